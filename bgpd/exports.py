"""What this node advertises: its confirmed blocks, and the addresses it holds in others' blocks.

    datastore ▶ advertised ▶ announcements (per session) ▶ Speaker.advertise

A block is ours if the block object itself names this node and our affinity to it is confirmed;
neither alone is enough, because a claim may be half made or half undone. A workload address that
lies in no such block (borrowed, or its block is being given up) goes out as /32 if a pool covers
it, unless its block says that another node holds it. Blocks of a single address are never
aggregates: the workload's own /32 is what goes out.

The whole set is worked out from state at every change. Paths learned from iBGP are not passed on to
iBGP peers (RFC 4271 §9.2); passing on paths inside pools to eBGP peers is not done yet, its place
is here.

Source: Calico 3.32's export filter, steps 0, 2, 5 and 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from bgpd.speaker import Announcement, PathAttributes
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.ipam import AllocationBlock, BlockAffinity
from cymric.model.net import Network, contains, host_network
from cymric.model.peering import Session
from cymric.model.resources import IPPool

ROUTE_PRIORITY = 1024
"""The metric of our routes in the kernel (Calico's normal route priority)."""
LOCAL_PREF = 2**31 - 1 - ROUTE_PRIORITY
"""What stock nodes give routes of that metric over iBGP, and turn back into it: 2147482623."""


class Why(StrEnum):
    """Why a prefix is advertised."""

    OWN_BLOCK = "block of this node"
    WORKLOAD = "workload address outside the node's blocks"
    FOREIGN = "workload address outside the pools, from another IPAM"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInputs:
    """What the datastore says, as far as it bears on advertising. `endpoints`: of any node."""

    node: str
    pools: tuple[IPPool, ...]
    blocks: Mapping[Network, AllocationBlock]
    affinities: Mapping[Network, BlockAffinity]
    endpoints: tuple[WorkloadEndpoint, ...]


def own_aggregates(inputs: ExportInputs) -> frozenset[Network]:
    """The blocks that are provably ours and larger than one address."""
    return frozenset(
        cidr
        for cidr, affinity in inputs.affinities.items()
        if affinity.is_confirmed
        and cidr.prefixlen < cidr.max_prefixlen
        and (block := inputs.blocks.get(cidr)) is not None
        and block.owner_host == inputs.node
    )


def advertised(inputs: ExportInputs) -> dict[Network, Why]:
    """Every prefix this node advertises, in order, and why."""
    aggregates = own_aggregates(inputs)
    closed = [pool.spec.network for pool in inputs.pools if pool.spec.disable_bgp_export]
    found = {
        cidr: Why.OWN_BLOCK
        for cidr in aggregates
        if not any(contains(network, cidr) for network in closed)
    }
    open_pools = [pool.spec.network for pool in inputs.pools if not pool.spec.disable_bgp_export]
    for prefix in _workload_prefixes(inputs):
        if (
            not any(contains(cidr, prefix) for cidr in aggregates)
            and any(contains(network, prefix) for network in open_pools)
            and not any(contains(network, prefix) for network in closed)
            and _may_be_held_here(prefix, inputs)
        ):
            found[prefix] = Why.WORKLOAD
    pools = open_pools + closed
    for prefix in _workload_prefixes(inputs, only_announced_anywhere=True):
        if not any(contains(network, prefix) for network in pools):
            found.setdefault(prefix, Why.FOREIGN)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def announcements(prefixes: Iterable[Network], session: Session) -> dict[str, Announcement]:
    """The Adj-RIB-Out of one session. Next hop is our own address; LOCAL_PREF on iBGP only."""
    attributes = PathAttributes(local_pref=LOCAL_PREF if session.is_ibgp else None)
    next_hop, version = str(session.local_address), session.local_address.version
    return {
        str(prefix): Announcement(str(prefix), next_hop, attributes)
        for prefix in prefixes
        if prefix.version == version
    }


def _workload_prefixes(
    inputs: ExportInputs, *, only_announced_anywhere: bool = False
) -> Iterable[Network]:
    for endpoint in inputs.endpoints:
        if only_announced_anywhere and not endpoint.is_announced_anywhere:
            continue
        if endpoint.spec.node == inputs.node:
            yield from map(host_network, endpoint.spec.addresses)


def _may_be_held_here(prefix: Network, inputs: ExportInputs) -> bool:
    address = prefix.network_address
    for cidr, block in inputs.blocks.items():
        if address in cidr:
            holder = block.holder_of(block.ordinal(address))
            return holder is None or holder.attributes.get("node", inputs.node) == inputs.node
    return True


def _order(prefix: Network) -> tuple[int, int, int]:
    return prefix.version, int(prefix.network_address), prefix.prefixlen
