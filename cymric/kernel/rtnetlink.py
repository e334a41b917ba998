"""Routes as rtnetlink bytes: pure packing and parsing, no socket.

Building one message object per route in a netlink library costs some fifty times what the kernel
needs to install it, so bulk routes are packed here with `struct`. Everything but the prefix is the
same for all routes of a next hop, so that part is encoded once and reused (`Encoder`).

Both families work: the address length decides. Layouts: linux/netlink.h, linux/rtnetlink.h and
linux/if_link.h of the kernel's user API; netlink(7), rtnetlink(7).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

from cymric.kernel.api import NextHop, Route, RouteKind
from cymric.model.net import Address, Network
from cymric.model.prefix import prefix_at

RT_TABLE_MAIN = 254


class Message(IntEnum):
    """Message types."""

    ERROR = 2
    DONE = 3
    NEWLINK = 16
    GETLINK = 18
    NEWROUTE = 24
    DELROUTE = 25
    GETROUTE = 26


class Flag(IntEnum):
    """Message flags; the meaning of some bits depends on the message type."""

    REQUEST = 0x1
    ACK = 0x4
    DUMP_INTERRUPTED = 0x10
    REPLACE = 0x100
    EXCLUSIVE = 0x200
    DUMP = 0x300
    CREATE = 0x400


_CAPPED = 0x100  # on an answer: the request's payload is not repeated
_ACK_TLVS = 0x200  # on an answer: attributes with an explanation follow

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 4, 5, 6, 7
_RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA = 9, 15, 18
_IFLA_IFNAME = 3
_ERROR_TEXT = 1

_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_NOWHERE = 0, 253, 255
_TYPE_BY_KIND = {RouteKind.UNICAST: 1, RouteKind.BLACKHOLE: 6}
_KIND_BY_TYPE = {number: kind for kind, number in _TYPE_BY_KIND.items()}
_DROPPING_TYPES = (7, 8)  # unreachable, prohibit: a blackhole that answers

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type
_ATTRIBUTE = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_I32 = struct.Struct("=i")
_NEXTHOP = struct.Struct("=HBBi")  # length, flags, weight - 1, interface
_IFINFO = struct.Struct("=BxHiII")
_NESTED_BIT = 0x8000
_MOST_TAILS = 4096


@dataclass(frozen=True, slots=True)
class Seen:
    """A route as the kernel dumped it. Devices are interface numbers until names are known."""

    prefix: Network
    kind: RouteKind
    hops: tuple[tuple[Address | None, int, int], ...]  # gateway, interface number, weight
    metric: int
    source: Address | None
    protocol: int
    table: int
    type_number: int


@dataclass(slots=True)
class Encoder:
    """Encodes changes of routes of one table and protocol; remembers what does not vary."""

    table: int
    protocol: int
    _tail_by_object: dict[tuple[int, int], tuple[Route, bytes]] = field(default_factory=dict)

    def new_routes(
        self,
        routes: Sequence[tuple[Network, Route]],
        *,
        flags: int,
        first: int,
        index: Mapping[str, int],
    ) -> bytes:
        """RTM_NEWROUTE for each, numbered from `first`; the last asks for an answer.

        `index` must hold the interface number of every device of the routes.
        """
        parts: list[bytes] = []
        flags |= Flag.REQUEST
        kind = int(Message.NEWROUTE)
        shapes: dict[tuple[int, int], tuple[int, bytes, bytes]] = {}
        for sequence, (prefix, route) in enumerate(routes, first):
            length = prefix.prefixlen
            shape = shapes.get((id(route), length))
            if shape is None or prefix.version == 6:
                # An IPv4 and an IPv6 prefix of one length and route would differ in family.
                shape = self._shape(prefix, route, index)
                if prefix.version == 4:
                    shapes[id(route), length] = shape
            size, head, tail = shape
            destination = prefix.network_address.packed
            parts += (_HEADER.pack(size, kind, flags, sequence, 0), head, destination, tail)
        if routes:
            last = len(parts) - 4
            size, *_ = _HEADER.unpack(parts[last])
            sequence = first + len(routes) - 1
            parts[last] = _HEADER.pack(size, kind, flags | Flag.ACK, sequence, 0)
        return b"".join(parts)

    def _shape(
        self, prefix: Network, route: Route, index: Mapping[str, int]
    ) -> tuple[int, bytes, bytes]:
        """Size of the message, and what stands before and after the destination's address."""
        scope = _SCOPE_UNIVERSE
        if route.kind is RouteKind.UNICAST and all(hop.gateway is None for hop in route.next_hops):
            scope = _SCOPE_LINK
        head = self._head(prefix, scope, _TYPE_BY_KIND[route.kind])
        tail = self._tail(prefix.version, route, index)
        return _HEADER.size + len(head) + prefix.max_prefixlen // 8 + len(tail), head, tail

    def delete_route(self, prefix: Network, *, metric: int, flags: int, sequence: int) -> bytes:
        """RTM_DELROUTE that matches only a route of our protocol with this metric."""
        tail = attribute(_RTA_PRIORITY, _U32.pack(metric))
        if self.table >= 256:
            tail += attribute(_RTA_TABLE, _U32.pack(self.table))
        # Scope "nowhere" and type 0 match any: identity is prefix, metric, table and protocol.
        head = self._head(prefix, _SCOPE_NOWHERE, 0)
        destination = prefix.network_address.packed
        size = _HEADER.size + len(head) + len(destination) + len(tail)
        header = _HEADER.pack(size, Message.DELROUTE, flags | Flag.REQUEST, sequence, 0)
        return b"".join((header, head, destination, tail))

    def _head(self, prefix: Network, scope: int, kind: int) -> bytes:
        """The fixed part of a message, and the head of the destination attribute."""
        body = _RTMSG.pack(
            socket.AF_INET if prefix.version == 4 else socket.AF_INET6,
            prefix.prefixlen,
            0,
            0,
            self.table if self.table < 256 else 0,
            self.protocol,
            scope,
            kind,
            0,
        )
        return body + _ATTRIBUTE.pack(_ATTRIBUTE.size + prefix.max_prefixlen // 8, _RTA_DST)

    def _tail(self, version: int, route: Route, index: Mapping[str, int]) -> bytes:
        # By identity: routes through one gateway are usually one object, and hashing one is slow.
        known = self._tail_by_object.get((id(route), version))
        if known is not None and known[0] is route:
            return known[1]
        parts = [attribute(_RTA_PRIORITY, _U32.pack(route.metric))]
        if self.table >= 256:
            parts.append(attribute(_RTA_TABLE, _U32.pack(self.table)))
        if route.source is not None:
            parts.append(attribute(_RTA_PREFSRC, route.source.packed))
        if len(route.next_hops) == 1:
            parts.append(_hop_attributes(route.next_hops[0], version, index))
        elif route.next_hops:
            parts.append(attribute(_RTA_MULTIPATH, _multipath(route.next_hops, version, index)))
        tail = b"".join(parts)
        if all(hop.device is None for hop in route.next_hops):
            # A device's number may change under its name, so those are encoded afresh every time.
            if len(self._tail_by_object) >= _MOST_TAILS:
                self._tail_by_object.clear()
            self._tail_by_object[id(route), version] = (route, tail)
        return tail


def _hop_attributes(hop: NextHop, version: int, index: Mapping[str, int]) -> bytes:
    parts = []
    if hop.gateway is not None:
        if hop.gateway.version == version:
            parts.append(attribute(_RTA_GATEWAY, hop.gateway.packed))
        else:  # IPv4 through an IPv6 next hop (RFC 8950) is spelt with its own attribute
            family = _family(hop.gateway).to_bytes(2, "little")
            parts.append(attribute(_RTA_VIA, family + hop.gateway.packed))
    if hop.device is not None:
        parts.append(attribute(_RTA_OIF, _U32.pack(index[hop.device])))
    return b"".join(parts)


def _multipath(hops: tuple[NextHop, ...], version: int, index: Mapping[str, int]) -> bytes:
    parts = []
    for hop in hops:
        inner = (
            _hop_attributes(NextHop(gateway=hop.gateway), version, index) if hop.gateway else b""
        )
        number = index[hop.device] if hop.device is not None else 0
        parts.append(_NEXTHOP.pack(_NEXTHOP.size + len(inner), 0, hop.weight - 1, number) + inner)
    return b"".join(parts)


def _family(address: Address) -> int:
    return int(socket.AF_INET if address.version == 4 else socket.AF_INET6)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    padding = b"\0" * (-len(value) % 4)
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + padding


def dump_routes(version: int, *, table: int, protocol: int, sequence: int) -> bytes:
    """RTM_GETROUTE for all routes of a table and protocol (a strict kernel filters, others not)."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    body = _RTMSG.pack(family, 0, 0, 0, table if table < 256 else 0, protocol, 0, 0, 0)
    if table >= 256:
        body += attribute(_RTA_TABLE, _U32.pack(table))
    return (
        _HEADER.pack(
            _HEADER.size + len(body), Message.GETROUTE, Flag.REQUEST | Flag.DUMP, sequence, 0
        )
        + body
    )


def get_links(*, name: str | None, sequence: int) -> bytes:
    """RTM_GETLINK for the link of that name, or for all."""
    flags = Flag.REQUEST | (Flag.DUMP if name is None else 0)
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, 0, 0, 0)
    if name is not None:
        body += attribute(_IFLA_IFNAME, name.encode() + b"\0")
    return _HEADER.pack(_HEADER.size + len(body), Message.GETLINK, flags, sequence, 0) + body


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and payload of each message of one datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            raise ValueError(f"netlink message of {length} bytes")
        yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3


def parse_error(flags: int, payload: bytes) -> tuple[int, str]:
    """The positive errno of an NLMSG_ERROR (0: an acknowledgement) and the kernel's own words."""
    number = -int(_I32.unpack_from(payload)[0])
    text = ""
    if flags & _ACK_TLVS:
        skip = _I32.size + _HEADER.size
        if not flags & _CAPPED:
            skip = _I32.size + ((_U32.unpack_from(payload, _I32.size)[0] + 3) & ~3)
        text = (
            attributes(payload, skip).get(_ERROR_TEXT, b"").rstrip(b"\0").decode(errors="replace")
        )
    return number, text


def parse_link(payload: bytes) -> tuple[int, str]:
    """Interface number and name of an RTM_NEWLINK."""
    number = int(_IFINFO.unpack_from(payload)[2])
    return number, attributes(payload, _IFINFO.size)[_IFLA_IFNAME].rstrip(b"\0").decode()


def parse_route(payload: bytes, *, drops: bool = False) -> Seen | None:
    """A dumped route; None for one of a kind this driver never writes (it cannot be ours).

    `drops`: whatever drops packets is read as a blackhole, for readers of others' routes.
    """
    family, length, _, tos, table, protocol, _, type_number, _ = _RTMSG.unpack_from(payload)
    kind = _KIND_BY_TYPE.get(type_number)
    if drops and type_number in _DROPPING_TYPES:
        kind = RouteKind.BLACKHOLE
    if kind is None or tos or family not in (socket.AF_INET, socket.AF_INET6):
        return None
    found = attributes(payload, _RTMSG.size)
    destination = int.from_bytes(found.get(_RTA_DST, b""), "big")
    hops: tuple[tuple[Address | None, int, int], ...] = ()
    if kind is RouteKind.UNICAST:
        hops = _parse_hops(found)
    return Seen(
        prefix=prefix_at(4 if family == socket.AF_INET else 6, destination, length),
        kind=kind,
        hops=hops,
        metric=int(_U32.unpack(found[_RTA_PRIORITY])[0]) if _RTA_PRIORITY in found else 0,
        source=_address(found[_RTA_PREFSRC]) if _RTA_PREFSRC in found else None,
        protocol=protocol,
        table=int(_U32.unpack(found[_RTA_TABLE])[0]) if _RTA_TABLE in found else table,
        type_number=type_number,
    )


def _parse_hops(found: dict[int, bytes]) -> tuple[tuple[Address | None, int, int], ...]:
    if _RTA_MULTIPATH not in found:
        number = int(_U32.unpack(found[_RTA_OIF])[0]) if _RTA_OIF in found else 0
        return ((_gateway(found), number, 1),)
    data, hops, offset = found[_RTA_MULTIPATH], [], 0
    while offset + _NEXTHOP.size <= len(data):
        length, _, weight, number = _NEXTHOP.unpack_from(data, offset)
        inner = attributes(data[: offset + length], offset + _NEXTHOP.size)
        hops.append((_gateway(inner), number, weight + 1))
        offset += (length + 3) & ~3
    return tuple(hops)


def _gateway(found: dict[int, bytes]) -> Address | None:
    if _RTA_GATEWAY in found:
        return _address(found[_RTA_GATEWAY])
    return _address(found[_RTA_VIA][2:]) if _RTA_VIA in found else None


@lru_cache(maxsize=4096)
def _address(packed: bytes) -> Address:
    return IPv4Address(packed) if len(packed) == 4 else IPv6Address(packed)


def attributes(data: bytes, offset: int) -> dict[int, bytes]:
    """The attributes from `offset` on, by type; the last of a type wins."""
    found = {}
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            break
        found[kind & ~_NESTED_BIT] = data[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found
