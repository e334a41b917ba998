"""Adj-RIB-In and Loc-RIB."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from bgpd.announcement import PathAttributes
from bgpd.decision import Path, Peer
from bgpd.rib import Rejection, Rib
from cymric.model.net import Network

A, B = ip_network("198.19.16.0/26"), ip_network("198.19.16.64/26")


def path(peer: str, *, local_pref: int = 100, node: str = "") -> Path:
    """A path from the iBGP peer at that address."""
    address = ip_address(peer)
    source = Peer(address=address, asn=1, local_asn=1, router_id=address, node=node)
    return Path(address, PathAttributes(local_pref=local_pref), source)


def says(
    prefix: Network, peer: str, *, local_pref: int = 100, node: str = ""
) -> tuple[Path, list[Network]]:
    """What an UPDATE with one prefix brings."""
    return path(peer, local_pref=local_pref, node=node), [prefix]


@dataclass
class Rejecting:
    """A policy that rejects by prefix and by path."""

    prefixes: Mapping[Network, Rejection] = field(default_factory=dict)
    paths: Callable[[Path], Rejection | None] = lambda _: None

    def opinion(self, path: Path) -> Rejection | str:
        return self.paths(path) or "may be of use"

    def judge_prefix(self, prefix: Network, path: Path, opinion: str) -> Path | Rejection:
        assert opinion == "may be of use"
        return self.prefixes.get(prefix, path)


take_all = Rejecting()


def test_withdrawals_apply_before_announcements() -> None:
    """An UPDATE that withdraws and announces a prefix announces it (RFC 4271 §4.3)."""
    rib = Rib()
    rib.receive("192.0.2.1", announced=[says(A, "192.0.2.1")], withdrawn=[A])
    rib.settle(take_all)
    assert rib.loc_rib.keys() == {A}


def test_the_second_best_takes_over() -> None:
    """When the chosen path goes, another peer's is used; when the last goes, the prefix goes."""
    rib = Rib()
    rib.receive("192.0.2.1", announced=[says(A, "192.0.2.1", local_pref=200)])
    rib.receive("192.0.2.2", announced=[says(A, "192.0.2.2")])
    assert rib.settle(take_all).prefixes == {A}
    assert rib.loc_rib[A].path.next_hop == ip_address("192.0.2.1")
    rib.drop("192.0.2.1")
    assert rib.settle(take_all).prefixes == {A}
    assert rib.loc_rib[A].path.next_hop == ip_address("192.0.2.2")
    rib.drop("192.0.2.2")
    rib.settle(take_all)
    assert rib.loc_rib == {}


def test_the_same_again_changes_nothing() -> None:
    """A repeated announcement is no news, but confirms a stale path."""
    rib = Rib()
    rib.receive("192.0.2.1", announced=[says(A, "192.0.2.1")])
    rib.settle(take_all)
    rib.mark_stale("192.0.2.1")
    rib.receive("192.0.2.1", announced=[says(A, "192.0.2.1")])
    assert not rib.is_dirty
    assert rib.sweep("192.0.2.1") == 0


def test_stale_paths_are_used_until_swept() -> None:
    """What was not announced again goes with the sweep, and only that."""
    rib = Rib()
    rib.receive("192.0.2.1", announced=[says(A, "192.0.2.1"), says(B, "192.0.2.1")])
    rib.mark_stale("192.0.2.1")
    rib.receive("192.0.2.1", announced=[says(B, "192.0.2.1")])
    rib.settle(take_all)
    assert rib.loc_rib.keys() == {A, B}
    assert rib.sweep("192.0.2.1") == 1
    assert rib.settle(take_all).prefixes == {A}
    assert rib.loc_rib.keys() == {B}


def test_a_rejected_path_waits_for_a_better_policy() -> None:
    """Rejected paths are kept with their reason and judged again when the policy changes."""
    rib = Rib()
    rib.receive("192.0.2.1", announced=[says(A, "192.0.2.1"), says(B, "192.0.2.1")])
    rib.settle(Rejecting({A: Rejection.OUTSIDE_POOLS}))
    table = rib.adj_ribs_in["192.0.2.1"]
    assert (table.accepted, table.rejections()) == (1, {Rejection.OUTSIDE_POOLS: 1})
    assert rib.candidates(A) == [(path("192.0.2.1"), Rejection.OUTSIDE_POOLS, False)]
    rib.judge_again()
    assert rib.settle(take_all).prefixes == {A}
    assert table.rejections() == {}


def test_a_peer_cannot_fill_the_memory() -> None:
    """Beyond the limit new prefixes are counted, not stored; with room again the rest is due."""
    rib = Rib(max_prefixes=2)
    prefixes = list(ip_network("198.19.0.0/24").subnets(new_prefix=26))
    rib.receive("192.0.2.1", announced=[(path("192.0.2.1"), prefixes)])
    assert len(rib.adj_ribs_in["192.0.2.1"].paths) == 2
    assert rib.over_limit["192.0.2.1"] == 2
    rib.drop("192.0.2.1")
    assert not rib.over_limit


def test_a_limit_of_its_own() -> None:
    """A peer with a limit of its own is held to that one, the others to the common one."""
    rib = Rib(max_prefixes=100)
    rib.max_prefixes_by_peer = {"192.0.2.1": 1}
    for peer in ("192.0.2.1", "192.0.2.2"):
        rib.receive(peer, announced=[(path(peer), [A, B])])
    assert rib.over_limit == {"192.0.2.1": 1}


def test_a_peer_that_turns_out_to_be_a_node() -> None:
    """Paths are judged anew when it is known who their sender is."""
    rib = Rib()
    rib.receive("192.0.2.1", announced=[says(A, "192.0.2.1")])
    policy = Rejecting(
        paths=lambda one: None if one.peer.node == "other" else Rejection.NOT_BORROWED
    )
    rib.settle(policy)
    assert rib.loc_rib == {}
    rib.name_peer("192.0.2.1", path("192.0.2.1", node="other").peer)
    rib.settle(policy)
    assert rib.loc_rib.keys() == {A}


def test_the_policy_changed_for_some_networks() -> None:
    """Only prefixes inside them are judged again, however many others there are."""
    inside, outside = list(A.subnets(new_prefix=32)), list(B.subnets(new_prefix=32))
    for others in (outside[:1], outside * 5):
        rib = Rib()
        group = [A, *inside, *others, *parse_all("10.0.0.0/15", 26)[: 3 * len(others)]]
        rib.receive("192.0.2.1", announced=[(path("192.0.2.1"), group)])
        rib.settle(take_all)
        rib.judge_again_inside([A])
        assert rib.settle(Rejecting(paths=lambda _: Rejection.FILTERED)).prefixes == {A, *inside}


def parse_all(text: str, length: int) -> list[Network]:
    """All prefixes of that length."""
    return list(ip_network(text).subnets(new_prefix=length))


def test_equal_paths_are_used_together() -> None:
    """Two peers with the same preference share a prefix; a change of the second alone is news."""
    rib = Rib()
    rib.receive("192.0.2.1", announced=[says(A, "192.0.2.1")])
    rib.receive("192.0.2.2", announced=[says(A, "192.0.2.2")])
    rib.settle(take_all, max_paths=2)
    assert list(map(str, rib.loc_rib[A].next_hops)) == ["192.0.2.1", "192.0.2.2"]
    rib.drop("192.0.2.2")
    assert rib.settle(take_all, max_paths=2).prefixes == {A}
    assert list(map(str, rib.loc_rib[A].next_hops)) == ["192.0.2.1"]


PEERS = st.sampled_from(["192.0.2.1", "192.0.2.2", "192.0.2.3"])
STEPS = st.lists(
    st.tuples(PEERS, st.sampled_from([A, B]), st.sampled_from([None, 100, 200]), st.booleans()),
    max_size=30,
)


@given(STEPS)
def test_only_the_last_word_of_each_peer_counts(
    steps: list[tuple[str, Network, int | None, bool]],
) -> None:
    """However updates come and whenever they settle, the Loc-RIB is that of the final state."""
    lived, last = Rib(), {}
    for peer, prefix, local_pref, settles in steps:
        if local_pref is None:
            lived.receive(peer, withdrawn=[prefix])
        else:
            lived.receive(peer, announced=[says(prefix, peer, local_pref=local_pref)])
        last[peer, prefix] = local_pref
        if settles:
            lived.settle(take_all)
    lived.settle(take_all)
    fresh = Rib()
    for (peer, prefix), local_pref in sorted(last.items(), key=str):
        if local_pref is not None:
            fresh.receive(peer, announced=[says(prefix, peer, local_pref=local_pref)])
    fresh.settle(take_all)
    assert lived.loc_rib == fresh.loc_rib
