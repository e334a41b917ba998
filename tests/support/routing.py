"""A small cluster as routing sees it: objects made from few words, and written to a datastore."""

from __future__ import annotations

from ipaddress import ip_network

import msgspec

from cymric.datastore.api import Datastore, Delete, Put, Transaction
from cymric.model import codec
from cymric.model.bgp_filter import BGPFilter
from cymric.model.endpoints import WorkloadEndpoint, WorkloadEndpointSpec, endpoint_name
from cymric.model.ipam import AffinityState, AllocationAttribute, AllocationBlock, BlockAffinity
from cymric.model.keys import AffinityKey, BlockKey, Key, ResourceKey
from cymric.model.resources import (
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPPeer,
    BGPPeerSpec,
    IPPool,
    IPPoolSpec,
    Node,
    NodeBGPSpec,
    NodeSpec,
    ObjectMeta,
)

POOL = "198.19.16.0/21"


def node(name: str, address: str, *, asn: int | None = None) -> Node:
    """A node with its address on the underlay."""
    bgp = NodeBGPSpec(ipv4_address=address, as_number=asn)
    return Node(metadata=ObjectMeta(name=name), spec=NodeSpec(bgp=bgp))


def pool(cidr: str = POOL, *, name: str = "pool", disable_bgp_export: bool = False) -> IPPool:
    """A pool without encapsulation."""
    spec = IPPoolSpec(cidr=cidr, disable_bgp_export=disable_bgp_export)
    return IPPool(metadata=ObjectMeta(name=name), spec=spec)


def peer(address: str, asn: int, *, name: str = "router") -> BGPPeer:
    """A global peer."""
    return BGPPeer(metadata=ObjectMeta(name=name), spec=BGPPeerSpec(peer_ip=address, as_number=asn))


def configuration(*, annotations: dict[str, str] | None = None, **spec: object) -> BGPConfiguration:
    """The cluster's BGP settings."""
    return BGPConfiguration(
        metadata=ObjectMeta(name="default", annotations=annotations),
        spec=msgspec.convert(spec, BGPConfigurationSpec),
    )


def block(cidr: str, owner: str | None, holders: dict[str, str] | None = None) -> AllocationBlock:
    """A block of `owner`; `holders` gives the node that holds each taken address."""
    network = ip_network(cidr)
    nodes = sorted(set((holders or {}).values()))
    taken = {
        int(ip_network(address).network_address) - int(network.network_address): nodes.index(name)
        for address, name in (holders or {}).items()
    }
    size = network.num_addresses
    return AllocationBlock(
        cidr=cidr,
        affinity=None if owner is None else f"host:{owner}",
        allocations=tuple(taken.get(ordinal) for ordinal in range(size)),
        unallocated=tuple(ordinal for ordinal in range(size) if ordinal not in taken),
        attributes=tuple(
            AllocationAttribute(handle_id=f"handle-{name}", secondary={"node": name})
            for name in nodes
        ),
    )


def affinity(state: AffinityState = AffinityState.CONFIRMED) -> BlockAffinity:
    """A claim in that state."""
    return BlockAffinity(state=state)


def endpoint(name: str, on: str, address: str) -> WorkloadEndpoint:
    """A workload on node `on` with one address."""
    spec = WorkloadEndpointSpec(
        orchestrator="k8s",
        node=on,
        pod=name,
        endpoint="eth0",
        ip_networks=(f"{address}/32",),
        interface_name=f"cali{name}",
    )
    names = endpoint_name(on, "k8s", name, "eth0")
    return WorkloadEndpoint(metadata=ObjectMeta(name=names, namespace="default"), spec=spec)


def key_of(value: object, *, owner: str = "", cidr: str = "") -> Key:
    """Where a value is stored; an affinity does not say itself."""
    match value:
        case Node() | IPPool() | BGPPeer() | BGPConfiguration() | BGPFilter():
            return ResourceKey(value.kind, value.metadata.name)
        case WorkloadEndpoint():
            return ResourceKey(value.kind, value.metadata.name, value.metadata.namespace)
        case AllocationBlock():
            return BlockKey(value.network)
        case BlockAffinity():
            return AffinityKey(owner, ip_network(cidr))
        case _:
            raise TypeError(f"no key for {value!r}")


async def store(datastore: Datastore, *values: object) -> None:
    """Write values; a block owned by a node comes with its confirmed affinity."""
    for value in values:
        puts = [Put(str(key_of(value)), codec.encode(value))]
        if isinstance(value, AllocationBlock) and value.owner_host is not None:
            claim = key_of(affinity(), owner=value.owner_host, cidr=value.cidr)
            puts.append(Put(str(claim), codec.encode(affinity())))
        await datastore.commit(Transaction((), puts))


async def remove(datastore: Datastore, *keys: Key) -> None:
    """Delete keys."""
    await datastore.commit(Transaction((), [Delete(str(key)) for key in keys]))
