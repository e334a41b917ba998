"""What the header of the speaker's configuration says to us; ExaBGP skips it as comment.

confd writes one line per fact above the ExaBGP text: where to listen, and a label per peer that
changes whenever anything about that peer's block changes. The label is also the peer's
`description`, so a running ExaBGP can be asked what it has really loaded.

    # cymric-listen 0.0.0.0 179
    # cymric-peer 198.19.0.3 cymric-6b1f0c5d2a97
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_LISTEN = re.compile(r"# cymric-listen (\S+) (\d+)")
_PEER = re.compile(r"# cymric-peer (\S+) (\S+)")
_NEIGHBOR = re.compile(r"neighbor (\S+) \{")
_DESCRIPTION = re.compile(r'\s*description "?([^";]*)"?;')


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the speaker waits for peers; `address` may be several, separated by commas."""

    address: str
    port: int

    @property
    def addresses(self) -> tuple[str, ...]:
        """One by one."""
        return tuple(self.address.split(","))


@dataclass(frozen=True, slots=True)
class Header:
    """The facts in one file: `label_by_peer` names every peer in it."""

    listen: Listen | None = None
    label_by_peer: Mapping[str, str] = field(default_factory=dict)


def parse_header(text: str) -> Header:
    """The facts in `text`; other lines are ignored."""
    listen = None
    labels: dict[str, str] = {}
    for line in text.splitlines():
        if match := _LISTEN.fullmatch(line):
            listen = Listen(match[1], int(match[2]))
        elif match := _PEER.fullmatch(line):
            labels[match[1]] = match[2]
    return Header(listen, labels)


def read_header(path: Path) -> Header:
    """The facts in the file; none if it is not there or no text."""
    try:
        return parse_header(path.read_text())
    except (OSError, UnicodeDecodeError):
        return Header()


def running_labels(answer: list[str]) -> dict[str, str]:
    """Peers and labels in ExaBGP's answer to `show neighbor configuration`."""
    labels: dict[str, str] = {}
    peer = ""
    for line in answer:
        if match := _NEIGHBOR.fullmatch(line.rstrip()):
            peer = match[1]
        elif peer and peer not in labels and (match := _DESCRIPTION.fullmatch(line.rstrip())):
            labels[peer] = match[1]
    return labels
