"""The IPv4 addresses of all interfaces in one system call.

A netlink dump lists every interface's addresses of both families, and on a node with hundreds of
pods nearly all of them are link-local addresses of veth ends. SIOCGIFCONF lists exactly the
interfaces that have an IPv4 address. Source: netdevice(7).
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from collections.abc import Mapping
from ipaddress import IPv4Address

_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40  # name, sockaddr, padding to the size of the union on 64 bit machines
_IFCONF = struct.Struct("iP")
_FIRST_COUNT = 64


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
