"""The datastore in memory: the same contract as etcd, for tests and trials without a server.

A fake that keeps state: revisions, guarded transactions, watches with history, compaction and
leases behave as etcd's do, and `tests/contract` holds both to the same tests. What only a test
wants is kept apart at the end: taking the store down, losing an answer, compacting, wiping.

Invariants: a commit has no await between comparing and writing, so it is atomic in one event loop;
every call yields once first, so that tasks race as they would over a network. One instance stands
for the cluster: several clients may share it, and `close` lets go of nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Sequence

from cymric.datastore.api import (
    ABSENT,
    Compacted,
    Conflict,
    Delete,
    KeyValue,
    LeaseLost,
    Listing,
    Operation,
    OutcomeUnknown,
    Put,
    Transaction,
    Unavailable,
    WatchEvent,
    check,
)


class MemoryDatastore:
    """A whole datastore in one process. See `Datastore` for the contract."""

    def __init__(self) -> None:
        self._revision = 1  # as a fresh etcd
        self._compacted = 0
        self._life = 0  # counts wipes
        self._current: dict[str, KeyValue] = {}
        self._created: dict[str, int] = {}  # at which revision each key came into being
        self._history: list[tuple[WatchEvent, ...]] = []  # one entry a revision, ascending
        self._changed = asyncio.Event()
        self._keys_by_lease: dict[int, set[str]] = {}
        self._on_lost_by_lease: dict[int, Callable[[int], None]] = {}
        self._lease_ids = itertools.count(1)
        self._down = False
        self._lose_answers = 0

    async def get(self, key: str) -> KeyValue | None:
        """The key as it is now, or None."""
        await self._answer()
        return self._current.get(key)

    async def list(self, prefix: str) -> Listing:
        """Every key that starts with `prefix`, in key order, all at one revision."""
        await self._answer()
        found = sorted(key for key in self._current if key.startswith(prefix))
        return Listing(tuple(self._current[key] for key in found), self._revision)

    async def commit(self, transaction: Transaction) -> int:
        """Land the transaction and return its revision; see `Datastore.commit` for the errors."""
        check(transaction)
        await self._answer()
        compared = {compare.key: self._current.get(compare.key) for compare in transaction.compares}
        created = {
            key: self._current[key]
            for guard in transaction.none_created
            for key, revision in self._created.items()
            if revision > guard.revision and key.startswith(guard.prefix)
        }
        if created or any(
            (pair.revision if (pair := compared[compare.key]) else ABSENT) != compare.revision
            for compare in transaction.compares
        ):
            raise Conflict({**created, **compared}, self._revision)
        for operation in transaction.operations:
            if isinstance(operation, Put) and operation.lease_id:
                self._keys_of(operation.lease_id)
        self._write(transaction.operations)
        if self._lose_answers:
            self._lose_answers -= 1
            raise OutcomeUnknown("the answer was lost")
        return self._revision

    async def watch(
        self, prefix: str, *, start_revision: int
    ) -> AsyncGenerator[Sequence[WatchEvent], None]:
        """Every change under `prefix` from `start_revision` on; ends only by raising Compacted."""
        if start_revision <= 0:
            raise ValueError("a watch starts at the revision after a listing, never at 0")
        next_revision, life = start_revision, self._life
        await asyncio.sleep(0)
        while True:
            changed = self._changed
            if not self._down:
                if next_revision > self._revision + 1 or life != self._life:
                    raise Compacted(reason="the datastore was wiped")
                if next_revision < self._compacted:
                    raise Compacted(self._compacted)
                events = [
                    event
                    for events in self._since(next_revision)
                    for event in events
                    if event.key.startswith(prefix)
                ]
                next_revision = self._revision + 1
                if events:
                    yield events
                    continue  # more may have been written while the consumer worked
            await changed.wait()

    async def grant_lease(self, ttl_s: int, *, on_lost: Callable[[int], None] | None = None) -> int:
        """A new lease. It has no clock: it ends by `revoke_lease` or `expire_lease`."""
        if ttl_s <= 0:
            raise ValueError("the time to live of a lease must be positive")
        await self._answer()
        lease_id = next(self._lease_ids)
        self._keys_by_lease[lease_id] = set()
        if on_lost:
            self._on_lost_by_lease[lease_id] = on_lost
        return lease_id

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease; the keys written under it vanish. One already gone is no error."""
        await self._answer()
        self._on_lost_by_lease.pop(lease_id, None)
        self._end_lease(lease_id)

    async def close(self) -> None:
        """Nothing to let go of: the instance is the cluster, and others may use it."""

    # What only a test does.

    @property
    def revision(self) -> int:
        """The revision of the last write."""
        return self._revision

    def compact(self, revision: int) -> None:
        """Forget all history before `revision`, as an operator or a control loop does to etcd."""
        if not self._compacted < revision <= self._revision:
            raise ValueError(f"cannot compact at {revision} of {self._revision}")
        self._history = [*self._since(revision)]
        self._compacted = revision
        self._wake()

    def wipe(self) -> None:
        """Start over, as a server whose data directory was lost."""
        self._revision, self._compacted, self._life = 1, 0, self._life + 1
        self._current, self._created, self._history, self._keys_by_lease = {}, {}, [], {}
        self._wake()

    def go_down(self) -> None:
        """Every call raises Unavailable and watches fall silent, until `come_up`."""
        self._down = True

    def come_up(self) -> None:
        """End an outage; watches go on where they were."""
        self._down = False
        self._wake()

    def lose_answers(self, count: int = 1) -> None:
        """Let the next `count` commits land and raise OutcomeUnknown all the same."""
        self._lose_answers = count

    def expire_lease(self, lease_id: int) -> None:
        """End a lease as if its holder had been silent for too long."""
        on_lost = self._on_lost_by_lease.pop(lease_id, None)
        self._end_lease(lease_id)
        if on_lost:
            on_lost(lease_id)

    # Helpers.

    async def _answer(self) -> None:
        await asyncio.sleep(0)
        if self._down:
            raise Unavailable("the datastore is down")

    def _keys_of(self, lease_id: int) -> set[str]:
        try:
            return self._keys_by_lease[lease_id]
        except KeyError:
            raise LeaseLost(f"lease {lease_id} does not exist") from None

    def _end_lease(self, lease_id: int) -> None:
        keys = sorted(self._keys_by_lease.pop(lease_id, ()))
        self._write([Delete(key) for key in keys])

    def _write(self, operations: Sequence[Operation]) -> None:
        revision = self._revision + 1
        events = []
        for operation in operations:
            key = operation.key
            if isinstance(operation, Put):
                self._created.setdefault(key, revision)
                self._current[key] = KeyValue(key, operation.value, revision)
                events.append(WatchEvent(key, operation.value, revision))
            elif self._current.pop(key, None):
                del self._created[key]
                events.append(WatchEvent(key, None, revision))
            for keys in self._keys_by_lease.values():
                keys.discard(key)  # a write without the lease, or a delete, frees the key of it
            if isinstance(operation, Put) and operation.lease_id:
                self._keys_by_lease[operation.lease_id].add(key)
        if events:
            self._revision = revision
            self._history.append(tuple(events))
            self._wake()

    def _since(self, revision: int) -> Sequence[tuple[WatchEvent, ...]]:
        first = bisect_left(self._history, revision, key=lambda events: events[0].revision)
        return self._history[first:]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
