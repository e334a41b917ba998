"""What each peer hears, as truth tables: own routes, routes passed on, routes reflected."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgpd.adj_rib_out import (
    NO_ADVERTISE,
    NO_EXPORT,
    REPEATED_MED,
    Exporter,
    ExportPolicy,
    advertisements,
)
from bgpd.announcement import Announcement, AsPathSegment, PathAttributes, SegmentKind, as_sequence
from bgpd.decision import Choice, Path, Peer
from bgpd.exports import LOCAL_PREF, Local, Why
from bgpd.filters import compile_rules
from bgpd.reflection import is_client
from bgpd.rib import Settled
from cymric.model.bgp_filter import BGPFilter, BGPFilterSpec
from cymric.model.net import Network
from cymric.model.peering import NextHopMode, PeerType, Session
from cymric.model.prefix import PrefixSet
from cymric.model.resources import BGPConfiguration, BGPConfigurationSpec, ObjectMeta

ASN, CLUSTER = 64512, "1.0.0.1"
US, ASKED, OTHER, TOR = "198.19.0.2", "198.19.0.3", "198.19.0.4", "198.19.0.254"
OURS, LEARNED, OUTSIDE = "198.19.16.0/26", "198.19.17.0/26", "192.0.2.0/24"
CLOSED, BALANCER = "198.19.24.0/26", "198.51.100.7/32"


def session(*, asn: int = ASN, address: str = ASKED, us: str = US, **more: Any) -> Session:
    """The session of the peer that is asked about."""
    return Session(
        name="x",
        peer_type=PeerType.GLOBAL,
        peer_address=ip_address(address),
        peer_port=179,
        peer_asn=asn,
        local_address=ip_address(us),
        local_asn=ASN,
        router_id=ip_address(US),
        listen_port=179,
        is_passive=False,
        **more,
    )


def policy(one: Session, **more: Any) -> ExportPolicy:
    """Pools 198.19.16.0/21 and, closed, 198.19.24.0/24; load balancers at a reflector."""
    ranges = PrefixSet.parse("198.51.100.0/24") if one.cluster_id else PrefixSet.of(())
    return ExportPolicy(
        session=one,
        open=PrefixSet.parse("198.19.16.0/21", "fd00:16::/112"),
        closed=PrefixSet.parse("198.19.24.0/24"),
        aggregates=PrefixSet.parse(OURS),
        reflected_ranges=ranges,
        **more,
    )


def learned(
    peer: str = OTHER,
    *,
    asn: int = ASN,
    router_id: str | None = "",
    client: bool = False,
    **attributes: Any,
) -> Path:
    """A path through the peer that sent it."""
    sender = Peer(
        address=ip_address(peer),
        asn=asn,
        local_asn=ASN,
        router_id=None if router_id is None else ip_address(router_id or peer),
        is_client=client,
    )
    return Path(ip_address(peer), PathAttributes(**attributes), sender)


def heard(policy_: ExportPolicy, path: Path, prefix: str = LEARNED) -> Announcement | None:
    """What the peer hears of a learned path."""
    choice = Choice(path, "only path")
    return Exporter(policy_).announcement(ip_network(prefix), None, choice)


IBGP, EBGP = session(), session(asn=65001, address=TOR)
TO_CLIENT = session(cluster_id=CLUSTER, is_reflector_client=True)
TO_OTHER = session(cluster_id=CLUSTER)
FROM_TOR = learned(TOR, asn=65002, as_path=as_sequence(65002), med=7)


@pytest.mark.parametrize(
    ("mode", "subnet", "hop", "said"),
    [
        pytest.param("Auto", "198.19.0.0/24", OTHER, OTHER, id="both are our neighbours"),
        pytest.param("Auto", "198.19.0.0/24", "198.19.1.4", US, id="another network"),
        pytest.param("Auto", None, OTHER, US, id="the peer is in another network"),
        pytest.param("Auto", "198.19.0.0/24", TOR, US, id="never the peer itself"),
        pytest.param("Self", "198.19.0.0/24", OTHER, US, id="ourselves, always"),
        pytest.param("Keep", None, "198.19.1.4", "198.19.1.4", id="kept, always"),
    ],
)
def test_third_party_next_hops(mode: str, subnet: str | None, hop: str, said: str) -> None:
    """Another AS is told the next hop of a learned route if all three are in one network (RFC 4271
    §5.1.3), else ourselves; of our own routes ourselves in any case.
    """
    one = replace(EBGP, next_hop_mode=NextHopMode(mode))
    asked = policy(one, subnet=None if subnet is None else ip_network(subnet))
    announcement = heard(asked, replace(learned(), next_hop=ip_address(hop)))
    assert announcement is not None
    assert announcement.next_hop == said
    own = Exporter(asked).announcement(ip_network(OURS), Local(Why.OWN_BLOCK), None)
    assert own is not None
    assert own.next_hop == US


@pytest.mark.parametrize(
    ("one", "attributes"),
    [
        pytest.param(IBGP, PathAttributes(local_pref=LOCAL_PREF), id="iBGP"),
        pytest.param(EBGP, PathAttributes(), id="eBGP"),
        pytest.param(
            replace(IBGP, next_hop_mode=NextHopMode.KEEP),
            PathAttributes(local_pref=LOCAL_PREF),
            id="our own next hop is ours in any mode",
        ),
    ],
)
def test_own_routes(one: Session, attributes: PathAttributes) -> None:
    """Next hop is our address; LOCAL_PREF is Calico's, and left out towards another AS."""
    exporter = Exporter(policy(one))
    own = exporter.announcement(ip_network(OURS), Local(Why.OWN_BLOCK), None)
    assert own == Announcement(OURS, US, attributes)
    assert exporter.announcement(ip_network(OURS), Local(None), None) is None


def test_each_session_has_its_family() -> None:
    """IPv6 routes go over IPv6 sessions, with an IPv6 next hop, and IPv4 routes do not."""
    over6 = session(address="fd00:1::3", us="fd00:1::2")
    exporter = Exporter(policy(over6))
    prefix = "fd00:16::/122"
    assert exporter.announcement(ip_network(OURS), Local(Why.OWN_BLOCK), None) is None
    assert exporter.announcement(ip_network(prefix), Local(Why.OWN_BLOCK), None) == Announcement(
        prefix, "fd00:1::2", PathAttributes(local_pref=LOCAL_PREF)
    )


@pytest.mark.parametrize(
    ("one", "path", "expected"),
    [
        pytest.param(IBGP, learned(), None, id="iBGP to iBGP"),
        pytest.param(
            EBGP, learned(), (US, PathAttributes(med=REPEATED_MED)), id="iBGP to another AS"
        ),
        pytest.param(
            EBGP,
            learned(
                local_pref=5,
                as_path=as_sequence(65009),
                originator_id=OTHER,
                cluster_list=(CLUSTER,),
                med=3,
            ),
            (US, PathAttributes(as_path=as_sequence(ASN, 65009), med=REPEATED_MED)),
            id="what stays within an AS does not leave it",
        ),
        pytest.param(
            IBGP,
            FROM_TOR,
            (TOR, PathAttributes(as_path=as_sequence(65002), med=7, local_pref=100)),
            id="eBGP to iBGP",
        ),
        pytest.param(
            replace(IBGP, next_hop_mode=NextHopMode.SELF),
            FROM_TOR,
            (US, PathAttributes(as_path=as_sequence(65002), med=7, local_pref=100)),
            id="eBGP to iBGP, next hop self",
        ),
        pytest.param(
            replace(EBGP, next_hop_mode=NextHopMode.KEEP),
            learned(),
            (OTHER, PathAttributes(med=REPEATED_MED)),
            id="to another AS, next hop kept",
        ),
        pytest.param(
            IBGP,
            learned(TOR, asn=65002, as_path=as_sequence(65002), communities=((65535, 0),)),
            (
                TOR,
                PathAttributes(as_path=as_sequence(65002), local_pref=0, communities=((65535, 0),)),
            ),
            id="graceful shutdown becomes the lowest preference",
        ),
        pytest.param(EBGP, learned(TOR, asn=65001), None, id="never back"),
        pytest.param(EBGP, learned(communities=(NO_EXPORT,)), None, id="no export"),
        pytest.param(
            IBGP,
            learned(TOR, asn=65002, communities=(NO_EXPORT,)),
            (TOR, PathAttributes(local_pref=100, communities=(NO_EXPORT,))),
            id="no export stays in the AS",
        ),
        pytest.param(TO_CLIENT, learned(communities=(NO_ADVERTISE,)), None, id="no advertise"),
        pytest.param(
            EBGP,
            learned(as_path=(AsPathSegment(SegmentKind.CONFED_SEQUENCE, (1,)),)),
            None,
            id="confederation",
        ),
        pytest.param(
            EBGP,
            learned(extended_communities=(1 << 62 | 5, 6)),
            (US, PathAttributes(med=REPEATED_MED, extended_communities=(6,))),
            id="extended communities that stay",
        ),
    ],
)
def test_learned_routes(
    one: Session, path: Path, expected: tuple[str, PathAttributes] | None
) -> None:
    """Which learned routes go on to whom, and with what."""
    told = heard(policy(one), path)
    assert told == (None if expected is None else Announcement(LEARNED, *expected))


MARKED = PathAttributes(local_pref=100, originator_id=OTHER, cluster_list=(CLUSTER,))


@pytest.mark.parametrize(
    ("one", "path", "attributes"),
    [
        pytest.param(TO_CLIENT, learned(), MARKED, id="from a non-client to a client"),
        pytest.param(TO_OTHER, learned(), None, id="from a non-client to a non-client"),
        pytest.param(TO_OTHER, learned(client=True), MARKED, id="from a client to a non-client"),
        pytest.param(TO_CLIENT, learned(client=True), MARKED, id="from a client to another"),
        pytest.param(TO_CLIENT, learned(ASKED, client=True), None, id="never back to the client"),
        pytest.param(
            TO_CLIENT,
            learned(local_pref=7, originator_id="9.9.9.9", cluster_list=("2.0.0.2",)),
            PathAttributes(
                local_pref=7, originator_id="9.9.9.9", cluster_list=(CLUSTER, "2.0.0.2")
            ),
            id="reflected before",
        ),
        pytest.param(TO_CLIENT, learned(router_id=None), None, id="of unknown origin"),
    ],
)
def test_reflection(one: Session, path: Path, attributes: PathAttributes | None) -> None:
    """A reflector marks what it passes on and leaves next hop and all else as they are."""
    told = heard(policy(one), path)
    assert told == (None if attributes is None else Announcement(LEARNED, OTHER, attributes))


@pytest.mark.parametrize(
    ("own", "peer", "is_ibgp", "expected"),
    [
        ("", "", True, False),
        (CLUSTER, "", True, True),
        (CLUSTER, "2.0.0.2", True, True),
        (CLUSTER, CLUSTER, True, False),
        (CLUSTER, "", False, False),
    ],
)
def test_who_is_a_client(own: str, peer: str, is_ibgp: bool, expected: bool) -> None:
    """Peers over iBGP that are not reflectors of our own cluster."""
    assert is_client(own_cluster_id=own, peer_cluster_id=peer, is_ibgp=is_ibgp) is expected


@pytest.mark.parametrize(
    ("one", "prefix", "goes_on"),
    [
        pytest.param(EBGP, LEARNED, True, id="in a pool"),
        pytest.param(EBGP, OUTSIDE, False, id="outside the pools"),
        pytest.param(EBGP, CLOSED, False, id="in a pool that is not exported"),
        pytest.param(EBGP, "198.19.16.7/32", False, id="inside our own block"),
        pytest.param(EBGP, BALANCER, False, id="service address"),
        pytest.param(TO_CLIENT, BALANCER, True, id="service address at a reflector"),
    ],
)
def test_what_is_passed_on(one: Session, prefix: str, goes_on: bool) -> None:
    """Only prefixes of exported pools, outside our blocks; reflectors carry services as well."""
    assert (heard(policy(one), learned(), prefix) is not None) is goes_on


def filtered(one: Session, *rules: dict[str, Any]) -> ExportPolicy:
    """The policy of a session with an export filter."""
    spec = msgspec.convert({"exportV4": rules}, BGPFilterSpec)
    found = {"f": BGPFilter(metadata=ObjectMeta(name="f"), spec=spec)}
    compiled = compile_rules(["f"], found, direction="export", version=4, is_ibgp=one.is_ibgp)
    return policy(one, rules=compiled)


def test_filters_go_before_the_default() -> None:
    """What a filter accepts needs no pool, what it rejects stays, also of our own."""
    asked = filtered(
        EBGP,
        {"cidr": OUTSIDE, "matchOperator": "In", "action": "Accept"},
        {"source": "RemotePeers", "action": "Reject"},
        {"interface": "cali*", "action": "Accept"},
    )
    assert heard(asked, learned(), OUTSIDE) is not None
    assert heard(asked, learned()) is None
    exporter = Exporter(asked)
    workload = ip_network("198.19.16.7/32")
    assert exporter.announcement(workload, Local(None, "cali1"), None) is not None
    assert exporter.announcement(workload, Local(None), None) is None
    assert exporter.announcement(ip_network(OURS), Local(Why.OWN_BLOCK), None) is not None


def test_what_filters_change() -> None:
    """Our AS goes before what was prepended, and a priority becomes the LOCAL_PREF."""
    rule = {
        "action": "Accept",
        "operations": [
            {"prependASPath": {"prefix": [ASN, ASN]}},
            {"addCommunity": {"value": "64512:9"}},
            {"setPriority": {"value": 2000}},
        ],
    }
    own = Exporter(filtered(EBGP, rule)).announcement(ip_network(OURS), Local(Why.OWN_BLOCK), None)
    assert own == Announcement(
        OURS,
        US,
        PathAttributes(as_path=as_sequence(ASN, ASN, ASN), communities=((64512, 9),)),
    )
    inside = Exporter(filtered(IBGP, rule)).announcement(
        ip_network(OURS), Local(Why.OWN_BLOCK), None
    )
    assert inside is not None
    assert inside.attributes.local_pref == 2**31 - 1 - 2000
    assert inside.attributes.as_path == as_sequence(ASN, ASN)


def configuration(name: str, **spec: Any) -> BGPConfiguration:
    """A BGPConfiguration."""
    return BGPConfiguration(
        metadata=ObjectMeta(name=name), spec=msgspec.convert(spec, BGPConfigurationSpec)
    )


def test_communities() -> None:
    """Routes inside a prefix carry its communities, by value or name; a node's list replaces."""
    cluster = configuration(
        "default",
        communities=[{"name": "blue", "value": "64512:100"}],
        prefixAdvertisements=[
            {"cidr": "198.19.16.0/24", "communities": ["blue", "1:2:3", "nobody"]},
            {"cidr": "198.19.16.0/26", "communities": ["64512:7"]},
        ],
    )
    node = configuration(
        "node.us", prefixAdvertisements=[{"cidr": "198.19.16.0/21", "communities": ["blue"]}]
    )
    asked = Exporter(policy(IBGP, advertisements=advertisements(cluster, None)))
    own = asked.announcement(ip_network(OURS), Local(Why.OWN_BLOCK), None)
    assert own is not None
    assert own.attributes.communities == ((64512, 100), (64512, 7))
    assert own.attributes.large_communities == ((1, 2, 3),)
    elsewhere = heard(policy(EBGP, advertisements=advertisements(cluster, None)), learned())
    assert elsewhere is not None
    assert elsewhere.attributes.communities == ()
    replaced = heard(policy(EBGP, advertisements=advertisements(cluster, node)), learned())
    assert replaced is not None
    assert replaced.attributes.communities == ((64512, 100),)
    assert advertisements(None, None) == ()


PREFIXES = st.sampled_from([*map(ip_network, (OURS, LEARNED, "198.19.17.64/26", OUTSIDE))])
PATHS = st.sampled_from(
    [None, learned(), learned(client=True), FROM_TOR, learned(ASKED), learned(TOR, asn=65001)]
)
TABLES = st.dictionaries(PREFIXES, PATHS, min_size=1)


@given(st.sampled_from([IBGP, EBGP, TO_CLIENT, TO_OTHER]), st.lists(TABLES, max_size=5))
def test_following_changes_ends_where_the_whole_does(
    one: Session, steps: list[dict[Network, Path | None]]
) -> None:
    """However the Loc-RIB came to be, the peer hears what the final one says."""
    local = {ip_network(OURS): Local(Why.OWN_BLOCK)}
    loc_rib: dict[Network, Choice] = {}
    follower = Exporter(policy(one))
    told = follower.whole(local, loc_rib)
    for step in steps:
        groups = []
        for prefix, path in step.items():
            choice = None if path is None else Choice(path, "only path")
            if choice is not None:
                loc_rib[prefix] = choice
            else:
                loc_rib.pop(prefix, None)
            groups.append((choice, {prefix}))
        news = follower.changes(Settled(tuple(groups)), local, loc_rib, told)
        told = {p: a for p, a in {**told, **news}.items() if a is not None}
    assert told == Exporter(policy(one)).whole(local, loc_rib)
