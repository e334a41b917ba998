"""Forgetting the connections of an address, by one netlink message: no program, no listing.

Connection tracking keeps what it knows of an address for minutes after its pod is gone; the next
owner of the address must not inherit it. The kernel goes through its table itself and removes what
matches (CTA_FILTER on a deletion, Linux 6.8), so that this costs some microseconds where a program
that lists the table and names each entry costs milliseconds for its start alone. An older kernel
refuses the message whole, without removing anything: `Unsupported`, and the caller falls back.

Source: linux/netfilter/nfnetlink_conntrack.h of the kernel's user API.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from typing import Protocol

from cymric.kernel.links import KernelError
from cymric.kernel.rtnetlink import attribute, messages, parse_error
from cymric.model.net import Address

_NETLINK_NETFILTER = 12
_DELETE = 1 << 8 | 2  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
_REQUEST_ACK = 0x1 | 0x4
_ERROR = 2
_VERSION = 1  # 0 would make the kernel ignore the family
_ORIGINAL, _REPLY, _FILTER = 1, 2, 25  # CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_FILTER
_TUPLE_IP = 1
_SOURCE = {4: 1, 6: 3}  # CTA_IP_V4_SRC, CTA_IP_V6_SRC
_FLAG_SOURCE = 1
_NESTED = 0x8000
_NO_SUCH = (errno.ENOENT, errno.ESRCH)
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)
_HEADER = struct.Struct("=IHHII")
_TIMEOUT = struct.pack("@ll", 2, 0)
_MOST_BYTES = 65536


class Unsupported(KernelError):
    """The kernel is too old to delete connections by a filter."""


class Connections(Protocol):
    """The connections that one network namespace tracks."""

    def forget(self, addresses: Iterable[Address]) -> None:
        """Remove every connection that an address began or answered. Raises KernelError."""
        ...


class FakeConnections:
    """A table in memory: pairs of who began a connection and who answers it."""

    def __init__(self) -> None:
        self.pairs: set[tuple[Address, Address]] = set()
        self.error: KernelError | None = None
        """Raised by every call, if set."""

    def forget(self, addresses: Iterable[Address]) -> None:
        """See Connections.forget."""
        if self.error is not None:
            raise self.error
        gone = set(addresses)
        self.pairs = {pair for pair in self.pairs if gone.isdisjoint(pair)}


class KernelConnections:
    """The kernel's table, of the namespace this was made in."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, _TIMEOUT)
        self._sequence = 0

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def forget(self, addresses: Iterable[Address]) -> None:
        """See Connections.forget."""
        for address in addresses:
            for direction in (_ORIGINAL, _REPLY):
                self._sequence += 1
                try:
                    self._socket.send(deletion(address, direction, self._sequence))
                    self._await_answer(address)
                except KernelError:
                    raise
                except OSError as error:
                    code = error.errno or errno.EIO
                    raise KernelError(code, _asked(address), os.strerror(code)) from error

    def _await_answer(self, address: Address) -> None:
        while True:
            for kind, flags, sequence, payload in messages(self._socket.recv(_MOST_BYTES)):
                if kind != _ERROR or sequence != self._sequence:
                    continue  # the late answer to a request given up
                code, said = parse_error(flags, payload)
                if code in _REFUSED:
                    raise Unsupported(code, _asked(address), said or os.strerror(code))
                if code and code not in _NO_SUCH:
                    raise KernelError(code, _asked(address), said or os.strerror(code))
                return


def deletion(address: Address, direction: int, sequence: int) -> bytes:
    """The request to remove all whose tuple of that direction has `address` as its source."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    source = attribute(_SOURCE[address.version], address.packed)
    of_tuple = attribute(direction | _NESTED, attribute(_TUPLE_IP | _NESTED, source))
    flags = attribute(direction, struct.pack("=I", _FLAG_SOURCE))
    body = struct.pack(">BBH", family, _VERSION, 0) + of_tuple + attribute(_FILTER | _NESTED, flags)
    return _HEADER.pack(_HEADER.size + len(body), _DELETE, _REQUEST_ACK, sequence, 0) + body


def _asked(address: Address) -> str:
    return f"forget the connections of {address}"
