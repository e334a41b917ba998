"""Telling felix of an endpoint directly, some milliseconds before the datastore's watch does.

A connection to felix' socket is kept open; an endpoint is one line on it. Nothing waits for felix:
without connection, or when felix does not read, the hint is dropped and only time is lost.
The messages: docs/design/felix.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import structlog
from prometheus_client import Counter

RETRY_S = 0.5
MAX_UNSENT_BYTES = 1 << 20
MAX_LINE_BYTES = 60_000

HINTS = Counter(
    "cymric_cni_felix_hints", "Endpoints told to felix directly, by what became of it", ["outcome"]
)

log = structlog.get_logger()


class FelixHint:
    """The sender; `run` must be running for anything to be sent."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: asyncio.StreamWriter | None = None

    @property
    def path(self) -> Path:
        """Where felix listens."""
        return self._path

    @property
    def is_connected(self) -> bool:
        """Whether felix listens."""
        return self._writer is not None

    @property
    def unsent_bytes(self) -> int:
        """How much felix has still to read."""
        return self._writer.transport.get_write_buffer_size() if self._writer else 0

    def tell(self, key: str, value: bytes | None) -> None:
        """Send an endpoint as it will be stored, or None to take a former hint back."""
        line = b'{"key":"%s","value":%s}\n' % (key.encode(), value or b"null")
        writer = self._writer
        if writer is None:
            HINTS.labels("not connected").inc()
        elif len(line) > MAX_LINE_BYTES:
            HINTS.labels("too long").inc()
        elif self.unsent_bytes > MAX_UNSENT_BYTES:
            HINTS.labels("felix does not read").inc()
        else:
            writer.write(line)
            HINTS.labels("sent").inc()

    async def run(self) -> None:
        """Keep the connection until cancelled."""
        while True:
            with suppress(OSError, ValueError):  # gone, or no line of any length we read
                async with self._connected() as reader:
                    # The answers must be read, or felix would stop; what they say is for the log.
                    while answer := await reader.readline():
                        if not answer.startswith(b'{"ok"'):
                            HINTS.labels("refused").inc()
                            log.debug("felix did not take a hint", said=answer.decode().strip())
            await asyncio.sleep(RETRY_S)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[asyncio.StreamReader]:
        reader, self._writer = await asyncio.open_unix_connection(str(self._path))
        try:
            yield reader
        finally:
            writer, self._writer = self._writer, None
            writer.close()
