"""Endpoints told of directly: a unix socket on which cnid says what it is about to store.

    cnid ─ one JSON line ─▶ felix.sock ─▶ hint ─▶ the same calculation as for stored values

A hint saves the time that the datastore needs to tell us, and is worth nothing more: it stands
only where nothing is stored, ends when the datastore speaks or after `KEEP_S`, and whatever is
wrong with it is answered and forgotten (docs/design/felix.md says why that is safe). Invariant:
whatever arrives here, what is stored is enforced as if this socket were not there.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from cymric.model import codec
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.keys import ResourceKey, parse_key
from felix import metrics

KEEP_S = 5.0
MOST_LINE_BYTES = 65_536
MOST_HINTS = 1_024
MOST_CONNECTIONS = 64

log = structlog.get_logger()


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is sent: a key as in the datastore, and the value that will stand there (or null)."""

    key: str
    value: msgspec.Raw


class Hints(Protocol):
    """Where hints go."""

    def hint(self, key: ResourceKey, value: WorkloadEndpoint) -> bool:
        """Take one; False if it is stored already. Raises ValueError if it does not stand."""
        ...

    def end_hint(self, key: ResourceKey) -> bool:
        """Forget one; False if there is none any more."""
        ...

    @property
    def hint_count(self) -> int:
        """How many stand."""
        ...


class Handoff:
    """See the chapter."""

    def __init__(self, hints: Hints) -> None:
        self._hints = hints
        self._connections = 0
        self._ends: dict[ResourceKey, asyncio.TimerHandle] = {}

    async def serve(self, path: Path) -> None:
        """Listen until cancelled."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            server = await asyncio.start_unix_server(self._talk, path, limit=MOST_LINE_BYTES)
        finally:
            os.umask(before)
        async with server:
            await server.serve_forever()

    def answer(self, line: bytes) -> dict[str, object]:
        """Work on one line; what to say."""
        try:
            self._take(msgspec.json.decode(line, type=_Line))
        except (ValueError, UnicodeDecodeError) as error:
            metrics.HINTS.labels("refused").inc()
            return {"error": str(error)}
        return {"ok": True}

    def _take(self, line: _Line) -> None:
        """Raises ValueError, saying what is wrong."""
        if bytes(line.value) == b"null":
            decoded = parse_key(line.key)
            if isinstance(decoded, ResourceKey):
                self._end(decoded, "taken back")
            return
        pair = codec.decode(line.key, bytes(line.value))
        key, value = pair or (None, None)
        if not isinstance(key, ResourceKey) or not isinstance(value, WorkloadEndpoint):
            raise ValueError("this is no workload endpoint")
        if self._hints.hint_count >= MOST_HINTS:
            raise ValueError(f"{MOST_HINTS} hints stand already")
        if self._hints.hint(key, value):
            metrics.HINTS.labels("taken").inc()
            if running := self._ends.pop(key, None):
                running.cancel()
            loop = asyncio.get_running_loop()
            self._ends[key] = loop.call_later(KEEP_S, self._end, key, "expired")

    def _end(self, key: ResourceKey, why: str) -> None:
        if running := self._ends.pop(key, None):
            running.cancel()
        if self._hints.end_hint(key):
            metrics.HINTS.labels(why).inc()
            log.warning("endpoint was told of and not stored", key=str(key), why=why)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections > MOST_CONNECTIONS:
                writer.write(_text({"error": f"more than {MOST_CONNECTIONS} connections"}))
                return
            while line := await reader.readline():
                writer.write(_text(self.answer(line)))
                await writer.drain()
        except ValueError:
            writer.write(_text({"error": f"a line is longer than {MOST_LINE_BYTES} bytes"}))
        except ConnectionError:
            pass  # whoever left needs no answer
        finally:
            self._connections -= 1
            with suppress(ConnectionError):
                writer.close()
                await writer.wait_closed()


def _text(answer: dict[str, object]) -> bytes:
    return msgspec.json.encode(answer) + b"\n"
