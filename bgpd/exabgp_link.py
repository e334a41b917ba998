"""The connection to the relay inside ExaBGP: events in, commands out, each command with its answer.

Invariants:

- At most `WINDOW` commands are unanswered: ExaBGP scans its whole queue of commands each turn.
- Answers carry no name, so they are matched in order. Commands that ExaBGP answers at once could
  overtake earlier ones; they go out `alone`, when nothing is unanswered.
- Events reach `on_event` in order, and the reader waits for it: a listener that falls behind slows
  this process only, since the relay goes on reading.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import structlog

from bgpd.exabgp_events import Answer, Greeting, Line, Malformed, Text, parse

WINDOW = 100
READ_BYTES = 1024 * 1024
LONGEST_LINE_BYTES = 64 * 1024 * 1024
"""The relay's greeting holds all sessions in one line."""

log = structlog.get_logger()


class LinkLost(Exception):
    """The relay closed the connection, or never greeted."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answered command: the lines before `done` or `error`."""

    ok: bool
    lines: tuple[str, ...] = ()


@dataclass(slots=True)
class _Asked:
    command: str
    reply: asyncio.Future[Reply]
    lines: list[str] = field(default_factory=list)


class Link:
    """One connection; `run` reads it until it is lost, `ask` may be called meanwhile."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        on_event: Callable[[Line], Awaitable[None]],
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._on_event = on_event
        self._unanswered: deque[_Asked] = deque()
        self._answered = asyncio.Event()
        self._turnstile = asyncio.Lock()

    @classmethod
    async def connect(
        cls, path: str, on_event: Callable[[Line], Awaitable[None]]
    ) -> tuple[Link, Greeting]:
        """Connect to the relay's socket and read its greeting. Raises OSError or LinkLost."""
        reader, writer = await asyncio.open_unix_connection(path, limit=LONGEST_LINE_BYTES)
        line = await reader.readline()
        greeting = parse(line.removesuffix(b"\n"))
        if not line.endswith(b"\n") or not isinstance(greeting, Greeting):
            writer.close()
            raise LinkLost(f"no greeting but {line[:200]!r}")
        return cls(reader, writer, on_event), greeting

    def close(self) -> None:
        """Let go of the connection; whoever waits for an answer is told LinkLost."""
        self._writer.close()
        for asked in self._unanswered:
            if not asked.reply.done():
                asked.reply.set_exception(LinkLost("closed"))
                asked.reply.exception()  # retrieved here, should nobody wait any more
        self._unanswered.clear()
        self._answered.set()

    async def run(self) -> None:
        """Read until the relay hangs up, which raises LinkLost."""
        rest = b""
        while data := await self._reader.read(READ_BYTES):
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                await self._on_line(parse(line))
        raise LinkLost("the relay closed the connection")

    async def ask(self, command: str, *, alone: bool = False) -> Reply:
        """Send one command and wait for its answer. Raises LinkLost."""
        async with self._turnstile:
            await self._until_unanswered_below(1 if alone else WINDOW)
            asked = _Asked(command, asyncio.get_running_loop().create_future())
            if self._writer.is_closing():
                raise LinkLost("closed")
            self._unanswered.append(asked)
            self._writer.write(command.encode("ascii") + b"\n")
            if alone:
                return await asked.reply
        return await asked.reply

    def tell(self, command: str) -> None:
        """Send a command that ExaBGP does not answer; it waits for no other."""
        if not self._writer.is_closing():
            self._writer.write(command.encode("ascii") + b"\n")

    @property
    def unanswered(self) -> int:
        """How many commands wait for their answer."""
        return len(self._unanswered)

    async def _until_unanswered_below(self, limit: int) -> None:
        while len(self._unanswered) >= limit and not self._writer.is_closing():
            self._answered.clear()
            await self._answered.wait()

    async def _on_line(self, line: Line) -> None:
        match line:
            case Text():
                if self._unanswered:
                    self._unanswered[0].lines.append(line.line)
            case Answer():
                if not self._unanswered:
                    log.warning("answer to no command", ok=line.ok)
                    return
                asked = self._unanswered.popleft()
                self._answered.set()
                if not line.ok:
                    log.warning("command refused", command=asked.command[:300])
                if not asked.reply.done():  # done when whoever asked was cancelled
                    asked.reply.set_result(Reply(line.ok, tuple(asked.lines)))
            case Malformed():
                log.warning("line makes no sense", line=line.line, reason=line.reason)
            case _:
                await self._on_event(line)
