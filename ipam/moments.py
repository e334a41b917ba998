"""Moments as Calico writes them. Pure; a moment is nanoseconds since 1970, UTC."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], int]
"""Nanoseconds since 1970."""

SECOND_NS = 1_000_000_000


def rfc3339(now_ns: int) -> str:
    """RFC 3339 UTC text of a moment, to the second."""
    return datetime.fromtimestamp(now_ns // SECOND_NS, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def go_time(now_ns: int) -> str:
    """A moment as Go prints it, which is how Calico stores an allocation's time."""
    seconds, nanoseconds = divmod(now_ns, SECOND_NS)
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return datetime.fromtimestamp(seconds, UTC).strftime(f"%Y-%m-%d %H:%M:%S{fraction} +0000 UTC")


def from_rfc3339(text: str) -> int | None:
    """The moment behind RFC 3339 text; None if it is none."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        return None
    return int(moment.timestamp()) * SECOND_NS
