"""Import policy: which received paths may be used, and the reason if not.

    Adj-RIB-In ▶ ImportPolicy.judge ▶ decision

Safe by default (a peer cannot pull our traffic by announcing what it should not have): a prefix is
taken only inside an IP pool or a service range, and inside a block of this node only the /32 (/128)
of an address that the block object itself says is held by the announcing node (borrowing depends
on it). The annotation `cymric.io/import-policy: all` on BGPConfiguration `default` takes
everything but what can only be wrong: loops, and next hops that are ourselves or nobody.

The policy is a value worked out from the datastore; two equal ones mean that nothing needs to be
judged again. BGPFilter will be a list of rules asked before `judge` speaks.

Source: RFC 4271 §9.1.2 (loops, next hop), RFC 4456 §8 (originator), RFC 6890 (special prefixes).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from bgpd.decision import Path
from bgpd.rib import Rejection
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.ipam import AllocationBlock
from cymric.model.net import Address, Network, parse_network
from cymric.model.prefix import PrefixSet
from cymric.model.resources import BGPConfiguration, IPPool

IMPORT_ANNOTATION = "cymric.io/import-policy"
IMPORT_ALL = "all"

MARTIANS = PrefixSet.parse(
    *("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "240.0.0.0/4"),
    *("::/127", "::ffff:0:0/96", "fe80::/10", "ff00::/8"),
)
"""Prefixes that never belong in a routing table (RFC 6890)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportPolicy:
    """What this node takes from its peers.

    `own_addresses` are the node's own; `allowed` pools and service ranges; `borrowed` the addresses
    of own blocks that another node holds, by that node's name; `local_workloads` the addresses of
    workloads here, whose routes are felix' business.
    """

    own_addresses: frozenset[Address] = frozenset()
    allowed: PrefixSet
    own_blocks: PrefixSet
    borrowed: Mapping[Address, str]
    local_workloads: frozenset[Address] = frozenset()
    takes_all: bool = False

    def judge(self, path: Path) -> Rejection | None:
        """Why the path must not be used; None if it may."""
        if path.peer.local_asn in path.attributes.asns:
            return Rejection.LOOP
        originator = path.attributes.originator_id
        if originator and path.peer.is_ibgp and originator in map(str, self.own_addresses):
            return Rejection.OWN_ORIGINATOR
        if rejection := self._judge_next_hop(path):
            return rejection
        if _is_host(path.prefix) and path.prefix.network_address in self.local_workloads:
            return Rejection.LOCAL_WORKLOAD
        return None if self.takes_all else self._judge_prefix(path)

    def _judge_next_hop(self, path: Path) -> Rejection | None:
        hop = path.next_hop
        if hop in self.own_addresses:
            return Rejection.NEXT_HOP_IS_OURS
        if not _is_usable(hop):
            return Rejection.NEXT_HOP_UNUSABLE
        if _is_host(path.prefix) and hop == path.prefix.network_address:
            return Rejection.NEXT_HOP_UNUSABLE  # a route to the next hop through itself
        return None

    def _judge_prefix(self, path: Path) -> Rejection | None:
        prefix = path.prefix
        if prefix.prefixlen == 0:
            return Rejection.DEFAULT_ROUTE
        if MARTIANS.covers(prefix):
            return Rejection.MARTIAN
        if self.own_blocks.covers(prefix):
            if not _is_host(prefix):
                return Rejection.INSIDE_OWN_BLOCK
            holder = self.borrowed.get(prefix.network_address)
            if holder is None or holder != path.peer.node:
                return Rejection.NOT_BORROWED
        if not self.allowed.covers(prefix):
            return Rejection.OUTSIDE_POOLS
        return None


def import_policy(
    *,
    node: str,
    own_addresses: Iterable[Address],
    pools: Iterable[IPPool],
    blocks: Iterable[AllocationBlock],
    endpoints: Iterable[WorkloadEndpoint],
    configuration: BGPConfiguration | None,
) -> ImportPolicy:
    """The policy of `node`, from the whole of what the datastore says now."""
    own = [block for block in blocks if block.owner_host == node]
    allowed = {pool.spec.network for pool in pools}
    if configuration is not None:
        spec = configuration.spec
        ranges = (spec.service_cluster_ips, spec.service_external_ips)
        for service in (*ranges[0], *ranges[1], *spec.service_load_balancer_ips):
            allowed.add(parse_network(service.cidr))
    annotations = {} if configuration is None else configuration.annotations
    return ImportPolicy(
        own_addresses=frozenset(own_addresses),
        allowed=PrefixSet.of(allowed),
        own_blocks=PrefixSet.of(block.network for block in own),
        borrowed={
            block.address(ordinal): holder.attributes["node"]
            for block in own
            for ordinal, holder in block.held()
            if holder.attributes.get("node", node) != node
        },
        local_workloads=frozenset(
            address
            for endpoint in endpoints
            if endpoint.spec.node == node
            for address in endpoint.spec.addresses
        ),
        takes_all=annotations.get(IMPORT_ANNOTATION) == IMPORT_ALL,
    )


@lru_cache(maxsize=4096)
def _is_usable(hop: Address) -> bool:
    is_special = hop.is_unspecified or hop.is_loopback or hop.is_multicast
    return not is_special and not (hop.version == 4 and hop.is_reserved)


def _is_host(prefix: Network) -> bool:
    return prefix.prefixlen == prefix.max_prefixlen
