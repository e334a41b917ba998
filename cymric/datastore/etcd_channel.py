"""One endpoint of etcd: its address, how we connect to it, and when it is ready.

The only module that opens gRPC channels, with every option that runs against real servers showed to
matter. Each endpoint has two connections: calls, and watches, so that a bulk read never starves an
open watch. Nothing is opened before the first use, so a datastore can be made outside a loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc
import grpc.aio

from cymric.datastore.api import Unavailable

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", 256 << 20),  # the default of 4 MiB kills a watch for good
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 10_000),  # etcd refuses pings more often than every 5 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # else a silent peer is noticed after 70 s, not 15
    # etcd takes pings on a connection without calls for an attack, and closes it.
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 3_000),  # also how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.enable_retries", 0),  # what is safe to repeat is for us to say
    ("grpc.use_local_subchannel_pool", 1),  # a channel of its own is a connection of its own
    ("grpc.enable_http_proxy", 0),
)
"""Also the options to give an etcd3 client whose channel is handed to `from_etcd3`."""

DEFAULT_PORT = 2379

CONNECT_S = 2.0
"""How long one endpoint may take to connect before the next is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files; an empty name is none. The client certificate's common name is the etcd user."""

    ca_cert_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files. Raises OSError naming the one that cannot be read."""
        ca_cert, key, cert = map(_read, (self.ca_cert_file, self.key_file, self.cert_file))
        return grpc.ssl_channel_credentials(ca_cert, key, cert)


class Channel(Protocol):
    """What we use of a `grpc.aio.Channel`; `etcd_bridge.py` offers it over a blocking one."""

    def unary_unary(self, method: str, **serializers: Any) -> Any:
        """A callable that sends one request and awaits one answer."""
        ...

    def stream_stream(self, method: str, **serializers: Any) -> Any:
        """A callable that opens a stream: `write`, `read` (EOF at its end), `cancel`."""
        ...


class Endpoint(Protocol):
    """One way to the cluster."""

    @property
    def url(self) -> str:
        """For messages to people."""
        ...

    async def ready(self, purpose: str, timeout_s: float, *, is_only: bool) -> Channel:
        """The connection for "calls" or for "watches". Raises Unavailable."""
        ...

    async def close(self) -> None:
        """Close what was opened."""
        ...


class UrlEndpoint:
    """One member of the cluster (or a proxy before it), by its URL."""

    def __init__(self, url: str, tls: Tls) -> None:
        self.url = url
        self._target, self._is_secure = parse_url(url)
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def ready(self, purpose: str, timeout_s: float, *, is_only: bool) -> Channel:
        """The connection for `purpose`; see `until_ready` for how long it is waited for."""
        channel = self._channels.get(purpose)
        if channel is None:
            channel = self._channels[purpose] = self._open()
        wait_s = timeout_s if is_only else min(timeout_s, CONNECT_S)
        if not await until_ready(channel, wait_s, is_only=is_only):
            raise Unavailable(f"{self.url} does not answer")
        opened: Channel = channel
        return opened

    async def close(self) -> None:
        """Close what was opened."""
        for channel in self._channels.values():
            await channel.close()
        self._channels.clear()

    def _open(self) -> grpc.aio.Channel:
        if self._is_secure:
            return grpc.aio.secure_channel(self._target, self._tls.credentials(), CHANNEL_OPTIONS)
        return grpc.aio.insecure_channel(self._target, CHANNEL_OPTIONS)


async def until_ready(channel: grpc.aio.Channel, timeout_s: float, *, is_only: bool) -> bool:
    """Wait for a connection; False if it is still being made after `timeout_s`.

    Calls fired at a dead channel one by one can miss a server that came back, so we wait for the
    channel. An endpoint that is refused is not waited for unless it `is_only`: the next may answer.
    A refused channel counts as ready, because a call on it fails at once and says why.
    """
    ready, refused = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE
    state = channel.get_state(try_to_connect=True)
    try:
        async with asyncio.timeout(timeout_s):
            while state != ready and (state != refused or is_only):
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
    except TimeoutError:
        pass
    return state in (ready, refused)


def parse_url(url: str) -> tuple[str, bool]:
    """The address for gRPC, and whether it wants TLS. Without a scheme, it is plain TCP."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"{url!r} is not an etcd endpoint like https://192.0.2.1:{DEFAULT_PORT}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{host}:{parts.port or DEFAULT_PORT}", parts.scheme == "https"


def _read(name: str) -> bytes | None:
    return Path(name).read_bytes() if name else None
