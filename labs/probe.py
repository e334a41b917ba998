"""Traffic of our own between namespaces: HTTP requests, a steady ping, steady new connections.

Requests are made from this process with sockets opened in the namespace. What must keep a rhythm
runs as a process of its own: iputils' ping, which knows nothing of us, and labs/dialer.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from labs.network import entering, inside
from labs.topology import HTTP_PORT

TIMEOUT_S = 2.0
START_PATIENCE_S = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the client's address as the server saw it, or why nothing did."""

    seen: str = ""
    error: str = ""

    @property
    def ok(self) -> bool:
        """True if a server answered."""
        return bool(self.seen)


async def fetch(
    namespace: str, address: str, *, port: int = HTTP_PORT, timeout_s: float = TIMEOUT_S
) -> Answer:
    """One HTTP request from `namespace`."""
    with inside(namespace):
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        async with asyncio.timeout(timeout_s):
            await asyncio.get_running_loop().sock_connect(connection, (address, port))
            reader, writer = await asyncio.open_connection(sock=connection)
            writer.write(b"GET / HTTP/1.0\r\n\r\n")
            body = (await reader.read()).partition(b"\r\n\r\n")[2]
            writer.close()
    except TimeoutError:
        return Answer(error="timed out")
    except OSError as failure:
        # asyncio wraps what the kernel said into words of its own, but keeps the number.
        return Answer(error=os.strerror(failure.errno) if failure.errno else str(failure))
    finally:
        connection.close()
    return Answer(seen=body.decode().strip())


def fetch_all(wanted: Sequence[tuple[str, str]]) -> Mapping[tuple[str, str], Answer]:
    """Requests for many (namespace, address) at once."""

    async def everything() -> list[Answer]:
        return await asyncio.gather(*(fetch(*one) for one in wanted))

    return dict(zip(wanted, asyncio.run(everything()), strict=True))


@dataclass(frozen=True, slots=True)
class Loss:
    """What a steady probe saw. `missing` are the numbers of the packets or connections lost."""

    sent: int
    missing: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.missing)} of {self.sent} lost {' '.join(self.missing[:20])}".strip()


class _Steady:
    """A process that probes until it is told to stop, then says what it saw."""

    def __init__(self, namespace: str, command: Sequence[str], *, begun: str) -> None:
        self._command = (*entering(namespace), *command)
        self._begun = begun
        # A file, not a pipe: nobody reads while it runs, and a full pipe would stop it.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Return once the first answer is there: only then the measurement has begun."""
        self._process = subprocess.Popen(self._command, stdout=self._output, stderr=self._output)
        deadline = time.monotonic() + START_PATIENCE_S
        while self._begun not in self._read():
            if time.monotonic() > deadline or self._process.poll() is not None:
                self._process.kill()
                raise RuntimeError(f"no first answer: {self._read()[-300:]!r}")
            time.sleep(0.01)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _read(self) -> str:
        # Not seek and read: the child writes at the same offset.
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode()

    def _stop(self) -> str:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait(timeout=15)
        return self._read()


class Ping(_Steady):
    """Debian's ping, one packet every `interval_s`, from a namespace to an address.

    From 10 ms upwards its beat is the kernel's clock tick (16 ms were measured for 10), so half.
    """

    def __init__(self, namespace: str, address: str, *, interval_s: float = 0.005) -> None:
        super().__init__(
            namespace,
            ["ping", "-n", "-i", str(interval_s), "-W", "2", address],
            begun="icmp_seq=",
        )

    def stop(self) -> Loss:
        """End it; the very last packet may still be on its way and does not count."""
        return read_ping(self._stop())


def read_ping(text: str) -> Loss:
    """Ping's output as a Loss: which sequence numbers never came back."""
    totals = re.search(r"(\d+) packets transmitted, (\d+) received", text)
    if totals is None:
        raise ValueError(f"not the output of ping: {text[-300:]!r}")
    sent = int(totals[1])
    # Numbers have 16 bits: count turns, so that a long run is read right.
    received, turn, last = set(), 0, 0
    for number in map(int, re.findall(r"icmp_seq=(\d+) ttl", text)):
        if number < last - 0x8000:
            turn += 0x10000
        last = number
        received.add(turn + number)
    return Loss(sent, tuple(str(n) for n in range(1, sent) if n not in received))


class Dialer(_Steady):
    """A new TCP connection every `interval_s`, from a namespace to an address."""

    def __init__(self, namespace: str, address: str, *, interval_s: float = 0.05) -> None:
        script = Path(__file__).with_name("dialer.py")
        words = [sys.executable, "-I", "-S", str(script), address, str(HTTP_PORT), str(interval_s)]
        super().__init__(namespace, words, begun="started")

    def stop(self) -> Loss:
        """End it, after the connection that is open."""
        seen = json.loads(self._stop().splitlines()[-1])
        return Loss(seen["sent"], tuple(seen["failed"]))
