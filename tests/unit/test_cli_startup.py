"""What `node init` writes, and which address it finds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cymric.cli import autodetect
from cymric.cli.autodetect import NoAddress, Seen, choose
from cymric.cli.objects import ObjectError, Objects
from cymric.cli.startup import AddressConflict, Plan, PoolPlan, initialise, write_nodename
from cymric.datastore.memory import MemoryDatastore
from cymric.model.net import parse_address, parse_interface

RESOURCES = "/calico/resources/v3/projectcalico.org"
SEEN = (parse_interface("198.19.0.2/20"),)


class Cluster:
    """A datastore in memory, and what is in it."""

    def __init__(self) -> None:
        self.store = MemoryDatastore()
        self.objects = Objects(self.store, clock=lambda: "2026-01-02T03:04:05Z")

    async def init(self, name: str = "node1", address: str = "198.19.0.2/20", **plan: Any) -> str:
        """Run init for a node; what it said."""
        found = parse_interface(address) if address else None
        lines = await initialise(self.objects, Plan(node_name=name, address=found, **plan), SEEN)
        return "\n".join(lines)

    async def all(self) -> dict[str, Any]:
        """Every stored value by the end of its key, without identity and time."""
        found = {}
        for item in (await self.store.list(RESOURCES)).items:
            tree = json.loads(item.value)
            for name in ("uid", "creationTimestamp"):
                assert tree["metadata"].pop(name)
            found[item.key.removeprefix(RESOURCES + "/")] = tree
        return found

    async def put(self, key: str, kind: str, spec: Mapping[str, Any], **metadata: Any) -> None:
        """Store an object as a foreign program would."""
        name = key.rpartition("/")[2]
        tree = {
            "kind": kind,
            "apiVersion": "projectcalico.org/v3",
            "metadata": {"name": name, "uid": "u", "creationTimestamp": "t", **metadata},
            "spec": dict(spec),
        }
        from cymric.datastore import api

        await api.put(self.store, f"{RESOURCES}/{key}", json.dumps(tree).encode())


async def test_an_empty_cluster() -> None:
    """The first node finds nothing and leaves what a Calico node would leave."""
    cluster = Cluster()
    await cluster.init()
    stored = await cluster.all()
    guid = stored["clusterinformations/default"]["spec"].pop("clusterGUID")
    assert len(guid) == 32
    assert int(guid, 16)
    assert {key: tree["spec"] for key, tree in stored.items()} == {
        "clusterinformations/default": {"clusterType": "bgp", "datastoreReady": True},
        "nodes/node1": {"bgp": {"ipv4Address": "198.19.0.2/20"}},
        "ippools/default-ipv4-ippool": {
            "cidr": "192.168.0.0/16",
            "vxlanMode": "Never",
            "ipipMode": "Never",
            "natOutgoing": True,
            "blockSize": 26,
            "nodeSelector": "all()",
            "allowedUses": ["Workload", "Tunnel"],
            "assignmentMode": "Automatic",
        },
        "felixconfigurations/default": {"logSeverityScreen": "Info", "reportingInterval": "0s"},
        "felixconfigurations/node.node1": {"defaultEndpointToHostAction": "Return"},
        "bgpconfigurations/default": {},
    }


async def test_the_second_run_writes_nothing() -> None:
    """Repeating it changes no key, not even its revision."""
    cluster = Cluster()
    await cluster.init()
    revision = cluster.store.revision
    said = await cluster.init()
    assert cluster.store.revision == revision
    assert "Node node1: as it should be" in said


async def test_nodes_start_at_once() -> None:
    """Ten nodes may start together: one cluster id, one pool, ten nodes."""
    cluster = Cluster()
    await asyncio.gather(*(cluster.init(f"node{n}", f"198.19.0.{n + 2}/20") for n in range(10)))
    stored = await cluster.all()
    assert sum(key.startswith("nodes/") for key in stored) == 10
    assert sum(key.startswith("ippools/") for key in stored) == 1


async def test_what_others_set_stays() -> None:
    """No field that anybody set is changed; labels, unknown fields and a lock stay as they are."""
    cluster = Cluster()
    await cluster.put("ippools/mine", "IPPool", {"cidr": "10.0.0.0/8"})
    locked = {"clusterGUID": "a" * 32, "datastoreReady": False, "clusterType": "k8s",
              "calicoVersion": "v3.32.1"}  # fmt: skip
    await cluster.put("clusterinformations/default", "ClusterInformation", locked)
    await cluster.put(
        "felixconfigurations/default", "FelixConfiguration", {"reportingInterval": "30s"}
    )
    await cluster.put("bgpconfigurations/default", "BGPConfiguration", {"asNumber": 65001})
    node = {"bgp": {"ipv4Address": "198.19.0.9/20", "asNumber": 7}, "future": 1}
    await cluster.put("nodes/node1", "Node", node, labels={"rack": "1"})
    await cluster.init()
    stored = await cluster.all()
    assert stored["clusterinformations/default"]["spec"] == {**locked, "clusterType": "k8s,bgp"}
    assert stored["felixconfigurations/default"]["spec"] == {
        "reportingInterval": "30s",
        "logSeverityScreen": "Info",
    }
    assert stored["bgpconfigurations/default"]["spec"] == {"asNumber": 65001}
    assert stored["nodes/node1"]["metadata"]["labels"] == {"rack": "1"}
    assert stored["nodes/node1"]["spec"] == {
        "bgp": {"ipv4Address": "198.19.0.2/20", "asNumber": 7},
        "future": 1,
    }
    assert "ippools/default-ipv4-ippool" not in stored


async def test_without_an_address_the_stored_one_stays() -> None:
    """A plan without an address leaves the node's address alone."""
    cluster = Cluster()
    await cluster.init()
    await cluster.init(address="", as_number=65001)
    bgp = (await cluster.all())["nodes/node1"]["spec"]["bgp"]
    assert bgp == {"asNumber": 65001, "ipv4Address": "198.19.0.2/20"}


async def test_an_address_has_one_node() -> None:
    """An address that another node has is refused before anything is written, unless told."""
    cluster = Cluster()
    await cluster.init("node1")
    revision = cluster.store.revision
    with pytest.raises(AddressConflict, match=r"node node1 already has the address 198\.19\.0\.2"):
        await cluster.init("node2", "198.19.0.2/16")
    assert cluster.store.revision == revision
    await cluster.init("node2", "198.19.0.2/16", checks_address=False)


@pytest.mark.parametrize(
    ("mine", "chosen"),
    [
        ([], "192.168.0.0/16"),
        (["10.0.0.1/8"], "192.168.0.0/16"),
        (["192.168.1.5/24"], "172.16.0.0/16"),
        (["192.168.1.5/24", "172.16.0.1/12"], "172.17.0.0/16"),
    ],
)
async def test_the_default_pool_avoids_the_machine(mine: list[str], chosen: str) -> None:
    """The default pool is the first usual range in which this machine has no address."""
    cluster = Cluster()
    await initialise(
        cluster.objects, Plan(node_name="n", address=None), [parse_interface(m) for m in mine]
    )
    pool = (await cluster.all())["ippools/default-ipv4-ippool"]
    assert pool["spec"]["cidr"] == chosen


async def test_no_pool_or_another() -> None:
    """The default pool can be left out, or be told."""
    without = Cluster()
    await without.init(pool=None)
    assert not any(key.startswith("ippools/") for key in await without.all())
    told = Cluster()
    await told.init(pool=PoolPlan(cidr="198.19.16.0/21", nat_outgoing=False, block_size=29))
    spec = (await told.all())["ippools/default-ipv4-ippool"]["spec"]
    assert (spec["cidr"], spec["blockSize"]) == ("198.19.16.0/21", 29)
    assert "natOutgoing" not in spec


async def test_a_bad_plan_is_refused() -> None:
    """A pool that no pool may be is refused like any other object."""
    with pytest.raises(ObjectError, match="has host bits set"):
        await Cluster().init(pool=PoolPlan(cidr="198.19.16.1/21"))


def test_nodename(tmp_path: Path) -> None:
    """The node's name is kept in a file, written once and whole."""
    path = tmp_path / "deep" / "nodename"
    write_nodename(path, "node1")
    assert path.read_text() == "node1"
    inode = path.stat().st_ino
    write_nodename(path, "node1")
    assert path.stat().st_ino == inode
    write_nodename(path, "node2")
    assert path.read_text() == "node2"
    assert [entry.name for entry in path.parent.iterdir()] == ["nodename"]


def seen(name: str, index: int, *addresses: str) -> Seen:
    return Seen(name, index, tuple(map(parse_interface, addresses)))


MACHINE = (
    seen("lo", 1, "127.0.0.1/8"),
    seen("eth0", 2, "10.0.0.5/24", "198.19.0.2/20"),
    seen("eth1", 3, "169.254.0.3/16", "fd00::1/64", "172.16.0.1/24"),
    seen("docker0", 4, "172.17.0.1/16"),
    seen("cali123", 5, "10.9.0.1/32"),
)


@pytest.mark.parametrize(
    ("method", "address"),
    [
        ("autodetect", "172.16.0.1/24"),
        ("first-found", "172.16.0.1/24"),
        ("interface=eth0", "10.0.0.5/24"),
        ("interface=en.*,eth0", "10.0.0.5/24"),
        ("interface=docker.*", "172.17.0.1/16"),
        ("skip-interface=eth1", "10.0.0.5/24"),
        ("cidr=198.19.0.0/20", "198.19.0.2/20"),
        ("cidr=203.0.113.0/24,10.0.0.0/8", "10.9.0.1/32"),
        ("can-reach=8.8.8.8", "10.0.0.5/24"),
        ("198.19.0.2", "198.19.0.2/20"),
        ("203.0.113.1", "203.0.113.1/32"),
        ("203.0.113.1/24", "203.0.113.1/24"),
    ],
)
def test_address(method: str, address: str) -> None:
    """Each method finds the address that Calico would."""
    assert str(choose(method, MACHINE, parse_address("10.0.0.5"))) == address


@pytest.mark.parametrize(
    "method", ["interface=wlan.*", "interface=eth", "cidr=203.0.113.0/24", "skip-interface=eth.*"]
)
def test_no_address(method: str) -> None:
    """When nothing fits, the method that was asked for is named."""
    with pytest.raises(NoAddress, match=method.replace("*", r"\*")):
        choose(method, MACHINE)


@pytest.mark.parametrize("method", ["guess", "cidr=x", "interface=(", "10.0.0.1/33"])
def test_no_method(method: str) -> None:
    """What is no method is refused as such."""
    with pytest.raises(ValueError, match=r"."):
        choose(method, MACHINE)


def test_reached_through() -> None:
    """Only can-reach needs to know how the kernel would send."""
    assert autodetect.reached_through("can-reach=10.0.0.1") == "10.0.0.1"
    assert autodetect.reached_through("cidr=10.0.0.0/8") == ""
