"""What was begun and not finished, on disk: so that a killed daemon can undo it.

An entry is written before the first change an ADD makes and removed when the ADD has succeeded or
has been undone. Whatever is found here at the start belongs to an ADD that nobody answered; the
runtime was told that it failed. Nothing else is ever cleaned up: state without an entry is not
known to be ours to remove.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import msgspec
import structlog

from cni.endpoint import Identity

log = structlog.get_logger()


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """An attachment that may be half made, with all the names needed to undo it."""

    handle: str
    is_ipam_only: bool
    identity: Identity

    @property
    def name(self) -> str:
        """One per container, interface and kind of call."""
        kind = "ipam" if self.is_ipam_only else "main"
        parts = (kind, self.identity.container_id, self.identity.endpoint)
        return " ".join(quote(part, safe="") for part in parts)


class Journal:
    """Entries as files of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def begin(self, entry: Entry) -> None:
        """Note an entry, in one step."""
        half = self._directory / f".{entry.name}"
        half.write_bytes(msgspec.json.encode(entry))
        half.rename(self._directory / entry.name)

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
