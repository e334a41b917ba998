"""The datastore port: what Cymric asks of etcd, and the errors it can answer.

Keys are text, values bytes, revisions etcd's 64-bit counters. A key's revision is its
`mod_revision`; 0 stands for "the key does not exist". Every error a caller can act on has its own
class, so that nobody above this layer ever sees a gRPC error. Adapters: `etcd.py` and `memory.py`;
`tests/contract` runs the same tests on both.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

ABSENT = 0
"""The revision of a key that does not exist, in a `Compare`."""

MAX_OPERATIONS = 128
"""etcd's default limit of operations in one transaction (`--max-txn-ops`)."""

MAX_REQUEST_BYTES = 1_500_000
"""A little under etcd's default request limit of 1.5 MiB (`--max-request-bytes`)."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as read: its value, and the revision that last wrote it."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys under a prefix as they stood at `revision`."""

    items: tuple[KeyValue, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """A key written (`value`) or deleted (`value is None`) at `revision`."""

    key: str
    value: bytes | None
    revision: int


@dataclass(frozen=True, slots=True)
class Compare:
    """The transaction lands only if `key` was last written at `revision` (`ABSENT`: is missing)."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True)
class NoneCreated:
    """The transaction lands only if no key that starts with `prefix` was created after `revision`.

    So what a listing at that revision did not show still does not exist. 0: there is none at all.
    """

    prefix: str
    revision: int


@dataclass(frozen=True, slots=True)
class Put:
    """Write `value`; with `lease_id`, for as long as that lease lives."""

    key: str
    value: bytes
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove `key`; removing a missing key is not an error."""

    key: str


Operation = Put | Delete


@dataclass(frozen=True, slots=True)
class Transaction:
    """All `operations` happen if every comparison holds, else none does."""

    compares: Sequence[Compare]
    operations: Sequence[Operation]
    none_created: Sequence[NoneCreated] = ()


class DatastoreError(Exception):
    """Any failure of the datastore."""


class Unavailable(DatastoreError):
    """No endpoint answered; nothing was written."""


class OutcomeUnknown(DatastoreError):
    """A write was sent and its answer lost: it may or may not have landed. Read before retrying."""


class NotAuthenticated(DatastoreError):
    """User, password or client certificate were refused."""


class PermissionDenied(DatastoreError):
    """The user may not touch this key."""


class TooLarge(DatastoreError):
    """The request exceeds etcd's limit on bytes or operations."""


class NoSpace(DatastoreError):
    """etcd's quota is used up; it refuses writes until an operator acts."""


class LeaseLost(DatastoreError):
    """The lease ran out or was revoked: what was written under it is gone."""


@dataclass(eq=False)
class Compacted(DatastoreError):
    """The wanted history is gone; list again. `revision` is the oldest still there, 0 if unknown.

    `reason` says why, for the log: compaction, or another or older cluster than before.
    """

    revision: int = 0
    reason: str = "the revision was compacted"

    def __str__(self) -> str:
        return self.reason


@dataclass(eq=False)
class Conflict(DatastoreError):
    """A comparison did not hold.

    `current` tells, for each compared key, what is there at `revision`; and for each `NoneCreated`
    the keys that were created since.
    """

    current: Mapping[str, KeyValue | None] = field(default_factory=dict)
    revision: int = 0

    def __str__(self) -> str:
        return f"somebody else wrote first: {', '.join(self.current)}"


class Datastore(Protocol):
    """Reads, guarded writes and watches. Reads retry by themselves; writes never do blindly."""

    async def get(self, key: str) -> KeyValue | None:
        """The key as it is now, or None."""
        ...

    async def list(self, prefix: str) -> Listing:
        """Every key that starts with `prefix`, in key order, all at one revision."""
        ...

    async def commit(self, transaction: Transaction) -> int:
        """Land the transaction and return its revision.

        Raises Conflict with the current state of all compared keys when a comparison fails,
        OutcomeUnknown when the connection broke after sending, TooLarge before sending what etcd
        would refuse, LeaseLost for a put under a lease that is gone, and ValueError when one key
        is written twice. Deleting what is missing changes nothing, also not the revision.
        """
        ...

    def watch(
        self, prefix: str, *, start_revision: int
    ) -> AsyncGenerator[Sequence[WatchEvent], None]:
        """Every change under `prefix` from `start_revision` on, once, in order, in batches.

        A revision is never split over two batches. Survives loss and restart of etcd, changed
        leaders and expired tokens. Ends only by raising Compacted (also when the cluster was wiped
        or restored to an older revision: then the caller must list again) or PermissionDenied /
        NotAuthenticated.
        """
        ...

    async def grant_lease(self, ttl_s: int, *, on_lost: Callable[[int], None] | None = None) -> int:
        """A new lease; the adapter keeps it alive until `revoke_lease` or `close`.

        `on_lost` is told the id if the lease runs out nevertheless (etcd away for `ttl_s`).
        """
        ...

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease; the keys written under it vanish. One already gone is no error."""
        ...

    async def close(self) -> None:
        """Let go of connections and background tasks."""
        ...


def check(transaction: Transaction, *, max_request_bytes: int = MAX_REQUEST_BYTES) -> None:
    """Refuse, before anything is sent, what etcd would refuse: TooLarge, or ValueError for a bug.

    etcd counts comparisons and operations separately, and limits each (`--max-txn-ops`).
    """
    operations = transaction.operations
    comparisons = len(transaction.compares) + len(transaction.none_created)
    if max(len(operations), comparisons) > MAX_OPERATIONS:
        raise TooLarge(f"more than {MAX_OPERATIONS} operations in one transaction")
    size = sum(len(op.key) + (len(op.value) if isinstance(op, Put) else 0) for op in operations)
    if size > max_request_bytes:
        raise TooLarge(f"{size} bytes in one transaction; the limit is {max_request_bytes}")
    keys = [operation.key for operation in operations]
    if len(set(keys)) < len(keys):
        raise ValueError("a transaction may touch a key only once")
    if not all(keys) or not all(compare.key for compare in transaction.compares):
        raise ValueError("a key must not be empty")
    if not all(guard.prefix for guard in transaction.none_created):
        raise ValueError("a prefix must not be empty")


async def create(store: Datastore, key: str, value: bytes) -> int:
    """Write `key` if it does not exist. Raises Conflict if it does."""
    return await store.commit(Transaction((Compare(key, ABSENT),), (Put(key, value),)))


async def update(store: Datastore, key: str, value: bytes, *, if_revision: int) -> int:
    """Write `key` if nobody wrote it since `if_revision`. Raises Conflict otherwise."""
    return await store.commit(Transaction((Compare(key, if_revision),), (Put(key, value),)))


async def put(store: Datastore, key: str, value: bytes) -> int:
    """Write `key` whatever is there."""
    return await store.commit(Transaction((), (Put(key, value),)))


async def delete(store: Datastore, key: str, *, if_revision: int | None = None) -> int:
    """Remove `key`, with `if_revision` only if nobody wrote it since."""
    compares = () if if_revision is None else (Compare(key, if_revision),)
    return await store.commit(Transaction(compares, (Delete(key),)))
