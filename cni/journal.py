"""What is to be removed although nobody will ask again, on disk: so that a successor can do it.

An entry is written before the first change an ADD makes and removed when the ADD has succeeded or
has been undone: whatever is found here at the start belongs to an ADD that nobody answered. An
entry is also written when a DEL is answered that could not be carried out, because the datastore
is away: that one is `is_owed`, and on the disk for good before the runtime hears of it. Either way
the work is the same: remove all of that attachment, and nothing of a newer one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

import msgspec
import structlog

from cni.delegate import Delegate
from cni.endpoint import Identity

log = structlog.get_logger()


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An attachment that has to go, with all the names needed for that.

    `delegate` is the other plugin that its addresses are from.
    """

    handle: str
    is_ipam_only: bool
    identity: Identity
    delegate: Delegate | None = None
    is_owed: bool = False

    @property
    def name(self) -> str:
        """One per container, interface and kind of call."""
        kind = "ipam" if self.is_ipam_only else "main"
        return _file_name(kind, self.identity.container_id, self.identity.endpoint)


class Journal:
    """Entries as files of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def begin(self, entry: Entry) -> None:
        """Note an entry, in one step."""
        # Plain system calls: this is on the way of every ADD.
        half = f"{self._directory}/.{entry.name}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        descriptor = os.open(half, flags, 0o600)
        try:
            os.write(descriptor, msgspec.json.encode(entry))
            if entry.is_owed:  # a promise outlasts a power cut; what is half made does not
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        Path(half).rename(f"{self._directory}/{entry.name}")
        if entry.is_owed:
            directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

    def finish(self, entry: Entry) -> None:
        """Forget an entry."""
        (self._directory / entry.name).unlink(missing_ok=True)

    def has(self, entry: Entry) -> bool:
        """Whether the entry is noted."""
        return (self._directory / entry.name).exists()

    def entries(self) -> Iterator[Entry]:
        """All entries; one that cannot be read is logged and removed, as nothing can be undone."""
        for path in sorted(self._directory.iterdir()):
            if path.name.startswith("."):
                continue
            try:
                yield msgspec.json.decode(path.read_bytes(), type=Entry)
            except FileNotFoundError:
                continue  # finished meanwhile
            except msgspec.MsgspecError as error:
                log.warning("unreadable journal entry removed", path=str(path), why=str(error))
                path.unlink(missing_ok=True)


@lru_cache(maxsize=1024)
def _file_name(*parts: str) -> str:
    return " ".join(quote(part, safe="") for part in parts)
