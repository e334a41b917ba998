"""Go's duration text, the form in which Calico stores every time span."""

from __future__ import annotations

import re

_PART = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|us|µs|ns|s)")
_UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def duration_s(text: str) -> float:
    """The seconds in `2m0s`, `90s` or `250ms`. Raises ValueError that quotes the text."""
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is not a duration such as 90s or 1m30s")
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)
