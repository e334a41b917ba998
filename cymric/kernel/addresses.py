"""The addresses of all interfaces, cheaply.

A netlink dump lists every interface's addresses of both families, and on a node with hundreds of
pods nearly all of them are link-local addresses of veth ends. SIOCGIFCONF lists exactly the
interfaces that have an IPv4 address; for IPv6 there is a file of the kernel's, a line an address.
Changes are told by the kernel over netlink. Source: netdevice(7), proc(5), rtnetlink(7).
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from cymric.kernel.links import EventsLost
from cymric.model.net import Address

_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40  # name, sockaddr, padding to the size of the union on 64 bit machines
_IFCONF = struct.Struct("iP")
_FIRST_COUNT = 64
_RTMGRP_IPV4_IFADDR, _RTMGRP_IPV6_IFADDR = 0x10, 0x100
_SO_RCVBUFFORCE = 33
_EVENT_BUFFER_BYTES = 1 << 20
_MOST_EVENT_BYTES = 1 << 16
_HEADER = struct.Struct("=IHHII")
_ADDRESS = struct.Struct("=BBBBI")
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")


def by_interface() -> Mapping[str, frozenset[Address]]:
    """The addresses of each interface of our network namespace that has any. Raises OSError."""
    found: dict[str, frozenset[Address]] = dict(ipv4_by_interface())
    for name, addresses in ipv6_by_interface().items():
        found[name] = found.get(name, frozenset()) | addresses
    return found


def ipv6_by_interface() -> Mapping[str, frozenset[IPv6Address]]:
    """The same, only IPv6 and without link-local addresses; empty if the kernel has no IPv6."""
    try:
        lines = _IPV6_ADDRESSES.read_text().splitlines()
    except FileNotFoundError:
        return {}
    found: dict[str, frozenset[IPv6Address]] = {}
    for digits, *_, name in (line.split() for line in lines):
        address = IPv6Address(int(digits, 16))
        if not address.is_link_local:
            found[name] = found.get(name, frozenset()) | {address}
    return found


def ipv4_by_interface() -> Mapping[str, frozenset[IPv4Address]]:
    """The addresses of each interface of our network namespace that has any. Raises OSError."""
    count = _FIRST_COUNT
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asked:
        while True:
            buffer = array.array("B", bytes(count * _IFREQ_BYTES))
            request = _IFCONF.pack(len(buffer), buffer.buffer_info()[0])
            used: int = _IFCONF.unpack(fcntl.ioctl(asked, _SIOCGIFCONF, request))[0]
            if used < len(buffer):
                return _parse(buffer.tobytes()[:used])
            count *= 2  # a full buffer may have been cut


def _parse(data: bytes) -> Mapping[str, frozenset[IPv4Address]]:
    found: dict[str, frozenset[IPv4Address]] = {}
    for start in range(0, len(data), _IFREQ_BYTES):
        # A second address may carry a label, `eth0:1`.
        label = data[start : start + 16].split(b"\0", 1)[0].decode(errors="replace")
        name = label.partition(":")[0]
        address = IPv4Address(data[start + 20 : start + 24])
        found[name] = found.get(name, frozenset()) | {address}
    return found


class AddressEvents:
    """Tells when addresses come and go in the network namespace that it is watched in."""

    async def watch(self) -> AsyncIterator[int]:
        """The index of each interface that gained or lost an address, from now on.

        Raises EventsLost when some were not read in time, OSError.
        """
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE) as listener:
            listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER_BYTES)
            listener.bind((0, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
            loop = asyncio.get_running_loop()
            while True:
                try:
                    data = await loop.sock_recv(listener, _MOST_EVENT_BYTES)
                except OSError as error:
                    if error.errno == errno.ENOBUFS:
                        raise EventsLost from None
                    raise
                while len(data) >= _HEADER.size + _ADDRESS.size:
                    length, *_ = _HEADER.unpack_from(data)
                    yield _ADDRESS.unpack_from(data, _HEADER.size)[-1]
                    data = data[max(_HEADER.size, (length + 3) & ~3) :]


class NoAddressEvents:
    """No events: for tests."""

    async def watch(self) -> AsyncIterator[int]:
        """Never yields."""
        await asyncio.Event().wait()
        yield 0
