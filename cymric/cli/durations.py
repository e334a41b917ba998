"""Spans of time as people read them: the two largest units."""

from __future__ import annotations

import time

_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def span(seconds: float) -> str:
    """`3d4h`, `12m5s`, `0s`."""
    left = max(0, int(seconds))
    parts: list[str] = []
    for name, size in _UNITS:
        count, left = divmod(left, size)
        if count or parts:
            parts.append(f"{count}{name}" if count else "")
        if len(parts) == 2:
            break
    return "".join(parts) or "0s"


def ago(at_s: float) -> str:
    """How long ago a Unix time was; empty for 0, which is never."""
    return f"{span(time.time() - at_s)} ago" if at_s else ""
