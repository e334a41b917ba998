"""A small cluster for IPAM tests: nodes and pools stored, and what must hold of the keys."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from cymric.datastore.api import Datastore, put
from cymric.datastore.syncer import Update
from cymric.model import keys
from cymric.model.codec import decode, encode
from cymric.model.ipam import AllocationBlock, AllocationHandle, BlockAffinity
from cymric.model.keys import AffinityKey, BlockKey, HandleKey, Key, ResourceKey
from cymric.model.resources import IPPool, IPPoolSpec, Node, ObjectMeta
from ipam import block as blocks
from ipam.allocator import Allocator


async def store_node(store: Datastore, name: str, **labels: str) -> None:
    """A Node with these labels."""
    node = Node(metadata=ObjectMeta(name=name, labels=labels or None))
    await put(store, str(ResourceKey("Node", name)), encode(node))


async def store_pool(store: Datastore, name: str, cidr: str, **spec: Any) -> None:
    """An IPPool."""
    pool = IPPool(metadata=ObjectMeta(name=name), spec=IPPoolSpec(cidr=cidr, **spec))
    await put(store, str(ResourceKey("IPPool", name)), encode(pool))


async def feed(allocator: Allocator, store: Datastore) -> None:
    """Hand the allocator a snapshot of what a Syncer would tell it."""
    for prefix in allocator.prefixes:
        for pair in (await store.list(prefix)).items:
            decoded = decode(pair.key, pair.value)
            if decoded is not None:
                allocator.on_updates([Update(*decoded)])
    allocator.on_in_sync()


@asynccontextmanager
async def running(store: Datastore, node: str, **options: Any) -> AsyncIterator[Allocator]:
    """A node's allocator at work, fed with what is stored now."""
    allocator = Allocator(store, node, **options)
    await feed(allocator, store)
    work = asyncio.create_task(allocator.run())
    try:
        yield allocator
    finally:
        work.cancel()
        (outcome,) = await asyncio.gather(work, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError), f"the allocator ended: {outcome!r}"


async def everything(store: Datastore) -> dict[Key, Any]:
    """All IPAM keys and values, typed; anything malformed fails."""
    found = (decode(pair.key, pair.value) for pair in (await store.list(keys.IPAM)).items)
    return {pair[0]: pair[1] for pair in found if pair is not None}


def assert_consistent(stored: dict[Key, Any]) -> dict[str, list[str]]:
    """Check every rule between blocks, handles and affinities; returns addresses by handle."""
    networks = [key.cidr for key in stored if isinstance(key, BlockKey)]
    for number, network in enumerate(networks):
        assert not any(network.overlaps(other) for other in networks[:number]), (
            f"{network} overlaps"
        )
    held: dict[str, list[str]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    seen: set[str] = set()
    for key, block in stored.items():
        if not isinstance(key, BlockKey):
            continue
        assert isinstance(block, AllocationBlock)
        assert blocks.problems(block) == ()
        assert block.affinity is not None or not block.is_empty, "an empty block without owner"
        if block.owner_host is not None:
            affinity = stored.get(AffinityKey(block.owner_host, key.cidr))
            assert affinity == BlockAffinity(state="confirmed"), f"{key} without its affinity"  # type: ignore[arg-type]
        for ordinal, holder in block.held():
            address = str(block.address(ordinal))
            assert address not in seen, f"{address} has two owners"
            seen.add(address)
            assert holder.handle is not None
            held.setdefault(holder.handle, []).append(address)
            counts[holder.handle, block.cidr] += 1
    stored_counts: Counter[tuple[str, str]] = Counter()
    for key, value in stored.items():
        if isinstance(key, HandleKey):
            assert isinstance(value, AllocationHandle)
            assert value.block, "a handle that holds nothing"
            stored_counts.update({(key.handle_id, cidr): n for cidr, n in value.block.items()})
        if isinstance(key, AffinityKey):
            block = stored.get(BlockKey(key.cidr))
            assert block is not None
            assert block.owner_host == key.owner, f"{key} is stale"
    assert stored_counts == counts
    return held


def owned_by(stored: dict[Key, Any], host: str) -> set[str]:
    """The blocks of a host."""
    return {str(key.cidr) for key in stored if isinstance(key, AffinityKey) and key.owner == host}


def addresses(assignments: Iterable[Any]) -> list[str]:
    """The addresses of assignments, as text."""
    return [str(assignment.address) for assignment in assignments]
