"""A TCP forwarder between client and server, that loses answers or cuts connections on demand."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from tests.support.etcd import free_port


class Forwarder:
    """Listens on a loopback port of its own and forwards to `target_port`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self.port = free_port()
        self.loses_answers = False
        """While true, requests reach the server and its answers go nowhere."""
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        """The URL for clients."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Accept connections (again)."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def stop(self) -> None:
        """Refuse connections from now on."""
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self) -> None:
        """Break all connections; new ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def retarget(self, target_port: int) -> None:
        """Cut, and forward new connections to another server."""
        self._target_port = target_port
        self.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        self._writers |= {writer, far_writer}
        for pump in (self._pump(reader, far_writer), self._pump(far_reader, writer, answers=True)):
            task = asyncio.create_task(pump)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool = False
    ) -> None:
        try:
            while data := await reader.read(65536):
                if not (answers and self.loses_answers):
                    writer.write(data)
                    await writer.drain()
        except ConnectionError:
            pass  # cut, or one side went away: so does the other
        writer.close()
