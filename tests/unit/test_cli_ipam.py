"""What `ipam` commands print and plan, from values alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from cymric.cli import check_text, collection, pool_migration, pool_split
from cymric.cli.main import cli
from cymric.cli.pool_split import CannotSplit
from cymric.cli.session import Session
from cymric.datastore.api import put
from cymric.datastore.memory import MemoryDatastore
from cymric.model.net import parse_network
from cymric.model.resources import IPPool, IPPoolSpec, ObjectMeta
from ipam.audit import audit
from tests.support.ipam_keys import (
    BLOCK,
    CLAIM,
    ENDPOINT,
    IPAM,
    LEAK,
    NODE,
    NOW_S,
    POOL,
    RESOURCES,
    block,
    endpoint,
    holder,
    leaking,
    read,
    resource,
    sound,
)
from tests.unit.test_cli_commands import bgpd_answering

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("ipam_check", check_text.Shown()),
        ("ipam_check_problems", check_text.Shown(problem_ips=True)),
        ("ipam_check_all", check_text.Shown(all_ips=True)),
    ],
)
def test_the_words_of_calicoctl(name: str, shown: check_text.Shown) -> None:
    """The output of `ipam check` is as in the golden files, which have calicoctl's sentences."""
    stored = leaking()
    stored[f"{RESOURCES}/workloadendpoints/default/node2-cni-c-eth0"] = endpoint(
        "node2", "c", "10.0.0.3/32"
    )
    stored[f"{IPAM}/host/node2/ipv4/block/10.0.0.8-30"] = {"state": "confirmed"}
    seen = read(stored)
    lines = check_text.lines(seen, audit(seen, now_s=NOW_S), shown, advertising="not done: x.")
    assert "\n".join(lines) + "\n" == (GOLDEN / f"{name}.txt").read_text()


@pytest.mark.parametrize(
    ("answer", "exit_code", "said"),
    [
        ({"advertising": {"10.0.0.0/30": "b", "fd00::/126": "b"}}, 0, "of this node only (node1)."),
        ({"advertising": {"fd00::/126": "b"}}, 1, "  10.0.0.0/30 of node1, which does not advert"),
        ({"in_sync": False}, 0, "not done: bgpd is not in sync with etcd yet."),
        ({"node": "node9"}, 0, "not done: bgpd here is of node9, which is not in this etcd."),
    ],
)
def test_announcements_are_asked_for(
    tmp_path: Path, answer: dict[str, Any], exit_code: int, said: str
) -> None:
    """What this node's bgpd advertises is compared when it answers and is of this cluster."""
    store = MemoryDatastore()
    for key, value in sound().items():
        asyncio.run(put(store, key, json.dumps(value).encode()))
    session = Session(
        store=store, environ={"CYMRIC_RUN_DIR": str(tmp_path)}, calicoctl_file=Path("/none")
    )
    whole = {"node": "node1", "in_sync": True, "advertising": {}, **answer}
    with bgpd_answering(tmp_path / "bgpd.sock", whole) as questions:
        result = CliRunner().invoke(cli, ["ipam", "check", "--settle=0"], obj=session)
    assert questions == ["status\n"]
    assert (result.exit_code, said in result.stdout) == (exit_code, True), result.output


# --- split ----------------------------------------------------------------------------------------


def pool(cidr: str, name: str = "p", **spec: object) -> IPPool:
    return IPPool(metadata=ObjectMeta(name=name), spec=IPPoolSpec(cidr=cidr, **spec))  # type: ignore[arg-type]


def test_equal_parts() -> None:
    """A pool is cut into parts that cover it, named by their number."""
    parts = pool_split.plan(pool("10.0.0.0/22"), 4, [parse_network("10.0.1.0/26")])
    assert [(part.name, str(part.network)) for part in parts] == [
        ("split-p-0", "10.0.0.0/24"),
        ("split-p-1", "10.0.1.0/24"),
        ("split-p-2", "10.0.2.0/24"),
        ("split-p-3", "10.0.3.0/24"),
    ]
    six = pool_split.plan(pool("fd00::/64", block_size=122), 2, [])
    assert [str(part.network) for part in six] == ["fd00::/65", "fd00::8000:0:0:0/65"]


def test_long_names_stay_names() -> None:
    """The name of a part is never longer than a name may be."""
    parts = pool_split.plan(pool("10.0.0.0/16", name="x" * 253), 64, [])
    assert {len(part.name) for part in parts} == {253}
    assert len({part.name for part in parts}) == 64


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, "not a valid power of 2: 0"),
        (1, "not a valid power of 2: 1"),
        (-2, "not a valid power of 2: -2"),
        (3, "not a valid power of 2: 3"),
        (8, "not large enough to be split into 8 parts of whole /26 blocks"),
        (4, "block 10.0.0.0/25 would lie in more than one part"),
        (128, "128 parts are more than 64"),
    ],
)
def test_what_cannot_be_split(number: int, said: str) -> None:
    """Parts are a power of two, hold whole blocks, and cut none in two."""
    with pytest.raises(CannotSplit, match=said):
        pool_split.plan(pool("10.0.0.0/24"), number, [parse_network("10.0.0.0/25")])


# --- collection -----------------------------------------------------------------------------------


def test_living_nodes_leave_nothing() -> None:
    """While a Node object exists, nothing of the node is up for collection."""
    assert collection.leavings(read(sound())) == {}


def test_what_a_dead_node_leaves() -> None:
    """Its blocks, the addresses it held anywhere, and its endpoints are told."""
    stored = sound()
    del stored[NODE]
    borrowed = holder("net.z", node="node2")
    stored[BLOCK] = block("10.0.0.0/30", "host:node1", holder("net.a"), borrowed)
    left = collection.leavings(read(stored))["node1"]
    assert [str(a.address) for a in left.addresses] == ["10.0.0.0", "fd00::"]
    assert [str(network) for network in left.blocks] == ["10.0.0.0/30", "fd00::/126"]
    assert [key.name for key in left.endpoints] == ["node1-cni-a-eth0"]


def test_an_address_in_use_elsewhere_stays() -> None:
    """An address of a dead node that an endpoint of another node uses is not collected."""
    stored = sound()
    del stored[NODE], stored[ENDPOINT], stored[CLAIM]
    stored[BLOCK] = block("10.0.0.0/30", "host:node2", holder("net.a"), LEAK)
    stored[f"{RESOURCES}/workloadendpoints/default/node2-cni-c-eth0"] = endpoint(
        "node2", "c", "10.0.0.0/32"
    )
    left = collection.leavings(read(stored))["node1"]
    assert [str(a.address) for a in left.addresses] == ["10.0.0.1", "fd00::"]
    assert [str(network) for network in left.blocks] == ["fd00::/126"]


# --- migration ------------------------------------------------------------------------------------


def test_a_plan_that_can_be_followed() -> None:
    """The plan names every workload by node, in the order to go, and the old pool's end."""
    stored = sound()
    pod = holder("net.b", pod="web", namespace="prod")
    tunnel = holder("t", node="node2", type="ipipTunnelAddress")
    stored[BLOCK] = block("10.0.0.0/30", "host:node1", holder("net.a"), pod, tunnel)
    stored[f"{RESOURCES}/ippools/next"] = resource("IPPool", "next", {"cidr": "10.9.0.0/24"})
    stored[f"{RESOURCES}/workloadendpoints/prod/node1-cni-c-eth0"] = {
        **endpoint("node1", "c", "10.0.0.1/32"),
        "metadata": {"name": "node1-cni-c-eth0", "namespace": "prod"},
    }
    stored[f"{RESOURCES}/nodes/node2"]["spec"] = {"bgp": {"ipv4IPIPTunnelAddr": "10.0.0.2"}}
    seen = read(stored)
    found = pool_migration.plan(seen, seen.pools["main"], seen.pools["next"])
    assert "\n".join(pool_migration.lines(found)) + "\n" == (
        (GOLDEN / "ipam_migrate.txt").read_text()
    )


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"cidr": "fd01::/64"}, "next is of another IP version"),
        ({"disabled": True}, "next is disabled"),
        ({"assignmentMode": "Manual"}, "used only when asked for by name"),
        ({"allowedUses": ["Tunnel"]}, "next may not be used for Workload"),
        ({"namespaceSelector": "a == 'b'"}, "next selects other namespaces"),
        ({"nodeSelector": "rack == '9'"}, "next does not select node node1"),
        ({"cidr": "10.9.0.0/32", "blockSize": 32}, "next has 1 free addresses, 2 are needed"),
    ],
)
def test_obstacles(spec: dict[str, object], said: str) -> None:
    """What keeps workloads from getting addresses of the new pool is told before anything moves."""
    stored = sound()
    stored[BLOCK] = block("10.0.0.0/30", "host:node1", holder("net.a"), LEAK)
    stored[f"{RESOURCES}/ippools/next"] = resource(
        "IPPool", "next", {"cidr": "10.9.0.0/24", **spec}
    )
    seen = read(stored)
    found = pool_migration.plan(seen, seen.pools["main"], seen.pools["next"])
    assert any(said in obstacle for obstacle in found.obstacles), found.obstacles


def test_nodes_that_are_gone_are_an_obstacle() -> None:
    """Addresses of dead nodes are collected, not moved."""
    stored = sound()
    del stored[NODE]
    seen = read(stored)
    found = pool_migration.plan(seen, seen.pools["main"], seen.pools["main"])
    assert any("cymric ipam gc" in obstacle for obstacle in found.obstacles)


def test_the_pool_is_a_resource() -> None:
    """The pool of these tests is the one that the keys name."""
    assert read(sound()).revisions[POOL] == 5
