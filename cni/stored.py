"""The node's endpoints in the datastore: read once, then remembered as they were last written.

cnid is the one writer of its node's endpoints, so what it remembers is right but for what a person
changes by hand. Every write compares with the revision that is remembered: being wrong costs one
round more, and what is there now comes with the refusal.

Writes that arrive while one is in flight share the next transaction; if one of them meets a change
by somebody else, each of them is tried by itself, so that nobody pays for another's conflict.

Invariants: an endpoint is written over or removed only as it was seen; what `known` says is a
reason to do something, never the proof that it is so (`read` is). A removal never overtakes a write
that its caller gave up.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import structlog

from cni.endpoint import Identity
from cni.errors import try_again
from cymric.datastore.api import (
    ABSENT,
    Compare,
    Conflict,
    Datastore,
    Delete,
    KeyValue,
    Operation,
    Put,
    TooLarge,
    Transaction,
)
from cymric.model.codec import Malformed, decode, encode
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.keys import ResourceKey, resource_prefix
from ipam.affinity import rfc3339

MAX_TRIES = 4
MAX_TOGETHER = 60
"""Writes in one transaction; etcd takes 128 operations, comparisons not counted."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Stored:
    """An endpoint as read, and the revision it was read at."""

    key: str
    value: WorkloadEndpoint
    revision: int


@dataclass(eq=False, slots=True)
class _Write:
    """An operation that waits to be landed, and whoever waits for it."""

    compare: Compare
    operation: Operation
    landed: asyncio.Future[int]

    @property
    def key(self) -> str:
        """The key it is about."""
        return self.compare.key

    def fail(self, error: Exception) -> None:
        """Tell that it did not land."""
        if not self.landed.done():
            self.landed.set_exception(error)


class Endpoints:
    """The endpoints of `node`. `clock` gives nanoseconds since 1970."""

    def __init__(
        self, store: Datastore, node: str, *, clock: Callable[[], int] = time.time_ns
    ) -> None:
        self._store = store
        self._node = node
        self._clock = clock
        self._by_key: dict[str, Stored] = {}
        self._loading: asyncio.Task[None] | None = None
        self._is_loaded = False
        self._waiting: deque[_Write] = deque()
        self._landing: asyncio.Task[None] | None = None
        self._in_flight: set[str] = set()

    async def load(self) -> None:
        """Read all endpoints once; later calls return at once. Raises DatastoreError."""
        while not self._is_loaded:
            if self._loading is None or self._loading.done():
                self._loading = asyncio.create_task(self._load(), name="load endpoints")
            await asyncio.shield(self._loading)

    async def _load(self) -> None:
        await self.refresh()
        self._is_loaded = True

    async def refresh(self) -> tuple[Stored, ...]:
        """Read all endpoints of this node anew; unreadable ones are named in the log."""
        listing = await self._store.list(resource_prefix("WorkloadEndpoint"))
        found = {}
        for pair in listing.items:
            try:
                stored = _stored(pair)
            except Malformed as error:
                log.warning("endpoint cannot be read", key=error.key, why=error.reason)
                continue
            if stored is not None and stored.value.spec.node == self._node:
                found[stored.key] = stored
        for key, stored in found.items():  # a write of ours may have landed since
            if key in self._by_key and self._by_key[key].revision > stored.revision:
                found[key] = self._by_key[key]
        for key, stored in self._by_key.items():
            if key not in found and stored.revision > listing.revision:
                found[key] = stored
        self._by_key = found
        return tuple(found.values())

    def known(self, identity: Identity) -> Stored | None:
        """What was there when last seen."""
        return self._by_key.get(identity.key_text)

    @property
    def all_known(self) -> tuple[Stored, ...]:
        """All that were there when last seen."""
        return tuple(self._by_key.values())

    async def read(self, identity: Identity) -> Stored | None:
        """What is there now."""
        key = identity.key_text
        stored = _stored(await self._store.get(key))
        return self._remember(key, stored)

    async def write(self, identity: Identity, value: WorkloadEndpoint) -> None:
        """Store `value`; the former one's uid and time of creation stay. Raises DatastoreError."""
        key = identity.key_text
        for _ in range(MAX_TRIES):
            former = self._by_key.get(key)
            revision = former.revision if former else ABSENT
            stamped = self._stamped(value, former)
            try:
                landed = await self._commit(Compare(key, revision), Put(key, encode(stamped)))
            except Conflict as conflict:
                self._remember(key, _stored(conflict.current.get(key)))
                continue
            except BaseException:
                self._by_key.pop(key, None)  # nobody knows: the next write finds out
                raise
            self._by_key[key] = Stored(key, stamped, landed)
            return
        raise try_again("the endpoint was changed by others again and again", key)

    def _stamped(self, value: WorkloadEndpoint, former: Stored | None) -> WorkloadEndpoint:
        metadata = former.value.metadata if former else None
        return msgspec.structs.replace(
            value,
            metadata=msgspec.structs.replace(
                value.metadata,
                uid=(metadata and metadata.uid) or str(uuid.uuid4()),
                creation_timestamp=(metadata and metadata.creation_timestamp)
                or rfc3339(self._clock()),
            ),
        )

    async def remove(self, identity: Identity) -> bool:
        """Remove the endpoint if it is this container's. False: it is another's, or missing."""
        key = identity.key_text
        while key in self._in_flight and self._landing is not None:
            await asyncio.wait({self._landing})
        stored = self._by_key.get(key)
        if stored is None or stored.value.spec.container_id != identity.container_id:
            stored = await self.read(identity)
        while stored is not None and stored.value.spec.container_id == identity.container_id:
            try:
                await self._commit(Compare(key, stored.revision), Delete(key))
            except Conflict as conflict:
                stored = self._remember(key, _stored(conflict.current.get(key)))
                continue
            except BaseException:
                self._by_key.pop(key, None)
                raise
            self._by_key.pop(key, None)
            return True
        return False

    async def of_container(self, identity: Identity) -> tuple[WorkloadEndpoint, ...]:
        """The other endpoints of the same container."""
        await self.load()
        return tuple(
            other.value
            for other in self._by_key.values()
            if other.value.spec.container_id == identity.container_id
            and other.key != identity.key_text
        )

    async def owner_of_interface(self, identity: Identity) -> ResourceKey | None:
        """The endpoint, other than this one, that has the host interface: by what is stored now."""
        for stored in await self.refresh():
            spec, metadata = stored.value.spec, stored.value.metadata
            if stored.key != identity.key_text and spec.interface_name == identity.host_interface:
                return ResourceKey("WorkloadEndpoint", metadata.name, metadata.namespace)
        return None

    async def _commit(self, compare: Compare, operation: Operation) -> int:
        """Land one operation, with others that wait; the revision. Raises Conflict, ...Error."""
        write = _Write(compare, operation, asyncio.get_running_loop().create_future())
        self._waiting.append(write)
        if self._landing is None or self._landing.done():
            self._landing = asyncio.create_task(self._land_waiting(), name="land endpoints")
        return await write.landed

    async def _land_waiting(self) -> None:
        await asyncio.sleep(0)  # who is ready to write in this moment shares the transaction
        while self._waiting:
            batch: dict[str, _Write] = {}
            while self._waiting and len(batch) < MAX_TOGETHER:
                if self._waiting[0].key in batch:
                    break
                write = self._waiting.popleft()
                if not write.landed.done():  # else who waited gave up before it was sent
                    batch[write.key] = write
            self._in_flight = set(batch)
            try:
                await self._land(tuple(batch.values()))
            finally:
                self._in_flight = set()

    async def _land(self, batch: Sequence[_Write]) -> None:
        if not batch:
            return
        comparisons = tuple(write.compare for write in batch)
        operations = tuple(write.operation for write in batch)
        try:
            revision = await self._store.commit(Transaction(comparisons, operations))
        except (Conflict, TooLarge) as error:
            if len(batch) == 1:
                batch[0].fail(error)
                return
            for write in batch:
                await self._land((write,))
        except asyncio.CancelledError:
            for write in batch:
                write.landed.cancel()
            raise
        except Exception as error:  # whatever it is, those who wait are the ones to hear of it
            for write in batch:
                write.fail(error)
        else:
            for write in batch:
                if not write.landed.done():
                    write.landed.set_result(revision)

    def _remember(self, key: str, stored: Stored | None) -> Stored | None:
        if stored is None:
            self._by_key.pop(key, None)
        else:
            self._by_key[key] = stored
        return stored


def identity_of(endpoint: WorkloadEndpoint) -> Identity:
    """The names of a stored endpoint."""
    spec = endpoint.spec
    return Identity(
        node=spec.node,
        orchestrator=spec.orchestrator,
        namespace=endpoint.metadata.namespace,
        workload=endpoint.spec.workload_name,
        endpoint=spec.endpoint,
        container_id=spec.container_id,
        host_interface=spec.interface_name,
    )


def _stored(pair: KeyValue | None) -> Stored | None:
    if pair is None:
        return None
    decoded = decode(pair.key, pair.value)
    assert decoded is not None
    value = decoded[1]
    return Stored(pair.key, value, pair.revision) if isinstance(value, WorkloadEndpoint) else None
