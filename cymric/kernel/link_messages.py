"""Links, addresses and neighbours as rtnetlink bytes: pure packing and parsing, no socket.

What is done for every pod is packed here, for the same reason as routes are (`rtnetlink.py`): a
netlink library spends more time on a message than the kernel does. Layouts: linux/rtnetlink.h,
linux/if_link.h, linux/if_addr.h, linux/neighbour.h, linux/veth.h of the kernel's user API.
"""

from __future__ import annotations

import socket
import struct
from enum import IntEnum

from cymric.kernel.links import Link, LinkRoute, VethPair
from cymric.kernel.rtnetlink import RT_TABLE_MAIN, Flag, attribute, attributes
from cymric.model.net import Address, Interface


class Kind(IntEnum):
    """Message types."""

    NEWLINK = 16
    DELLINK = 17
    GETLINK = 18
    SETLINK = 19
    NEWADDR = 20
    NEWROUTE = 24
    NEWNEIGH = 28
    DELNEIGH = 29


_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_IFINFO = struct.Struct("=BxHiII")  # family, device type, index, flags, changed flags
_IFADDR = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
_NDMSG = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type
_U32 = struct.Struct("=I")

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU = 1, 3, 4
_IFLA_LINK, _IFLA_LINKINFO, _IFLA_GROUP, _IFLA_NET_NS_FD = 5, 18, 27, 28
_IFLA_NUM_TX_QUEUES, _IFLA_NUM_RX_QUEUES = 31, 32
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_NDA_DST, _NDA_LLADDR = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_IFF_UP, _IFF_LOWER_UP = 0x1, 0x10000
_IFA_F_NODAD = 0x02
_NUD_PERMANENT = 0x80
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_PROTOCOL_BOOT, _UNICAST = 3, 1
_NEW = Flag.CREATE | Flag.EXCLUSIVE


def get_link(name: str) -> bytes:
    """The link of that name."""
    return _request(Kind.GETLINK, 0, _IFINFO.pack(0, 0, 0, 0, 0), (_IFLA_IFNAME, _text(name)))


def create_veth(pair: VethPair) -> bytes:
    """A pair, both ends down."""
    peer = _IFINFO.pack(0, 0, 0, 0, 0) + _packed(
        *_end(pair.peer_name, pair.peer_mac, pair),
        (_IFLA_NET_NS_FD, _U32.pack(pair.peer_namespace)),
    )
    info = _packed(
        (_INFO_KIND, b"veth"),
        (_INFO_DATA, _packed((_VETH_PEER, peer))),
    )
    return _request(
        Kind.NEWLINK,
        _NEW,
        _IFINFO.pack(0, 0, 0, 0, 0),
        *_end(pair.name, pair.mac, pair),
        (_IFLA_LINKINFO, info),
    )


def set_up(index: int) -> bytes:
    """A link switched on."""
    return _request(Kind.SETLINK, 0, _IFINFO.pack(0, 0, index, _IFF_UP, _IFF_UP))


def delete_link(index: int) -> bytes:
    """A link removed."""
    return _request(Kind.DELLINK, 0, _IFINFO.pack(0, 0, index, 0, 0))


def set_group(index: int, group: int) -> bytes:
    """A link put into a group, which is but a number it carries."""
    body = _IFINFO.pack(0, 0, index, 0, 0)
    return _request(Kind.SETLINK, 0, body, (_IFLA_GROUP, _U32.pack(group)))


def delete_group(group: int) -> bytes:
    """All links of a group removed at once."""
    body = _IFINFO.pack(0, 0, 0, 0, 0)
    return _request(Kind.DELLINK, 0, body, (_IFLA_GROUP, _U32.pack(group)))


def add_address(index: int, address: Interface) -> bytes:
    """An address for a link, without broadcast; of IPv6, ready at once (no duplicate detection)."""
    family, packed = _family(address.ip), address.ip.packed
    flags = _IFA_F_NODAD if address.version == 6 else 0
    body = _IFADDR.pack(family, address.network.prefixlen, flags, 0, index)
    return _request(Kind.NEWADDR, _NEW, body, (_IFA_LOCAL, packed), (_IFA_ADDRESS, packed))


def add_route(route: LinkRoute) -> bytes:
    """A route of the main table over a link."""
    destination = route.destination
    scope = _SCOPE_LINK if route.gateway is None else _SCOPE_UNIVERSE
    body = _RTMSG.pack(
        _family(destination.network_address),
        destination.prefixlen,
        0,
        0,
        RT_TABLE_MAIN,
        _PROTOCOL_BOOT,
        scope,
        _UNICAST,
        0,
    )
    pairs = [(_RTA_DST, destination.network_address.packed), (_RTA_OIF, _U32.pack(route.index))]
    if route.gateway is not None:
        pairs.append((_RTA_GATEWAY, route.gateway.packed))
    return _request(Kind.NEWROUTE, _NEW, body, *pairs)


def set_neighbour(index: int, address: Address, mac: str) -> bytes:
    """A permanent neighbour, whatever was known before."""
    body = _NDMSG.pack(_family(address), index, _NUD_PERMANENT, 0, 0)
    pairs = ((_NDA_DST, address.packed), (_NDA_LLADDR, _mac(mac)))
    return _request(Kind.NEWNEIGH, Flag.CREATE | Flag.REPLACE, body, *pairs)


def remove_neighbour(index: int, address: Address) -> bytes:
    """A neighbour forgotten."""
    body = _NDMSG.pack(_family(address), index, 0, 0, 0)
    return _request(Kind.DELNEIGH, 0, body, (_NDA_DST, address.packed))


def numbered(request: bytes, sequence: int) -> bytes:
    """The request under its sequence number."""
    length, kind, flags, _, port = _HEADER.unpack_from(request)
    return _HEADER.pack(length, kind, flags, sequence, port) + request[_HEADER.size :]


def parse_link(payload: bytes) -> Link:
    """The link an RTM_NEWLINK tells of."""
    _, _, index, flags, _ = _IFINFO.unpack_from(payload)
    found = attributes(payload, _IFINFO.size)
    info = attributes(found.get(_IFLA_LINKINFO, b""), 0)
    return Link(
        index=index,
        name=_untext(found[_IFLA_IFNAME]),
        kind=_untext(info.get(_INFO_KIND, b"")),
        mac=found.get(_IFLA_ADDRESS, b"").hex(":"),
        mtu=_U32.unpack(found[_IFLA_MTU])[0] if _IFLA_MTU in found else 0,
        is_up=bool(flags & _IFF_UP),
        is_running=bool(flags & _IFF_UP and flags & _IFF_LOWER_UP),
    )


def parse_peer_index(payload: bytes) -> int:
    """The index of a veth's other end, in the namespace where that is; 0 if it is not told."""
    found = attributes(payload, _IFINFO.size)
    return int(_U32.unpack(found[_IFLA_LINK])[0]) if _IFLA_LINK in found else 0


def _end(name: str, mac: str, pair: VethPair) -> list[tuple[int, bytes]]:
    pairs = [(_IFLA_IFNAME, _text(name))]
    if mac:
        pairs.append((_IFLA_ADDRESS, _mac(mac)))
    if pair.mtu:
        pairs.append((_IFLA_MTU, _U32.pack(pair.mtu)))
    if pair.queues:
        queues = _U32.pack(pair.queues)
        pairs += [(_IFLA_NUM_TX_QUEUES, queues), (_IFLA_NUM_RX_QUEUES, queues)]
    return pairs


def _request(kind: Kind, flags: int, body: bytes, *pairs: tuple[int, bytes]) -> bytes:
    payload = body + _packed(*pairs)
    # Flag.ACK would make GETLINK answer twice; the link itself is answer enough.
    wanted = flags | Flag.REQUEST | (0 if kind is Kind.GETLINK else Flag.ACK)
    return _HEADER.pack(_HEADER.size + len(payload), kind, wanted, 0, 0) + payload


def _packed(*pairs: tuple[int, bytes]) -> bytes:
    return b"".join(attribute(kind, value) for kind, value in pairs)


def _family(address: Address) -> int:
    return int(socket.AF_INET if address.version == 4 else socket.AF_INET6)


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def _text(name: str) -> bytes:
    return name.encode() + b"\0"


def _untext(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")
