"""Telling felix directly, and waiting for its word: what is sent, and life without felix."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest

from cni.errors import CniError
from cni.hint import MAX_UNSENT_BYTES, FelixHint
from cni.status import Awaited, StatusDirectory
from cni.waiting import TIMEOUTS, WAITS, Waiting
from tests.support.cni_world import FakeWiring, Life, Pairs
from tests.support.eventually import eventually

KEY = "/calico/resources/v3/projectcalico.org/workloadendpoints/default/x"


class Felix:
    """The other end of the socket. It answers each line, unless it is `deaf`."""

    def __init__(self, *, is_deaf: bool = False) -> None:
        self.lines: list[bytes] = []
        self.is_deaf = is_deaf

    @asynccontextmanager
    async def at(self, path: Path) -> AsyncIterator[None]:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while not self.is_deaf and (line := await reader.readline()):
                self.lines.append(line)
                writer.write(b'{"ok": true}\n' if len(self.lines) % 2 else b'{"error": "no"}\n')
            if self.is_deaf:
                await asyncio.Event().wait()

        server = await asyncio.start_unix_server(serve, str(path))
        try:
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)


@asynccontextmanager
async def hinting(path: Path) -> AsyncIterator[FelixHint]:
    hint = FelixHint(path)
    running = asyncio.create_task(hint.run())
    try:
        yield hint
    finally:
        running.cancel()
        await asyncio.wait({running})


async def test_an_endpoint_is_one_line(tmp_path: Path) -> None:
    """An endpoint goes out as it will be stored, and is taken back with null."""
    path, felix = tmp_path / "felix.sock", Felix()
    async with felix.at(path), hinting(path) as hint:
        await eventually(lambda: hint.is_connected)
        hint.tell(KEY, b'{"kind":"WorkloadEndpoint"}')
        hint.tell(KEY, None)
        await eventually(lambda: len(felix.lines) == 2)
    told, gone = map(json.loads, felix.lines)
    assert told == {"key": KEY, "value": {"kind": "WorkloadEndpoint"}}
    assert gone == {"key": KEY, "value": None}


async def test_felix_may_come_late_and_go(tmp_path: Path) -> None:
    """Without felix a hint is dropped at once; when felix is there, the next one arrives."""
    path, felix = tmp_path / "felix.sock", Felix()
    async with hinting(path) as hint:
        hint.tell(KEY, b"{}")
        assert not hint.is_connected
        for _ in range(2):
            felix.lines.clear()
            async with felix.at(path):
                await eventually(lambda: hint.is_connected)
                hint.tell(KEY, b"{}")
                await eventually(lambda: felix.lines)


async def test_a_felix_that_does_not_read(tmp_path: Path) -> None:
    """Hints for a felix that hangs are dropped instead of gathered."""
    path, felix = tmp_path / "felix.sock", Felix(is_deaf=True)
    async with felix.at(path), hinting(path) as hint:
        await eventually(lambda: hint.is_connected)
        value = json.dumps("x" * 50_000).encode()
        for _ in range(1000):
            hint.tell(KEY, value)
        assert hint.unsent_bytes <= MAX_UNSENT_BYTES + 60_000


async def test_the_wait_is_measured_and_says_what_was_missing(tmp_path: Path) -> None:
    """A wait that ends is in the histogram; one that does not is counted, and names each lack."""
    status = StatusDirectory(tmp_path / "status")
    status.start()
    wiring = FakeWiring(Pairs(), Life())
    waiting = Waiting(status, wiring, FelixHint(tmp_path / "felix.sock"), 0.3)
    address = ip_address("198.19.16.5")
    awaited = Awaited("cni default%2Fx eth0", "02:00:00:00:00:01", (address,), status.look("x"))
    sums, timeouts = WAITS._sum.get(), TIMEOUTS._value.get()
    with pytest.raises(CniError) as caught:
        await waiting.for_felix(awaited, "cali1")
    for text in ("felix does not listen", "no interface cali1", "no status file"):
        assert text in caught.value.details
    assert TIMEOUTS._value.get() == timeouts + 1
    content = {"mac": awaited.mac, "ipv4Nets": ["198.19.16.5/32"], "ipv6Nets": []}
    asyncio.get_running_loop().call_later(
        0.05, (tmp_path / "status" / awaited.name).write_text, json.dumps(content)
    )
    await waiting.for_felix(awaited, "cali1")
    assert WAITS._sum.get() > sums
    status.close()
