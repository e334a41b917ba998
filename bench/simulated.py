"""Many BGP peers in one process: each answers at an address of its own and announces its routes.

They speak just enough of RFC 4271: OPEN with 4-octet AS, route refresh and one family, KEEPALIVE,
UPDATE. What they hear they only count. Run as `python -m bench.simulated FILE`, a JSON list of
peers; a line `<address> <prefixes heard> <sessions so far>` for each goes to standard output every
second.

    [{"address": "198.19.0.10", "asn": 64512, "routes": [{"prefixes": ["10.0.0.0/26"],
      "next_hop": "198.19.0.10", "originator": "198.19.0.10"}]}]

`originator` makes it a reflected route, with this peer as the reflector (RFC 4456).
"""

from __future__ import annotations

import asyncio
import json
import struct
import sys
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

MARKER = b"\xff" * 16
OPEN, UPDATE, NOTIFICATION, KEEPALIVE, REFRESH = 1, 2, 3, 4, 5
HOLD_S = 240
KEEPALIVE_S = 60
LOCAL_PREF = 2_147_482_623
NLRI_BYTES = 3900


@dataclass
class Peer:
    """One simulated router. `heard` is how many prefixes it was told and not told to forget."""

    address: str
    asn: int
    routes: list[dict[str, Any]]
    heard: set[bytes] = field(default_factory=set)
    sessions: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One session, until the other side ends it."""
        self.sessions += 1
        self.heard.clear()
        keepalives: asyncio.Task[None] | None = None
        try:
            while True:
                head = await reader.readexactly(19)
                size, kind = struct.unpack("!HB", head[16:])
                body = await reader.readexactly(size - 19)
                if kind == OPEN:
                    writer.write(self._open() + message(KEEPALIVE))
                elif kind == KEEPALIVE and keepalives is None:
                    keepalives = asyncio.create_task(_keep_alive(writer))
                    self._announce(writer)
                elif kind == REFRESH:
                    self._announce(writer)
                elif kind == UPDATE:
                    self._hear(body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the end of a session, whoever ended it
        finally:
            if keepalives is not None:
                keepalives.cancel()
            writer.close()

    def _open(self) -> bytes:
        capabilities = (
            b"\x01\x04\x00\x01\x00\x01"  # multiprotocol, IPv4 unicast
            b"\x02\x00"  # route refresh
            b"\x41\x04" + self.asn.to_bytes(4, "big")
        )
        options = b"\x02" + bytes([len(capabilities)]) + capabilities
        identifier = IPv4Address(self.address).packed
        head = struct.pack("!BHH4sB", 4, min(self.asn, 23456), HOLD_S, identifier, len(options))
        return message(OPEN, head + options)

    def _announce(self, writer: asyncio.StreamWriter) -> None:
        for route in self.routes:
            attributes = self._attributes(route)
            nlri = b""
            for prefix in route["prefixes"]:
                nlri += packed(prefix)
                if len(nlri) > NLRI_BYTES:
                    writer.write(update(attributes, nlri))
                    nlri = b""
            if nlri:
                writer.write(update(attributes, nlri))
        writer.write(update(b"", b""))  # End-of-RIB

    def _attributes(self, route: dict[str, Any]) -> bytes:
        found = [
            attribute(0x40, 1, b"\x00"),  # ORIGIN igp
            attribute(0x40, 2, b""),  # AS_PATH of iBGP
            attribute(0x40, 3, IPv4Address(route["next_hop"]).packed),
            attribute(0x40, 5, LOCAL_PREF.to_bytes(4, "big")),
        ]
        if originator := route.get("originator"):
            found.append(attribute(0x80, 9, IPv4Address(originator).packed))
            found.append(attribute(0x80, 10, IPv4Address(self.address).packed))
        return b"".join(found)

    def _hear(self, body: bytes) -> None:
        (withdrawn,) = struct.unpack_from("!H", body)
        (attributes,) = struct.unpack_from("!H", body, 2 + withdrawn)
        self.heard.difference_update(_prefixes(body[2 : 2 + withdrawn]))
        self.heard.update(_prefixes(body[4 + withdrawn + attributes :]))


def message(kind: int, body: bytes = b"") -> bytes:
    """RFC 4271 §4.1."""
    return MARKER + struct.pack("!HB", 19 + len(body), kind) + body


def update(attributes: bytes, nlri: bytes) -> bytes:
    """RFC 4271 §4.3, nothing withdrawn."""
    return message(UPDATE, struct.pack("!HH", 0, len(attributes)) + attributes + nlri)


def attribute(flags: int, kind: int, value: bytes) -> bytes:
    """A path attribute of less than 256 bytes."""
    return struct.pack("!BBB", flags, kind, len(value)) + value


def packed(prefix: str) -> bytes:
    """Length in bits, then as many bytes as that takes."""
    network = IPv4Network(prefix)
    return (
        bytes([network.prefixlen]) + network.network_address.packed[: (network.prefixlen + 7) // 8]
    )


def _prefixes(nlri: bytes) -> set[bytes]:
    found, at = set(), 0
    while at < len(nlri):
        size = 1 + (nlri[at] + 7) // 8
        found.add(nlri[at : at + size])
        at += size
    return found


async def _keep_alive(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(message(KEEPALIVE))
        await asyncio.sleep(KEEPALIVE_S)


async def main(path: Path) -> None:
    """Serve all peers of the file until killed."""
    peers = [Peer(**tree) for tree in json.loads(path.read_text())]
    for peer in peers:
        await asyncio.start_server(peer.serve, peer.address, 179, backlog=8)
    while True:
        for peer in peers:
            print(peer.address, len(peer.heard), peer.sessions)
        print(flush=True)
        await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
