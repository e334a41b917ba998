"""The audit of one snapshot: a sound cluster, and one thing wrong at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.datastore.api import KeyValue
from cymric.model.net import parse_network
from ipam import report, snapshot
from ipam.audit import Advertised, Audit, Kind, audit
from ipam.snapshot import Snapshot

RESOURCES = "/calico/resources/v3/projectcalico.org"
IPAM = "/calico/ipam/v2"
BLOCK = f"{IPAM}/assignment/ipv4/block/10.0.0.0-30"
OTHER_BLOCK = f"{IPAM}/assignment/ipv4/block/10.0.0.4-30"
SIX_BLOCK = f"{IPAM}/assignment/ipv6/block/fd00::-126"
CLAIM = f"{IPAM}/host/node1/ipv4/block/10.0.0.0-30"
HANDLE = f"{IPAM}/handle/net.a"
POOL = f"{RESOURCES}/ippools/main"
ENDPOINT = f"{RESOURCES}/workloadendpoints/default/node1-cni-a-eth0"
NODE = f"{RESOURCES}/nodes/node1"
NOW_S = 1_767_323_045.0  # 2026-01-02 03:04:05 UTC

Stored = dict[str, Any]
Change = Callable[[Stored], None]


def block(cidr: str, affinity: str | None, *holders: dict[str, Any]) -> Stored:
    """A block whose first addresses are held, each by a holder of its own."""
    size, held = parse_network(cidr).num_addresses, len(holders)
    return {
        "cidr": cidr,
        "affinity": affinity,
        "allocations": [*range(held), *[None] * (size - held)],
        "unallocated": list(range(held, size)),
        "attributes": list(holders) or None,
        "sequenceNumber": 9,
        "sequenceNumberForAllocation": {str(n): 7 for n in range(held)},
        "deleted": False,
    }


def holder(handle: str, **attributes: str) -> Stored:
    return {"handle_id": handle, "secondary": {"node": "node1", **attributes}}


def resource(kind: str, name: str, spec: Stored, **metadata: str) -> Stored:
    metadata = {"name": name, **metadata}
    return {"kind": kind, "apiVersion": "projectcalico.org/v3", "metadata": metadata, "spec": spec}


def endpoint(node: str, container: str, *networks: str) -> Stored:
    spec = {"orchestrator": "cni", "node": node, "containerID": container, "endpoint": "eth0",
            "ipNetworks": list(networks)}  # fmt: skip
    name = f"{node}-cni-{container}-eth0"
    return resource("WorkloadEndpoint", name, spec, namespace="default")


CONFIRMED = {"state": "confirmed", "deleted": False}


def sound() -> Stored:
    """Two nodes; node1 owns a block of which a container holds an address, and one of IPv6."""
    return {
        POOL: resource("IPPool", "main", {"cidr": "10.0.0.0/24", "blockSize": 30}),
        f"{RESOURCES}/ippools/six": resource(
            "IPPool", "six", {"cidr": "fd00::/64", "blockSize": 126}
        ),
        NODE: resource("Node", "node1", {}),
        f"{RESOURCES}/nodes/node2": resource("Node", "node2", {}),
        ENDPOINT: endpoint("node1", "a", "10.0.0.0/32", "fd00::/128"),
        BLOCK: block("10.0.0.0/30", "host:node1", holder("net.a")),
        SIX_BLOCK: block("fd00::/126", "host:node1", holder("net.a")),
        CLAIM: CONFIRMED,
        f"{IPAM}/host/node1/ipv6/block/fd00::-126": CONFIRMED,
        HANDLE: {"block": {"10.0.0.0/30": 1, "fd00::/126": 1}, "deleted": False},
    }


def read(stored: Stored) -> Snapshot:
    """The snapshot of these keys; texts are stored as they are, all else as JSON."""
    pairs = [
        KeyValue(key, (value if isinstance(value, str) else json.dumps(value)).encode(), 5)
        for key, value in sorted(stored.items())
    ]
    return snapshot.read(pairs, 7)


def audited(stored: Stored, advertised: Advertised | None = None) -> Audit:
    return audit(read(stored), now_s=NOW_S, advertised=advertised)


def found(result: Audit) -> set[str]:
    """What was found, as `kind subject`."""
    return {f"{finding.kind.value} {finding.subject}" for finding in result.findings}


def test_a_sound_cluster() -> None:
    """Nothing is found where everything agrees, in both families."""
    assert audited(sound()).findings == ()


def test_an_empty_datastore() -> None:
    """Nothing stored is nothing wrong."""
    assert audited({}).findings == ()


def put(key: str, value: Any) -> Change:
    return lambda stored: stored.update({key: value})


def drop(key: str) -> Change:
    return lambda stored: stored.__delitem__(key)


def claim(node: str, state: str = "confirmed", cidr: str = "10.0.0.0-30") -> Change:
    key = f"{IPAM}/host/{node}/ipv4/block/{cidr}"
    return put(key, {"state": state, "deleted": False})


def holding(*holders: Stored, affinity: str | None = "host:node1") -> Change:
    return put(BLOCK, block("10.0.0.0/30", affinity, *holders))


def counted(count: int) -> Change:
    return put(HANDLE, {"block": {"10.0.0.0/30": count, "fd00::/126": 1}, "deleted": False})


def using(node: str, address: str) -> Change:
    key = f"{RESOURCES}/workloadendpoints/default/{node}-cni-c-eth0"
    return put(key, endpoint(node, "c", address))


def handle(name: str) -> Change:
    return put(f"{IPAM}/handle/{name}", {"block": {"10.0.0.0/30": 1}, "deleted": False})


def wider(*holders: Stored) -> list[Change]:
    """A block of node2 around that of node1."""
    found = block("10.0.0.0/29", "host:node2", *holders)
    key = f"{IPAM}/assignment/ipv4/block/10.0.0.0-29"
    return [put(key, found), claim("node2", "confirmed", "10.0.0.0-29")]


LEAK = holder("net.b", pod="p", namespace="ns", timestamp="2026-01-01 03:04:05.5 +0000 UTC")
LEAK_HANDLE = handle("net.b")
YOUNG = holder("net.b", timestamp="2026-01-02 05:03:45.1234 +0200 CEST")
TUNNEL = {"bgp": {"ipv4Address": "1.2.3.4/8", "ipv4IPIPTunnelAddr": "10.0.0.1"}}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param(
            [put(BLOCK, "{}")],
            f"unreadable {BLOCK}, affinity-without-block 10.0.0.0/30, "
            "not-allocated 10.0.0.0, handle-too-high net.a",
            id="unreadable block",
        ),
        pytest.param(
            [claim("node2")], "stale-affinity 10.0.0.0/30, two-owners 10.0.0.0/30", id="two claims"
        ),
        pytest.param(
            [claim("node2", "pending")], "unsettled-claim 10.0.0.0/30", id="a claim that loses"
        ),
        pytest.param(
            [claim("node1", "pendingDeletion")], "unsettled-claim 10.0.0.0/30", id="half released"
        ),
        pytest.param(
            [claim("node2", "confirmed", "10.0.0.8-30")],
            "affinity-without-block 10.0.0.8/30",
            id="claim without block",
        ),
        pytest.param(
            [claim("node2", "pending", "10.0.0.8-30")],
            "unsettled-claim 10.0.0.8/30",
            id="claim about to have a block",
        ),
        pytest.param([claim("node1", "")], "", id="the old spelling of confirmed"),
        pytest.param([put(CLAIM, "")], "", id="the empty value of old releases"),
        pytest.param([drop(CLAIM)], "block-without-affinity 10.0.0.0/30", id="no claim"),
        pytest.param(
            [drop(CLAIM), holding(holder("net.a"), affinity=None)],
            "no-owner 10.0.0.0/30",
            id="orphaned block",
        ),
        pytest.param(
            [holding(holder("net.a"), affinity="host:node2"), claim("node2")],
            "stale-affinity 10.0.0.0/30, two-owners 10.0.0.0/30",
            id="block of another than claims it",
        ),
        pytest.param(
            [*wider()], "overlap 10.0.0.0/30, block-of-other-size 10.0.0.0/29", id="overlap"
        ),
        pytest.param(
            [*wider(holder("net.a"))],
            "overlap 10.0.0.0/30, block-of-other-size 10.0.0.0/29, "
            "allocated-twice 10.0.0.0, handle-too-low net.a",
            id="one address from two blocks",
        ),
        pytest.param([drop(POOL)], "block-outside-pools 10.0.0.0/30", id="pool gone"),
        pytest.param(
            [put(POOL, resource("IPPool", "main", {"cidr": "10.0.0.0/24", "blockSize": 28}))],
            "block-of-other-size 10.0.0.0/30",
            id="pool made anew",
        ),
        pytest.param([drop(NODE)], "dead-node node1", id="node gone"),
        pytest.param(
            [put(NODE, "{")], f"unreadable {NODE}", id="a node whose value is broken exists"
        ),
        pytest.param(
            [holding(holder("net.a"), LEAK), LEAK_HANDLE], "leaked-address 10.0.0.1", id="leak"
        ),
        pytest.param(
            [holding(holder("net.a"), YOUNG), LEAK_HANDLE],
            "starting 10.0.0.1",
            id="pod about to start",
        ),
        pytest.param(
            [holding(holder("net.a"), holder("lb-x")), handle("lb-x")],
            "load-balancer 10.0.0.1",
            id="service",
        ),
        pytest.param(
            [holding(holder("net.a"), {"handle_id": "windows-reserved-ipam-handle"})],
            "",
            id="reserved by Windows",
        ),
        pytest.param(
            [
                holding(
                    holder("net.a"), holder("ipip-tunnel-addr-node1", type="ipipTunnelAddress")
                ),
                put(NODE, resource("Node", "node1", TUNNEL)),
                handle("ipip-tunnel-addr-node1"),
            ],
            "",
            id="tunnel address",
        ),
        pytest.param(
            [drop(ENDPOINT)], "leaked-address 10.0.0.0, leaked-address fd00::", id="endpoint gone"
        ),
        pytest.param(
            [put(ENDPOINT, {**endpoint("node1", "a", "10.0.0.0/32", "fd00::/128"), "kind": "X"})],
            f"unreadable {ENDPOINT}",
            id="a broken endpoint still uses its addresses",
        ),
        pytest.param([using("node1", "10.0.0.3/32")], "not-allocated 10.0.0.3", id="used and free"),
        pytest.param(
            [using("node1", "192.0.2.3/32")], "address-outside-pools 192.0.2.3", id="another IPAM"
        ),
        pytest.param(
            [using("node2", "10.0.0.0/32")],
            "shared-address 10.0.0.0, wrong-node 10.0.0.0",
            id="one address, two endpoints",
        ),
        pytest.param([drop(HANDLE)], "missing-handle net.a", id="no handle"),
        pytest.param([counted(2)], "handle-too-high net.a", id="Calico's crash artefact"),
        pytest.param([counted(0)], "handle-too-low net.a", id="count too low"),
        pytest.param([handle("old")], "leaked-handle old", id="handle of nothing"),
        pytest.param(
            [holding(holder("net.a"), holder("a/b")), using("node1", "10.0.0.1/32")],
            "",
            id="a handle that has no key",
        ),
    ],
)
def test_one_thing_wrong(changes: list[Change], told: str) -> None:
    """Each fault is found by its name, and nothing else is."""
    stored = sound()
    for change in changes:
        change(stored)
    assert found(audited(stored)) == set(told.split(", ") if told else ())


def test_problems_and_notes() -> None:
    """Harmless oddities are no problems."""
    stored = sound()
    counted(2)(stored)
    result = audited(stored)
    assert result.problems == ()
    assert [note.text for note in result.notes] == ["counts 2 in block 10.0.0.0/30, which holds 1"]


OWN = frozenset(map(parse_network, ("10.0.0.0/30", "fd00::/126")))


@pytest.mark.parametrize(
    ("prefixes", "problems"),
    [
        pytest.param(OWN, set(), id="all"),
        pytest.param(OWN | {parse_network("10.0.0.0/32")}, set(), id="a workload's address, too"),
        pytest.param(
            OWN - {parse_network("10.0.0.0/30")}, {"not-advertised 10.0.0.0/30"}, id="missing"
        ),
        pytest.param(
            OWN | {parse_network("10.0.0.4/30")}, {"advertised-in-vain 10.0.0.4/30"}, id="not ours"
        ),
    ],
)
def test_owned_is_advertised(prefixes: frozenset[Any], problems: set[str]) -> None:
    """What a node advertises is what it owns, and its workloads' addresses."""
    assert found(audited(sound(), Advertised("node1", prefixes))) == problems


def test_closed_pools_are_not_advertised() -> None:
    """Blocks of a pool that is not exported are not missed."""
    stored = sound()
    stored[POOL]["spec"]["disableBGPExport"] = True
    advertised = Advertised("node1", OWN - {parse_network("10.0.0.0/30")})
    assert found(audited(stored, advertised)) == set()


@given(st.permutations(sorted(sound())))
def test_the_order_of_keys_does_not_matter(order: list[str]) -> None:
    """Findings follow from what is stored, however it was listed."""
    stored = sound()
    holding(holder("net.a"), LEAK)(stored)
    pairs = [KeyValue(key, json.dumps(stored[key]).encode(), 5) for key in order]
    assert found(audit(snapshot.read(pairs, 7), now_s=NOW_S)) == found(audited(stored))


# --- reports --------------------------------------------------------------------------------------

CLUSTER = resource(
    "ClusterInformation",
    "default",
    {"clusterGUID": "g", "clusterType": "bgp", "datastoreReady": False},
)
CLUSTER_KEY = f"{RESOURCES}/clusterinformations/default"


def leaking() -> Stored:
    stored = sound()
    holding(holder("net.a"), LEAK)(stored)
    stored[f"{IPAM}/handle/old"] = {"block": {"10.0.0.0/30": 1}}
    stored[CLUSTER_KEY] = CLUSTER
    return stored


def written(stored: Stored, version: str = "v") -> report.Report:
    seen = read(stored)
    tree = report.document(seen, audit(seen, now_s=NOW_S), version=version)
    return report.parse(json.dumps(tree).encode(), "r.json")


def test_report_has_calicos_fields() -> None:
    """The report has the fields of calicoctl's, with ours after them."""
    seen = read(leaking())
    tree = report.document(seen, audit(seen, now_s=NOW_S), version="v")
    assert list(tree) == [
        "version", "clusterGUID", "datastoreLocked", "clusterInformationRevision", "clusterType",
        "allocations", "leakedHandles", "revision", "problems", "notes",
    ]  # fmt: skip
    assert tree["datastoreLocked"] is True
    assert tree["clusterInformationRevision"] == "5"
    assert tree["leakedHandles"] == [{"ID": "old", "UID": None, "Revision": "5"}]
    assert tree["allocations"]["10.0.0.1"] == [
        {
            "ip": "10.0.0.1",
            "handle": "net.b",
            "sequenceNumber": 7,
            "pod": "p",
            "namespace": "ns",
            "node": "node1",
            "creationTimestamp": "2026-01-01 03:04:05.5 +0000 UTC",
            "inUse": False,
            "owners": None,
        }
    ]
    assert tree["allocations"]["10.0.0.0"][0]["owners"] == ["Workload(default/node1-cni-a-eth0)"]
    kinds = [finding["kind"] for finding in tree["problems"]]
    assert kinds == ["leaked-address", "missing-handle"]


def test_what_all_reports_agree_on() -> None:
    """Only what is unused in every report, under the same handle and write, is leaked."""
    first = written(leaking())
    assert [leak.ip for leak in report.leaked_addresses([first])] == ["10.0.0.1"]
    assert [leak.ip for leak in report.leaked_addresses([first, first])] == ["10.0.0.1"]
    assert report.leaked_addresses([first, written(sound())]) == ()
    anew = leaking()
    anew[BLOCK]["sequenceNumberForAllocation"]["1"] = 8
    assert report.leaked_addresses([first, written(anew)]) == ()
    assert [handle.ID for handle in report.leaked_handles([first, written(anew)])] == ["old"]
    assert report.leaked_handles([first, written(sound())]) == ()


@pytest.mark.parametrize(
    ("change", "is_forced", "said"),
    [
        pytest.param({}, False, "", id="locked and current"),
        pytest.param({"version": "w"}, False, "different version (w)", id="version"),
        pytest.param({"version": "w"}, True, "", id="version, forced"),
        pytest.param({"guid": "h"}, True, "mismatched cluster GUID", id="another cluster"),
        pytest.param({"revision": "4"}, True, "all stale", id="stale"),
        pytest.param({"locked": False}, False, "data store is not locked", id="not locked"),
        pytest.param({"locked": False}, True, "", id="not locked, forced"),
    ],
)
def test_when_reports_may_be_used(change: dict[str, Any], is_forced: bool, said: str) -> None:
    """Calicoctl's conditions: this cluster, this version, one current report, a locked store."""
    stored = leaking()
    stored[CLUSTER_KEY] = json.loads(json.dumps(CLUSTER))
    made = written(stored, change.get("version", "v"))
    stored[CLUSTER_KEY]["spec"]["clusterGUID"] = change.get("guid", "g")
    stored[CLUSTER_KEY]["spec"]["datastoreReady"] = not change.get("locked", True)
    seen = read(stored)
    revision = change.get("revision", seen.cluster_revision)

    def use() -> tuple[str, ...]:
        reports = {"r.json": made}
        return report.check_use(reports, seen.cluster, revision, version="v", is_forced=is_forced)

    if said:
        with pytest.raises(report.BadReport, match=said.replace("(", r"\(").replace(")", r"\)")):
            use()
    else:
        assert bool(use()) is is_forced


def test_a_file_that_is_no_report() -> None:
    """Anything else than a report is refused by its name."""
    with pytest.raises(report.BadReport, match=r"x\.json is no report"):
        report.parse(b'{"allocations": 3}', "x.json")


def test_kinds_are_told_apart() -> None:
    """The names in reports are stable and different."""
    assert len({kind.value for kind in Kind}) == len(Kind)
