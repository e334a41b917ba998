"""The way every daemon reads the datastore: the whole picture first, then each change for ever.

For each prefix: list, deliver all of it, then watch from the next revision on. When all prefixes
were listed once, `on_in_sync` says so; before that, unwanted and not-yet-seen look alike and
nothing outside may be removed. When history was compacted or the cluster wiped, the prefix is
listed again and only the difference is delivered: changed values, and a deletion for each key that
vanished.

    datastore ─ list, watch ─▶ gather ─▶ decode once ─▶ Update(key, value | None) ─▶ on_updates

What arrives while the consumer works is gathered, and of each key only the last value is decoded
and delivered: so who is slower than the changes falls behind by one round of them, not by all.

Invariants:
- Batches of one prefix arrive in the datastore's order, none overtakes another, and the last word
  on every key is delivered. Between prefixes there is no order; each prefix has its own watch.
- A value that does not parse is absent: its key is logged and counted, and `None` delivered, so
  that one bad object never stops a daemon and never leaves an older value of it in force. Where
  absence could allow more than was written, `Damaged` with a strict stand-in is delivered instead.
- Call-backs run in the event loop and must not block. An exception they raise is a bug and ends
  `run`.
- An outage delivers nothing: what is known stays in force until the datastore speaks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import islice, pairwise

import structlog
from prometheus_client import Counter
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from cymric.datastore.api import Compacted, Datastore, DatastoreError, Listing, WatchEvent
from cymric.model import codec
from cymric.model.keys import Key, MalformedKey, parse_key
from cymric.runtime.pacing import Backoff

log = structlog.get_logger()

CHUNK = 2_000
"""Updates delivered at once while a listing is worked off; health checks are served in between."""

MANY = 50
"""After a delivery of so many there may be a queue behind it, which is read before the next one."""
CATCH_UP_S = 0.25
TURNS = 4
"""Turns of the loop within which the next message arrives if it is there already."""

RETRY_FIRST_S, RETRY_CAP_S = 0.1, 5.0
"""Pauses between attempts to list or watch grow from one to the other, with jitter."""

UNREADABLE = Counter("cymric_datastore_unreadable", "Stored keys or values that did not parse.")
RESYNCS = Counter("cymric_datastore_resyncs", "Prefixes listed again after lost history.")


@dataclass(frozen=True, slots=True)
class Update:
    """The whole value now behind `key`; None means gone, or unreadable."""

    key: Key
    value: object | None


class Syncer:
    """Follows `prefixes` (which must not overlap) and tells what is in them; see the chapter."""

    def __init__(
        self,
        store: Datastore,
        prefixes: Sequence[str],
        on_updates: Callable[[Sequence[Update]], None],
        on_in_sync: Callable[[], None],
    ) -> None:
        ordered = sorted(prefixes)
        if any(after.startswith(before) for before, after in pairwise(ordered)):
            raise ValueError(f"prefixes overlap: {ordered}")
        self._store = store
        self._prefixes = tuple(prefixes)
        self._on_updates = on_updates
        self._on_in_sync = on_in_sync
        self._waiting_for = set(self._prefixes)

    async def run(self) -> None:
        """Deliver until cancelled. Retries by itself whatever the datastore may answer."""
        if not self._prefixes:
            self._on_in_sync()
        async with asyncio.TaskGroup() as tasks:
            for prefix in self._prefixes:
                tasks.create_task(self._follow(prefix), name=f"follow {prefix}")

    async def _follow(self, prefix: str) -> None:
        loop = asyncio.get_running_loop()
        seen: Seen = {}
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(DatastoreError),
            wait=wait_random_exponential(multiplier=RETRY_FIRST_S, max=RETRY_CAP_S),
            before_sleep=_warn(prefix),
        )
        pauses = Backoff(RETRY_FIRST_S, RETRY_CAP_S)
        while True:
            listing: Listing = await attempts(self._store.list, prefix)
            await self._deliver(difference(seen, listing))
            self._mark_listed(prefix)
            started = loop.time()
            try:
                await self._watch(prefix, listing.revision + 1, seen)
            except Compacted as error:
                log.info("history is gone, listing again", prefix=prefix, reason=str(error))
            except DatastoreError as error:
                log.warning("watch was refused", prefix=prefix, error=repr(error))
            RESYNCS.inc()
            # However the watch ended, never a storm of new ones: only one that lasted is forgiven.
            if loop.time() - started > RETRY_CAP_S:
                pauses.succeeded()
            await asyncio.sleep(pauses.next_s())

    async def _watch(self, prefix: str, start_revision: int, seen: Seen) -> None:
        gathered = Gathered()

        async def gather() -> None:
            watch = self._store.watch(prefix, start_revision=start_revision)
            async with aclosing(watch) as batches:
                async for events in batches:
                    for event in events:
                        remember(seen, event)
                    gathered.add(events)

        reading = asyncio.create_task(gather(), name=f"watch {prefix}")
        reading.add_done_callback(lambda _: gathered.news.set())
        try:
            while True:
                if events := gathered.take():
                    await self._deliver(events)
                    if len(events) >= MANY:
                        await gathered.catch_up()
                elif reading.done():
                    return reading.result()
                else:
                    await gathered.news.wait()
                    gathered.news.clear()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _deliver(self, events: Iterable[WatchEvent]) -> None:
        updates = decode(events)
        while chunk := tuple(islice(updates, CHUNK)):
            self._on_updates(chunk)
            await asyncio.sleep(0)

    def _mark_listed(self, prefix: str) -> None:
        if prefix in self._waiting_for:
            self._waiting_for.discard(prefix)
            if not self._waiting_for:
                log.info("in sync with the datastore", prefixes=len(self._prefixes))
                self._on_in_sync()


class Gathered:
    """What a watch said and nobody was told yet: the last event of each key, in order."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self._events: dict[str, WatchEvent] = {}
        self._batches = 0

    def add(self, events: Iterable[WatchEvent]) -> None:
        """Take in what the datastore said."""
        for event in events:
            self._events.pop(event.key, None)  # so that it comes last
            self._events[event.key] = event
        self._batches += 1
        self.news.set()

    def take(self) -> list[WatchEvent]:
        """All of it, once."""
        events = list(self._events.values())
        self._events.clear()
        return events

    async def catch_up(self) -> None:
        """Return when nothing more comes at once, or after a while."""
        deadline, before = asyncio.get_running_loop().time() + CATCH_UP_S, -1
        while before != self._batches and asyncio.get_running_loop().time() < deadline:
            before = self._batches
            for _ in range(TURNS):
                await asyncio.sleep(0)


Seen = dict[str, int]
"""Each key delivered and a fingerprint of its value: enough to tell a difference, no more."""


def difference(seen: Seen, listing: Listing) -> list[WatchEvent]:
    """What to deliver so that a consumer who has `seen` knows `listing`; updates `seen`.

    Values are compared, not revisions: after a wipe, revisions come round again.
    """
    events = []
    for item in listing.items:
        if seen.get(item.key) != hash(item.value):
            events.append(WatchEvent(item.key, item.value, item.revision))
    gone = seen.keys() - {item.key for item in listing.items}
    events += [WatchEvent(key, None, listing.revision) for key in sorted(gone)]
    for event in events:
        remember(seen, event)
    return events


def remember(seen: Seen, event: WatchEvent) -> None:
    """Note in `seen` that `event` was delivered."""
    if event.value is None:
        seen.pop(event.key, None)
    else:
        seen[event.key] = hash(event.value)


def decode(events: Iterable[WatchEvent]) -> Iterator[Update]:
    """The typed updates behind `events`; keys that are none of ours, or broken, bring none."""
    for event in events:
        if event.value is not None:
            try:
                decoded = codec.decode(event.key, event.value)
            except codec.Malformed as error:
                UNREADABLE.inc()
                log.warning(
                    "stored value does not parse, "
                    + ("read in the strictest way" if error.damaged else "treated as absent"),
                    key=event.key,
                    reason=error.reason,
                )
                if error.damaged and (key := parse_key(event.key)):
                    yield Update(key, error.damaged)
                    continue
            else:
                if decoded:
                    yield Update(*decoded)
                continue
        try:
            key = parse_key(event.key)
        except MalformedKey:
            continue
        if key:
            yield Update(key, None)


def _warn(prefix: str) -> Callable[[RetryCallState], None]:
    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("cannot list, trying again", prefix=prefix, error=repr(error))

    return warn
