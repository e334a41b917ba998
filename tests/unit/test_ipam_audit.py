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
from ipam import snapshot
from ipam.audit import Advertised, Audit, Kind, audit, confirmed
from tests.support.ipam_keys import (
    BLOCK,
    CLAIM,
    ENDPOINT,
    HANDLE,
    IPAM,
    LEAK,
    NODE,
    NOW_S,
    POOL,
    RESOURCES,
    Stored,
    block,
    endpoint,
    holder,
    read,
    resource,
    sound,
)

Change = Callable[[Stored], None]


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


def test_what_passes_is_no_problem() -> None:
    """Of two audits only what both call a problem is one; notes are those of the later."""
    earlier, later = sound(), sound()
    drop(ENDPOINT)(earlier)
    holding(holder("net.a"), LEAK)(later)
    LEAK_HANDLE(later)
    counted(2)(later)
    passing, lasting = audited(earlier), audited(later)
    assert found(confirmed(passing, lasting)) == {"handle-too-high net.a"}
    assert found(confirmed(lasting, lasting)) == found(lasting)


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


def test_kinds_are_told_apart() -> None:
    """The names in reports are stable and different."""
    assert len({kind.value for kind in Kind}) == len(Kind)
