"""Puts a rendered file in place: only if it changed, only if its reader accepts it, in one step.

Invariants:

- The file in place is always one that was accepted, whole. Readers see the old or the new one.
- A refused text stays beside it as `<name>.refused`, for people, and is not checked again.
- What is in place is judged by reading it, so a restart writes nothing when nothing changed, and a
  file that was edited or removed by hand is put right.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

Check = Callable[[Path], Awaitable[str]]
"""Why the reader would refuse the file; empty if it would not."""

MODE = 0o600
"""Peers' passwords are in it, once there are any."""


class State(StrEnum):
    """How an attempt to install ended."""

    UNCHANGED = "unchanged"
    INSTALLED = "installed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one attempt; `reason` only when refused."""

    state: State
    reason: str = ""


class Installer:
    """Owns one file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._refused: tuple[str, str] | None = None

    async def install(self, text: str, check: Check) -> Outcome:
        """Make `text` the content of the file. Raises OSError if it cannot be written."""
        if _read(self._path) == text:
            self._refused = None
            return Outcome(State.UNCHANGED)
        if self._refused is not None and self._refused[0] == text:
            return Outcome(State.REFUSED, self._refused[1])
        candidate = self._path.with_name(self._path.name + ".new")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write(candidate, text)
        if reason := await check(candidate):
            candidate.rename(self._path.with_name(self._path.name + ".refused"))
            self._refused = (text, reason)
            return Outcome(State.REFUSED, reason)
        candidate.rename(self._path)
        self._refused = None
        return Outcome(State.INSTALLED)


def write(path: Path, text: str) -> None:
    """A new file with this text on disk, readable by its owner only."""
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, MODE)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
