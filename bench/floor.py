"""The least a program behind ExaBGP can do: bare ExaBGP 5.0.15 starts this, and we are beside it.

No tables, no decisions, no checks, no answers waited for. Routes received go to the kernel as
packed netlink messages, one write per line read; a line `go` or `back` in the FIFO named by the
first argument announces or withdraws `count` prefixes, 200 a command, all at once.

Run by `bench/routes.py` as `python floor.py <fifo> <peer> <next hop> <count>`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Any

PROTOCOL = 200
NEW, DELETE = 24, 25
REQUEST, REPLACE, CREATE = 0x1, 0x100, 0x400
PER_COMMAND = 200
READ_BYTES = 1024 * 1024


def prefixes(count: int) -> list[str]:
    """The prefixes every benchmark of routes uses: /26 from 10.0.0.0 on."""
    return [f"10.{n // 1024}.{n // 4 % 256}.{n % 4 * 64}/26" for n in range(count)]


def message(prefix: str, gateway: str | None) -> bytes:
    """One route as netlink has it; without gateway, its removal."""
    address, _, length = prefix.partition("/")
    kind, flags = (NEW, REQUEST | CREATE | REPLACE) if gateway else (DELETE, REQUEST)
    body = struct.pack("=BBBBBBBBI", 2, int(length), 0, 0, 254, PROTOCOL, 0, 1, 0)
    body += struct.pack("=HH4s", 8, 1, socket.inet_aton(address))
    if gateway:
        body += struct.pack("=HH4s", 8, 5, socket.inet_aton(gateway))
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def messages(update: dict[str, Any]) -> Iterable[bytes]:
    """The netlink messages of one UPDATE event."""
    for entry in update.get("withdraw", {}).get("ipv4 unicast", ()):
        yield message(entry["nlri"], None)
    for gateway, entries in update.get("announce", {}).get("ipv4 unicast", {}).items():
        for entry in entries:
            yield message(entry["nlri"], gateway)


def commands(word: str, peer: str, next_hop: str, count: int) -> bytes:
    """What to tell ExaBGP for `go` and `back`."""
    action = "announce" if word == "go" else "withdraw"
    head = f"neighbor {peer} {action} attributes next-hop {next_hop} nlri "
    known = prefixes(count)
    chunks = (known[at : at + PER_COMMAND] for at in range(0, count, PER_COMMAND))
    return "".join(f"{head}{' '.join(chunk)}\n" for chunk in chunks).encode()


def main() -> None:
    """Relay until ExaBGP goes."""
    fifo_path, peer, next_hop, count = sys.argv[1:]
    fifo = os.open(fifo_path, os.O_RDWR)
    netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    netlink.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * 1024 * 1024)
    rest = b""
    while True:
        ready, _, _ = select.select([0, fifo], [], [])
        if fifo in ready:
            for word in os.read(fifo, 4096).decode().split():
                sys.stdout.buffer.write(commands(word, peer, next_hop, int(count)))
                sys.stdout.buffer.flush()
        if 0 not in ready:
            continue
        data = os.read(0, READ_BYTES)
        if not data:
            return
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if b'"type": "update"' in line[:400]:
                said = json.loads(line)["neighbor"]["message"]
                if packed := b"".join(messages(said.get("update", {}))):
                    for part in _parts(packed):
                        netlink.send(part)


def _parts(packed: bytes, size: int = 36 * 1000) -> Iterable[bytes]:
    """Whole messages in writes the socket takes; removals are as long as routes less 8 bytes."""
    at = 0
    while at < len(packed):
        end = at
        while end < len(packed) and end - at < size:
            end += struct.unpack_from("=I", packed, end)[0]
        yield packed[at:end]
        at = end


if __name__ == "__main__":
    main()
