"""bgpd where routes come from many sides: limits, hostile peers, IPv6, shared traffic."""

from __future__ import annotations

import msgspec
import pytest

from bgpd.announcement import Announcement, PathAttributes, as_sequence
from bgpd.fake_speaker import FakeSpeaker
from bgpd.imports import IMPORT_ALL, IMPORT_ANNOTATION
from bgpd.router import Router
from bgpd.speaker import RoutesReceived, SessionUp, SpeakerConnected
from cymric.datastore.syncer import Update
from cymric.kernel.api import RouteKind
from cymric.kernel.underlay import OtherRoute, Out
from cymric.model.bgp_filter import BGPFilter, BGPFilterSpec
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.keys import AffinityKey
from cymric.model.net import parse_network
from cymric.model.resources import (
    BGPPeer,
    BGPPeerSpec,
    Node,
    NodeBGPSpec,
    NodeSpec,
    ObjectMeta,
)
from tests.support.routing import (
    affinity,
    block,
    configuration,
    endpoint,
    key_of,
    node,
    peer,
    pool,
)

OTHER, THIRD, TOR, TOR_TWO = "198.19.0.3", "198.19.0.4", "198.19.0.254", "198.19.0.253"
OWN, THEIRS, FREE = "198.19.16.0/26", "198.19.16.64/26", "198.19.17.0/26"


class World:
    """A router on a fake speaker, told objects one by one, without any task."""

    def __init__(self, *objects: object) -> None:
        self.speaker = FakeSpeaker()
        self.router = Router("us", self.speaker)
        self.learn(
            node("us", "198.19.0.2/20"), node("other", f"{OTHER}/20"), pool(), block(OWN, "us"),
            block(THEIRS, "other"), *objects,
        )  # fmt: skip
        self.router.on_in_sync()
        self.router.work()
        self.router.on_event(SpeakerConnected("1", lost_events=False))

    def learn(self, *objects: object) -> None:
        """Objects come or change."""
        updates = [Update(key_of(one), one) for one in objects]
        for one in objects:
            owner = getattr(one, "owner_host", None)
            if owner:
                network = parse_network(one.cidr)  # type: ignore[attr-defined]
                updates.append(Update(AffinityKey(owner, network), affinity()))
        self.router.on_updates(updates)
        self.router.work()

    def up(self, *peers: str) -> None:
        """Sessions are up."""
        for one in peers:
            event = SessionUp(one, 64512, frozenset(), router_id=one if "." in one else TOR)
            self.speaker.up[one] = event
            self.router.on_event(event)

    def hear(
        self, peer: str, *prefixes: str, next_hop: str = "", work: bool = True, **attributes: object
    ) -> None:
        """A peer announces."""
        said = PathAttributes(**attributes)  # type: ignore[arg-type]
        routes = tuple(Announcement(one, next_hop or peer, said) for one in prefixes)
        self.router.on_event(RoutesReceived(peer, announced=routes))
        if work:
            self.router.work()

    def withdraw(self, peer: str, *prefixes: str) -> None:
        """A peer withdraws."""
        self.router.on_event(RoutesReceived(peer, withdrawn=prefixes))
        self.router.work()

    @property
    def kernel(self) -> dict[str, str]:
        """What the kernel is to have."""
        wanted = self.router.wanted_in_kernel()
        assert wanted is not None
        return {
            str(prefix): "drop"
            if route.kind is RouteKind.BLACKHOLE
            else " ".join(str(hop.gateway) for hop in route.next_hops)
            for prefix, route in wanted.routes.items()
        }

    def told(self, peer: str) -> set[str]:
        """What a peer is told."""
        return set(self.speaker.advertised.get(peer, {}))


NORMAL = {OWN: "drop", THEIRS: OTHER}


def test_a_hostile_router_changes_nothing() -> None:
    """Default routes, our block, parts of others', pods as next hops: no forwarding changes."""
    world = World(peer(TOR, 65001))
    world.up(OTHER, TOR)
    world.hear(OTHER, THEIRS, local_pref=2147482623)
    assert world.kernel == NORMAL
    inside = ["198.19.16.64/27", "198.19.16.70/32", "198.19.16.5/32", "198.19.16.0/27"]
    for path in (as_sequence(65001), as_sequence(65001, 65002), ()):
        world.hear(TOR, "0.0.0.0/0", OWN, THEIRS, *inside, "127.0.0.0/8", as_path=path)
        world.hear(TOR, "10.0.0.0/8", "198.19.0.0/20", "198.19.0.3/32", as_path=path)
        assert world.kernel == NORMAL
    world.hear(TOR, FREE, next_hop="198.19.16.70", as_path=as_sequence(65001))
    assert world.kernel == NORMAL
    assert world.told(OTHER) == {OWN}


def test_a_flood_takes_the_session_down() -> None:
    """At 100,000 prefixes the session is held down, its paths go, all others stay as they are."""
    world = World(peer(TOR, 65001), pool("10.0.0.0/8", name="large"))
    world.up(OTHER, TOR)
    world.hear(OTHER, THEIRS)
    flood = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}/32" for n in range(100_001)]
    for start in range(0, 100_000, 1000):
        world.hear(TOR, *flood[start : start + 1000], work=False)
    world.router.work()
    assert len(world.kernel) == 100_002
    assert TOR not in world.speaker.held
    world.hear(TOR, flood[-1])
    reason, retry_s = world.speaker.held[TOR]
    assert (reason, retry_s > 0) == ("announced more than 100000 prefixes", True)
    world.hear(TOR, *flood[:5])  # was under way already
    assert world.kernel == NORMAL
    assert TOR not in world.router.rib.adj_ribs_in
    world.up(TOR)
    world.hear(TOR, flood[0])
    assert world.kernel == NORMAL | {flood[0]: TOR}


@pytest.mark.parametrize("by", ["peer", "cluster"])
def test_limits_are_settable(by: str) -> None:
    """A BGPPeer's annotation, or the cluster's, says how many prefixes are too many."""
    note = {"cymric.io/max-prefixes": "2"}
    spec = BGPPeerSpec(peer_ip=TOR, as_number=65001)
    tor = BGPPeer(
        metadata=ObjectMeta(name="tor", annotations=note if by == "peer" else None), spec=spec
    )
    world = World(tor, configuration(annotations=note if by == "cluster" else {}))
    world.up(OTHER, TOR)
    world.hear(TOR, FREE, "198.19.18.0/26")
    assert not world.speaker.held
    world.hear(TOR, "198.19.19.0/26")
    assert world.speaker.held.keys() == {TOR}


def test_equal_paths_share_up_to_a_limit() -> None:
    """Two routers that announce the same share the traffic; the annotation limits how many do."""
    tors = [peer(TOR, 65001, name="a"), peer(TOR_TWO, 65001, name="b")]
    world = World(*tors)
    world.up(TOR, TOR_TWO)
    for one in (TOR, TOR_TWO):
        world.hear(one, FREE, as_path=as_sequence(65001))
    assert world.kernel[FREE] == f"{TOR_TWO} {TOR}"
    world.learn(configuration(annotations={"cymric.io/max-paths": "1"}))
    assert world.kernel[FREE] == TOR_TWO
    world.learn(configuration(annotations={}))
    world.hear(TOR_TWO, FREE, as_path=as_sequence(65001), communities=((65535, 0),))
    assert world.kernel[FREE] == TOR
    world.withdraw(TOR, FREE)
    assert world.kernel[FREE] == TOR_TWO


def test_a_block_that_changes_hands_is_judged_again() -> None:
    """What a node announces counts from the moment the block is its own, and no longer."""
    world = World(node("third", f"{THIRD}/20"))
    world.up(OTHER, THIRD)
    world.hear(OTHER, THEIRS, "198.19.16.70/32")
    world.hear(THIRD, THEIRS, "198.19.16.70/32")
    assert world.kernel == NORMAL | {"198.19.16.70/32": OTHER}
    world.learn(block(THEIRS, "other", {"198.19.16.70/32": "third"}))
    assert world.kernel[THEIRS] == OTHER
    world.learn(block(THEIRS, "third"))
    assert world.kernel == NORMAL | {THEIRS: THIRD, "198.19.16.70/32": THIRD}


def test_a_filter_that_comes_and_changes() -> None:
    """Sessions with a filter that is missing are shut; its rules count when it is there."""
    tor = BGPPeer(
        metadata=ObjectMeta(name="tor"),
        spec=BGPPeerSpec(peer_ip=TOR, as_number=65001, filters=("f",)),
    )
    world = World(tor)
    world.up(OTHER, TOR)
    world.hear(TOR, FREE, "192.0.2.0/24", as_path=as_sequence(65001))
    assert (world.kernel, world.told(TOR)) == ({OWN: "drop"}, set())

    def rules(**spec: object) -> BGPFilter:
        return BGPFilter(metadata=ObjectMeta(name="f"), spec=msgspec.convert(spec, BGPFilterSpec))

    world.learn(rules())
    assert (world.kernel, world.told(TOR)) == ({OWN: "drop", FREE: TOR}, {OWN})
    accept = {"cidr": "192.0.2.0/24", "matchOperator": "In", "action": "Accept"}
    world.learn(rules(importV4=[accept], exportV4=[{"action": "Reject"}]))
    assert world.kernel == {OWN: "drop", FREE: TOR, "192.0.2.0/24": TOR}
    assert world.told(TOR) == set()


def test_a_peer_behind_a_gateway_has_a_route_of_its_own() -> None:
    """`reachableBy` is a route of ours to the peer, no peer overrides it, and it goes with it."""
    gateway, prefix = "198.19.0.77", f"{TOR}/32"
    plain = peer(TOR, 65001)
    world = World(plain, configuration(annotations={IMPORT_ANNOTATION: IMPORT_ALL}))
    behind = msgspec.structs.replace(
        plain, spec=msgspec.structs.replace(plain.spec, reachable_by=gateway)
    )
    world.learn(behind)
    assert world.kernel == {OWN: "drop", prefix: gateway}
    world.up(OTHER, TOR)
    world.hear(OTHER, prefix)
    world.hear(TOR, FREE, as_path=as_sequence(65001))
    assert world.kernel == {OWN: "drop", prefix: gateway, FREE: gateway}
    world.learn(plain)
    assert world.kernel == {OWN: "drop", prefix: OTHER, FREE: TOR}


def test_a_gateway_out_of_reach() -> None:
    """As long as the gateway cannot be reached, there is no route; as soon as it can, there is."""
    plain = peer(TOR, 65001)
    spec = msgspec.structs.replace(plain.spec, reachable_by="198.19.15.77")
    world = World(msgspec.structs.replace(plain, spec=spec))
    assert world.kernel == {OWN: "drop", f"{TOR}/32": "198.19.15.77"}, "nothing is known yet"
    near = OtherRoute(parse_network("198.19.0.0/24"), (Out(None, "eth0", 2),))
    far = OtherRoute(parse_network("198.19.15.0/24"), (Out(None, "eth1", 3),))
    for routes, expected in (((near,), {}), ((near, far), {f"{TOR}/32": "198.19.15.77"})):
        world.router.on_underlay(routes)
        world.router.work()
        assert world.kernel == {OWN: "drop", **expected}


def test_services_stay_out_of_the_kernel() -> None:
    """Service ranges are advertised and never routed, whoever else announces them."""
    world = World(configuration(serviceClusterIPs=[{"cidr": "10.96.0.0/12"}]))
    world.up(OTHER)
    world.hear(OTHER, "10.96.0.0/12", THEIRS)
    assert world.kernel == NORMAL
    assert world.told(OTHER) == {OWN, "10.96.0.0/12"}
    assert parse_network("10.96.0.0/12") in world.router.rib.loc_rib
    one = frozenset({parse_network("192.0.2.7/32")})
    world.router.on_service_addresses(one)
    world.router.work()
    assert world.told(OTHER) == {OWN, "10.96.0.0/12", "192.0.2.7/32"}


def test_ipv6() -> None:
    """An IPv6 session carries IPv6 blocks both ways, and what is borrowed, beside the IPv4 one."""

    def both(name: str, last: int) -> Node:
        bgp = NodeBGPSpec(ipv4_address=f"198.19.0.{last}/20", ipv6_address=f"fd00:1::{last}/64")
        return Node(metadata=ObjectMeta(name=name), spec=NodeSpec(bgp=bgp))

    ours, theirs, other6 = "fd00:16::/122", "fd00:16::40/122", "fd00:1::3"
    world = World(
        both("us", 2),
        both("other", 3),
        pool("fd00:16::/112", name="six"),
        block(ours, "us", {"fd00:16::5/128": "other"}),
        block(theirs, "other"),
        _endpoint("fd00:16::45"),
    )
    world.up(OTHER, other6)
    world.hear(OTHER, THEIRS)
    world.hear(other6, theirs, "fd00:16::5/128", "fd00:16::6/128", "::/0", "fe80::/64")
    assert world.kernel == NORMAL | {ours: "drop", theirs: other6, "fd00:16::5/128": other6}
    assert world.told(OTHER) == {OWN}
    assert world.told(other6) == {ours, "fd00:16::45/128"}
    assert {one.next_hop for one in world.speaker.advertised[other6].values()} == {"fd00:1::2"}


def _endpoint(address: str) -> WorkloadEndpoint:
    made = endpoint("six", "us", "198.19.16.5")
    spec = msgspec.structs.replace(made.spec, ip_networks=(f"{address}/128",))
    return msgspec.structs.replace(made, spec=spec)


def test_the_metric_that_a_preference_stands_for() -> None:
    """Nodes' LOCAL_PREF is a metric; that of others is none; the usual metric is configured."""
    world = World(configuration(ipv4NormalRoutePriority=900))
    world.up(OTHER)
    world.hear(OTHER, THEIRS, local_pref=2147482623)
    world.hear(OTHER, FREE, local_pref=100)
    wanted = world.router.wanted_in_kernel()
    assert wanted is not None
    metrics = {str(prefix): route.metric for prefix, route in wanted.routes.items()}
    assert metrics == {OWN: 900, THEIRS: 1024, FREE: 900}
    assert world.speaker.advertised[OTHER][OWN].attributes.local_pref == 2**31 - 1 - 900


def test_a_workload_that_moves_away_alive() -> None:
    """The node that holds its address and claims it with more than the usual preference gets a
    route of lower metric than felix' own; with the usual preference, or when it is gone, none.
    """
    address, usual = "198.19.16.7", 2**31 - 1 - 1024
    world = World(block(OWN, "us", {f"{address}/32": "other"}), endpoint("here", "us", address))
    world.up(OTHER)
    for local_pref, metric in ((usual, None), (usual + 512, 512), (usual, None)):
        world.hear(OTHER, f"{address}/32", local_pref=local_pref)
        wanted = world.router.wanted_in_kernel()
        assert wanted is not None
        route = wanted.routes.get(parse_network(f"{address}/32"))
        assert (None if route is None else route.metric) == metric


def test_cluster_routes_cannot_be_left_to_others() -> None:
    """A setting that is not honoured is named; routes are written all the same."""
    world = World(configuration(programClusterRoutes="Disabled"))
    world.up(OTHER)
    world.hear(OTHER, THEIRS)
    assert world.kernel == NORMAL
    (name,) = world.router.problems
    assert "programClusterRoutes" in name
    world.learn(configuration(programClusterRoutes="Enabled"))
    assert not world.router.problems


def test_pods_of_other_nodes_cost_nothing() -> None:
    """Another node's block changes with each of its pods; only what bears on routing is news."""
    world = World(endpoint("borrowing", "us", "198.19.16.130"))
    view = world.router.view

    def told(*objects: object) -> bool:
        return view.update([Update(key_of(one), one) for one in objects])

    assert not told(block(THEIRS, "other", {"198.19.16.70/32": "other"}))
    assert not told(endpoint("there", "other", "198.19.16.70"))
    assert told(block(THEIRS, "other", {"198.19.16.70/32": "us"}))
    assert told(block(THEIRS, "third"))
    assert told(block("198.19.16.128/26", "third", {"198.19.16.129/32": "third"}))
    assert told(block("198.19.16.128/26", "third", {"198.19.16.130/32": "third"}))
    assert told(node("third", f"{THIRD}/20"))
