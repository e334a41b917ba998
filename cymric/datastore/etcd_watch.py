"""One watch that never goes deaf: the state machine around etcd's Watch stream.

    open at `next` ──▶ created ──▶ events … ──▶ batch to the caller, next = last mod_revision + 1
        ▲                │  │         └──▶ (no events: progress)    next = header.revision + 1
        │                │  └ another cluster, or an older one ──▶ Compacted: the caller lists again
        │                └ canceled: compacted ──▶ Compacted; token ──▶ log in; denied ──▶ raise
        └── back-off ◀── stream broke, ended, was cancelled, or was silent for too long

Invariants, each bought with a lost event somewhere:
- `next` comes from the last event of a complete answer. The header's revision is ahead of the
  events while etcd replays history, so it counts only in a progress notice.
- Fragments are joined before anything is delivered, so a revision is never split or half lost.
- etcd accepts a watch from a future revision and stays silent. So the `created` answer is compared:
  after a wipe or a restore the caller hears Compacted, not nothing.
- The back-off covers cancelled watches too, and ends only when events or progress arrive.
- The member must have a leader (`hasleader`), else a partitioned one would be silent for ever.

Source: etcd's API guarantees and rpc.proto; the hazards were met on etcd 3.4 and 3.5.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
import structlog
from prometheus_client import Counter, Gauge

from cymric.datastore.api import (
    Compacted,
    DatastoreError,
    NotAuthenticated,
    PermissionDenied,
    Unavailable,
    WatchEvent,
)
from cymric.datastore.etcd_channel import Endpoint
from cymric.datastore.etcd_connection import RANGE, Connection, metadata
from cymric.datastore.etcd_errors import TokenRefused, is_refusal_of_token, translate
from cymric.datastore.etcd_keys import range_of, to_text
from cymric.datastore.etcd_messages_pb2 import (
    Event,
    RangeRequest,
    WatchCreateRequest,
    WatchRequest,
    WatchResponse,
)
from cymric.runtime.pacing import Backoff

log = structlog.get_logger()

OPEN_S = 10.0
"""How long etcd may take to answer that a watch was created."""

SILENCE_S = 21 * 60.0
"""etcd reports progress every 10 minutes by default; after two missed reports we reopen."""

FAR_BEHIND = 50_000
"""Revisions. etcd replays some 6,000 a second; from here on, listing again is faster."""

RESTARTS = Counter("cymric_datastore_watch_restarts", "Watches opened again after an interruption.")
LAST_RESPONSE = Gauge(
    "cymric_datastore_watch_last_response_timestamp_seconds",
    "When etcd last said anything on the watch; progress reports count.",
    ["prefix"],
)


class Watch:
    """Everything under `prefix` from `start_revision` on, however often the stream breaks."""

    def __init__(self, connection: Connection, prefix: str, start_revision: int) -> None:
        if start_revision <= 0:
            # To etcd, 0 means "from now on": what happened in between would be lost in silence.
            raise ValueError("a watch starts at the revision after a listing, never at 0")
        self._connection = connection
        self._prefix = prefix
        self._next = start_revision
        self._cluster_id = connection.cluster_id
        self._term = 0
        self._is_reopened = False
        self._was_denied = False
        self._token = ""
        self._backoff = Backoff(first_s=0.1, most_s=2.0)

    async def batches(self) -> AsyncGenerator[Sequence[WatchEvent], None]:
        """Deliver batches until Compacted, PermissionDenied or NotAuthenticated is raised."""
        while True:
            endpoint = self._connection.current
            try:
                async with aclosing(self._stream(endpoint)) as batches:
                    async for events in batches:
                        yield events
            except TokenRefused as error:
                if not self._connection.login.has_user:
                    raise NotAuthenticated(str(error)) from None
                self._connection.login.forget(self._token)
                reason = str(error)
            except (Compacted, PermissionDenied, NotAuthenticated):
                raise
            except DatastoreError as error:
                self._connection.leave(endpoint)
                reason = str(error)
            self._is_reopened = True
            RESTARTS.inc()
            log.warning("watch was interrupted", prefix=self._prefix, reason=reason)
            await asyncio.sleep(self._backoff.next_s())

    async def _stream(self, endpoint: Endpoint) -> AsyncGenerator[Sequence[WatchEvent], None]:
        """The batches of one stream; always ends by raising a typed error."""
        channel = await self._connection.ready(endpoint, "watches", OPEN_S)
        self._token = await self._connection.token(OPEN_S)
        invoke = channel.stream_stream(
            "/etcdserverpb.Watch/Watch",
            request_serializer=WatchRequest.SerializeToString,
            response_deserializer=WatchResponse.FromString,
        )
        call = invoke(metadata=(*metadata(self._token), ("hasleader", "true")))
        try:
            await call.write(self._request())
            await self._created(await _read(call, OPEN_S))
            joined: list[Event] = []
            while True:
                response = await _read(call, SILENCE_S)
                LAST_RESPONSE.labels(self._prefix).set_to_current_time()
                if response.canceled:
                    raise self._why(response)
                joined.extend(response.events)
                if response.fragment:
                    continue
                self._backoff.succeeded()
                if joined:
                    self._next = max(self._next, joined[-1].kv.mod_revision + 1)
                    events, joined = [*map(_decode, joined)], []
                    yield events
                else:
                    self._next = max(self._next, response.header.revision + 1)
        except grpc.RpcError as error:
            raise translate(error, is_write=False) from None
        except asyncio.InvalidStateError:
            raise Unavailable("the stream broke while it was opened") from None
        finally:
            call.cancel()

    def _request(self) -> WatchRequest:
        key, range_end = range_of(self._prefix)
        return WatchRequest(
            create_request=WatchCreateRequest(
                key=key,
                range_end=range_end,
                start_revision=self._next,
                progress_notify=True,
                fragment=True,
            )
        )

    async def _created(self, response: WatchResponse) -> None:
        """Judge the first answer. Raises Compacted if this is not the history we followed."""
        if response.canceled:
            raise self._why(response)
        header = response.header
        if self._cluster_id not in (0, header.cluster_id):
            raise Compacted(reason="this is another cluster than before")
        if header.raft_term < self._term:
            raise Compacted(reason="this cluster is younger than it was before")
        if header.revision < self._next - 1 and await self._revision() < self._next - 1:
            raise Compacted(reason="this cluster is at an older revision than before")
        if self._is_reopened and header.revision - self._next > FAR_BEHIND:
            raise Compacted(reason="too much happened meanwhile, listing is faster")
        self._cluster_id, self._term = header.cluster_id, header.raft_term
        self._was_denied = False
        LAST_RESPONSE.labels(self._prefix).set_to_current_time()

    async def _revision(self) -> int:
        """The cluster's revision; the member we watch at may only be a moment behind the others."""
        request = RangeRequest(key=range_of(self._prefix)[0], limit=1)
        return (await self._connection.call(RANGE, request)).header.revision

    def _why(self, response: WatchResponse) -> DatastoreError:
        reason = response.cancel_reason
        if response.compact_revision:
            return Compacted(response.compact_revision)
        if is_refusal_of_token(reason):
            return TokenRefused(reason)
        if "permission denied" in reason:
            # Early 3.4 says so also when only the token is too old: believe it the second time.
            if self._connection.login.has_user and not self._was_denied:
                self._was_denied = True
                return TokenRefused(reason)
            return PermissionDenied(f"{self._prefix}: {reason}")
        return Unavailable(f"etcd cancelled the watch: {reason or 'no reason given'}")


async def _read(call: Any, timeout_s: float) -> WatchResponse:
    try:
        async with asyncio.timeout(timeout_s):
            response = await call.read()
    except TimeoutError:
        raise Unavailable(f"etcd was silent for {timeout_s:.0f} s") from None
    if response is grpc.aio.EOF:
        raise Unavailable("etcd ended the stream")
    answer: WatchResponse = response
    return answer


def _decode(event: Event) -> WatchEvent:
    value = None if event.type == Event.DELETE else event.kv.value
    return WatchEvent(to_text(event.kv.key), value, event.kv.mod_revision)
