"""Import policy: which received paths may be used, and the reason if not.

    Adj-RIB-In ▶ opinion (of a path) ▶ judge_prefix (of a prefix with it) ▶ decision

Safe by default: a peer cannot pull our traffic by announcing what it should not have. In this
order; the first that holds decides:

1. What can only be wrong is never taken: loops (AS, originator, cluster), next hops that are
   ourselves, nobody or out of reach (next_hops.py), addresses of workloads here, unless one of
   them is migrating alive.
2. The session's BGPFilters accept or reject. What they accept skips 4.
3. Blocks belong to nodes, and the datastore says to whom. Inside a block only its owner may
   announce anything, and a node that holds an address of it (borrowed) that /32 (/128). Inside our
   own block that leaves the borrowers. A router that passes on what others announced is believed
   for a block as such, and for a borrowed address, if the AS path begins in the owner's or
   borrower's AS; never for a part of a block, which would beat the owner by being more specific.
   An equal block from the owner itself wins by LOCAL_PREF.
4. Only prefixes inside IP pools and service ranges, through next hops outside the pools.

The annotation `cymric.io/import-policy: all` on BGPConfiguration `default` leaves 1 and 2 only.

Who announced a reflected path is told by its ORIGINATOR_ID, a node's router ID.

The policy is a value worked out from the datastore; two equal ones mean that nothing needs to be
judged again. `claims` and `resolver` are not compared: they change in place, and the change is told
by block and by next hop.

Source: RFC 4271 §9.1.2 (loops, next hop), RFC 4456 §8 (originator, cluster), RFC 6890 (special
prefixes), Calico 3.32's import filter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from bgpd.decision import Path
from bgpd.exports import LOCAL_PREF
from bgpd.filters import NO_CHANGES, NO_RULES, Candidate, Changes, Rules
from bgpd.next_hops import ON_LINK, Resolver
from bgpd.reflection import has_looped
from bgpd.rib import Rejection
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.ipam import AllocationBlock
from cymric.model.net import Address, Network, parse_network
from cymric.model.prefix import PrefixMap, PrefixSet
from cymric.model.resources import BGPConfiguration, IPPool

IMPORT_ANNOTATION = "cymric.io/import-policy"
IMPORT_ALL = "all"

MARTIANS = PrefixSet.parse(
    *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/127", "::ffff:0:0/96", "fe80::/10", "ff00::/8"),
)
"""Prefixes that never belong in a routing table (RFC 6890)."""

REMEMBERED_HOPS = 10_000

_NOTHING: Mapping[Address, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Claim:
    """To whom a block belongs, and which of its addresses other nodes hold."""

    owner: str
    lent: Mapping[Address, str] = field(default_factory=lambda: _NOTHING)


def claim_on(block: AllocationBlock) -> Claim | None:
    """What the block object says; None if it belongs to no node."""
    owner = block.owner_host
    if owner is None:
        return None
    records = block.attributes or ()
    if all(record.attributes.get("node", owner) == owner for record in records):
        return Claim(owner)
    lent = {
        block.address(ordinal): node
        for ordinal, holder in block.held()
        if (node := holder.attributes.get("node", owner)) != owner
    }
    return Claim(owner, lent)


@dataclass(frozen=True, slots=True)
class Opinion:
    """What is known of a path before its prefixes are looked at.

    `announcer` is the node that announced it, "" for outsiders. `changed` remembers what filters
    made of the path, by what they changed. `interface` is that by which the next hop is reached,
    where filters may ask for it.
    """

    announcer: str
    rules: Rules
    is_next_hop_in_pool: bool
    changed: dict[Changes, Path] | None = None
    interface: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPolicy:
    """What this node takes from its peers.

    `own_addresses` are the node's own; `allowed` pools and service ranges; `claims` the blocks of
    all nodes; `local_workloads` the addresses of workloads here, whose routes are felix' business.
    `rules` are the compiled import filters by peer address. `nodes` gives each node's AS number,
    `node_by_router_id` the node behind an ORIGINATOR_ID; `usual_local_prefs` what nodes give routes
    to workloads that are not on the move, IPv4 and IPv6.
    """

    node: str
    own_addresses: frozenset[Address] = frozenset()
    cluster_id: str = ""
    allowed: PrefixSet
    pools: PrefixSet = field(default_factory=lambda: PrefixSet.of(()))
    claims: PrefixMap[Claim] = field(default_factory=PrefixMap, compare=False)
    local_workloads: frozenset[Address] = frozenset()
    rules: Mapping[Address, Rules] = field(default_factory=dict)
    nodes: Mapping[str, int] = field(default_factory=dict)
    node_by_router_id: Mapping[str, str] = field(default_factory=dict)
    takes_all: bool = False
    usual_local_prefs: tuple[int, ...] = (LOCAL_PREF, LOCAL_PREF)
    resolver: Resolver = field(default=ON_LINK, compare=False, repr=False)
    hops: dict[int, Rejection | bool] = field(default_factory=dict, compare=False, repr=False)

    def judge(self, prefix: Network, path: Path) -> Path | Rejection:
        """Both steps: the path as it takes part in the decision, or why it does not."""
        opinion = self.opinion(path)
        if isinstance(opinion, Rejection):
            return opinion
        return self.judge_prefix(prefix, path, opinion)

    def opinion(self, path: Path) -> Opinion | Rejection:
        """See `rib.Policy`."""
        attributes, peer = path.attributes, path.peer
        own = 0
        for segment in attributes.as_path:
            own += segment.asns.count(peer.local_asn)
        if own > peer.allowed_own_asns:
            return Rejection.LOOP
        originator = attributes.originator_id if peer.is_ibgp else None
        if originator and self.node_by_router_id.get(originator) == self.node:
            return Rejection.OWN_ORIGINATOR
        if attributes.cluster_list and has_looped(path, cluster_id=self.cluster_id):
            return Rejection.OWN_CLUSTER
        hop = self._judge_next_hop(path.next_hop)
        if isinstance(hop, Rejection):
            return hop
        rules = self.rules.get(peer.address, NO_RULES) if self.rules else NO_RULES
        if rules.missing:
            return Rejection.FILTER_MISSING
        return Opinion(
            announcer=self.node_by_router_id.get(originator, "") if originator else peer.node,
            rules=rules,
            is_next_hop_in_pool=hop,
            changed={} if rules else None,
            interface=self.resolver.resolve(path.next_hop).interface if rules else "",
        )

    def _judge_next_hop(self, hop: Address) -> Rejection | bool:
        """Why it is none, or whether it lies in a pool; there are few, so it is remembered."""
        number = int(hop) if hop.version == 4 else -1 - int(hop)
        known = self.hops.get(number)
        if known is None:
            if hop in self.own_addresses:
                known = Rejection.NEXT_HOP_IS_OURS
            elif not _is_usable(hop):
                known = Rejection.NEXT_HOP_UNUSABLE
            elif not self.resolver.resolve(hop).hops:
                known = Rejection.NEXT_HOP_UNREACHABLE
            else:
                known = any(hop in network for network in self.pools.networks)
            if len(self.hops) >= REMEMBERED_HOPS:
                self.hops.clear()
            self.hops[number] = known
        return known

    def judge_prefix(self, prefix: Network, path: Path, opinion: Opinion) -> Path | Rejection:
        """See `rib.Policy`."""
        if prefix.prefixlen == prefix.max_prefixlen:
            address = prefix.network_address
            if path.next_hop == address:
                return Rejection.NEXT_HOP_UNUSABLE  # a route to the next hop through itself
            if address in self.local_workloads and not self._is_moving(prefix, path, opinion):
                return Rejection.LOCAL_WORKLOAD
        is_allowed = self.takes_all
        if opinion.rules:
            verdict = opinion.rules.judge(
                Candidate(
                    prefix=prefix,
                    attributes=path.attributes,
                    local_pref=path.local_pref,
                    is_learned=True,
                    interface=opinion.interface,
                )
            )
            if verdict == "reject":
                return Rejection.FILTERED
            if verdict is not None:
                path, is_allowed = _changed(path, verdict, opinion), True
        if not self.takes_all:
            held = self.claims.holding(prefix)
            if held is not None and (rejection := self._against(held, prefix, path, opinion)):
                return rejection
        if is_allowed:
            return path
        if not self.allowed.covers(prefix):
            return _outside(prefix)
        if opinion.is_next_hop_in_pool:
            return Rejection.NEXT_HOP_IN_POOL
        return path

    def _against(
        self, held: tuple[Network, Claim], prefix: Network, path: Path, opinion: Opinion
    ) -> Rejection | None:
        """What the owner of the block around `prefix` has against the path."""
        block, claim = held
        is_host = prefix.prefixlen == prefix.max_prefixlen
        borrower = claim.lent.get(prefix.network_address) if is_host else None
        if claim.owner == self.node:
            if borrower is not None and self._speaks_for(borrower, path, opinion):
                return None
            return Rejection.NOT_BORROWED if is_host else Rejection.INSIDE_OWN_BLOCK
        if opinion.announcer == claim.owner:
            return None
        if borrower is not None and self._speaks_for(borrower, path, opinion):
            return None
        if prefix.prefixlen == block.prefixlen and self._speaks_for(claim.owner, path, opinion):
            return None
        return Rejection.NOT_THE_OWNER

    def _is_moving(self, prefix: Network, path: Path, opinion: Opinion) -> bool:
        """Whether a node claims a workload of ours with more than the usual preference: one that
        migrates alive. Whether it may is said by the block, as for any borrowed address.
        """
        return (
            bool(opinion.announcer)
            and path.local_pref > self.usual_local_prefs[prefix.version == 6]
        )

    def _speaks_for(self, node: str, path: Path, opinion: Opinion) -> bool:
        """Whether the node announced the path, or a router passes on what began in its AS.

        A router that leaves its own AS out of the path could pass for the owner: not believed.
        """
        if opinion.announcer == node:
            return True
        if not path.peer.is_ibgp and path.neighbour_asn != path.peer.asn:
            return False
        return bool(path.attributes.as_path) and path.origin_asn == self.nodes.get(node)


def import_policy(
    *,
    node: str,
    own_addresses: Iterable[Address] = (),
    cluster_id: str = "",
    pools: Iterable[IPPool],
    claims: PrefixMap[Claim],
    endpoints: Iterable[WorkloadEndpoint],
    configuration: BGPConfiguration | None,
    rules: Mapping[Address, Rules] | None = None,
    nodes: Mapping[str, int] | None = None,
    node_by_router_id: Mapping[str, str] | None = None,
    resolver: Resolver = ON_LINK,
    usual_local_prefs: tuple[int, ...] = (LOCAL_PREF, LOCAL_PREF),
) -> ImportPolicy:
    """The policy of `node`, from the whole of what the datastore says now."""
    networks = [pool.spec.network for pool in pools]
    annotations = {} if configuration is None else configuration.annotations
    return ImportPolicy(
        node=node,
        own_addresses=frozenset(own_addresses),
        cluster_id=cluster_id,
        allowed=PrefixSet.of([*networks, *service_ranges(configuration)]),
        pools=PrefixSet.of(networks),
        claims=claims,
        local_workloads=frozenset(
            address
            for endpoint in endpoints
            if endpoint.spec.node == node
            for address in endpoint.spec.addresses
        ),
        rules=rules or {},
        nodes=nodes or {},
        node_by_router_id=node_by_router_id or {},
        takes_all=annotations.get(IMPORT_ANNOTATION) == IMPORT_ALL,
        resolver=resolver,
        usual_local_prefs=usual_local_prefs,
    )


def service_ranges(configuration: BGPConfiguration | None) -> tuple[Network, ...]:
    """All ranges of service addresses."""
    if configuration is None:
        return ()
    spec = configuration.spec
    ranges = (spec.service_cluster_ips, spec.service_external_ips, spec.service_load_balancer_ips)
    return tuple(parse_network(one.cidr) for blocks in ranges for one in blocks)


def _changed(path: Path, changes: Changes, opinion: Opinion) -> Path:
    """The path as a filter makes it; the same object for all prefixes that share it."""
    if changes == NO_CHANGES:
        return path
    assert opinion.changed is not None  # there are rules
    found = opinion.changed.get(changes)
    if found is None:
        attributes = changes.apply(path.attributes)
        preference = path.preference if changes.local_pref is None else changes.local_pref
        found = replace(path, attributes=attributes, preference=preference)
        opinion.changed[changes] = found
    return found


def _outside(prefix: Network) -> Rejection:
    if prefix.prefixlen == 0:
        return Rejection.DEFAULT_ROUTE
    return Rejection.MARTIAN if MARTIANS.covers(prefix) else Rejection.OUTSIDE_POOLS


def _is_usable(hop: Address) -> bool:
    is_special = hop.is_unspecified or hop.is_loopback or hop.is_multicast
    return not is_special and not (hop.version == 4 and hop.is_reserved)
