"""Objects on trial, ahead of the calculation: as stored until their time is up, then as before.

    syncer ─▶ Trials.read ─▶ what is in force ─▶ calculation
                │ timer: the time is up ─▶ the same once more, for that key

Only what is stored decides, so every node and every fresh process comes to the same; nothing is
written to the datastore. While something is on trial the earliest end stands in a file, for a
process that starts and cannot hear the datastore (felix/rescue.py). See docs/design/felix.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from cymric.model import codec, trial
from cymric.model.keys import Key, ResourceKey
from cymric.model.resources import Resource
from cymric.model.strictest import Damaged

log = structlog.get_logger()

Update = Callable[[Key, object | None], None]


@dataclass(frozen=True, slots=True)
class _Running:
    """One trial: its end by the clock and the timer that will go off."""

    ends_at: float
    timer: asyncio.TimerHandle


def in_force(key: Key, value: object | None, now: float) -> object | None:
    """What counts now when this is stored."""
    if not isinstance(key, ResourceKey) or key.kind not in trial.KINDS:
        return value
    try:
        found = trial.of(_annotations(value))
    except ValueError:
        return value
    return value if found is None or now < found.ends_at else _before(key, found, value)


class Trials:
    """See the chapter. `clock` gives seconds since 1970.

    `update` is told what counts when a trial is over. `mark` None: nothing is noted for a later
    process.
    """

    def __init__(self, update: Update, mark: Path | None, clock: Callable[[], float]) -> None:
        self._update = update
        self._mark = mark
        self._clock = clock
        self._running: dict[ResourceKey, _Running] = {}
        self._is_marked = mark is not None and mark.exists()

    @property
    def keys(self) -> frozenset[ResourceKey]:
        """What is on trial now."""
        return frozenset(self._running)

    def read(self, key: Key, value: object | None) -> object | None:
        """What is in force when this is stored."""
        if not isinstance(key, ResourceKey) or key.kind not in trial.KINDS:
            return value
        if running := self._running.pop(key, None):
            running.timer.cancel()
        found = self._judge(key, value)
        if running or key in self._running:
            self._write_mark()
        return found

    def in_sync(self) -> None:
        """All that is stored was read: what the file says of earlier times is over."""
        self._write_mark()

    def _judge(self, key: ResourceKey, value: object | None) -> object | None:
        try:
            found = trial.of(_annotations(value))
        except ValueError as error:
            log.warning(
                "trial without end: what was before is lost", key=str(key), error=str(error)
            )
            return value
        if found is None:
            return value
        left_s = min(found.ends_at - self._clock(), found.within_s)
        if left_s <= 0:
            log.warning("not confirmed in time, what was before counts", key=str(key))
            return _before(key, found, value)
        log.warning("on trial, undone unless confirmed", key=str(key), left_s=round(left_s))
        timer = asyncio.get_running_loop().call_later(left_s, self._end, key, found, value)
        self._running[key] = _Running(self._clock() + left_s, timer)
        return value

    def _end(self, key: ResourceKey, found: trial.Trial, value: object | None) -> None:
        self._running.pop(key, None)
        log.warning("not confirmed in time, undone", key=str(key))
        self._update(key, _before(key, found, value))
        self._write_mark()

    def _write_mark(self) -> None:
        """The earliest end of what is on trial, or no file."""
        if self._mark is None:
            return
        ends = [one.ends_at for one in self._running.values()]
        try:
            if ends:
                self._mark.parent.mkdir(parents=True, exist_ok=True)
                self._mark.write_text(trial.time_text(min(ends)) + "\n")
            elif self._is_marked:
                self._mark.unlink(missing_ok=True)
            self._is_marked = bool(ends)
        except OSError as error:
            log.warning("cannot note the trial for a later process", error=str(error))


def _annotations(value: object | None) -> Mapping[str, str]:
    """Those of an object; what can only be read in the strictest way has them as well."""
    resource = value.stand_in if isinstance(value, Damaged) else value
    return resource.annotations if isinstance(resource, Resource) else {}


def _before(key: ResourceKey, found: trial.Trial, value: object | None) -> object | None:
    if found.before is None:
        return None
    try:
        decoded = codec.decode(str(key), msgspec.json.encode(found.before))
    except codec.Malformed as error:
        log.warning("what was before cannot be read", key=str(key), reason=error.reason)
        return error.damaged or value
    return decoded[1] if decoded else value
