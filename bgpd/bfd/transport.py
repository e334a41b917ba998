"""The sockets of BFD: one per local address receives, one per session sends.

    peers ─▶ UDP 3784 on each local address ─▶ drain ─▶ Datagram (with its TTL) ─▶ engine
    engine ─▶ Sender (own port, TTL 255) ─▶ peers

Nothing waits here: sockets do not block, and an error of sending is returned in words.

Source: RFC 5881 §4 (ports 3784 and 49152 to 65535, one source port per session), §5 (TTL 255).
"""

from __future__ import annotations

import errno
import random
import socket
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Protocol

PORT = 3784
TTL = 255
SOURCE_PORTS = range(49152, 65536)
_IP_RECVTTL = 12  # not in Python's socket module; linux/in.h
_INTERNET_CONTROL = 0xC0
_LONGEST = 512
_PORT_ATTEMPTS = 32


@dataclass(frozen=True, slots=True)
class Datagram:
    """One UDP payload, where it arrived, who sent it, and the TTL or hop limit it came with."""

    local: str
    source: str
    ttl: int
    data: bytes


class Sender(Protocol):
    """Sends to one peer."""

    def send(self, data: bytes) -> str:
        """Send; empty if the kernel took it, else what it said."""
        ...

    def close(self) -> None:
        """Give the port back."""
        ...


class Transport(Protocol):
    """How packets come and go. `listen`, `drain` and `sender` never wait."""

    def listen(self, locals_: Collection[str]) -> dict[str, str]:
        """Receive on exactly these addresses; returns those where it fails, and why."""
        ...

    def drain(self, most: int) -> Iterator[Datagram]:
        """What has arrived, at most `most` from each socket."""
        ...

    def sender(self, local: str, peer: str) -> Sender:
        """A sender from `local` to `peer`. Raises OSError."""
        ...


@dataclass(slots=True)
class UdpTransport:
    """The real sockets. `on_open` and `on_close` tell the event loop about them."""

    on_open: Callable[[socket.socket], object] = lambda _: None
    on_close: Callable[[socket.socket], object] = lambda _: None
    _sockets: dict[str, socket.socket] = field(default_factory=dict)

    def listen(self, locals_: Collection[str]) -> dict[str, str]:
        """See `Transport`."""
        for local in self._sockets.keys() - set(locals_):
            sock = self._sockets.pop(local)
            self.on_close(sock)
            sock.close()
        problems = {}
        for local in sorted(set(locals_) - self._sockets.keys()):
            try:
                sock = _receiver(local)
            except OSError as error:
                problems[local] = f"cannot receive on {local} port {PORT}: {_words(error)}"
                continue
            self._sockets[local] = sock
            self.on_open(sock)
        return problems

    def drain(self, most: int) -> Iterator[Datagram]:
        """See `Transport`."""
        for local, sock in self._sockets.items():
            for _ in range(most):
                try:
                    data, controls, _, source = sock.recvmsg(_LONGEST, socket.CMSG_SPACE(4))
                except BlockingIOError:
                    break
                except OSError:  # an error that waited on the socket; the next call goes on
                    continue
                yield Datagram(local, source[0], _ttl(controls), data)

    def sender(self, local: str, peer: str) -> Sender:
        """See `Transport`."""
        return _UdpSender(local, peer)


class _UdpSender:
    def __init__(self, local: str, peer: str) -> None:
        self._socket = _socket(local)
        self._to = (peer, PORT)
        try:
            if _is_ipv6(local):
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, TTL)
                self._socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, _INTERNET_CONTROL)
            else:
                self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, TTL)
                self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, _INTERNET_CONTROL)
            _bind_any(self._socket, local)
        except OSError:
            self._socket.close()
            raise

    def send(self, data: bytes) -> str:
        """See `Sender`."""
        try:
            self._socket.sendto(data, self._to)
        except OSError as error:
            return _words(error)
        return ""

    def close(self) -> None:
        """See `Sender`."""
        self._socket.close()


def _bind_any(sock: socket.socket, local: str) -> None:
    """Take a free port of the range. Raises OSError."""
    for _ in range(_PORT_ATTEMPTS):
        try:
            sock.bind((local, random.choice(SOURCE_PORTS)))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return
    raise OSError(errno.EADDRINUSE, f"no free port found in {_PORT_ATTEMPTS} attempts")


def _receiver(local: str) -> socket.socket:
    sock = _socket(local)
    try:
        if _is_ipv6(local):
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_RECVTTL, 1)
        sock.bind((local, PORT))
    except OSError:
        sock.close()
        raise
    return sock


def _socket(local: str) -> socket.socket:
    family = socket.AF_INET6 if _is_ipv6(local) else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    return sock


def _is_ipv6(address: str) -> bool:
    return ":" in address


def _ttl(controls: list[tuple[int, int, bytes]]) -> int:
    """The TTL or hop limit in the control messages; -1 if the kernel did not say."""
    for level, kind, value in controls:
        if (level, kind) in (
            (socket.IPPROTO_IP, socket.IP_TTL),
            (socket.IPPROTO_IPV6, socket.IPV6_HOPLIMIT),
        ):
            return int.from_bytes(value[:4], sys.byteorder)
    return -1


def _words(error: OSError) -> str:
    return error.strerror or str(error)
