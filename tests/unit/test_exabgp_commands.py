"""Command text, as ExaBGP reads it."""

from __future__ import annotations

import pytest

from bgpd.announcement import (
    Announcement,
    AsPathSegment,
    Origin,
    PathAttributes,
    SegmentKind,
    as_sequence,
)
from bgpd.exabgp_commands import PREFIXES_PER_LINE, announce, attribute_text, withdraw

PEER, HOP = "198.19.8.2", "198.19.8.1"


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        pytest.param(PathAttributes(), "origin igp", id="plain"),
        pytest.param(
            PathAttributes(origin=Origin.INCOMPLETE, med=0, local_pref=2147482623),
            "origin incomplete local-preference 2147482623 med 0",
            id="numbers",
        ),
        pytest.param(
            PathAttributes(
                as_path=(*as_sequence(65010, 1), AsPathSegment(SegmentKind.SET, (7, 8)))
            ),
            "origin igp as-path [ 65010 1 ] ( 7 8 )",
            id="path with set",
        ),
        pytest.param(
            PathAttributes(communities=((65001, 7), (1, 2)), large_communities=((1, 2, 3),)),
            "origin igp community [ 65001:7 1:2 ] large-community [ 1:2:3 ]",
            id="communities",
        ),
        pytest.param(
            PathAttributes(originator_id="1.1.1.1", cluster_list=("2.2.2.2", "3.3.3.3")),
            "origin igp originator-id 1.1.1.1 cluster-list [ 2.2.2.2 3.3.3.3 ]",
            id="reflected",
        ),
        pytest.param(
            PathAttributes(extended_communities=(0x0002FDE900000005,)),
            "origin igp extended-community [ 0x0002FDE900000005 ]",
            id="extended",
        ),
    ],
)
def test_attributes(attributes: PathAttributes, text: str) -> None:
    """Each attribute has its words, in one order."""
    assert attribute_text(HOP, attributes) == f"next-hop {HOP} {text}"


@pytest.mark.parametrize(
    "attributes",
    [
        PathAttributes(communities=((1, 65536),)),
        PathAttributes(large_communities=((1, 2, 2**32),)),
        PathAttributes(med=2**32),
        PathAttributes(local_pref=-1),
        PathAttributes(as_path=as_sequence(2**32)),
        PathAttributes(as_path=(AsPathSegment(SegmentKind.CONFED_SEQUENCE, (1,)),)),
    ],
)
def test_numbers_out_of_range_are_refused(attributes: PathAttributes) -> None:
    """ExaBGP would send some of these as other numbers; they never get that far."""
    with pytest.raises(ValueError, match=r"fit|confederation"):
        attribute_text(HOP, attributes)


def test_routes_with_equal_attributes_share_a_line() -> None:
    """One line for each next hop and attribute set, of bounded length."""
    many = [Announcement(f"10.0.{n // 256}.{n % 256}/32", HOP) for n in range(450)]
    other = Announcement("10.9.0.0/16", HOP, PathAttributes(med=1))
    lines = list(announce(PEER, [*many[:200], other, *many[200:]]))
    assert [len(prefixes) for _, prefixes in lines] == [PREFIXES_PER_LINE, PREFIXES_PER_LINE, 50, 1]
    assert lines[-1] == (
        f"neighbor {PEER} announce attributes next-hop {HOP} origin igp med 1 nlri 10.9.0.0/16",
        ("10.9.0.0/16",),
    )
    assert sum((prefixes for _, prefixes in lines[:-1]), ()) == tuple(r.prefix for r in many)


def test_withdrawals_are_split_by_family() -> None:
    """A withdrawal names a next hop of its own family, which says nothing."""
    assert [line for line, _ in withdraw(PEER, ["10.0.0.0/8", "2001:db8::/32"])] == [
        f"neighbor {PEER} withdraw attributes next-hop 0.0.0.0 nlri 10.0.0.0/8",
        f"neighbor {PEER} withdraw attributes next-hop :: nlri 2001:db8::/32",
    ]
