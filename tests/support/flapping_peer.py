"""A BGP peer that only flaps: `python -m tests.support.flapping_peer <peer> <seconds>`.

It connects, opens an iBGP session with a hold time of `HOLD_S`, and for so many seconds withdraws
and announces `ROUTES` routes, `FLAPS_PER_S` times a second, in UPDATEs of ten with attributes of
their own. Then every route with an even number stays announced. Like any peer it ends the session
when it hears nothing for the hold time, and the program ends with exit code 1; it goes on until it
is killed otherwise. RFC 4271, no more of it than this.
"""

from __future__ import annotations

import asyncio
import struct
import sys

ROUTES, PER_UPDATE, FLAPS_PER_S = 1000, 10, 10
HOLD_S = 6
ASN = 64512
OPEN, UPDATE, NOTIFICATION, KEEPALIVE = 1, 2, 3, 4


def message(kind: int, body: bytes = b"") -> bytes:
    """A whole message."""
    return b"\xff" * 16 + struct.pack(">HB", 19 + len(body), kind) + body


def prefix(number: int) -> str:
    """The prefix of a route, as text."""
    return f"10.{number // 256}.{number % 256}.0/24"


def _packed(numbers: range) -> bytes:
    return b"".join(bytes([24, 10, number // 256, number % 256]) for number in numbers)


def withdrawal(numbers: range) -> bytes:
    """An UPDATE that takes these routes back."""
    body = _packed(numbers)
    return message(UPDATE, struct.pack(">H", len(body)) + body + b"\0\0")


def announcement(numbers: range, next_hop: bytes, med: int) -> bytes:
    """An UPDATE that announces these routes."""
    attributes = (
        b"\x40\x01\x01\x00\x40\x02\x00\x40\x03\x04" + next_hop
        + b"\x80\x04\x04" + struct.pack(">I", med) + b"\x40\x05\x04\0\0\0\x64"
    )  # fmt: skip
    return message(
        UPDATE, b"\0\0" + struct.pack(">H", len(attributes)) + attributes + _packed(numbers)
    )


async def run(peer: str, seconds: float) -> None:
    """Be that peer. Raises when the session ends."""
    reader, writer = await asyncio.open_connection(peer, 179)
    address = writer.get_extra_info("sockname")[0]
    next_hop = bytes(map(int, address.split(".")))
    capabilities = bytes([1, 4, 0, 1, 0, 1, 65, 4]) + struct.pack(">I", ASN)
    options = bytes([2, len(capabilities)]) + capabilities
    writer.write(
        message(
            OPEN,
            struct.pack(">BHH", 4, ASN, HOLD_S) + next_hop + bytes([len(options)]) + options,
        )
    )
    if await read(reader) != OPEN:
        raise ConnectionError("no OPEN")
    writer.write(message(KEEPALIVE))
    if await read(reader) != KEEPALIVE:
        raise ConnectionError("no KEEPALIVE")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(listen(reader))
        tasks.create_task(flap(writer, next_hop, seconds))


async def read(reader: asyncio.StreamReader) -> int:
    """The kind of the next message; raises if none comes within the hold time."""
    async with asyncio.timeout(HOLD_S):
        header = await reader.readexactly(19)
        await reader.readexactly(int.from_bytes(header[16:18]) - 19)
    return header[18]


async def listen(reader: asyncio.StreamReader) -> None:
    """Until the session ends."""
    while await read(reader) != NOTIFICATION:
        pass
    raise ConnectionError("NOTIFICATION")


async def flap(writer: asyncio.StreamWriter, next_hop: bytes, seconds: float) -> None:
    """All routes go and come; in the end half of them are there."""
    groups = [range(at, at + PER_UPDATE) for at in range(0, ROUTES, PER_UPDATE)]
    clock = asyncio.get_running_loop().time
    until_s, turn = clock() + seconds, 0
    while clock() < until_s:
        turn += 1
        next_s = clock() + 1 / FLAPS_PER_S
        for group in groups:
            writer.write(withdrawal(group))
        for group in groups:
            writer.write(announcement(group, next_hop, med=turn * ROUTES + group.start))
        await writer.drain()
        await asyncio.sleep(max(0.0, next_s - clock()))
    for number in range(1, ROUTES, 2):
        writer.write(withdrawal(range(number, number + 1)))
    print(f"flapped {turn} times", flush=True)
    while True:
        writer.write(message(KEEPALIVE))
        await asyncio.sleep(HOLD_S / 3)


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], float(sys.argv[2])))
