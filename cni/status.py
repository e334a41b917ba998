"""Waiting for felix: a file appears when an endpoint's route and policy are in the kernel.

One inotify descriptor watches the directory for all waiting calls, so a file is noticed at once, by
the call it concerns, and waiting costs nothing. A file may be left from a former instance of the
same pod, so it counts only if it tells of our MAC and addresses; one that tells nothing counts once
it was written anew.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cymric.model.net import Address, host_network

_IN_CREATE, _IN_MOVED_TO, _IN_CLOSE_WRITE = 0x100, 0x80, 0x8
_IN_NONBLOCK, _IN_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_EVENT = struct.Struct("=iIII")  # watch, mask, cookie, length of the name that follows
_LIBC = ctypes.CDLL(None, use_errno=True)
RECHECK_S = 0.25
"""How often a waiting call looks by itself, should the directory have been replaced."""


class _Content(msgspec.Struct, frozen=True):
    """What felix says of an endpoint, as far as it matters here."""

    mac: str = ""
    ipv4_nets: tuple[str, ...] = msgspec.field(default=(), name="ipv4Nets")
    ipv6_nets: tuple[str, ...] = msgspec.field(default=(), name="ipv6Nets")


@dataclass(frozen=True, slots=True)
class Seen:
    """What was there at some moment: inode and time of the file, None for none."""

    stamp: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Awaited:
    """The endpoint whose file is waited for, and what was there before it was made."""

    name: str
    mac: str
    addresses: tuple[Address, ...]
    before: Seen

    def is_told_by(self, mac: str, nets: Collection[str]) -> bool:
        """Whether a file with this content is about this endpoint, and all of it."""
        wanted = {str(host_network(address)) for address in self.addresses}
        return mac in ("", self.mac) and wanted <= set(nets)


class StatusDirectory:
    """The directory felix writes to. Made here if it does not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed_by_name: dict[str, asyncio.Event] = {}
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

    async def wait(self, awaited: Awaited, timeout_s: float) -> bool:
        """Wait until felix tells of this endpoint; False after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed = self._changed_by_name.setdefault(awaited.name, asyncio.Event())
                    if self._tells(awaited):
                        return True
                    with suppress(TimeoutError):
                        async with asyncio.timeout(RECHECK_S):
                            await changed.wait()
        except TimeoutError:
            return False
        finally:
            self._changed_by_name.pop(awaited.name, None)

    def _tells(self, awaited: Awaited) -> bool:
        now = self.look(awaited.name)
        try:
            text = (self._path / awaited.name).read_bytes()
        except FileNotFoundError:
            return False
        try:
            content = msgspec.json.decode(text, type=_Content)
        except msgspec.MsgspecError:
            content = _Content()
        nets = content.ipv4_nets + content.ipv6_nets
        if content.mac or nets:
            return awaited.is_told_by(content.mac, nets)
        return now.stamp is not None and now != awaited.before

    def _wake(self) -> None:
        events, position = os.read(self._descriptor, 65536), 0
        while position < len(events):
            _, _, _, length = _EVENT.unpack_from(events, position)
            position += _EVENT.size + length
            name = os.fsdecode(events[position - length : position].rstrip(b"\0"))
            # An event without name (the queue ran over) is made up for by looking again.
            if (changed := self._changed_by_name.pop(name, None)) is not None:
                changed.set()


def _checked(answer: int) -> int:
    if answer < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"inotify: {os.strerror(code)}")
    return answer
