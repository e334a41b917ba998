"""What this node originates: its confirmed blocks, addresses it holds in others' blocks, services.

    datastore ▶ local_routes ▶ Adj-RIB-Out (adj_rib_out.py), one per session

A block is ours if the block object itself names this node and our affinity to it is confirmed;
neither alone is enough, because a claim may be half made or half undone. A workload address that
lies in no such block (borrowed, or its block is being given up) goes out as /32 if a pool covers
it, unless its block says that another node holds it. Blocks of a single address are never
aggregates: the workload's own /32 is what goes out.

Service ranges go out from every node, except ranges of a single address, which stand for services
that are announced one by one (`service_addresses`, told by whoever watches services), and except
from nodes with the label that keeps load balancers away.

What is known here and not advertised by default (`why` None) is listed as well, because an export
filter may let it out. The whole set is worked out from state at every change.

Source: Calico 3.32's origination and export filter, steps 0, 2, 5, 6 and 8; its service routes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.ipam import AllocationBlock, BlockAffinity
from cymric.model.net import Network, host_network, parse_network
from cymric.model.prefix import PrefixSet
from cymric.model.resources import (
    DEFAULT_ROUTE_PRIORITY,
    BGPConfiguration,
    BGPConfigurationSpec,
    CIDRBlock,
    IPPool,
)

ROUTE_PRIORITY = DEFAULT_ROUTE_PRIORITY
"""The metric of our routes in the kernel unless configured (Calico's normal route priority)."""
LOCAL_PREF = 2**31 - 1 - ROUTE_PRIORITY
"""What stock nodes give routes of that metric over iBGP, and turn back into it: 2147482623."""
EXCLUDE_LABEL = "node.kubernetes.io/exclude-from-external-load-balancers"


class Why(StrEnum):
    """Why a prefix is advertised."""

    OWN_BLOCK = "block of this node"
    WORKLOAD = "workload address outside the node's blocks"
    FOREIGN = "workload address outside the pools, from another IPAM"
    SERVICE_RANGE = "range of service addresses"
    SERVICE = "address of a service"


@dataclass(frozen=True, slots=True)
class Local:
    """A prefix of this node. `why` None: only an export filter can let it out.

    `interface` is that of the workload, "" for prefixes that belong to no interface.
    """

    why: Why | None
    interface: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportInputs:
    """What the datastore says, as far as it bears on advertising. `endpoints`: of any node.

    `claims` gives the block objects by prefix. `service_addresses` are those of services that this
    node should attract traffic for.
    """

    node: str
    pools: tuple[IPPool, ...]
    blocks: Mapping[Network, AllocationBlock]
    affinities: Mapping[Network, BlockAffinity]
    endpoints: tuple[WorkloadEndpoint, ...]
    labels: Mapping[str, str] | None = None
    configuration: BGPConfiguration | None = None
    service_addresses: frozenset[Network] = frozenset()


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


def local_routes(inputs: ExportInputs) -> dict[Network, Local]:
    """Every prefix of this node, in order, and whether and why it is advertised."""
    aggregates = own_aggregates(inputs)
    closed = closed_pools(inputs.pools)
    found = {cidr: Local(None if closed.covers(cidr) else Why.OWN_BLOCK) for cidr in aggregates}
    for endpoint in inputs.endpoints:
        if endpoint.spec.node == inputs.node:
            for prefix in map(host_network, endpoint.spec.addresses):
                why = _why_workload(prefix, endpoint, inputs, PrefixSet.of(aggregates))
                if prefix not in found or found[prefix].why is None:
                    found[prefix] = Local(why, endpoint.spec.interface_name)
    for prefix, why in _services(inputs):
        found.setdefault(prefix, Local(None if closed.covers(prefix) else why))
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def advertised(inputs: ExportInputs) -> dict[Network, Why]:
    """Every prefix this node advertises of its own unless filters say otherwise, and why."""
    return {
        prefix: local.why for prefix, local in local_routes(inputs).items() if local.why is not None
    }


def open_pools(pools: Iterable[IPPool]) -> PrefixSet:
    """The pools whose prefixes go out."""
    return PrefixSet.of(pool.spec.network for pool in pools if not pool.spec.disable_bgp_export)


def closed_pools(pools: Iterable[IPPool]) -> PrefixSet:
    """The pools whose prefixes stay in."""
    return PrefixSet.of(pool.spec.network for pool in pools if pool.spec.disable_bgp_export)


def kept_out_of_kernel(configuration: BGPConfiguration | None) -> PrefixSet:
    """Service ranges: kube-proxy's, never the routing table's, whoever announces them."""
    if configuration is None:
        return PrefixSet.of(())
    spec = configuration.spec
    ranges = [parse_network(one.cidr) for one in spec.service_cluster_ips]
    ranges += _several((*spec.service_external_ips, *spec.service_load_balancer_ips))
    return PrefixSet.of(ranges)


def _why_workload(
    prefix: Network, endpoint: WorkloadEndpoint, inputs: ExportInputs, aggregates: PrefixSet
) -> Why | None:
    if closed_pools(inputs.pools).covers(prefix) or aggregates.covers(prefix):
        return None
    if not open_pools(inputs.pools).covers(prefix):
        return Why.FOREIGN if endpoint.is_announced_anywhere else None
    return Why.WORKLOAD if _may_be_held_here(prefix, inputs) else None


def _may_be_held_here(prefix: Network, inputs: ExportInputs) -> bool:
    address = prefix.network_address
    for length in {cidr.prefixlen for cidr in inputs.blocks}:
        block = inputs.blocks.get(prefix.supernet(new_prefix=length))
        if block is not None:
            holder = block.holder_of(block.ordinal(address))
            return holder is None or holder.attributes.get("node", inputs.node) == inputs.node
    return True


def _services(inputs: ExportInputs) -> Iterator[tuple[Network, Why]]:
    if inputs.configuration is None or (inputs.labels or {}).get(EXCLUDE_LABEL) == "true":
        return
    spec = inputs.configuration.spec
    for network in _announced_ranges(spec):
        yield network, Why.SERVICE_RANGE
    for address in inputs.service_addresses:
        yield address, Why.SERVICE


def _announced_ranges(spec: BGPConfigurationSpec) -> Iterator[Network]:
    for one in spec.service_cluster_ips:
        yield parse_network(one.cidr)
    yield from _several(spec.service_external_ips)
    if spec.service_load_balancer_aggregation != "Disabled":
        yield from _several(spec.service_load_balancer_ips)


def _several(ranges: Iterable[CIDRBlock]) -> Iterator[Network]:
    """Those of more than one address."""
    for network in (parse_network(one.cidr) for one in ranges):
        if network.prefixlen < network.max_prefixlen:
            yield network


def _order(prefix: Network) -> tuple[int, int, int]:
    return prefix.version, int(prefix.network_address), prefix.prefixlen
