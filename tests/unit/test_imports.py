"""Import policy: what is taken from peers, as a truth table."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import msgspec
import pytest

from bgpd.announcement import PathAttributes, as_sequence
from bgpd.decision import Path, Peer
from bgpd.exports import LOCAL_PREF
from bgpd.filters import compile_rules
from bgpd.imports import (
    IMPORT_ALL,
    IMPORT_ANNOTATION,
    ImportPolicy,
    Opinion,
    claim_on,
    import_policy,
)
from bgpd.next_hops import Resolver
from bgpd.rib import Rejection
from cymric.kernel.underlay import OtherRoute, Out
from cymric.model.bgp_filter import BGPFilter, BGPFilterSpec
from cymric.model.prefix import PrefixMap
from cymric.model.resources import BGPConfiguration, ObjectMeta
from tests.support.routing import block, configuration, endpoint, pool

OWN = "198.19.16.0/26"
LENT, FREE, MINE = "198.19.16.7/32", "198.19.16.8/32", "198.19.16.9/32"
BORROWED_HERE = "198.19.17.5"
ELEVATED = LOCAL_PREF + 1


NODES = {"us": 64512, "other": 64512, "third": 64512, "far": 64620}
THEIRS, THEIR_HOST, THEIR_LENT = "198.19.16.64/26", "198.19.16.80/32", "198.19.16.75/32"
FAR_BLOCK, FAR_HOST, FAR_LENT = "198.19.16.128/26", "198.19.16.130/32", "198.19.16.140/32"


def policy(config: BGPConfiguration | None = None, **changed: object) -> ImportPolicy:
    """Node `us` owns a block with one address lent to `other` and one held by itself; `other` and
    `far`, whose AS is its own, each have a block of which `third` (and `far`) hold an address.
    """
    blocks = [
        block(OWN, "us", {LENT: "other", MINE: "us"}),
        block(THEIRS, "other", {"198.19.16.70/32": "us", THEIR_LENT: "third"}),
        block(FAR_BLOCK, "far", {FAR_LENT: "far", "198.19.16.141/32": "third"}),
        block("198.19.16.192/26", None),
    ]
    made = import_policy(
        node="us",
        own_addresses=[ip_address("198.19.0.2")],
        cluster_id="1.0.0.1",
        pools=[pool(), pool("198.19.24.0/24", name="second", disable_bgp_export=True)],
        claims=PrefixMap(
            {one.network: claim for one in blocks if (claim := claim_on(one)) is not None}
        ),
        endpoints=[
            endpoint("here", "us", BORROWED_HERE),
            endpoint("there", "other", "198.19.17.6"),
        ],
        configuration=config,
        nodes=NODES,
        node_by_router_id={
            "198.19.0.2": "us",
            "198.19.0.3": "other",
            "198.19.0.4": "third",
            "198.19.0.5": "far",
        },
    )
    return replace(made, **changed)  # type: ignore[arg-type]


def tor(*asns: int, **attributes: object) -> Path:
    """A path from a router of AS 65001 that is no node."""
    return path(node="", asn=65001, as_path=as_sequence(65001, *asns), **attributes)


def mirrored(originator: str, **attributes: object) -> Path:
    """A path that a route reflector, which is no node, passes on."""
    return path(node="", originator_id=originator, cluster_list=("1.0.0.9",), **attributes)


def path(
    *,
    node: str = "other",
    next_hop: str = "198.19.0.3",
    asn: int = 64512,
    peer_change: dict[str, int] | None = None,
    **attributes: object,
) -> Path:
    """A path from `node` at 198.19.0.3."""
    peer = Peer(address=ip_address("198.19.0.3"), asn=asn, local_asn=64512, node=node)
    peer = replace(peer, **(peer_change or {}))  # type: ignore[arg-type]
    said = PathAttributes(**attributes)  # type: ignore[arg-type]
    return Path(ip_address(next_hop), said, peer)


@pytest.mark.parametrize(
    ("prefix", "received", "verdict", "verdict_when_all"),
    [
        pytest.param("198.19.16.64/26", path(), None, None, id="a block in a pool"),
        pytest.param("198.19.16.0/21", path(), None, None, id="the pool itself"),
        pytest.param("198.19.24.0/26", path(), None, None, id="a pool we do not export"),
        pytest.param("198.19.0.0/16", path(), Rejection.OUTSIDE_POOLS, None, id="around the pool"),
        pytest.param("192.0.2.0/24", path(), Rejection.OUTSIDE_POOLS, None, id="elsewhere"),
        pytest.param("10.96.0.0/12", path(), Rejection.OUTSIDE_POOLS, None, id="services unknown"),
        pytest.param("0.0.0.0/0", path(), Rejection.DEFAULT_ROUTE, None, id="default"),
        pytest.param("127.0.0.0/8", path(), Rejection.MARTIAN, None, id="loopback"),
        pytest.param("239.1.2.3/32", path(), Rejection.MARTIAN, None, id="multicast"),
        pytest.param("169.254.1.1/32", path(), Rejection.MARTIAN, None, id="link local"),
        pytest.param(OWN, path(), Rejection.INSIDE_OWN_BLOCK, None, id="our block"),
        pytest.param(
            "198.19.16.0/27", path(), Rejection.INSIDE_OWN_BLOCK, None, id="half of our block"
        ),
        pytest.param(LENT, path(), None, None, id="lent, by the borrower"),
        pytest.param(
            LENT, path(node="third"), Rejection.NOT_BORROWED, None, id="lent, by somebody else"
        ),
        pytest.param(
            LENT, path(node=""), Rejection.NOT_BORROWED, None, id="lent, by a router without node"
        ),
        pytest.param(FREE, path(), Rejection.NOT_BORROWED, None, id="free address of our block"),
        pytest.param(MINE, path(), Rejection.NOT_BORROWED, None, id="held by ourselves"),
        pytest.param("198.19.17.6/32", path(), None, None, id="a /32 in nobody's block"),
        pytest.param(
            f"{BORROWED_HERE}/32",
            path(),
            Rejection.LOCAL_WORKLOAD,
            Rejection.LOCAL_WORKLOAD,
            id="workload here",
        ),
        pytest.param(
            "198.19.17.0/26",
            path(as_path=as_sequence(65001, 64512)),
            Rejection.LOOP,
            Rejection.LOOP,
            id="own AS in the path",
        ),
        pytest.param(
            "198.19.17.0/26",
            path(originator_id="198.19.0.2"),
            Rejection.OWN_ORIGINATOR,
            Rejection.OWN_ORIGINATOR,
            id="our own, reflected",
        ),
        pytest.param(
            "198.19.17.0/26",
            path(asn=65001, originator_id="198.19.0.2"),
            None,
            None,
            id="originator from eBGP is ignored",
        ),
        pytest.param(
            "198.19.17.0/26",
            path(cluster_list=("1.0.0.9", "1.0.0.1")),
            Rejection.OWN_CLUSTER,
            Rejection.OWN_CLUSTER,
            id="reflected by our cluster",
        ),
        pytest.param(THEIRS, path(node="third"), Rejection.NOT_THE_OWNER, None, id="not its block"),
        pytest.param(THEIR_HOST, path(), None, None, id="the owner's single address"),
        pytest.param(
            THEIR_HOST, path(node="third"), Rejection.NOT_THE_OWNER, None, id="not its address"
        ),
        pytest.param(THEIR_LENT, path(node="third"), None, None, id="lent to the announcer"),
        pytest.param(
            "198.19.16.192/26", path(node="third"), None, None, id="a block that nobody owns"
        ),
        pytest.param(THEIRS, mirrored("198.19.0.3"), None, None, id="reflected, from the owner"),
        pytest.param(
            THEIRS,
            mirrored("198.19.0.4"),
            Rejection.NOT_THE_OWNER,
            None,
            id="reflected, from somebody else",
        ),
        pytest.param(LENT, mirrored("198.19.0.3"), None, None, id="reflected, from the borrower"),
        pytest.param(
            LENT,
            mirrored("198.19.0.4"),
            Rejection.NOT_BORROWED,
            None,
            id="reflected, not from the borrower",
        ),
        pytest.param(THEIRS, tor(), Rejection.NOT_THE_OWNER, None, id="a router's own idea"),
        pytest.param(
            THEIR_HOST, tor(), Rejection.NOT_THE_OWNER, None, id="a router's more specific idea"
        ),
        pytest.param(FAR_BLOCK, tor(64620), None, None, id="passed on by a router"),
        pytest.param(
            FAR_BLOCK, tor(64630), Rejection.NOT_THE_OWNER, None, id="begun in another AS"
        ),
        pytest.param(
            "198.19.16.128/27",
            tor(64620),
            Rejection.NOT_THE_OWNER,
            None,
            id="half a block, passed on by a router",
        ),
        pytest.param(
            FAR_HOST,
            tor(64620),
            Rejection.NOT_THE_OWNER,
            None,
            id="an address of a block, passed on by a router",
        ),
        pytest.param(
            OWN, tor(64620), Rejection.INSIDE_OWN_BLOCK, None, id="our block, by a router"
        ),
        pytest.param("198.19.20.0/22", tor(), None, None, id="a part of the pool without blocks"),
        pytest.param(
            "198.19.20.0/26",
            tor(next_hop="198.19.20.9"),
            Rejection.NEXT_HOP_IN_POOL,
            None,
            id="through a pod",
        ),
        pytest.param(
            "198.19.20.0/26",
            path(asn=65001, as_path=as_sequence(64512), peer_change={"allowed_own_asns": 1}),
            None,
            None,
            id="own AS, as often as is allowed",
        ),
        pytest.param(
            "198.19.17.0/26",
            path(next_hop="198.19.0.2"),
            Rejection.NEXT_HOP_IS_OURS,
            Rejection.NEXT_HOP_IS_OURS,
            id="next hop is us",
        ),
        pytest.param(
            "198.19.17.0/26",
            path(next_hop="0.0.0.0"),
            Rejection.NEXT_HOP_UNUSABLE,
            Rejection.NEXT_HOP_UNUSABLE,
            id="next hop nobody",
        ),
        pytest.param(
            "198.19.17.0/26",
            path(next_hop="224.0.0.5"),
            Rejection.NEXT_HOP_UNUSABLE,
            Rejection.NEXT_HOP_UNUSABLE,
            id="next hop a group",
        ),
        pytest.param(
            "198.19.17.3/32",
            path(next_hop="198.19.17.3"),
            Rejection.NEXT_HOP_UNUSABLE,
            Rejection.NEXT_HOP_UNUSABLE,
            id="next hop through itself",
        ),
    ],
)
def test_verdicts(
    prefix: str, received: Path, verdict: Rejection | None, verdict_when_all: Rejection | None
) -> None:
    """Each path is judged by itself; the annotation lets pass all but what can only be wrong."""
    network = ip_network(prefix)
    assert policy().judge(network, received) is (verdict or received)
    takes_all = policy(configuration(annotations={IMPORT_ANNOTATION: IMPORT_ALL}))
    assert takes_all.judge(network, received) is (verdict_when_all or received)


def test_service_ranges_are_taken() -> None:
    """What BGPConfiguration lists as service addresses may be announced by peers."""
    config = configuration(
        serviceClusterIPs=[{"cidr": "10.96.0.0/12"}],
        serviceExternalIPs=[{"cidr": "192.0.2.0/28"}],
        serviceLoadBalancerIPs=[{"cidr": "198.51.100.0/24"}],
    )
    taking = policy(config)
    for prefix in ("10.96.0.0/12", "192.0.2.3/32", "198.51.100.7/32"):
        assert isinstance(taking.judge(ip_network(prefix), path()), Path)


def test_another_annotation_value_changes_nothing() -> None:
    """Only the one word widens the policy."""
    config = configuration(annotations={IMPORT_ANNOTATION: "pools"})
    assert policy(config) == policy()


def test_a_block_without_owner_protects_nothing() -> None:
    """Inside a block that is not ours any more, paths are judged as any other."""
    given_up = policy()
    given_up.claims.discard(ip_network(OWN))
    assert isinstance(given_up.judge(ip_network(FREE), path()), Path)


def filtered(*rules: dict[str, object], missing: bool = False) -> ImportPolicy:
    """A policy with an import filter for the peer at 198.19.0.3."""
    spec = msgspec.convert({"importV4": rules}, BGPFilterSpec)
    known = {} if missing else {"f": BGPFilter(metadata=ObjectMeta(name="f"), spec=spec)}
    compiled = compile_rules(["f"], known, direction="import", version=4, is_ibgp=True)
    return policy(rules={ip_address("198.19.0.3"): compiled})


def test_a_filter_widens_and_narrows() -> None:
    """What it rejects is out, what it accepts needs no pool; what it does not name is as ever."""
    asked = filtered(
        {"cidr": "192.0.2.0/24", "matchOperator": "In", "action": "Accept"},
        {"cidr": "198.19.17.0/24", "matchOperator": "In", "action": "Reject"},
    )
    assert isinstance(asked.judge(ip_network("192.0.2.0/25"), path()), Path)
    assert asked.judge(ip_network("198.19.17.0/26"), path()) is Rejection.FILTERED
    assert isinstance(asked.judge(ip_network("198.19.18.0/26"), path()), Path)
    assert asked.judge(ip_network("203.0.113.0/24"), path()) is Rejection.OUTSIDE_POOLS


def test_a_filter_does_not_give_away_blocks() -> None:
    """Not even what a filter accepts may take a block from its owner, make a loop or a bad hop."""
    asked = filtered({"action": "Accept"})
    assert asked.judge(ip_network(OWN), path()) is Rejection.INSIDE_OWN_BLOCK
    assert asked.judge(ip_network(THEIR_HOST), tor()) is Rejection.NOT_THE_OWNER
    assert asked.judge(ip_network(THEIRS), path(next_hop="198.19.0.2")) is (
        Rejection.NEXT_HOP_IS_OURS
    )


def test_a_missing_filter_lets_nothing_in() -> None:
    """A session that was meant to be filtered is shut when the filter is gone."""
    asked = filtered(missing=True)
    assert asked.judge(ip_network(THEIRS), path()) is Rejection.FILTER_MISSING


def test_what_a_filter_does_to_a_path() -> None:
    """Operations change the path for the decision; the prefixes of an UPDATE still share it."""
    operations = [
        {"setPriority": {"value": 512}},
        {"addCommunity": {"value": "64512:7"}},
        {"addCommunity": {"value": "64512:1:2"}},
        {"prependASPath": {"prefix": [65007, 65008]}},
    ]
    asked = filtered({"action": "Accept", "operations": operations})
    received = path(as_path=as_sequence(65001))
    opinion = asked.opinion(received)
    assert isinstance(opinion, Opinion)
    one = asked.judge_prefix(ip_network("192.0.2.0/24"), received, opinion)
    assert isinstance(one, Path)
    assert one.local_pref == 2**31 - 1 - 512
    assert one.attributes.communities == ((64512, 7),)
    assert one.attributes.large_communities == ((64512, 1, 2),)
    assert one.attributes.as_path == as_sequence(65007, 65008, 65001)
    assert asked.judge_prefix(ip_network("198.51.100.0/24"), received, opinion) is one


@pytest.mark.parametrize(
    ("node", "local_pref", "prefix", "expected"),
    [
        pytest.param("other", ELEVATED, LENT, None, id="held by the node that claims it"),
        pytest.param("other", LOCAL_PREF, LENT, Rejection.LOCAL_WORKLOAD, id="as usual"),
        pytest.param("other", ELEVATED, FREE, Rejection.NOT_BORROWED, id="held by nobody"),
        pytest.param("", ELEVATED, LENT, Rejection.LOCAL_WORKLOAD, id="an outsider"),
    ],
)
def test_a_workload_that_migrates_alive(
    node: str, local_pref: int, prefix: str, expected: Rejection | None
) -> None:
    """A node that claims a workload of ours with more than the usual preference gets its traffic,
    if the block says that it holds the address; preference alone is not enough.
    """
    here = frozenset(ip_network(one).network_address for one in (LENT, FREE))
    judged = policy(local_workloads=here).judge(
        ip_network(prefix), path(node=node, local_pref=local_pref)
    )
    assert (judged if isinstance(judged, Rejection) else None) is expected


@pytest.mark.parametrize(
    ("asns", "expected"),
    [
        pytest.param((65001, 64620), None, id="the router's AS, then the owner's"),
        pytest.param((64620,), Rejection.NOT_THE_OWNER, id="the owner's alone"),
        pytest.param((65002, 64620), Rejection.NOT_THE_OWNER, id="another router's first"),
    ],
)
def test_a_router_that_passes_for_the_owner(
    asns: tuple[int, ...], expected: Rejection | None
) -> None:
    """A router is believed for a block only behind its own AS, so that its path is longer than the
    owner's own.
    """
    offered = path(node="", asn=65001, as_path=as_sequence(*asns))
    judged = policy().judge(ip_network(FAR_BLOCK), offered)
    assert (judged if isinstance(judged, Rejection) else None) is expected


def test_filters_see_the_interface_of_the_next_hop() -> None:
    """A rule with `interface` matches by the device through which the next hop is reached."""
    rule = {"interface": "eth*", "action": "Reject"}
    spec = msgspec.convert({"importV4": [rule]}, BGPFilterSpec)
    one = BGPFilter(metadata=ObjectMeta(name="f"), spec=spec)
    rules = compile_rules(["f"], {"f": one}, direction="import", version=4, is_ibgp=True)
    offered = path()
    for device, expected in (("eth0", Rejection.FILTERED), ("bond0", None)):
        link = OtherRoute(ip_network("198.19.0.0/20"), (Out(None, device, 2),))
        asked = policy(rules={offered.peer.address: rules}, resolver=Resolver([link]))
        judged = asked.judge(ip_network(THEIRS), offered)
        assert (judged if isinstance(judged, Rejection) else None) is expected
