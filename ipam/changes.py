"""What a transaction stores, and how to tell later whether it did. Pure.

Made by `Drafts` from all the changes it gathered. Every key that a written value rests on is
compared. When the answer is lost, what the keys hold tells whether the transaction landed, and
whether it still may.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cymric.datastore.api import (
    ABSENT,
    MAX_REQUEST_BYTES,
    Compare,
    Delete,
    KeyValue,
    NoneCreated,
    Operation,
    Put,
    Transaction,
)
from cymric.model.codec import encode
from cymric.model.ipam import AllocationBlock
from cymric.model.keys import BlockKey
from ipam.mirror import Mirror


class Changes:
    """What shall be stored: typed values by key (None: delete), and what they rest on."""

    def __init__(
        self,
        mirror: Mirror,
        values: Mapping[str, object | None],
        compared: Iterable[str],
        around: Iterable[Compare],
        inside: Iterable[NoneCreated],
    ) -> None:
        self.values = values
        self.before = {text: mirror.pair(text) for text in compared}
        compares = {
            text: Compare(text, ABSENT if pair is None else pair.revision)
            for text, pair in self.before.items()
        }
        compares.update((compare.key, compare) for compare in around)
        operations: list[Operation] = [
            Delete(text) if value is None else Put(text, encode(value))
            for text, value in values.items()
        ]
        self.transaction = Transaction(tuple(compares.values()), operations, tuple(inside))

    @property
    def is_too_large(self) -> bool:
        """Whether it exceeds what one request may hold."""
        operations = self.transaction.operations
        size = sum(len(op.key) + (len(op.value) if isinstance(op, Put) else 0) for op in operations)
        return size > MAX_REQUEST_BYTES

    def remember(self, mirror: Mirror, revision: int) -> None:
        """The transaction landed at `revision`: what the keys hold now."""
        for operation in self.transaction.operations:
            text = operation.key
            if isinstance(operation, Put):
                pair = KeyValue(text, operation.value, revision)
                mirror.see_written(text, pair, self.values[text])
            else:
                mirror.see_written(text, None, None)

    def rules_out(self, other: Changes) -> bool:
        """Whether the other changes, which did not land before these, never will."""
        return not other.before.keys().isdisjoint(self.values)

    def has_landed(self, mirror: Mirror) -> bool:
        """Whether what the blocks hold now proves that the transaction landed, its answer lost.

        One trace is enough, since all of it happened or nothing; another writer may have been at
        the same block since. Only what nobody else would write counts: a block with exactly our
        bytes, or an address given at our sequence number to our holder. Releases alone leave no
        such trace once the block was written again; repeating them is harmless.
        """
        return any(
            _is_trace(value, mirror.pair(text), mirror.value(BlockKey(value.network), type(value)))
            for text, value in self.values.items()
            if isinstance(value, AllocationBlock)
        )


def _is_trace(ours: AllocationBlock, pair: KeyValue | None, now: AllocationBlock | None) -> bool:
    if pair is None or now is None:
        return False
    if pair.value == encode(ours):
        return True
    given_by_us = ours.sequence_number - 1
    sequences = now.sequence_number_for_allocation or {}
    return any(
        sequences.get(text) == number == given_by_us
        and now.holder_of(int(text)) == ours.holder_of(int(text))
        for text, number in (ours.sequence_number_for_allocation or {}).items()
    )
