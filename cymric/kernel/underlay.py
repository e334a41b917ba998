"""The main table's routes that are not bgpd's, and word of what may have changed about them.

    kernel ─ dump ─▶ read() ─▶ OtherRoute … ─▶ next hops resolved (bgpd/next_hops.py)
    kernel ─ events ─▶ changes() ─▶ a prefix, a device, or "anything": read again

Level, not edge: an event only says what to look at. What the kernel does not tell is inferred: when
a device goes down or an address goes, IPv4 routes through it vanish without a word, so the device
is named instead.

Invariants
- Nothing is written here.
- bgpd's own routes are never seen: the dump leaves them out, and a filter in the kernel drops the
  events about them, which come by the hundred thousand.

Source: rtnetlink(7), netlink(7); classic BPF on netlink sockets, socket(7) SO_ATTACH_FILTER.
"""

from __future__ import annotations

import array
import asyncio
import errno
import socket
import struct
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from cymric.kernel import rtnetlink
from cymric.kernel.routes import RTPROT_CYMRIC, DumpInterrupted, NetlinkError
from cymric.kernel.rtnetlink import Flag, Message, Seen
from cymric.model.net import Address, Network
from cymric.model.prefix import prefix_at

READ_BYTES = 256 << 10
DUMP_ATTEMPTS = 5
ANSWER_WITHIN_S = 10.0
EVENT_BUFFER_BYTES = 4 << 20

_SOL_NETLINK, _NETLINK_GET_STRICT_CHK = 270, 12
_SO_ATTACH_FILTER, _SO_RCVBUFFORCE = 26, 33
_GROUP_LINK, _GROUP_ADDRESS_4, _GROUP_ROUTE_4 = 0x1, 0x10, 0x40
_GROUP_ADDRESS_6, _GROUP_ROUTE_6 = 0x100, 0x400
_DELLINK, _DELADDR = 17, 21
_IFF_UP = 0x1
_RTMSG = struct.Struct("=BBBBBBBBI")
_IFINFO = struct.Struct("=BxHiII")
_IFADDR = struct.Struct("=BBBBI")
_PROTOCOL_AT = 5  # in the route message
_RTA_DST = 1

_LOAD_BYTE, _JUMP_IF_EQUAL, _RETURN = 0x30, 0x15, 0x06
_INSTRUCTION = struct.Struct("=HBBI")


@dataclass(frozen=True, slots=True)
class Out:
    """One way out of a route: through a gateway, or (None) straight out of the device."""

    gateway: Address | None
    device: str
    index: int


@dataclass(frozen=True, slots=True)
class OtherRoute:
    """A route of somebody else's; without any way out it drops. The lower metric wins."""

    prefix: Network
    outs: tuple[Out, ...]
    metric: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """What may have changed: the routes to a prefix, those through a device, or (neither) any."""

    prefix: Network | None = None
    device: int | None = None


ANYTHING = Change()


class Underlay(Protocol):
    """The routes by which this node reaches its peers and theirs."""

    async def read(self) -> Sequence[OtherRoute]:
        """All of them, as they are now. Raises OSError, TimeoutError."""
        ...

    def changes(self) -> AsyncIterator[Change]:
        """What changes from now on. Raises OSError."""
        ...


class KernelUnderlay:
    """The main table of the network namespace in which this object was made."""

    def __init__(self, *, without_protocol: int = RTPROT_CYMRIC) -> None:
        self._without = without_protocol
        self._socket = _open()
        self._events = _open()
        self._sequence = 0
        with suppress(PermissionError):
            self._events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, EVENT_BUFFER_BYTES)
        _drop_events_of(self._events, without_protocol)
        self._events.bind(
            (
                0,
                _GROUP_LINK | _GROUP_ADDRESS_4 | _GROUP_ROUTE_4 | _GROUP_ADDRESS_6 | _GROUP_ROUTE_6,
            )
        )

    def close(self) -> None:
        """Let go of the sockets."""
        self._socket.close()
        self._events.close()

    async def read(self) -> Sequence[OtherRoute]:
        """See `Underlay`."""
        seen: list[Seen] = []
        for version in (4, 6):
            seen += await self._routes(version)
        names: dict[int, str] = {}
        if any(number for route in seen for _, number, _ in route.hops):
            self._sequence += 1
            links = rtnetlink.get_links(name=None, sequence=self._sequence)
            names = dict(map(rtnetlink.parse_link, await self._dump(links, Message.NEWLINK)))
        return tuple(
            OtherRoute(
                prefix=route.prefix,
                outs=tuple(
                    Out(gateway, names[number], number)
                    for gateway, number, _ in route.hops
                    if number in names
                ),
                metric=route.metric,
            )
            for route in seen
        )

    async def changes(self) -> AsyncIterator[Change]:
        """See `Underlay`. What happened since this object was made is told as well."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = await loop.sock_recv(self._events, READ_BYTES)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield ANYTHING  # some events were lost
                continue
            for kind, _, _, payload in rtnetlink.messages(data):
                change = _change(kind, payload)
                if change is not None:
                    yield change

    async def _routes(self, version: int) -> list[Seen]:
        for _ in range(DUMP_ATTEMPTS):
            self._sequence += 1
            request = rtnetlink.dump_routes(
                version, table=rtnetlink.RT_TABLE_MAIN, protocol=0, sequence=self._sequence
            )
            with suppress(DumpInterrupted):
                payloads = await self._dump(request, Message.NEWROUTE)
                found = (rtnetlink.parse_route(one, drops=True) for one in payloads)
                return [
                    route
                    for route in found
                    if route is not None and route.table == rtnetlink.RT_TABLE_MAIN
                ]
        raise DumpInterrupted(errno.EINTR, "the route table kept changing while it was read")

    async def _dump(self, request: bytes, wanted: Message) -> list[bytes]:
        payloads: list[bytes] = []
        is_interrupted = False
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(ANSWER_WITHIN_S):
            await loop.sock_sendall(self._socket, request)
            while True:
                data = await loop.sock_recv(self._socket, READ_BYTES)
                for kind, flags, sequence, payload in rtnetlink.messages(data):
                    if sequence != self._sequence:
                        continue  # of a request that was given up
                    is_interrupted = is_interrupted or bool(flags & Flag.DUMP_INTERRUPTED)
                    if kind == Message.ERROR:
                        raise NetlinkError(*rtnetlink.parse_error(flags, payload))
                    if kind == Message.DONE:
                        if is_interrupted:
                            raise DumpInterrupted(errno.EINTR, "the table changed meanwhile")
                        return payloads
                    is_own = wanted is Message.NEWROUTE and payload[_PROTOCOL_AT] == self._without
                    if kind == wanted and not is_own:
                        payloads.append(payload)


def _change(kind: int, payload: bytes) -> Change | None:
    """What an event may change; None if no route of the main table."""
    if kind in (Message.NEWROUTE, Message.DELROUTE):
        family, length, _, _, table, *_ = _RTMSG.unpack_from(payload)
        if table != rtnetlink.RT_TABLE_MAIN or family not in (socket.AF_INET, socket.AF_INET6):
            return None
        destination = rtnetlink.attributes(payload, _RTMSG.size).get(_RTA_DST, b"")
        version = 4 if family == socket.AF_INET else 6
        return Change(prefix=prefix_at(version, int.from_bytes(destination, "big"), length))
    if kind in (Message.NEWLINK, _DELLINK):
        _, _, index, flags, _ = _IFINFO.unpack_from(payload)
        return Change(device=index) if kind == _DELLINK or not flags & _IFF_UP else None
    if kind == _DELADDR:
        return Change(device=_IFADDR.unpack_from(payload)[-1])
    return None


def _drop_events_of(listener: socket.socket, protocol: int) -> None:
    """Have the kernel drop events about routes of that protocol number."""
    type_at = 4 if sys.byteorder == "little" else 5
    program = b"".join(
        _INSTRUCTION.pack(*instruction)
        for instruction in (
            (_LOAD_BYTE, 0, 0, type_at),
            (_JUMP_IF_EQUAL, 1, 0, Message.NEWROUTE),
            (_JUMP_IF_EQUAL, 0, 2, Message.DELROUTE),
            (_LOAD_BYTE, 0, 0, 16 + _PROTOCOL_AT),  # after the header of 16 bytes
            (_JUMP_IF_EQUAL, 1, 0, protocol),
            (_RETURN, 0, 0, 0xFFFFFFFF),
            (_RETURN, 0, 0, 0),
        )
    )
    kept = array.array("B", program)
    count = len(program) // _INSTRUCTION.size
    filter_program = struct.pack("@HP", count, kept.buffer_info()[0])
    listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_program)


def _open() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    opened.setblocking(False)
    with suppress(OSError):  # kernels before 4.20 send all tables: then the filter is ours alone
        opened.setsockopt(_SOL_NETLINK, _NETLINK_GET_STRICT_CHK, 1)
    return opened
