"""A program kept running that works on its standard input piece by piece.

iptables-restore takes one transaction after another from one input, and a transaction stands when
its COMMIT line was worked on. Starting the program costs some 5 ms of processor time; ending the
nft variant another 8 ms, for the kernel lets nobody leave before it has cleaned up behind a change
(close of the netlink socket). A program that stays pays neither: a transaction is below 1 ms.

How is known that it is done, when the program says nothing? By a pipe that holds one page only: it
becomes writable again when the program has read all that was in it, and a program reads on only
when it is done with what it has. So the text goes in pages, then an empty line, and when that was
read too, the text was worked on. A program that refuses its input ends, which closes the pipe.

Idle, such a program waits in `read` and holds no lock. It ends with us: the pipe closes. Invariant:
after an error, a cancellation or a timeout the program is gone, and the next piece meets a new one.
Source: pipe(7), fcntl(2) F_SETPIPE_SZ; xtables' iptables-restore, tried with 1.8.9.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import subprocess
from collections import deque
from collections.abc import Sequence

PAGE_BYTES = 4096
MOST_PIECES = 500
"""A program is replaced after so many pieces, should it keep something of each."""
END_WITHIN_S = 10.0
RECENT_PIDS = 16

_F_SETPIPE_SZ = 1031
_MOST_ERROR_BYTES = 2000


class FeedFailed(Exception):
    """The program ended (or could not be started, or was too slow); the text says why."""


class Feeder:
    """One program, started when it is first needed; see the chapter."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = tuple(argv)
        self._one_at_a_time = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = self._errors = -1
        self._pieces = 0
        self._leaving: list[subprocess.Popen[bytes]] = []
        self.recent_pids: deque[int] = deque(maxlen=RECENT_PIDS)
        """The programs that were fed lately, to tell their doing from that of others."""

    async def feed(self, text: str, timeout_s: float) -> None:
        """Have the program work on `text` (whole lines). Raises FeedFailed."""
        async with self._one_at_a_time:
            self._reap()
            if self._process is None or self._process.poll() is not None:
                self._start()
            done = False
            try:
                async with asyncio.timeout(timeout_s):
                    await self._write(text.encode())
                done = True
            except TimeoutError:
                raise FeedFailed(f"did not end within {timeout_s} s") from None
            except BrokenPipeError:
                raise FeedFailed(await self._why_ended()) from None
            finally:
                if not done:
                    self._kill()
            self._pieces += 1
            if self._pieces >= MOST_PIECES:
                self._leave()

    def close(self) -> None:
        """Let the program end; what it was given is done."""
        self._leave()
        for process in self._leaving:
            process.wait(END_WITHIN_S)
        self._leaving.clear()

    async def _write(self, data: bytes) -> None:
        for start in range(0, len(data), PAGE_BYTES):
            await self._until_empty()
            os.write(self._pipe, data[start : start + PAGE_BYTES])
        await self._until_empty()
        os.write(self._pipe, b"\n")
        await self._until_empty()

    async def _until_empty(self) -> None:
        """Until all that was written has been read. Raises BrokenPipeError."""
        poll = select.poll()
        poll.register(self._pipe, select.POLLOUT)
        loop = asyncio.get_running_loop()
        while not (found := poll.poll(0)):
            is_writable = asyncio.Event()
            loop.add_writer(self._pipe, is_writable.set)
            try:
                await is_writable.wait()
            finally:
                loop.remove_writer(self._pipe)
        if found[0][1] & select.POLLERR:
            raise BrokenPipeError

    def _start(self) -> None:
        self._discard()
        reading, self._pipe = os.pipe2(os.O_CLOEXEC)
        # A file in memory never fills, so the program never waits for us to read what it says.
        self._errors = os.memfd_create("stderr", os.MFD_CLOEXEC)
        try:
            fcntl.fcntl(self._pipe, _F_SETPIPE_SZ, PAGE_BYTES)
            os.set_blocking(self._pipe, False)
            self._process = process = subprocess.Popen(
                self._argv,
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                env={**os.environ, "LC_ALL": "C"},
            )
            self.recent_pids.append(process.pid)
        except OSError as error:
            self._discard()
            raise FeedFailed(f"cannot be started: {error}") from error
        finally:
            os.close(reading)
        self._pieces = 0

    async def _why_ended(self) -> str:
        """Its exit code and what it said."""
        process = self._process
        assert process is not None
        loop, has_ended = asyncio.get_running_loop(), asyncio.Event()
        handle = os.pidfd_open(process.pid)
        loop.add_reader(handle, has_ended.set)
        try:
            async with asyncio.timeout(END_WITHIN_S):
                await has_ended.wait()
        except TimeoutError:
            return "closed its input and did not end"
        finally:
            loop.remove_reader(handle)
            os.close(handle)
        process.wait()
        said = os.pread(self._errors, 1 << 20, 0)[-_MOST_ERROR_BYTES:].decode(errors="replace")
        return f"exit code {process.returncode}: {said.strip()}"

    def _leave(self) -> None:
        process, self._process = self._process, None
        self._discard()
        if process is not None:
            self._leaving.append(process)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._discard()

    def _discard(self) -> None:
        for descriptor in (self._pipe, self._errors):
            if descriptor >= 0:
                os.close(descriptor)
        self._pipe = self._errors = -1

    def _reap(self) -> None:
        self._leaving = [process for process in self._leaving if process.poll() is None]
