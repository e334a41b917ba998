"""Waiting for felix: a file appears when an endpoint's route and policy are in the kernel.

One inotify descriptor watches the directory for all waiting calls, so a file is noticed at once and
waiting costs nothing. A file that was there before (left from a former instance of the same pod)
proves nothing; it counts once it was written anew, or the kernel shows the route.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

_IN_CREATE, _IN_MOVED_TO, _IN_CLOSE_WRITE = 0x100, 0x80, 0x8
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_LIBC = ctypes.CDLL(None, use_errno=True)
RECHECK_S = 0.25
"""How often a waiting call looks by itself, should the directory have been replaced."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Which file was there at some moment; None for none."""

    stamp: tuple[int, int] | None


class StatusDirectory:
    """The directory felix writes to. Made here if it does not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = asyncio.Event()
        self._descriptor = -1

    def start(self) -> None:
        """Begin to watch. Raises OSError."""
        self._path.mkdir(parents=True, exist_ok=True)
        self._descriptor = _checked(_LIBC.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC))
        mask = _IN_CREATE | _IN_MOVED_TO | _IN_CLOSE_WRITE
        _checked(_LIBC.inotify_add_watch(self._descriptor, os.fsencode(self._path), mask))
        asyncio.get_running_loop().add_reader(self._descriptor, self._wake)

    def close(self) -> None:
        """End watching."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def look(self, name: str) -> Seen:
        """What is there now."""
        try:
            stat = (self._path / name).stat()
        except FileNotFoundError:
            return Seen(None)
        return Seen((stat.st_ino, stat.st_mtime_ns))

    async def wait(self, name: str, before: Seen, timeout_s: float) -> bool:
        """Wait until `name` is there and is not what was seen `before`; False after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while (now := self.look(name)) == before or now.stamp is None:
                    changed = self._changed
                    try:
                        async with asyncio.timeout(RECHECK_S):
                            await changed.wait()
                    except TimeoutError:
                        continue
        except TimeoutError:
            return False
        return True

    def _wake(self) -> None:
        os.read(self._descriptor, 65536)
        self._changed.set()
        self._changed = asyncio.Event()


def _checked(answer: int) -> int:
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"inotify: {os.strerror(code)}")
    return answer
