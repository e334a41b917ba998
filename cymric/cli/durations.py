"""Go's canonical spelling of a duration, as Calico writes it: `120s` becomes `2m0s`. Pure."""

from __future__ import annotations

from cymric.model.durations import duration_s

_NS = 1_000_000_000


def go_duration(text: str) -> str:
    """The canonical spelling of a duration. Raises ValueError that quotes the text."""
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
