"""Go's duration text, the form in which Calico stores every time span: read and written. Pure."""

from __future__ import annotations

import re

_PART = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|us|µs|ns|s)")
_NS = 1_000_000_000
_UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def duration_s(text: str) -> float:
    """The seconds in `2m0s`, `90s` or `250ms`. Raises ValueError that quotes the text."""
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration such as 90s or 1m30s")
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


def go_duration(text: str) -> str:
    """Go's own spelling of a duration, `2m0s` for `120s`. Raises ValueError quoting it."""
    sign = "-" if text.startswith("-") else ""
    bare = text.lstrip("-+")
    left = 0 if bare == "0" else round(duration_s(bare) * _NS)
    if left == 0:
        return "0s"
    if left < _NS:
        return sign + _below_a_second(left)
    minutes, left = divmod(left, 60 * _NS)
    hours, minutes = divmod(minutes, 60)
    seconds = _decimal(left, _NS) + "s"
    if hours:
        return f"{sign}{hours}h{minutes}m{seconds}"
    return f"{sign}{minutes}m{seconds}" if minutes else sign + seconds


def _below_a_second(nanoseconds: int) -> str:
    for unit, size in (("ms", 1_000_000), ("µs", 1_000)):
        if nanoseconds >= size:
            return _decimal(nanoseconds, size) + unit
    return f"{nanoseconds}ns"


def _decimal(amount: int, unit: int) -> str:
    whole, rest = divmod(amount, unit)
    digits = f"{rest:0{len(str(unit)) - 1}d}".rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)
