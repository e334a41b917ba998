"""Import policy: what is taken from peers, as a truth table."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from bgpd.decision import Path, Peer
from bgpd.imports import IMPORT_ALL, IMPORT_ANNOTATION, ImportPolicy, import_policy
from bgpd.rib import Rejection
from bgpd.speaker import PathAttributes, as_sequence
from cymric.model.prefix import PrefixSet
from cymric.model.resources import BGPConfiguration
from tests.support.routing import block, configuration, endpoint, pool

OWN = "198.19.16.0/26"
LENT, FREE, MINE = "198.19.16.7/32", "198.19.16.8/32", "198.19.16.9/32"
BORROWED_HERE = "198.19.17.5"


def policy(config: BGPConfiguration | None = None) -> ImportPolicy:
    """Node `us` owns a block with one address lent to `other` and one held by itself."""
    return import_policy(
        node="us",
        own_addresses=[ip_address("198.19.0.2")],
        pools=[pool(), pool("198.19.24.0/24", name="second", disable_bgp_export=True)],
        blocks=[
            block(OWN, "us", {LENT: "other", MINE: "us"}),
            block("198.19.16.64/26", "other", {"198.19.16.70/32": "us"}),
        ],
        endpoints=[
            endpoint("here", "us", BORROWED_HERE),
            endpoint("there", "other", "198.19.17.6"),
        ],
        configuration=config,
    )


def path(
    prefix: str,
    *,
    node: str = "other",
    next_hop: str = "198.19.0.3",
    asn: int = 64512,
    **attributes: object,
) -> Path:
    """A path from `node` at 198.19.0.3."""
    peer = Peer(address=ip_address("198.19.0.3"), asn=asn, local_asn=64512, node=node)
    said = PathAttributes(**attributes)  # type: ignore[arg-type]
    return Path(ip_network(prefix), ip_address(next_hop), said, peer)


@pytest.mark.parametrize(
    ("received", "verdict", "verdict_when_all"),
    [
        pytest.param(path("198.19.16.64/26"), None, None, id="a block in a pool"),
        pytest.param(path("198.19.16.0/21"), None, None, id="the pool itself"),
        pytest.param(path("198.19.24.0/26"), None, None, id="a pool we do not export"),
        pytest.param(path("198.19.0.0/16"), Rejection.OUTSIDE_POOLS, None, id="around the pool"),
        pytest.param(path("192.0.2.0/24"), Rejection.OUTSIDE_POOLS, None, id="elsewhere"),
        pytest.param(path("10.96.0.0/12"), Rejection.OUTSIDE_POOLS, None, id="services unknown"),
        pytest.param(path("0.0.0.0/0"), Rejection.DEFAULT_ROUTE, None, id="default"),
        pytest.param(path("127.0.0.0/8"), Rejection.MARTIAN, None, id="loopback"),
        pytest.param(path("239.1.2.3/32"), Rejection.MARTIAN, None, id="multicast"),
        pytest.param(path("169.254.1.1/32"), Rejection.MARTIAN, None, id="link local"),
        pytest.param(path(OWN), Rejection.INSIDE_OWN_BLOCK, None, id="our block"),
        pytest.param(
            path("198.19.16.0/27"), Rejection.INSIDE_OWN_BLOCK, None, id="half of our block"
        ),
        pytest.param(path(LENT), None, None, id="lent, by the borrower"),
        pytest.param(
            path(LENT, node="third"), Rejection.NOT_BORROWED, None, id="lent, by somebody else"
        ),
        pytest.param(
            path(LENT, node=""), Rejection.NOT_BORROWED, None, id="lent, by a router without node"
        ),
        pytest.param(path(FREE), Rejection.NOT_BORROWED, None, id="free address of our block"),
        pytest.param(path(MINE), Rejection.NOT_BORROWED, None, id="held by ourselves"),
        pytest.param(path("198.19.17.6/32"), None, None, id="a /32 in nobody's block"),
        pytest.param(
            path(f"{BORROWED_HERE}/32"),
            Rejection.LOCAL_WORKLOAD,
            Rejection.LOCAL_WORKLOAD,
            id="workload here",
        ),
        pytest.param(
            path("198.19.17.0/26", as_path=as_sequence(65001, 64512)),
            Rejection.LOOP,
            Rejection.LOOP,
            id="own AS in the path",
        ),
        pytest.param(
            path("198.19.17.0/26", originator_id="198.19.0.2"),
            Rejection.OWN_ORIGINATOR,
            Rejection.OWN_ORIGINATOR,
            id="our own, reflected",
        ),
        pytest.param(
            path("198.19.17.0/26", asn=65001, originator_id="198.19.0.2"),
            None,
            None,
            id="originator from eBGP is ignored",
        ),
        pytest.param(
            path("198.19.17.0/26", next_hop="198.19.0.2"),
            Rejection.NEXT_HOP_IS_OURS,
            Rejection.NEXT_HOP_IS_OURS,
            id="next hop is us",
        ),
        pytest.param(
            path("198.19.17.0/26", next_hop="0.0.0.0"),
            Rejection.NEXT_HOP_UNUSABLE,
            Rejection.NEXT_HOP_UNUSABLE,
            id="next hop nobody",
        ),
        pytest.param(
            path("198.19.17.0/26", next_hop="224.0.0.5"),
            Rejection.NEXT_HOP_UNUSABLE,
            Rejection.NEXT_HOP_UNUSABLE,
            id="next hop a group",
        ),
        pytest.param(
            path("198.19.17.3/32", next_hop="198.19.17.3"),
            Rejection.NEXT_HOP_UNUSABLE,
            Rejection.NEXT_HOP_UNUSABLE,
            id="next hop through itself",
        ),
    ],
)
def test_verdicts(
    received: Path, verdict: Rejection | None, verdict_when_all: Rejection | None
) -> None:
    """Each path is judged by itself; the annotation lets pass all but what can only be wrong."""
    assert policy().judge(received) is verdict
    takes_all = policy(configuration(annotations={IMPORT_ANNOTATION: IMPORT_ALL}))
    assert takes_all.judge(received) is verdict_when_all


def test_service_ranges_are_taken() -> None:
    """What BGPConfiguration lists as service addresses may be announced by peers."""
    config = configuration(
        serviceClusterIPs=[{"cidr": "10.96.0.0/12"}],
        serviceExternalIPs=[{"cidr": "192.0.2.0/28"}],
        serviceLoadBalancerIPs=[{"cidr": "198.51.100.0/24"}],
    )
    taking = policy(config)
    for prefix in ("10.96.0.0/12", "192.0.2.3/32", "198.51.100.7/32"):
        assert taking.judge(path(prefix)) is None


def test_another_annotation_value_changes_nothing() -> None:
    """Only the one word widens the policy."""
    config = configuration(annotations={IMPORT_ANNOTATION: "pools"})
    assert policy(config) == policy()


def test_a_block_without_owner_protects_nothing() -> None:
    """Inside a block that is not ours any more, paths are judged as any other."""
    given_up = replace(policy(), own_blocks=PrefixSet.of(()))
    assert given_up.judge(path(FREE)) is None
