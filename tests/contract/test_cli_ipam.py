"""`cymric ipam` and `cymric datastore`: what they change, in memory and on a real etcd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cymric.cli.ipam_check import look
from cymric.cli.session import Session
from cymric.datastore import api
from cymric.datastore.api import Datastore
from cymric.datastore.memory import MemoryDatastore
from ipam.audit import audit
from ipam.client import IPAM, Request
from tests.support.cymric_cli import (
    LONG_AGO,
    RESOURCES,
    Cymric,
    InMemory,
    endpoint,
    pool,
    populate,
    resource,
)

CONFIG = "/calico/ipam/v2/config"
CLUSTER = f"{RESOURCES}/clusterinformations/default"
HANDLES = "/calico/ipam/v2/handle"


def found(cymric: Cymric) -> list[str]:
    """What the audit finds, problems and notes."""
    seen = cymric.run(look)
    return sorted(finding.kind.value for finding in audit(seen, now_s=1e10).findings)


def held(cymric: Cymric, handle: str) -> list[str]:
    """The addresses of a handle."""

    async def ask(store: Datastore) -> list[str]:
        return list(map(str, await IPAM(store).held_by(handle)))

    return cymric.run(ask)


def assign(cymric: Cymric, node: str, handle: str, **request: Any) -> str:
    async def ask(store: Datastore) -> str:
        attributes = {"node": node, "timestamp": LONG_AGO}
        wanted = Request(host=node, handle=handle, attributes=attributes, **request)
        return str((await IPAM(store).assign(wanted)).address)

    return cymric.run(ask)


# --- release --------------------------------------------------------------------------------------


def test_release_an_address(cymric: Cymric) -> None:
    """An address is released once; then it is not assigned."""
    address = populate(cymric)["a"]
    said = cymric.ok("ipam", "release", "--ip", address)
    assert said == f"Successfully released IP address {address}\n"
    said = cymric.refused("ipam", "release", f"--ip={address}")
    assert said == f"Error: IP address {address} is not assigned"
    assert held(cymric, "net.a") == []


def test_release_a_handle(cymric: Cymric) -> None:
    """Everything a handle holds is released, and told; an unknown handle holds nothing."""
    address = populate(cymric)["a"]
    other = assign(cymric, "n1", "net.a")
    said = cymric.ok("ipam", "release", "--handle", "net.a")
    assert sorted(said.splitlines()) == sorted(
        f"Successfully released IP address {ip}" for ip in (address, other)
    )
    assert cymric.raw.get(f"{HANDLES}/net.a") is None
    assert "handle net.a holds no IP" in cymric.refused("ipam", "release", "--handle", "net.a")
    assert "slash" in cymric.refused("ipam", "release", "--handle", "a/b")


def check(cymric: Cymric, path: Path) -> str:
    """Write a report; its path."""
    cymric("ipam", "check", "--settle=0", "-o", str(path))
    return str(path)


def test_release_what_leaked(cymric: Cymric, tmp_path: Path) -> None:
    """Leaked addresses and handles of a report go while the datastore is locked; nothing else."""
    given = populate(cymric)
    cymric.ok("delete", "wep", "n1-cni-a-eth0")
    cymric.raw.put(f"{HANDLES}/old", '{"block":{"10.244.0.0/30":1},"deleted":false}')
    assert cymric.ok("datastore", "lock") == "Datastore locked.\n"
    path = check(cymric, tmp_path / "r.json")
    report = json.loads(Path(path).read_text())
    assert report["datastoreLocked"] is True
    assert [ip for ip, (a,) in report["allocations"].items() if not a["inUse"]] == [given["a"]]
    assert [problem["subject"] for problem in report["problems"]] == [given["a"]]
    said = cymric.ok("ipam", "release", "--from-report", path)
    assert said.splitlines() == [
        "Releasing 1 old IPs...",
        "Released 1 IPs successfully",
        "Deleting 1 handles...",
        "Released 1 handles; 0 skipped; 0 errors.",
        "You may now unlock the data store.",
    ]
    assert found(cymric) == []
    assert held(cymric, "net.b") == [given["b"]]
    again = cymric.ok("ipam", "release", "--from-report", path)
    assert "1 addresses marked as leaked in the report had already been cleaned up." in again
    assert "Released 0 handles; 1 skipped; 0 errors." in again


def test_reports_have_conditions(cymric: Cymric, tmp_path: Path) -> None:
    """Without the lock nothing is released unless forced; a stale report is no use even then."""
    address = populate(cymric)["a"]
    cymric.ok("delete", "wep", "n1-cni-a-eth0")
    path = check(cymric, tmp_path / "r.json")
    assert "data store is not locked" in cymric.refused("ipam", "release", "--from-report", path)
    cymric.ok("datastore", "lock")
    assert "all stale" in cymric.refused("ipam", "release", "--from-report", path, "--force")
    cymric.ok("datastore", "unlock")
    assert held(cymric, "net.a") == [address]
    path = check(cymric, tmp_path / "r.json")
    result = cymric("ipam", "release", "--from-report", path, "--force")
    assert result.exit_code == 0, result.output
    assert "WARNING: Data store is not locked" in result.stderr
    assert "unlock" not in result.stdout
    assert held(cymric, "net.a") == []


def test_an_address_in_use_again_stays(cymric: Cymric, tmp_path: Path) -> None:
    """What a report calls leaked and is used, or was assigned anew, by now is left alone."""
    given = populate(cymric)
    for name in ("a", "b"):
        cymric.ok("delete", "wep", f"n1-cni-{name}-eth0")
    path = check(cymric, tmp_path / "r.json")
    cymric.ok("apply", "-f", "-", stdin=endpoint("n1", "a", given["a"]))
    cymric.ok("ipam", "release", "--ip", given["b"])
    others = [assign(cymric, "n1", f"net.x{n}") for n in range(3)]
    assert given["b"] in others
    said = cymric.ok("ipam", "release", "--from-report", path, "--force")
    assert "Released 0 IPs successfully" in said
    assert held(cymric, "net.a") == [given["a"]]
    assert sorted(ip for n in range(3) for ip in held(cymric, f"net.x{n}")) == sorted(others)


def test_nothing_is_released_blindly(cymric: Cymric, tmp_path: Path) -> None:
    """While an endpoint cannot be read at all, no address counts as leaked for sure."""
    populate(cymric)
    key = f"{RESOURCES}/workloadendpoints/default/n1-cni-a-eth0"
    cymric.raw.put(key, "{broken")
    path = check(cymric, tmp_path / "r.json")
    said = cymric.refused("ipam", "release", "--from-report", path, "--force")
    assert key in said
    assert held(cymric, "net.a") != []


class Interrupted(MemoryDatastore):
    """A datastore that breaks at one write, before it lands or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.writes_left = 1_000_000
        self.lands = False

    async def commit(self, transaction: api.Transaction) -> int:
        """Land, unless this is the write to break at."""
        self.writes_left -= 1
        if self.writes_left == 0:
            if self.lands:
                await super().commit(transaction)
            raise api.Unavailable("broken here")
        return await super().commit(transaction)


def in_memory(store: MemoryDatastore) -> Cymric:
    session = Session(store=store, environ={}, calicoctl_file=Path("/none"))
    return Cymric(InMemory(store), session)


@pytest.mark.parametrize("lands", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("command", ["gc", "release"])
def test_broken_at_every_write(tmp_path: Path, command: str, lands: bool) -> None:
    """Cut short at any write, collecting or releasing is finished by asking again; all agrees."""
    for writes in range(1, 100):
        store = Interrupted()
        cymric = in_memory(store)
        populate(cymric)
        assign(cymric, "n1", "net.tunnel")
        if command == "gc":
            cymric.run(lambda store: _forget(store, f"{RESOURCES}/nodes/n1"))
            words = ["ipam", "gc", "--dead-nodes", "--force"]
        else:
            cymric.ok("delete", "wep", "n1-cni-a-eth0")
            cymric.raw.put(f"{HANDLES}/old", '{"block":{},"deleted":false}')
            path = check(cymric, tmp_path / "r.json")
            words = ["ipam", "release", "--from-report", path, "--force"]
        store.writes_left, store.lands = writes, lands
        was_broken = cymric(*words).exit_code != 0
        store.writes_left = 1_000_000
        cymric.ok(*words)
        assert found(cymric) == []
        if not was_broken:
            assert writes > 2
            return
    raise AssertionError("it never came to an end")


class _Returning(MemoryDatastore):
    """Node n1 comes back and takes an address, once its old ones were freed."""

    def __init__(self) -> None:
        super().__init__()
        self.is_collected = False

    async def commit(self, transaction: api.Transaction) -> int:
        """Land; after the first freed address the node is there again."""
        revision = await super().commit(transaction)
        if self.is_collected:
            self.is_collected = False
            tree = resource("Node", "n1", {})
            await api.put(self, f"{RESOURCES}/nodes/n1", json.dumps(tree).encode())
            attributes = {"node": "n1", "timestamp": LONG_AGO}
            await IPAM(self).assign(Request(host="n1", handle="net.new", attributes=attributes))
        return revision


def test_a_node_that_returns_keeps_what_is_new() -> None:
    """A node that comes back while it is collected keeps its blocks and what it takes by then."""
    store = _Returning()
    cymric = in_memory(store)
    populate(cymric, has_endpoints=False)
    cymric.run(lambda store: _forget(store, f"{RESOURCES}/nodes/n1"))
    store.is_collected = True
    said = cymric.refused("ipam", "gc", "--node=n1")
    assert "node n1 is back; its blocks were left alone" in said
    assert len(held(cymric, "net.new")) == 1
    assert {key.owner for key in cymric.run(look).affinities} == {"n1", "n2"}


# --- configuration and the lock -------------------------------------------------------------------


def test_configure(cymric: Cymric) -> None:
    """Settings are changed one by one, in Calico's form; fields of other versions stay."""
    said = cymric.ok("ipam", "configure", "--strictaffinity=true")
    assert said == "Successfully set StrictAffinity to: true\n"
    assert cymric.raw.get(CONFIG) == (
        '{"strict_affinity":true,"auto_allocate_blocks":true,'
        '"kubeVirtVMAddressPersistence":"Enabled"}'
    )
    cymric.raw.put(CONFIG, '{"auto_allocate_blocks":true,"future":[1]}')
    said = cymric.ok("ipam", "configure", "--strictaffinity=true", "--max-blocks-per-host=3")
    assert said.splitlines()[1] == "Successfully set MaxBlocksPerHost to: 3"
    assert cymric.raw.get(CONFIG) == (
        '{"strict_affinity":true,"auto_allocate_blocks":true,"maxBlocksPerHost":3,"future":[1]}'
    )
    shown = cymric.ok("ipam", "show", "--show-configuration").splitlines()
    rows = [line.strip("|").split("|") for line in shown if "|" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["PROPERTY", "VALUE"],
        ["StrictAffinity", "true"],
        ["AutoAllocateBlocks", "true"],
        ["MaxBlocksPerHost", "3"],
    ]


def test_settings_that_cannot_be(cymric: Cymric) -> None:
    """A block limit without strict affinity is refused, and nothing is written."""
    said = cymric.refused("ipam", "configure", "--max-blocks-per-host=3")
    assert "maxBlocksPerHost needs strict_affinity" in said
    assert cymric.raw.get(CONFIG) is None


def test_the_lock(cymric: Cymric) -> None:
    """Locking writes ClusterInformation if need be, and changes nothing but readiness."""
    cymric.ok("datastore", "lock")
    before = cymric.stored(CLUSTER)
    assert before["spec"]["datastoreReady"] is False
    assert len(before["spec"]["clusterGUID"]) == 32
    cymric.ok("datastore", "migrate", "unlock")
    after = cymric.stored(CLUSTER)
    assert after == {**before, "spec": {**before["spec"], "datastoreReady": True}}
    revision = cymric.run(look).cluster_revision
    assert cymric.ok("datastore", "unlock") == "Datastore unlocked.\n"
    assert cymric.run(look).cluster_revision == revision


# --- split and migrate ----------------------------------------------------------------------------


def test_split(cymric: Cymric) -> None:
    """A pool becomes equal parts with all its settings; addresses and blocks stay as they are."""
    populate(cymric)
    cymric.ok("apply", "-f", "-", stdin=pool("10.244.0.0/24", blockSize=30, natOutgoing=True))
    assert "datastore is not locked" in cymric.refused("ipam", "split", "2", "--name=main")
    cymric.ok("datastore", "lock")
    before = cymric.run(look)
    said = cymric.ok("ipam", "split", "--cidr=10.244.0.0/24", "2")
    assert said.splitlines()[:3] == [
        "IP Pool main was successfully split into 2 smaller pools.",
        "Created split-main-0 with CIDR 10.244.0.0/25.",
        "Created split-main-1 with CIDR 10.244.0.128/25.",
    ]
    after = cymric.run(look)
    assert sorted(after.pools) == ["split-main-0", "split-main-1"]
    assert all(made.spec.nat_outgoing for made in after.pools.values())
    assert {made.spec.block_size for made in after.pools.values()} == {30}
    assert len({made.metadata.uid for made in after.pools.values()}) == 2
    assert (after.blocks, after.affinities) == (before.blocks, before.affinities)
    assert found(cymric) == []
    tree = cymric.stored(f"{RESOURCES}/ippools/split-main-0")
    assert "resourceVersion" not in tree["metadata"]
    cymric.ok("datastore", "unlock")
    assert assign(cymric, "n1", "net.e", pools=("split-main-1",)).startswith("10.244.0.")


def test_split_refuses(cymric: Cymric) -> None:
    """A split that cannot be leaves everything as it is."""
    populate(cymric)
    cymric.ok("datastore", "lock")
    assert "not a valid power of 2" in cymric.refused("ipam", "split", "3", "--name=main")
    assert "unable to find IP pool" in cymric.refused("ipam", "split", "2", "--name=other")
    cymric.ok("apply", "-f", "-", stdin=pool("10.9.0.0/24", name="split-main-1"))
    assert "nothing was split" in cymric.refused("ipam", "split", "2", "--name=main")
    assert sorted(cymric.run(look).pools) == ["main", "split-main-1"]


def test_migrate_plans_and_changes_nothing(cymric: Cymric) -> None:
    """The plan names every address of the old pool, and etcd is as it was."""
    given = populate(cymric)
    cymric.ok("apply", "-f", "-", stdin=pool("10.9.0.0/24", name="next"))
    revision = cymric.run(look).revision
    said = cymric.ok("ipam", "migrate", "--plan", "--from=main", "--to=next")
    for address in given.values():
        assert address in said
    assert "Nothing stands in the way." in said
    assert cymric.run(look).revision == revision
    assert "there is no IPPool x" in cymric.refused(
        "ipam", "migrate", "--plan", "--from=main", "--to=x"
    )
    assert cymric("ipam", "migrate", "--from=main", "--to=next").exit_code == 2


# --- collection -----------------------------------------------------------------------------------


def test_dead_nodes_are_collected(cymric: Cymric) -> None:
    """A node whose object is gone gives back its addresses and blocks, once its endpoints are."""
    populate(cymric)
    assert "node n1 exists" in cymric.refused("ipam", "gc", "--node=n1")
    cymric.run(lambda store: _forget(store, f"{RESOURCES}/nodes/n1"))
    said = cymric.refused("ipam", "gc", "--dead-nodes")
    assert "n1: 2 addresses, 1 blocks, 2 workload endpoints" in said
    for name in ("a", "b"):
        cymric.ok("delete", "wep", f"n1-cni-{name}-eth0")
    revision = cymric.run(look).revision
    said = cymric.ok("ipam", "gc", "--dead-nodes", "--dry-run")
    assert said == "n1: has left 2 addresses, 1 blocks, 0 workload endpoints\n"
    assert cymric.run(look).revision == revision
    said = cymric.ok("ipam", "gc", "--dead-nodes")
    assert said == "n1: released 2 addresses and 1 blocks\n"
    assert found(cymric) == []
    assert {key.owner for key in cymric.run(look).affinities} == {"n2"}
    assert cymric.raw.get(f"{HANDLES}/net.a") is None
    assert "Nothing is left of node n1" in cymric.ok("ipam", "gc", "--node=n1")


async def _forget(store: Datastore, key: str) -> None:
    await api.delete(store, key)


def test_force_takes_the_endpoints_too(cymric: Cymric) -> None:
    """Forced, the endpoints of a dead node go with what they held; other nodes keep theirs."""
    given = populate(cymric)
    borrowed = [assign(cymric, "n1", f"net.b{n}") for n in range(2)]
    cymric.run(lambda store: _forget(store, f"{RESOURCES}/nodes/n1"))
    said = cymric.ok("ipam", "gc", "--node=n1", "--force")
    assert said == "n1: released 4 addresses and 1 blocks\n"
    assert cymric.ok("get", "wep", "-o", "name").split() == [
        "workloadendpoint/n2-cni-c-eth0",
        "workloadendpoint/n2-cni-d-eth0",
    ]
    assert held(cymric, "net.c") == [given["c"]]
    assert len(borrowed) == 2
    assert found(cymric) == []


def test_what_others_borrowed_stays(cymric: Cymric) -> None:
    """A block in which a living node holds an address loses its owner, and keeps the address."""
    populate(cymric)
    address = cymric.run(_borrow)
    cymric.run(lambda store: _forget(store, f"{RESOURCES}/nodes/n1"))
    said = cymric.ok("ipam", "gc", "--node=n1", "--force")
    assert said.splitlines() == [
        "n1: released 2 addresses and 0 blocks",
        "  1 blocks stay without owner: other nodes hold addresses in them",
    ]
    assert held(cymric, "net.lent") == [address]
    assert found(cymric) == ["leaked-address", "no-owner"]  # nobody uses what was lent


async def _borrow(store: Datastore) -> str:
    """Node n2 takes an address of n1's block."""
    seen = await look(store)
    (network,) = (n for n, block in seen.blocks.items() if block.owner_host == "n1")
    free = seen.blocks[network].unallocated[0]
    address = seen.blocks[network].address(free)
    attributes = {"node": "n2", "timestamp": LONG_AGO}
    request = Request(host="n2", handle="net.lent", attributes=attributes)
    return str((await IPAM(store).assign_address(address, request)).address)


def test_a_claim_without_block_is_collected(cymric: Cymric) -> None:
    """What a node that died in the middle of a claim left behind goes, too."""
    populate(cymric)
    key = "/calico/ipam/v2/host/n9/ipv4/block/10.244.0.252-30"
    cymric.raw.put(key, '{"state":"pending","deleted":false}')
    assert cymric.ok("ipam", "gc", "--dead-nodes") == "n9: released 0 addresses and 1 blocks\n"
    assert cymric.raw.get(key) is None


# --- looking --------------------------------------------------------------------------------------


def test_show_an_address(cymric: Cymric) -> None:
    """Who holds an address is told in calicoctl's words."""
    address = populate(cymric)["a"]
    assert cymric.ok("ipam", "show", "--ip", address).splitlines() == [
        f"IP {address} is in use",
        "Handle ID: net.a",
        "Active Owner Attributes:",
        "  node: n1",
        f"  timestamp: {LONG_AGO}",
    ]
    assert cymric.ok("ipam", "show", "--ip=fd00::1") == "fd00::1 is not assigned\n"
    assert cymric.ok("ipam", "show", "--ip=10.244.0.250") == "10.244.0.250 is not assigned\n"


def test_show_alternate_owners_and_ipv6(cymric: Cymric) -> None:
    """Both owners of an address under migration are shown, in either family."""
    attributes = [{"handle_id": "h", "secondary": {"pod": "p"},
                   "alternateOwnerAttrs": {"pod": "q"}}, {}]  # fmt: skip
    stored = {
        "cidr": "fd00::/126",
        "affinity": "host:n1",
        "allocations": [0, 1, None, None],
        "unallocated": [2, 3],
        "attributes": attributes,
    }
    cymric.raw.put("/calico/ipam/v2/assignment/ipv6/block/fd00::-126", json.dumps(stored))
    assert cymric.ok("ipam", "show", "--ip=fd00::").splitlines()[2:] == [
        "Active Owner Attributes:",
        "  pod: p",
        "Alternate Owner Attributes:",
        "  pod: q",
    ]
    assert cymric.ok("ipam", "show", "--ip=fd00::1").splitlines() == [
        "IP fd00::1 is in use",
        "Handle ID: <none>",
        "No Active Owner attributes defined",
    ]
    said = cymric.ok("ipam", "show", "--show-borrowed")
    assert "Note: found 2 IP allocations without an explicit node association." in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ipam", "release"], "give one of --ip, --handle and --from-report"),
        (["ipam", "release", "--ip=x"], "--ip: 'x'"),
        (["ipam", "configure"], "at least one configuration option must be specified"),
        (["ipam", "split", "2"], "no name or CIDR provided"),
        (["ipam", "gc"], "give one of --node and --dead-nodes"),
    ],
)
def test_misuse(cymric: Cymric, arguments: list[str], said: str) -> None:
    """A wrong command line is exit code 2 and says what is wrong."""
    result = cymric(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_a_report_that_is_none(cymric: Cymric, tmp_path: Path) -> None:
    """A file that is no report, or is not there, is refused by its name."""
    path = tmp_path / "r.json"
    path.write_text("[]")
    assert str(path) in cymric.refused("ipam", "release", f"--from-report={path}")
    assert "none.json" in cymric.refused("ipam", "release", f"--from-report={tmp_path}/none.json")


def test_resources_of_these_tests(cymric: Cymric) -> None:
    """A node that was applied is one that the listing knows."""
    cymric.ok("apply", "-f", "-", stdin=resource("Node", "n1", {}, labels={"rack": "9"}))
    assert cymric.run(look).node_labels == {"n1": {"rack": "9"}}
