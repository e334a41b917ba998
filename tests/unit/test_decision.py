"""The decision process: RFC 4271 §9.1."""

from __future__ import annotations

import random
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgpd.announcement import AsPathSegment, Origin, PathAttributes, SegmentKind, as_sequence
from bgpd.decision import ONLY_PATH, STEPS, Path, Peer, best, lost_at

LOCAL = 64512


def path(
    address: str = "198.19.0.2", *, asn: int = LOCAL, router_id: str = "", **attributes: object
) -> Path:
    """A path from the peer at `address`."""
    peer = Peer(
        address=ip_address(address),
        asn=asn,
        local_asn=LOCAL,
        router_id=ip_address(router_id or address),
    )
    return Path(ip_address(address), PathAttributes(**attributes), peer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("winner", "loser", "step"),
    [
        pytest.param(
            path("198.19.0.3", local_pref=200, as_path=as_sequence(1, 2, 3)),
            path(local_pref=150),
            "highest_local_pref",
            id="preference before length",
        ),
        pytest.param(
            path("198.19.0.3", local_pref=101), path(), "highest_local_pref", id="none means 100"
        ),
        pytest.param(
            path("198.19.0.3"),
            path(asn=65001, local_pref=500, as_path=as_sequence(65001)),
            "fewest_as_hops",
            id="what eBGP claims is ignored",
        ),
        pytest.param(
            path("198.19.0.3", as_path=(AsPathSegment(SegmentKind.SET, (1, 2, 3)),)),
            path(as_path=as_sequence(4, 5)),
            "fewest_as_hops",
            id="a set is one hop",
        ),
        pytest.param(
            path("198.19.0.3", origin=Origin.EGP),
            path(origin=Origin.INCOMPLETE),
            "lowest_origin",
            id="origin",
        ),
        pytest.param(
            path("198.19.0.3", as_path=as_sequence(7, 9), med=1),
            path(as_path=as_sequence(7, 8), med=2),
            "lowest_med_per_neighbour",
            id="MED of one neighbour AS",
        ),
        pytest.param(
            path("198.19.0.3", as_path=as_sequence(7)),
            path(as_path=as_sequence(7), med=2),
            "lowest_med_per_neighbour",
            id="no MED is 0",
        ),
        pytest.param(
            path("198.19.0.2", as_path=as_sequence(7), med=9),
            path("198.19.0.3", as_path=as_sequence(8), med=1),
            "lowest_bgp_identifier",
            id="MEDs of two neighbour ASes are not compared",
        ),
        pytest.param(
            path("198.19.0.3", asn=65001, as_path=as_sequence(65001)),
            path(as_path=as_sequence(65001)),
            "external_before_internal",
            id="eBGP before iBGP",
        ),
        pytest.param(
            path("198.19.0.3", router_id="10.0.0.1"),
            path(router_id="10.0.0.2"),
            "lowest_bgp_identifier",
            id="identifier",
        ),
        pytest.param(
            path("198.19.0.3", router_id="10.0.0.9", originator_id="10.0.0.1"),
            path(router_id="10.0.0.2"),
            "lowest_bgp_identifier",
            id="originator in place of the identifier",
        ),
        pytest.param(
            path("198.19.0.3", originator_id="10.0.0.1", cluster_list=("1.0.0.1",)),
            path(originator_id="10.0.0.1", cluster_list=("1.0.0.1", "1.0.0.2")),
            "shortest_cluster_list",
            id="shorter cluster list",
        ),
        pytest.param(
            path("198.19.0.2", router_id="10.0.0.1"),
            path("198.19.0.3", router_id="10.0.0.1"),
            "lowest_peer_address",
            id="peer address",
        ),
    ],
)
def test_each_step(winner: Path, loser: Path, step: str) -> None:
    """Two paths are told apart by the first step in which they differ, in either order."""
    for paths in ([winner, loser], [loser, winner]):
        choice = best(paths)
        assert (choice.path, choice.settled_by) == (winner, step)
        assert lost_at(paths) == {loser: step}


def test_a_single_path_needs_no_step() -> None:
    """The only path is used."""
    assert best([path()]).settled_by == ONLY_PATH
    assert lost_at([path()]) == {}


PATHS = st.lists(
    st.builds(
        path,
        st.integers(2, 9).map("198.19.0.{}".format),
        asn=st.sampled_from([LOCAL, 65001]),
        router_id=st.sampled_from(["10.0.0.1", "10.0.0.2"]),
        local_pref=st.sampled_from([None, 100, 200]),
        med=st.sampled_from([None, 0, 5, 9]),
        origin=st.sampled_from(Origin),
        as_path=st.sampled_from([(), as_sequence(7), as_sequence(8), as_sequence(7, 8)]),
        originator_id=st.sampled_from([None, "10.0.0.1"]),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda one: one.peer.address,
)


@given(PATHS, st.randoms(use_true_random=False))
def test_the_order_of_arrival_changes_nothing(paths: list[Path], order: random.Random) -> None:
    """However the paths are listed, the choice and the step that settled it are the same."""
    shuffled = list(paths)
    order.shuffle(shuffled)
    assert best(paths) == best(shuffled)


@given(PATHS)
def test_every_path_but_the_chosen_lost_somewhere(paths: list[Path]) -> None:
    """`why` names the step for each path that is not used, and a step that exists."""
    lost = lost_at(paths)
    assert {*lost, best(paths).path} == set(paths)
    assert best(paths).path not in lost
    assert set(lost.values()) <= {step.__name__ for step in STEPS}
