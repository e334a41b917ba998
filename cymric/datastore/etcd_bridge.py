"""Our calls over somebody else's connection: the channel of an etcd3 client that already exists.

The etcd3 package's channel is a blocking one. Calls on it report back from gRPC's own threads, and
an open stream is read in one thread of its own; these are the only threads of the datastore, and
only here. Address, TLS and channel options are whatever the client was made with, so it has one
endpoint, one connection for calls and watches, and gRPC's default of 4 MiB an answer unless it was
made with `grpc_options=CHANNEL_OPTIONS`. See docs/etcd.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc
import grpc.aio

from cymric.datastore.etcd import EtcdDatastore
from cymric.datastore.etcd_channel import Channel
from cymric.datastore.etcd_connection import CALL_S, Connection

Metadata = Sequence[tuple[str, str]]


class Etcd3Client(Protocol):
    """What we use of an `etcd3.Etcd3Client`: its public channel."""

    channel: grpc.Channel


def from_etcd3(
    client: Etcd3Client, *, user: str = "", password: str = "", call_s: float = CALL_S
) -> EtcdDatastore:
    """A datastore over the channel of an etcd3 client, which stays the caller's to close.

    Where etcd wants a user, name it here too: the client's own token is never renewed, ours is.
    """
    endpoint = BorrowedEndpoint(client.channel)
    return EtcdDatastore(Connection([endpoint], user=user, password=password, call_s=call_s))


class BorrowedEndpoint:
    """An endpoint whose channel belongs to others. Its state is unknown: calls find out."""

    url = "the borrowed channel"

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = ThreadedChannel(channel)

    async def ready(self, purpose: str, timeout_s: float, *, is_only: bool) -> Channel:
        """The one channel there is, for every purpose."""
        return self._channel

    async def close(self) -> None:
        """Not ours to close."""


class ThreadedChannel:
    """A blocking channel, used from a loop in the way of a `grpc.aio.Channel`."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, **serializers: Any) -> Any:
        """A callable that sends one request and awaits one answer."""
        start = self._channel.unary_unary(method, **serializers).future

        async def invoke(request: Any, *, timeout: float, metadata: Metadata) -> Any:
            call = start(request, timeout=timeout, metadata=metadata)
            finished = asyncio.Event()
            loop = asyncio.get_running_loop()
            call.add_done_callback(lambda _: _tell(loop, finished.set))
            try:
                await finished.wait()
            except asyncio.CancelledError:
                call.cancel()
                raise
            return call.result()

        return invoke

    def stream_stream(self, method: str, **serializers: Any) -> Any:
        """A callable that opens a stream."""
        start = self._channel.stream_stream(method, **serializers)
        return lambda *, metadata: ThreadedStream(start, metadata)


class ThreadedStream:
    """A blocking stream; `cancel` must be called, it ends the thread that reads."""

    def __init__(self, start: Callable[..., Any], metadata: Metadata) -> None:
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = start(iter(self._requests.get, None), metadata=metadata)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="etcd stream")

    async def write(self, request: Any) -> None:
        """Send a request; what becomes of it, `read` tells."""
        self._requests.put(request)

    async def read(self) -> Any:
        """The next answer, or EOF. Raises grpc.RpcError."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reader, next, self._call, grpc.aio.EOF)

    def cancel(self) -> None:
        """End the stream and its thread."""
        self._call.cancel()
        self._requests.put(None)
        self._reader.shutdown(wait=False)


def _tell(loop: asyncio.AbstractEventLoop, what: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop ended, and with it whoever waited
        loop.call_soon_threadsafe(what)
