"""Whether the kernel already sends an address to a link of this machine: asked one by one.

The question is the kernel's own look-up (RTM_GETROUTE with RTM_F_FIB_MATCH, which answers with the
entry that decides), so it sees every table and every owner of routes and costs some 50
microseconds. An address counts as routed when that entry is for it alone and leads to a link
without a gateway, or to this machine itself. Blocks' blackholes and everything wider do not count.
Source: linux/rtnetlink.h.
"""

from __future__ import annotations

import socket
import struct

from cymric.kernel.links import KernelError
from cymric.kernel.netlink import Requests
from cymric.kernel.rtnetlink import Flag, attributes
from cymric.model.net import Address

_GETROUTE = 26
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type
_ATTRIBUTE = struct.Struct("=HH")
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_VIA = 1, 4, 5, 18
_RTM_F_FIB_MATCH = 0x2000
_UNICAST, _LOCAL = 1, 2


class HostRoutes:
    """The routes of the network namespace that this was made in."""

    def __init__(self) -> None:
        self._requests = Requests(None)

    def close(self) -> None:
        """Let go of the socket."""
        self._requests.close()

    def leads_to_link(self, address: Address) -> bool:
        """Whether a route for `address` alone leads to a link, or the address is our own."""
        try:
            payload = self._requests.ask(f"look up route to {address}", _get_route(address))
        except KernelError:
            return False  # unreachable, or thrown away: nobody has it
        fields = _RTMSG.unpack_from(payload)
        prefix_length, kind = fields[1], fields[7]
        found = attributes(payload, _RTMSG.size)
        if prefix_length != address.max_prefixlen:
            return False
        is_direct = _RTA_OIF in found and not found.keys() & {_RTA_GATEWAY, _RTA_VIA}
        return kind == _LOCAL or (kind == _UNICAST and is_direct)


def _get_route(address: Address) -> bytes:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    length = address.max_prefixlen
    body = _RTMSG.pack(family, length, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(address.packed), _RTA_DST) + address.packed
    return _HEADER.pack(_HEADER.size + len(body), _GETROUTE, Flag.REQUEST, 0, 0) + body
