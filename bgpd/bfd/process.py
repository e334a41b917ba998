"""The BFD process: the node's BFD sessions, apart from bgpd so that neither waits for the other.

    bgpd ◀─ unix socket ─▶ Process ─▶ Engine ◀─ UDP ─▶ peers

    python -m bgpd.bfd.process SOCKET [LINGER_S]

Started by bgpd (client.py) and not ended with it: a bgpd that restarts finds its sessions as they
were. Without a bgpd for `LINGER_S`, on `Stop` and on SIGTERM it says AdminDown, which no peer takes
for a failure, and ends. It ends also when bgpd is gone and wanted nothing watched.

Invariants
- One process per socket path: a lock file beside it; a second process leaves with EXIT_TAKEN.
- The newest connection is bgpd; an older one is closed.
- A failure is delivered once. While nobody listens it is kept, unless the session is up again.

It logs nothing: bgpd, which hears of everything, does.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import os
import signal
import socket
import sys
from contextlib import suppress
from math import inf
from pathlib import Path

import msgspec

from bgpd.bfd.engine import Engine
from bgpd.bfd.messages import (
    LONGEST_LINE_BYTES,
    PROTOCOL,
    Expect,
    Failed,
    FromProcess,
    Hello,
    Stop,
    line,
    to_process,
)
from bgpd.bfd.packet import State
from bgpd.bfd.transport import UdpTransport

LINGER_S = 120.0
REPORT_S = 5.0
GOODBYES, GOODBYE_S = 3, 0.02
EXIT_TAKEN = 3
NICE = -10
_MOST_UNSENT_BYTES = 4 * 1024 * 1024


class Process:
    """See the module."""

    def __init__(self, linger_s: float = LINGER_S) -> None:
        self._linger_s = linger_s
        self._loop = asyncio.get_running_loop()
        self._transport = UdpTransport(
            on_open=lambda sock: self._loop.add_reader(sock.fileno(), self._work),
            on_close=lambda sock: self._loop.remove_reader(sock.fileno()),
        )
        self._engine = Engine(self._transport, on_change=self._changed, on_failure=self._failed)
        self._timer: asyncio.TimerHandle | None = None
        self._client: asyncio.StreamWriter | None = None
        self._untold: dict[str, Failed] = {}
        self._is_report_due = False
        self._was_told = False
        self._alone_since_s = self._loop.time()
        self._ended = asyncio.Event()

    async def run(self, path: Path) -> None:
        """Serve until there is no reason to any more; then say goodbye."""
        path.unlink(missing_ok=True)
        listening = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(mask)
        server = await asyncio.start_unix_server(
            self._converse, sock=listening, limit=LONGEST_LINE_BYTES
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._ended.set)
        reporting = asyncio.create_task(self._report_regularly())
        await self._ended.wait()
        reporting.cancel()
        path.unlink(missing_ok=True)
        server.close()
        for _ in range(GOODBYES):  # one may be lost
            self._engine.shut_all()
            await asyncio.sleep(GOODBYE_S)
        if self._client is not None:
            self._client.close()

    # --- the engine ---------------------------------------------------------------------------

    def _work(self) -> None:
        due_s = self._engine.work()
        if self._timer is not None:
            if self._timer.when() == due_s > self._loop.time():
                return  # a packet rarely changes what is due next
            self._timer.cancel()
            self._timer = None
        if due_s < inf:
            self._timer = self._loop.call_at(due_s, self._work)

    def _changed(self) -> None:
        if not self._is_report_due:
            self._is_report_due = True
            self._loop.call_soon(self._report)

    def _failed(self, failed: Failed) -> None:
        # Before the report: bgpd acts first and shows afterwards.
        if not self._tell(failed):
            self._untold[failed.peer] = failed

    # --- the conversation ---------------------------------------------------------------------

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._client is not None:
            self._client.close()
        self._client = writer
        self._tell(Hello(protocol=PROTOCOL, pid=os.getpid()))
        for peer in tuple(self._untold):
            self._tell(self._untold.pop(peer))
        self._report()
        try:
            while text := await reader.readline():
                self._obey(text)
        except (OSError, ValueError, msgspec.MsgspecError):
            pass  # a client that breaks off, or says what we do not understand, is no client
        finally:
            writer.close()
            if self._client is writer:
                self._client = None
                self._alone_since_s = self._loop.time()
                self._end_if_idle()

    def _obey(self, text: bytes) -> None:
        match to_process.decode(text):
            case Expect(sessions=sessions):
                self._was_told = True
                self._engine.expect(sessions)
                self._work()
                self._end_if_idle()
            case Stop():
                self._ended.set()

    def _tell(self, message: FromProcess) -> bool:
        """Whether there is somebody to tell. One who does not read is not waited for."""
        if self._client is None or self._client.is_closing():
            return False
        if self._client.transport.get_write_buffer_size() > _MOST_UNSENT_BYTES:
            self._client.transport.abort()
            return False
        self._client.write(line(message))
        return True

    def _report(self) -> None:
        self._is_report_due = False
        report = self._engine.report()
        for session in report.sessions:
            if session.state is State.UP:
                self._untold.pop(session.peer, None)
        self._tell(report)

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(min(REPORT_S, self._linger_s))
            self._report()
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        is_alone = self._client is None
        has_waited = self._loop.time() - self._alone_since_s >= self._linger_s
        has_nothing = self._was_told and len(self._engine) == 0
        if is_alone and (has_waited or has_nothing):
            self._ended.set()


def main() -> None:
    """Run until there is nothing to do; exit code EXIT_TAKEN if another process does it."""
    path = Path(sys.argv[1])
    linger_s = float(sys.argv[2]) if len(sys.argv) > 2 else LINGER_S
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(EXIT_TAKEN)
        with suppress(PermissionError):  # works as well, only later on a busy node
            os.setpriority(os.PRIO_PROCESS, 0, NICE)
        gc.freeze()
        gc.disable()  # nothing here makes cycles that matter, and a pause is what we are apart from
        asyncio.run(_run(path, linger_s))


async def _run(path: Path, linger_s: float) -> None:
    await Process(linger_s).run(path)


if __name__ == "__main__":
    main()
