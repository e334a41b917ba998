"""BIRD's control sockets, so that an unmodified `calicoctl node status` sees our sessions.

    calicoctl, birdc ─▶ bird.ctl, bird6.ctl ─▶ Dialogue.answer ─▶ rows of `show protocols`

Calico runs one BIRD per family, so there are two sockets, each with the sessions of its family.
Served are `show protocols`, `show status` and `restrict`; anything else is refused in BIRD's own
form of an error, which every client shows to its person. Nothing can be changed here.

The sockets belong to a machine that is one node. Where many nodes share a file system each has its
own directory (setting `bird_socket_dir`). A socket on which somebody else answers, a real BIRD, is
never taken over; we look again until it is free.

Invariants
- What a client sends can cost it its connection and nothing else: lines, time and the number of
  connections are bounded, and the oldest idle one makes room.

Source: BIRD's programmer documentation, "Client-server protocol" (reply codes), and the dialogue
that Calico's programs understand.
"""

from __future__ import annotations

import asyncio
import os
import socket as sockets
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import structlog

import cymric
from cymric.runtime.namesake import namesake

log = structlog.get_logger()

SPOKEN = "v0.3.3+birdv1.6.8"
"""The BIRD whose dialogue this is: Calico's."""

SOCKET_BY_FAMILY = {4: "bird.ctl", 6: "bird6.ctl"}

LINE_BYTES = 1024
IDLE_S = 300.0
WRITE_WITHIN_S = 5.0
CONNECTIONS = 64
LOOK_AGAIN_S = 10.0

HEADER = "name     proto    table    state  since       info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One protocol as BIRD lists it. `since_s` is Unix time in seconds, 0 when unknown."""

    name: str
    proto: str
    state: str
    since_s: float
    info: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Daemon:
    """What `show status` tells. Times are Unix seconds; `configured_s`: the last change of it."""

    router_id: str
    started_s: float
    configured_s: float


class Dialogue:
    """The answers, whole, without any I/O. `clock` gives Unix seconds."""

    def __init__(
        self,
        rows: Callable[[], Sequence[Row]],
        daemon: Callable[[], Daemon],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._rows = rows
        self._daemon = daemon
        self._clock = clock

    @property
    def greeting(self) -> str:
        """What a client reads before it says anything."""
        return f"0001 BIRD {SPOKEN} ready.\n"

    def answer(self, line: str) -> str:
        """The reply lines to one command; empty for an empty line."""
        match line.split():
            case []:
                return ""
            case ["show", ("protocols" | "protocol")]:
                return self._protocols()
            case ["show", ("protocols" | "protocol"), name]:
                return self._protocols(name.strip('"'))
            case ["show", "status"]:
                return self._status()
            case ["restrict"]:
                return "0016 Access restricted\n"
            case _:
                return (
                    "9001 Not served here: Cymric answers show protocols and show status; "
                    "see cymric bgp for routes and changes\n"
                )

    def _protocols(self, name: str | None = None) -> str:
        now_s = self._clock()
        rows = [row for row in self._rows() if name in (None, row.name)]
        if not rows:
            return "8003 No protocols match\n"
        texts = [
            f"{row.name:<8} {row.proto:<8} {'master':<8} {row.state:<6} "
            f"{_since(row.since_s, now_s):<11} {row.info}"
            for row in rows
        ]
        return f"2002-{HEADER}\n1002-" + "\n ".join(texts) + "\n0000 \n"

    def _status(self) -> str:
        daemon = self._daemon()
        return (
            f"1000-BIRD {SPOKEN}, spoken by Cymric {cymric.__version__}\n"
            f"1011-Router ID is {daemon.router_id}\n"
            f" Current server time is {_moment(self._clock())}\n"
            f" Last reboot on {_moment(daemon.started_s)}\n"
            f" Last reconfiguration on {_moment(daemon.configured_s)}\n"
            "0013 Daemon is up and running\n"
        )


class BirdSocket:
    """One of the two sockets. `run` serves it until cancelled."""

    def __init__(self, path: Path, dialogue: Dialogue, *, look_again_s: float = LOOK_AGAIN_S):
        self._path = path
        self._dialogue = dialogue
        self._look_again_s = look_again_s
        self._open: dict[asyncio.StreamWriter, None] = {}

    async def run(self) -> None:
        """Serve; wait, and say so once, while somebody else does or the directory is closed."""
        told = ""
        while True:
            try:
                server = await self._listen()
            except OSError as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("bird's socket is not served", path=str(self._path), reason=told)
                await asyncio.sleep(self._look_again_s)
                continue
            async with server:
                log.info("serving bird's socket", path=str(self._path))
                await server.serve_forever()

    async def _listen(self) -> asyncio.Server:
        """Raises OSError if the path cannot be had, or is another's."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self._path.stat().st_mode):
                raise FileExistsError(f"{self._path} is not a socket")
            if _is_served(self._path):
                raise FileExistsError(f"another process answers on {self._path}")
            self._path.unlink()
        listening = sockets.socket(sockets.AF_UNIX)
        # The socket is ours alone from its first moment. The mask is the whole process': nothing
        # may wait while it is changed.
        mask = os.umask(0o177)
        try:
            listening.bind(str(self._path))
        finally:
            os.umask(mask)
        return await asyncio.start_unix_server(
            self._converse, sock=listening, limit=LINE_BYTES, backlog=256
        )

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= CONNECTIONS:
            oldest = next(iter(self._open))
            del self._open[oldest]
            oldest.transport.abort()
        self._open[writer] = None
        try:
            await _write(writer, self._dialogue.greeting)
            while True:
                async with asyncio.timeout(IDLE_S):
                    said = await reader.readline()
                if not said.endswith(b"\n"):
                    break  # it ended, perhaps in the middle of a word
                if writer not in self._open:
                    break  # it had to make room
                self._open[writer] = self._open.pop(writer)  # the youngest now
                await _write(writer, self._dialogue.answer(said.decode(errors="replace")))
        except ValueError:
            with suppress(OSError, TimeoutError):
                await _write(writer, "9001 Command too long\n")
        except (OSError, TimeoutError) as error:
            log.debug("a client of bird's socket went away", reason=repr(error))
        finally:
            self._open.pop(writer, None)
            writer.close()


async def serve_bird(
    directory: Path,
    rows: Callable[[int], Sequence[Row]],
    daemon: Callable[[], Daemon],
    *,
    bears_names: bool,
) -> None:
    """Serve both sockets. With `bears_names` be found under BIRD's names as well: calicoctl looks
    for processes called `bird` and `bird6` before it opens a socket.
    """
    async with asyncio.TaskGroup() as tasks:
        for family, name in SOCKET_BY_FAMILY.items():
            dialogue = Dialogue(lambda family=family: rows(family), daemon)  # type: ignore[misc]
            tasks.create_task(BirdSocket(directory / name, dialogue).run(), name=name)
            if bears_names:
                tasks.create_task(namesake(name.removesuffix(".ctl")), name=f"namesake of {name}")


async def _write(writer: asyncio.StreamWriter, text: str) -> None:
    if text:
        writer.write(text.encode())
        async with asyncio.timeout(WRITE_WITHIN_S):
            await writer.drain()


def _is_served(path: Path) -> bool:
    with sockets.socket(sockets.AF_UNIX) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(str(path))
        except ConnectionRefusedError:
            return False
    return True


def _since(since_s: float, now_s: float) -> str:
    """As BIRD writes it: the time of day for the last twenty hours, else the date."""
    if not since_s:
        return ""
    moment = datetime.fromtimestamp(since_s)
    is_recent = timedelta(0) <= datetime.fromtimestamp(now_s) - moment < timedelta(hours=20)
    return moment.strftime("%H:%M:%S" if is_recent else "%Y-%m-%d")


def _moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")
