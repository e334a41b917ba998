"""Pure changes to one allocation block, with exactly Calico's semantics.

Every function takes a block and returns a new one, ready to be written with compare-and-swap; its
sequence number is one higher. Addresses leave `unallocated` at the front and come back at its
tail, so an address rests as long as possible before it is used again. Who holds an address is an
attribute record; allocations with equal handle and attributes share one, and a record without
allocations goes, the others moving up. Source: Calico's ipam_block.go, described in its own words
in docs/design/ipam.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from msgspec import UNSET
from msgspec.structs import replace

from cymric.model.ipam import AllocationAttribute, AllocationBlock
from cymric.model.net import Network

NONE_RESERVED: frozenset[int] = frozenset()


def new_block(
    network: Network, *, affinity: str | None, claimed_at: str, sequence_number: int
) -> AllocationBlock:
    """An empty block. `claimed_at` is RFC 3339 text, `sequence_number` UnixNano of its birth."""
    size = network.num_addresses
    return AllocationBlock(
        cidr=str(network),
        affinity=affinity,
        affinity_claim_time=claimed_at if affinity is not None else UNSET,
        allocations=(None,) * size,
        unallocated=tuple(range(size)),
        attributes=None,
        sequence_number=sequence_number,
        sequence_number_for_allocation={},
    )


def record_of(handle: str | None, attributes: Mapping[str, str]) -> AllocationAttribute:
    """The attribute record of a holder, as Calico would write it."""
    return AllocationAttribute(
        handle_id=UNSET if handle is None else handle,
        secondary=dict(attributes) if attributes else UNSET,
    )


def free_ordinals(
    block: AllocationBlock, reserved: Collection[int] = NONE_RESERVED
) -> tuple[int, ...]:
    """The ordinals that may be handed out, in the order they will be."""
    return tuple(ordinal for ordinal in block.unallocated if ordinal not in reserved)


def ordinals_of_record(block: AllocationBlock, record: AllocationAttribute) -> tuple[int, ...]:
    """The ordinals held under exactly this handle and these attributes."""
    return tuple(ordinal for ordinal, holder in block.held() if _is_same(holder, record))


def ordinals_of_handle(block: AllocationBlock, handle: str) -> tuple[int, ...]:
    """The ordinals a handle holds, ascending."""
    return tuple(ordinal for ordinal, holder in block.held() if holder.handle == handle)


def take(
    block: AllocationBlock,
    count: int,
    record: AllocationAttribute,
    reserved: Collection[int] = NONE_RESERVED,
) -> tuple[AllocationBlock, tuple[int, ...]]:
    """Give `record` up to `count` addresses, the longest idle first; fewer if the block ran out.

    Reserved ordinals are passed over and keep their place. Nothing free: the block unchanged.
    """
    taken = free_ordinals(block, reserved)[:count]
    return (_allocate(block, taken, record), taken) if taken else (block, ())


def take_ordinal(
    block: AllocationBlock, ordinal: int, record: AllocationAttribute
) -> AllocationBlock | None:
    """Give `record` this one address; None if somebody holds it."""
    if block.allocations[ordinal] is not None:
        return None
    return _allocate(block, (ordinal,), record)


def give_back(block: AllocationBlock, ordinals: Iterable[int]) -> AllocationBlock:
    """Free the given ordinals, in this order at the tail; those already free are passed over.

    Nothing to free: the block unchanged, and so no reason to write it.
    """
    freed = tuple(
        ordinal for ordinal in dict.fromkeys(ordinals) if block.allocations[ordinal] is not None
    )
    if not freed:
        return block
    gone = set(freed)
    left = [None if n in gone else index for n, index in enumerate(block.allocations)]
    sequences = block.sequence_number_for_allocation or {}
    allocations, attributes = _without_unreferenced(left, block.attributes or ())
    return replace(
        block,
        allocations=allocations,
        unallocated=(*block.unallocated, *freed),
        attributes=attributes,
        sequence_number=block.sequence_number + 1,
        sequence_number_for_allocation={
            text: number for text, number in sequences.items() if int(text) not in gone
        },
    )


def own(block: AllocationBlock, affinity: str, *, claimed_at: str) -> AllocationBlock:
    """The block with this owner from now on."""
    return touch(replace(block, affinity=affinity, affinity_claim_time=claimed_at))


def disown(block: AllocationBlock) -> AllocationBlock:
    """The block without owner: what is held stays held."""
    return touch(replace(block, affinity=None, affinity_claim_time=UNSET))


def touch(block: AllocationBlock) -> AllocationBlock:
    """Nothing changed but the sequence number: a write that makes concurrent ones fail."""
    return replace(block, sequence_number=block.sequence_number + 1)


def problems(block: AllocationBlock) -> tuple[str, ...]:
    """What a checker should report; a block read from the datastore already has sound ordinals."""
    records = block.attributes or ()
    referenced = {index for index in block.allocations if index is not None}
    sequences = block.sequence_number_for_allocation or {}
    found = [
        f"attribute record {index} of block {block.cidr} is held by no address"
        for index in range(len(records))
        if index not in referenced
    ]
    found += [
        f"attribute records {first} and {second} of block {block.cidr} are equal"
        for second in range(len(records))
        for first in range(second)
        if _is_same(records[first], records[second])
    ]
    found += [
        f"sequence number of ordinal {text} of block {block.cidr} is from the future"
        for text, number in sequences.items()
        if number >= block.sequence_number
    ]
    return tuple(found)


def _allocate(
    block: AllocationBlock, ordinals: tuple[int, ...], record: AllocationAttribute
) -> AllocationBlock:
    records = block.attributes or ()
    index = next((i for i, known in enumerate(records) if _is_same(known, record)), len(records))
    if index == len(records):
        records = (*records, record)
    taken = set(ordinals)
    sequences = dict(block.sequence_number_for_allocation or {})
    sequences.update((str(ordinal), block.sequence_number) for ordinal in ordinals)
    return replace(
        block,
        allocations=tuple(
            index if n in taken else held for n, held in enumerate(block.allocations)
        ),
        unallocated=tuple(n for n in block.unallocated if n not in taken),
        attributes=records,
        sequence_number=block.sequence_number + 1,
        sequence_number_for_allocation=sequences,
    )


def _is_same(one: AllocationAttribute, other: AllocationAttribute) -> bool:
    """Whether two records may be shared: equal handle and attributes, no alternate owner."""
    return (
        one.handle == other.handle
        and one.attributes == other.attributes
        and not one.alternateOwnerAttrs
        and not other.alternateOwnerAttrs
    )


def _without_unreferenced(
    allocations: list[int | None], records: tuple[AllocationAttribute, ...]
) -> tuple[tuple[int | None, ...], tuple[AllocationAttribute, ...]]:
    kept = sorted({index for index in allocations if index is not None})
    new_index = {old: new for new, old in enumerate(kept)}
    return (
        tuple(None if index is None else new_index[index] for index in allocations),
        tuple(records[index] for index in kept),
    )
