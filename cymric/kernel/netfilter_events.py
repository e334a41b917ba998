"""Who changes which table of netfilter, as the kernel tells it.

The nft side of the kernel (nftables itself, and iptables in its nft variant) announces every change
of a table, chain or rule to a group of netlink listeners; the port number of the socket that asked
for it is that of the process, as a rule, which is how a listener knows its own changes. The legacy
variant announces nothing. Source: linux/netfilter/nf_tables.h, nfnetlink.h, netlink(7).
"""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from cymric.kernel.links import EventsLost

_NETLINK_NETFILTER = 12
_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP = 270, 1
_NFNLGRP_NFTABLES = 7
_NFNL_SUBSYS_NFTABLES = 10
_SO_RCVBUFFORCE = 33
_EVENT_BUFFER_BYTES = 4 << 20
_MOST_BYTES = 1 << 16
_HEADER = struct.Struct("=IHHII")
_FAMILY = struct.Struct("=BBH")
_ATTRIBUTE = struct.Struct("=HH")
_ATTRIBUTE_TYPE = 0x3FFF

# Message by number: the attributes that hold the table's and the chain's name.
# A table is "new" with every transaction of iptables, so that says nothing.
_DELETE_TABLE, _NEW_CHAIN, _DELETE_CHAIN, _NEW_RULE, _DELETE_RULE = 2, 3, 5, 6, 8
_NAMES = {
    _DELETE_TABLE: (1, None),
    _NEW_CHAIN: (1, 3),
    _DELETE_CHAIN: (1, 3),
    _NEW_RULE: (1, 2),
    _DELETE_RULE: (1, 2),
}
_VERSION_BY_FAMILY = {2: 4, 10: 6}  # NFPROTO_IPV4, NFPROTO_IPV6


@dataclass(frozen=True, slots=True)
class TableChange:
    """Somebody changed something in a table; `chain` is empty for the table as a whole."""

    ip_version: int
    table: str
    chain: str
    port: int
    """The netlink port of who did it: the process' id, unless it has several sockets."""


class TableEvents(Protocol):
    """Tells of changes."""

    def watch(self, is_own: Callable[[int], bool]) -> AsyncIterator[TableChange]:
        """Every change from now on, but for those of ports that `is_own` knows.

        Raises EventsLost when some were not read in time.
        """
        ...


class NetfilterEvents:
    """The real ones, of the network namespace that the socket is opened in."""

    async def watch(self, is_own: Callable[[int], bool]) -> AsyncIterator[TableChange]:
        """See TableEvents.watch. Raises OSError if the kernel has no nft side."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_NETLINK, kind, _NETLINK_NETFILTER) as listener:
            listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER_BYTES)
            listener.bind((0, 0))
            listener.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
            loop = asyncio.get_running_loop()
            while True:
                try:
                    data = await loop.sock_recv(listener, _MOST_BYTES)
                except OSError as error:
                    if error.errno == errno.ENOBUFS:
                        raise EventsLost from None
                    raise
                for change in parse(data, is_own):
                    yield change


class SilentEvents:
    """No events: for kernels and tests without them."""

    async def watch(self, is_own: Callable[[int], bool]) -> AsyncIterator[TableChange]:
        """Never yields."""
        await asyncio.Event().wait()
        yield TableChange(4, "", "", 0)


def parse(data: bytes, is_own: Callable[[int], bool]) -> Iterator[TableChange]:
    """The changes in one datagram."""
    while len(data) >= _HEADER.size:
        length, kind, _, _, port = _HEADER.unpack_from(data)
        if length < _HEADER.size:
            return
        body, data = data[_HEADER.size : length], data[(length + 3) & ~3 :]
        names = _NAMES.get(kind & 0xFF) if kind >> 8 == _NFNL_SUBSYS_NFTABLES else None
        if names is None or len(body) < _FAMILY.size or is_own(port):
            continue
        version = _VERSION_BY_FAMILY.get(_FAMILY.unpack_from(body)[0])
        if version is None:
            continue
        texts = _texts(body[_FAMILY.size :], names)
        yield TableChange(version, texts.get(names[0], ""), texts.get(names[1], ""), port)


def _texts(data: bytes, wanted: tuple[int | None, ...]) -> dict[int | None, str]:
    found: dict[int | None, str] = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        if length < _ATTRIBUTE.size:
            break
        if kind & _ATTRIBUTE_TYPE in wanted:
            text = data[_ATTRIBUTE.size : length].split(b"\0")[0]
            found[kind & _ATTRIBUTE_TYPE] = text.decode(errors="replace")
        data = data[(length + 3) & ~3 :]
    return found
