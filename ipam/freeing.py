"""Freeing addresses of one block, with the handles that count them, in one transaction.

Which handles are involved is known only once the block has been read; so the keys to read start as
a guess, and the round is repeated when the block names handles that were not among them. A handle's
count becomes what the block says, which also mends counts that a crash elsewhere left too high.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from cymric.datastore.api import Datastore, Operation
from cymric.model.ipam import AllocationBlock, AllocationHandle
from cymric.model.keys import BlockKey, HandleKey
from cymric.model.net import Address, Network
from ipam import block as blocks
from ipam.storage import View, delete, land, put

Choose = Callable[[AllocationBlock], Sequence[int]]
"""Which ordinals of a block to free."""

Freed = tuple[tuple[Address, ...], frozenset[HandleKey]]
"""What was freed, and the handles that have to be read before anything can be."""


async def free(
    store: Datastore, network: Network, choose: Choose, *, handles: Collection[HandleKey] = ()
) -> tuple[Address, ...]:
    """Free what `choose` picks and tell what was held. An empty block without owner goes as well.

    `handles` are those likely to be involved. Raises Contended, and whatever `choose` raises.
    """
    known = frozenset(handles)
    while True:
        ordered = sorted(known, key=str)
        change = partial(_freed, network, choose, ordered)
        freed, missing = await land(store, (BlockKey(network), *ordered), change)
        if not missing:
            return freed
        known |= missing


def _freed(
    network: Network, choose: Choose, known: Sequence[HandleKey], view: View
) -> tuple[Freed, Sequence[Operation]]:
    key = BlockKey(network)
    block = view.get(key, AllocationBlock)
    if block is None:
        return ((), frozenset()), [op for h in known for op in _recounted(view, h, network, None)]
    ordinals = choose(block)
    missing = _handles_of(block, ordinals) - frozenset(known)
    if missing:
        return ((), missing), []
    changed = blocks.give_back(block, ordinals)
    operations = [op for h in known for op in _recounted(view, h, network, changed)]
    if changed is not block:
        is_over = changed.is_empty and changed.affinity is None
        operations.insert(0, delete(key) if is_over else put(key, changed))
    held = tuple(block.address(n) for n in ordinals if block.allocations[n] is not None)
    return (held, frozenset()), operations


def _handles_of(block: AllocationBlock, ordinals: Iterable[int]) -> frozenset[HandleKey]:
    holders = (block.holder_of(ordinal) for ordinal in ordinals)
    names = {holder.handle for holder in holders if holder is not None and holder.handle}
    # A handle with a slash has no key that could be read back: nothing counts it.
    return frozenset(HandleKey(name) for name in names if "/" not in name)


def _recounted(
    view: View, key: HandleKey, network: Network, block: AllocationBlock | None
) -> list[Operation]:
    """Make a handle's count for this block what the block says; without counts the key goes."""
    handle = view.get(key, AllocationHandle)
    if handle is None:
        return []
    count = len(blocks.ordinals_of_handle(block, key.handle_id)) if block is not None else 0
    counts = {cidr: n for cidr, n in handle.block.items() if cidr != str(network)}
    if count:
        counts[str(network)] = count
    if counts == handle.block:
        return []
    return [put(key, AllocationHandle(block=counts))] if counts else [delete(key)]
