"""What the datastore says, as far as routing needs it: typed objects by name, nothing worked out.

    Syncer ▶ View.update ▶ peering, import_policy, export_inputs, … (each pure, from the whole)

Only this node's workload endpoints are kept. Blocks change with every pod of the cluster, so what
routing needs of them (owner, and addresses that others hold) is kept apart as claims, changed in
place; which claims changed is told once (`take_changed_claims`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from bgpd.adj_rib_out import ExportPolicy, advertisements
from bgpd.decision import DEFAULT_MAX_PATHS
from bgpd.exports import (
    ROUTE_PRIORITY,
    ExportInputs,
    closed_pools,
    open_pools,
    own_aggregates,
)
from bgpd.filters import MOST_PREFERENCE, Direction, Rules, compile_rules
from bgpd.imports import Claim, ImportPolicy, claim_on, import_policy
from bgpd.next_hops import ON_LINK, Resolver
from bgpd.rib import DEFAULT_MAX_PREFIXES
from cymric.datastore.syncer import Update
from cymric.model.bgp_filter import BGPFilter
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.ipam import AllocationBlock, BlockAffinity
from cymric.model.keys import (
    AffinityKey,
    BlockKey,
    ResourceKey,
    affinity_prefix,
    block_prefix,
    resource_prefix,
)
from cymric.model.net import Network, parse_interface, parse_network
from cymric.model.peering import Peering, PeeringInputs, Session, peering_of
from cymric.model.prefix import PrefixMap, PrefixSet
from cymric.model.resources import BGPConfiguration, BGPPeer, IPPool, Node

_T = TypeVar("_T")
_K = TypeVar("_K")


def prefixes(node: str) -> tuple[str, ...]:
    """What bgpd of `node` watches."""
    kinds = ("Node", "IPPool", "BGPPeer", "BGPFilter", "BGPConfiguration", "WorkloadEndpoint")
    return (*map(resource_prefix, kinds), block_prefix(), affinity_prefix(node))


MAX_PREFIXES_ANNOTATION = "cymric.io/max-prefixes"
MAX_PATHS_ANNOTATION = "cymric.io/max-paths"


@dataclass(slots=True)
class View:
    """The known objects. `service_addresses`: told by whoever watches services, if anybody."""

    node: str
    nodes: dict[str, Node] = field(default_factory=dict)
    pools: dict[str, IPPool] = field(default_factory=dict)
    peers: dict[str, BGPPeer] = field(default_factory=dict)
    filters: dict[str, BGPFilter] = field(default_factory=dict)
    configurations: dict[str, BGPConfiguration] = field(default_factory=dict)
    blocks: dict[Network, AllocationBlock] = field(default_factory=dict)
    affinities: dict[Network, BlockAffinity] = field(default_factory=dict)
    endpoints: dict[ResourceKey, WorkloadEndpoint] = field(default_factory=dict)
    service_addresses: frozenset[Network] = frozenset()
    claims: PrefixMap[Claim] = field(default_factory=PrefixMap)
    _changed_claims: set[Network] = field(default_factory=set)

    def update(self, updates: Sequence[Update]) -> bool:
        """Take in what changed; None means gone. False if nothing that routing looks at did.

        Another node's block changes with each of its pods; that alone means nothing here.
        """
        is_news = False
        for update in updates:
            match update.key:
                case BlockKey(cidr):
                    block = update.value if isinstance(update.value, AllocationBlock) else None
                    _set(self.blocks, cidr, block)
                    is_news |= self._claim(cidr, None if block is None else claim_on(block))
                    is_news = is_news or self._has_workload_in(cidr)
                case AffinityKey(owner, cidr, "host") if owner == self.node:
                    _set(self.affinities, cidr, _of(update.value, BlockAffinity))
                    is_news = True
                case ResourceKey() as key:
                    is_news |= self._update_resource(key, update.value)
                case _:
                    pass
        return is_news

    def _has_workload_in(self, cidr: Network) -> bool:
        return any(
            address in cidr
            for endpoint in self.endpoints.values()
            for address in endpoint.spec.addresses
        )

    def _update_resource(self, key: ResourceKey, value: object | None) -> bool:
        match key.kind:
            case "Node":
                _set(self.nodes, key.name, _of(value, Node))
            case "IPPool":
                _set(self.pools, key.name, _of(value, IPPool))
            case "BGPPeer":
                _set(self.peers, key.name, _of(value, BGPPeer))
            case "BGPFilter":
                _set(self.filters, key.name, _of(value, BGPFilter))
            case "BGPConfiguration":
                _set(self.configurations, key.name, _of(value, BGPConfiguration))
            case "WorkloadEndpoint":
                endpoint = _of(value, WorkloadEndpoint)
                is_here = endpoint is not None and endpoint.spec.node == self.node
                was_here = key in self.endpoints
                _set(self.endpoints, key, endpoint if is_here else None)
                return is_here or was_here
            case _:
                return False
        return True

    def _claim(self, cidr: Network, claim: Claim | None) -> bool:
        if self.claims.get(cidr) == claim:
            return False
        self._changed_claims.add(cidr)
        if claim is None:
            self.claims.discard(cidr)
        else:
            self.claims[cidr] = claim
        return True

    def take_changed_claims(self) -> frozenset[Network]:
        """The blocks whose claims changed since the last call."""
        changed, self._changed_claims = self._changed_claims, set()
        return frozenset(changed)

    @property
    def cluster(self) -> BGPConfiguration | None:
        """The cluster-wide settings."""
        return self.configurations.get("default")

    def peering_inputs(self) -> PeeringInputs:
        """What decides about sessions."""
        return PeeringInputs(nodes=self.nodes, peers=self.peers, configurations=self.configurations)

    def peering(self) -> Peering:
        """The sessions this node should have."""
        return peering_of(self.node, self.peering_inputs())

    def import_policy(
        self, sessions: Iterable[Session], resolver: Resolver = ON_LINK
    ) -> ImportPolicy:
        """What this node takes from the peers of these sessions."""
        inputs = self.peering_inputs()
        return import_policy(
            node=self.node,
            own_addresses=inputs.addresses(self.node),
            cluster_id=inputs.cluster_id(self.node),
            pools=self.pools.values(),
            claims=self.claims,
            endpoints=self.endpoints.values(),
            configuration=self.cluster,
            rules={
                session.peer_address: self._rules(session, "import")
                for session in sessions
                if session.filters
            },
            nodes={name: inputs.asn(name) for name in self.nodes},
            node_by_router_id={str(inputs.router_id(name)): name for name in self.nodes},
            resolver=resolver,
            usual_local_prefs=tuple(MOST_PREFERENCE - self.route_priority(v) for v in (4, 6)),
        )

    def export_inputs(self) -> ExportInputs:
        """What decides what this node originates."""
        node = self.nodes.get(self.node)
        return ExportInputs(
            node=self.node,
            pools=tuple(self.pools.values()),
            blocks=self.blocks,
            affinities=self.affinities,
            endpoints=tuple(self.endpoints.values()),
            labels=None if node is None else node.labels,
            configuration=self.cluster,
            service_addresses=self.service_addresses,
        )

    def export_policies(self, sessions: Iterable[Session]) -> dict[str, ExportPolicy]:
        """What decides what each peer hears, by peer."""
        pools = tuple(self.pools.values())
        opened, closed = open_pools(pools), closed_pools(pools)
        aggregates = PrefixSet.of(own_aggregates(self.export_inputs()))
        said = advertisements(self.cluster, self.configurations.get(f"node.{self.node}"))
        balancers = () if self.cluster is None else self.cluster.spec.service_load_balancer_ips
        ranges = PrefixSet.of(parse_network(one.cidr) for one in balancers)
        return {
            session.key: ExportPolicy(
                session=session,
                rules=self._rules(session, "export"),
                open=opened,
                closed=closed,
                reflected_ranges=ranges if session.cluster_id else PrefixSet.of(()),
                aggregates=aggregates,
                advertisements=said,
                local_pref=MOST_PREFERENCE - self.route_priority(session.version),
                subnet=self._shared_subnet(session),
            )
            for session in sessions
        }

    def _shared_subnet(self, session: Session) -> Network | None:
        """The node's own network, as its Node says, if the session does not leave it."""
        node = self.nodes.get(self.node)
        bgp = None if node is None else node.spec.bgp
        text = "" if bgp is None else bgp.ipv4_address if session.version == 4 else bgp.ipv6_address
        if not text or "/" not in text:
            return None
        interface = parse_interface(text)
        is_ours = session.local_address == interface.ip
        return interface.network if is_ours and session.peer_address in interface.network else None

    def problems(self) -> Mapping[str, str]:
        """Settings that routing does not honour, and why."""
        if self.cluster is None or self.cluster.spec.program_cluster_routes != "Disabled":
            return {}
        name = "BGPConfiguration default: programClusterRoutes Disabled"
        return {name: "is not honoured: nobody else would write the routes to pods of other nodes"}

    def route_priority(self, version: int) -> int:
        """The kernel metric of routes to pods."""
        if self.cluster is None:
            return ROUTE_PRIORITY
        spec = self.cluster.spec
        return spec.ipv4_normal_route_priority if version == 4 else spec.ipv6_normal_route_priority

    def max_paths(self) -> int:
        """How many equal paths share the traffic."""
        return self._number(MAX_PATHS_ANNOTATION, DEFAULT_MAX_PATHS)

    def max_prefixes(self) -> int:
        """How many prefixes a peer may announce for which its BGPPeer says nothing."""
        return self._number(MAX_PREFIXES_ANNOTATION, DEFAULT_MAX_PREFIXES)

    def _number(self, annotation: str, default: int) -> int:
        """A positive number from the cluster's annotations; what is none counts as not said."""
        text = "" if self.cluster is None else self.cluster.annotations.get(annotation, "")
        return int(text) if text.isascii() and text.isdecimal() and int(text) > 0 else default

    def _rules(self, session: Session, direction: Direction) -> Rules:
        return compile_rules(
            session.filters,
            self.filters,
            direction=direction,
            version=session.version,
            is_ibgp=session.is_ibgp,
        )


def _of(value: object | None, kind: type[_T]) -> _T | None:
    return value if isinstance(value, kind) else None


def _set(values: dict[_K, _T], key: _K, value: _T | None) -> None:
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value
