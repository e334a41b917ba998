"""Real packets of any protocol out of one namespace, and who gets them in which namespace.

Raw sockets, opened in each namespace and used from here: one sends packets as they are, one for
each protocol gets what the namespace's own kernel accepted for itself, after its INPUT chains.
Every packet carries a number, so that a late one is never taken for another.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from pyroute2 import netns

from cymric.model.net import Address
from felix.calc.verdict import Packet

_IPV6_HDRINCL = 36
_RECEIVE_BYTES = 1 << 22
_SO_RCVBUFFORCE = 33
_MAGIC = b"CYFV"
TCP, UDP, SCTP, ICMP, ICMPV6, OTHER = 6, 17, 132, 1, 58, 253
_PROTOCOLS = {4: (TCP, UDP, SCTP, ICMP, OTHER), 6: (TCP, UDP, SCTP, ICMPV6, OTHER)}
_TOKEN_AT = {TCP: 20, UDP: 8, SCTP: 16, ICMP: 8, ICMPV6: 8, OTHER: 0}
_ICMP_ANSWERS = {0, 14, 129, 140}
HOPS = 64


class Wire:
    """Sockets in some namespaces; `close` when done."""

    def __init__(self, namespaces: Iterable[str]) -> None:
        self._senders: dict[tuple[str, int], socket.socket] = {}
        self._receivers: dict[socket.socket, tuple[str, int, int]] = {}
        for name in namespaces:
            with _inside(name):
                self._open(name)

    def close(self) -> None:
        """Close all sockets."""
        for one in (*self._senders.values(), *self._receivers):
            one.close()

    def send(self, namespace: str, packet: Packet, number: int) -> None:
        """Send a packet from a namespace; that its kernel drops it or has no route is no error."""
        version = packet.ip_version
        data = _packet(packet, number)
        target = (
            (str(packet.destination), 0) if version == 4 else (str(packet.destination), 0, 0, 0)
        )
        try:
            self._senders[namespace, version].sendto(data, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENETUNREACH):
                raise

    def received(self, wait_s: float = 0.0) -> Iterator[tuple[int, str]]:
        """What arrived: the packet's number, and where; waits for the first, if there is none."""
        deadline_s = time.monotonic() + wait_s
        while True:
            found = list(self._waiting())
            if found or time.monotonic() >= deadline_s:
                yield from found
                return
            time.sleep(0.001)

    def _open(self, name: str) -> None:
        for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
            sender = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
            if version == 6:
                sender.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
            self._senders[name, version] = sender
            for protocol in _PROTOCOLS[version]:
                receiver = socket.socket(family, socket.SOCK_RAW, protocol)
                receiver.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
                receiver.setblocking(False)
                self._receivers[receiver] = (name, version, protocol)

    def _waiting(self) -> Iterator[tuple[int, str]]:
        for receiver, (name, version, protocol) in self._receivers.items():
            while True:
                try:
                    data = receiver.recv(2048)
                except BlockingIOError:
                    break
                body = data[(data[0] & 15) * 4 :] if version == 4 else data
                start = _TOKEN_AT[protocol]
                if protocol in (ICMP, ICMPV6) and body[0] in _ICMP_ANSWERS:
                    continue  # the echo of one of ours
                if body[start : start + 4] == _MAGIC:
                    yield struct.unpack("!I", body[start + 4 : start + 8])[0], name


@contextmanager
def _inside(name: str) -> Iterator[None]:
    netns.pushns(name)
    try:
        yield
    finally:
        netns.popns()


def _packet(packet: Packet, number: int) -> bytes:
    body = _body(packet, _MAGIC + struct.pack("!I", number))
    source, destination = packet.source.packed, packet.destination.packed
    if packet.ip_version == 4:
        head = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 20 + len(body), number & 0xFFFF, 0, HOPS, packet.protocol, 0,
            source, destination,
        )  # fmt: skip
        return head + body  # the kernel writes the header's checksum
    head = struct.pack(
        "!IHBB16s16s", 6 << 28, len(body), packet.protocol, HOPS, source, destination
    )
    return head + body


def _body(packet: Packet, token: bytes) -> bytes:
    ports = (packet.source_port, packet.destination_port)
    match packet.protocol:
        case 6:  # the first of a connection: SYN
            body = struct.pack("!HHIIBBHHH", *ports, 1, 0, 5 << 4, 2, 1024, 0, 0) + token
            return _summed(packet, body, 16)
        case 17:
            body = struct.pack("!HHHH", *ports, 8 + len(token), 0) + token
            return _summed(packet, body, 6)
        case 132:  # INIT: the token is its initiate tag and its window
            body = struct.pack("!HHII", *ports, 0, 0) + struct.pack("!BBH", 1, 0, 20)
            body += token + struct.pack("!HHI", 1, 1, 1)
            return body[:8] + struct.pack("<I", _crc32c(body)) + body[12:]
        case 1 | 58:
            which = struct.unpack("!I", token[4:])[0] & 0xFFFF  # of each echo, a new connection
            body = struct.pack("!BBHHH", packet.icmp_type, packet.icmp_code, 0, which, 1) + token
            return _summed(packet, body, 2)
    return token + bytes(8)


def _summed(packet: Packet, body: bytes, at: int) -> bytes:
    """With the internet checksum, over the pseudo header as well where there is one."""
    pseudo = b""
    if packet.protocol != ICMP:
        pseudo = _pseudo(packet.source, packet.destination, packet.protocol, len(body))
    data = pseudo + body
    total = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    checksum = ~total & 0xFFFF or 0xFFFF
    return body[:at] + struct.pack("!H", checksum) + body[at + 2 :]


def _pseudo(source: Address, destination: Address, protocol: int, length: int) -> bytes:
    if source.version == 4:
        return source.packed + destination.packed + struct.pack("!BBH", 0, protocol, length)
    return source.packed + destination.packed + struct.pack("!II", length, protocol)


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
