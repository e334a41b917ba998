"""What the datastore says, as far as routing needs it: typed objects by name, nothing worked out.

    Syncer ▶ View.update ▶ peering, import_policy, export_inputs (each pure, from the whole)

Only this node's workload endpoints are kept, and the node's own blocks are indexed apart, so that
the changes of a large cluster cost this node little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from bgpd.exports import ExportInputs
from bgpd.imports import ImportPolicy, import_policy
from cymric.datastore.syncer import Update
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
from cymric.model.net import Network
from cymric.model.peering import Peering, PeeringInputs, peering_of
from cymric.model.resources import BGPConfiguration, BGPPeer, IPPool, Node

_T = TypeVar("_T")
_K = TypeVar("_K")


def prefixes(node: str) -> tuple[str, ...]:
    """What bgpd of `node` watches."""
    kinds = ("Node", "IPPool", "BGPPeer", "BGPConfiguration", "WorkloadEndpoint")
    return (*map(resource_prefix, kinds), block_prefix(), affinity_prefix(node))


@dataclass(slots=True)
class View:
    """The known objects. `own_blocks` are those whose object names this node."""

    node: str
    nodes: dict[str, Node] = field(default_factory=dict)
    pools: dict[str, IPPool] = field(default_factory=dict)
    peers: dict[str, BGPPeer] = field(default_factory=dict)
    configurations: dict[str, BGPConfiguration] = field(default_factory=dict)
    blocks: dict[Network, AllocationBlock] = field(default_factory=dict)
    own_blocks: dict[Network, AllocationBlock] = field(default_factory=dict)
    affinities: dict[Network, BlockAffinity] = field(default_factory=dict)
    endpoints: dict[ResourceKey, WorkloadEndpoint] = field(default_factory=dict)

    def update(self, updates: Sequence[Update]) -> None:
        """Take in what changed; None means gone."""
        for update in updates:
            match update.key:
                case BlockKey(cidr):
                    block = update.value if isinstance(update.value, AllocationBlock) else None
                    is_own = block is not None and block.owner_host == self.node
                    _set(self.blocks, cidr, block)
                    _set(self.own_blocks, cidr, block if is_own else None)
                case AffinityKey(owner, cidr, "host") if owner == self.node:
                    _set(self.affinities, cidr, _of(update.value, BlockAffinity))
                case ResourceKey() as key:
                    self._update_resource(key, update.value)
                case _:
                    pass

    def _update_resource(self, key: ResourceKey, value: object | None) -> None:
        match key.kind:
            case "Node":
                _set(self.nodes, key.name, _of(value, Node))
            case "IPPool":
                _set(self.pools, key.name, _of(value, IPPool))
            case "BGPPeer":
                _set(self.peers, key.name, _of(value, BGPPeer))
            case "BGPConfiguration":
                _set(self.configurations, key.name, _of(value, BGPConfiguration))
            case "WorkloadEndpoint":
                endpoint = _of(value, WorkloadEndpoint)
                is_here = endpoint is not None and endpoint.spec.node == self.node
                _set(self.endpoints, key, endpoint if is_here else None)
            case _:
                pass

    def peering(self) -> Peering:
        """The sessions this node should have."""
        inputs = PeeringInputs(
            nodes=self.nodes, peers=self.peers, configurations=self.configurations
        )
        return peering_of(self.node, inputs)

    def import_policy(self) -> ImportPolicy:
        """What this node takes from peers."""
        node = self.nodes.get(self.node)
        bgp = None if node is None else node.spec.bgp
        interface = None if bgp is None else bgp.ipv4_interface
        return import_policy(
            node=self.node,
            own_addresses=() if interface is None else (interface.ip,),
            pools=self.pools.values(),
            blocks=self.own_blocks.values(),
            endpoints=self.endpoints.values(),
            configuration=self.configurations.get("default"),
        )

    def export_inputs(self) -> ExportInputs:
        """What decides what this node advertises."""
        return ExportInputs(
            node=self.node,
            pools=tuple(self.pools.values()),
            blocks=self.blocks,
            affinities=self.affinities,
            endpoints=tuple(self.endpoints.values()),
        )


def _of(value: object | None, kind: type[_T]) -> _T | None:
    return value if isinstance(value, kind) else None


def _set(values: dict[_K, _T], key: _K, value: _T | None) -> None:
    if value is None:
        values.pop(key, None)
    else:
        values[key] = value
