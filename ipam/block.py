"""Pure changes to one allocation block, with exactly Calico's semantics.

Every function takes a block and returns a new one, ready to be written with compare-and-swap; its
sequence number is one higher. Addresses leave `unallocated` at the front and come back at its
tail, so an address rests as long as possible before it is used again. Who holds an address is an
attribute record; allocations with equal handle and attributes share one, and a record without
allocations goes, the others moving up. Source: Calico's ipam_block.go, described in its own words
in docs/design/ipam.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from msgspec import UNSET
from msgspec.structs import replace

from cymric.model.ipam import WINDOWS_RESERVED_HANDLE, AllocationAttribute, AllocationBlock
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
    draft = Draft(block)
    taken = draft.take(count, record, reserved)
    return draft.finish(), taken


def take_ordinal(
    block: AllocationBlock, ordinal: int, record: AllocationAttribute
) -> AllocationBlock | None:
    """Give `record` this one address; None if somebody holds it."""
    draft = Draft(block)
    return draft.finish() if draft.take_ordinal(ordinal, record) else None


def give_back(block: AllocationBlock, ordinals: Iterable[int]) -> AllocationBlock:
    """Free the given ordinals, in this order at the tail; those already free are passed over.

    Nothing to free: the block unchanged, and so no reason to write it.
    """
    draft = Draft(block)
    draft.give_back(ordinals)
    return draft.finish()


Undo = list[Callable[[], None]]
"""How to take changes back, the last one first."""


class Draft:
    """A block while many changes are gathered that will be stored by one write.

    Each change appends to `undo` how it is taken back. `finish` gives the block to store.
    """

    def __init__(self, block: AllocationBlock, undo: Undo | None = None) -> None:
        self.before = block
        self._allocations = list(block.allocations)
        self._free = list(block.unallocated)
        self._records = list(block.attributes or ())
        self._sequences = dict(block.sequence_number_for_allocation or {})
        self._affinity = (block.affinity, block.affinity_claim_time)
        self._undo: Undo = [] if undo is None else undo
        self._changes = 0
        self._has_loose_records = False
        self._indices: dict[RecordKey, int] | None = None

    @property
    def is_changed(self) -> bool:
        """Whether there is anything to store."""
        return self._changes > 0

    @property
    def affinity(self) -> str | None:
        """The owner as it will be stored."""
        return self._affinity[0]

    @property
    def is_empty(self) -> bool:
        """Whether nobody holds an address, Windows' own reservations aside."""
        windows = {
            n for n, record in enumerate(self._records) if record.handle == WINDOWS_RESERVED_HANDLE
        }
        return all(index is None or index in windows for index in self._allocations)

    @property
    def free_count(self) -> int:
        """How many ordinals are free, reserved or not."""
        return len(self._free)

    def holder_of(self, ordinal: int) -> AllocationAttribute | None:
        """The record of whoever holds `ordinal`; None if it is free."""
        index = self._allocations[ordinal]
        return None if index is None else self._records[index]

    def sequence_of(self, ordinal: int) -> int | None:
        """The sequence number an allocation remembers; None if it has none (older writers)."""
        return self._sequences.get(str(ordinal))

    def ordinals_of_handle(self, handle: str) -> tuple[int, ...]:
        """The ordinals a handle holds, ascending."""
        mine = {n for n, record in enumerate(self._records) if record.handle == handle}
        return tuple(n for n, index in enumerate(self._allocations) if index in mine)

    def take(
        self,
        count: int,
        record: AllocationAttribute,
        reserved: Collection[int] = NONE_RESERVED,
        is_refused: Callable[[int], bool] | None = None,
    ) -> tuple[int, ...]:
        """Give `record` up to `count` ordinals from the front, passing over what may not be given.

        `is_refused` is asked only about ordinals that would be given.
        """
        taken: list[int] = []
        position = 0
        while len(taken) < count and position < len(self._free):
            ordinal = self._free[position]
            if ordinal in reserved or (is_refused is not None and is_refused(ordinal)):
                position += 1
                continue
            self._allocate(position, record)
            taken.append(ordinal)
        return tuple(taken)

    def take_ordinal(self, ordinal: int, record: AllocationAttribute) -> bool:
        """Give `record` this one ordinal; False if somebody holds it."""
        if self._allocations[ordinal] is not None:
            return False
        self._allocate(self._free.index(ordinal), record)
        return True

    def give_back(self, ordinals: Iterable[int]) -> tuple[int, ...]:
        """Free ordinals, in this order at the tail; returns those that were held."""
        freed = []
        for ordinal in ordinals:
            index = self._allocations[ordinal]
            if index is not None:
                self._free_one(ordinal, index)
                freed.append(ordinal)
        return tuple(freed)

    def touch(self) -> None:
        """A reason to store the block although nothing else changes."""
        self._count_change()

    def disown(self) -> None:
        """The block without owner: what is held stays held."""
        before = self._affinity
        self._affinity = (None, UNSET)
        self._undo.append(lambda: setattr(self, "_affinity", before))
        self._count_change()

    def finish(self) -> AllocationBlock:
        """The block to store, its sequence number one higher; unchanged if nothing was done."""
        if not self._changes:
            return self.before
        allocations, records = tuple(self._allocations), tuple(self._records)
        if self._has_loose_records:
            allocations, records = _without_unreferenced(self._allocations, records)
        before = self.before
        return replace(
            before,
            affinity=self._affinity[0],
            affinity_claim_time=self._affinity[1],
            allocations=allocations,
            unallocated=tuple(self._free),
            attributes=None if before.attributes is None and not records else records,
            sequence_number=before.sequence_number + 1,
            sequence_number_for_allocation=self._sequences,
        )

    def _allocate(self, position: int, record: AllocationAttribute) -> None:
        ordinal = self._free.pop(position)
        self._allocations[ordinal] = self._index_of(record)
        self._sequences[str(ordinal)] = self.before.sequence_number

        def undo() -> None:
            self._allocations[ordinal] = None
            self._free.insert(position, ordinal)
            self._sequences.pop(str(ordinal), None)
            self._has_loose_records = True

        self._undo.append(undo)
        self._count_change()

    def _free_one(self, ordinal: int, index: int) -> None:
        self._allocations[ordinal] = None
        self._free.append(ordinal)
        sequence = self._sequences.pop(str(ordinal), None)
        self._has_loose_records = True

        def undo() -> None:
            self._allocations[ordinal] = index
            self._free.pop()
            if sequence is not None:
                self._sequences[str(ordinal)] = sequence

        self._undo.append(undo)
        self._count_change()

    def _count_change(self) -> None:
        self._changes += 1
        self._undo.append(self._uncount_change)

    def _uncount_change(self) -> None:
        self._changes -= 1

    def _index_of(self, record: AllocationAttribute) -> int:
        if self._indices is None:
            self._indices = {}
            for index, known in enumerate(self._records):
                if not known.alternateOwnerAttrs:
                    self._indices.setdefault(_key_of(known), index)
        index = self._indices.setdefault(_key_of(record), len(self._records))
        if index == len(self._records):
            self._records.append(record)
        return index


def own(block: AllocationBlock, affinity: str, *, claimed_at: str) -> AllocationBlock:
    """The block with this owner from now on."""
    return touch(replace(block, affinity=affinity, affinity_claim_time=claimed_at))


def disown(block: AllocationBlock) -> AllocationBlock:
    """The block without owner: what is held stays held."""
    return touch(replace(block, affinity=None, affinity_claim_time=UNSET))


def counts_by_handle(block: AllocationBlock) -> Counter[str]:
    """How many addresses of the block each handle holds."""
    records = block.attributes or ()
    by_index = Counter(index for index in block.allocations if index is not None)
    counts: Counter[str] = Counter()
    for index, count in by_index.items():
        if (handle := records[index].handle) is not None:
            counts[handle] += count
    return counts


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
    first_by_key: dict[RecordKey, int] = {}
    for index, record in enumerate(records):
        if record.alternateOwnerAttrs:
            continue  # never shared
        first = first_by_key.setdefault(_key_of(record), index)
        if first != index:
            found.append(f"attribute records {first} and {index} of block {block.cidr} are equal")
    found += [
        f"sequence number of ordinal {text} of block {block.cidr} is from the future"
        for text, number in sequences.items()
        if number >= block.sequence_number
    ]
    return tuple(found)


RecordKey = tuple[str | None, frozenset[tuple[str, str]]]


def _key_of(record: AllocationAttribute) -> RecordKey:
    return record.handle, frozenset(record.attributes.items())


def _is_same(one: AllocationAttribute, other: AllocationAttribute) -> bool:
    """Whether two records may be shared: equal handle and attributes, no alternate owner."""
    return (
        one.handle == other.handle
        and one.attributes == other.attributes
        and not one.alternateOwnerAttrs
        and not other.alternateOwnerAttrs
    )


def _without_unreferenced(
    allocations: Sequence[int | None], records: tuple[AllocationAttribute, ...]
) -> tuple[tuple[int | None, ...], tuple[AllocationAttribute, ...]]:
    kept = sorted({index for index in allocations if index is not None})
    new_index = {old: new for new, old in enumerate(kept)}
    return (
        tuple(None if index is None else new_index[index] for index in allocations),
        tuple(records[index] for index in kept),
    )
