"""What happened to each session: since when, how often, how much, and why it last ended.

    Speaker.events ─▶ SessionLog.note ─▶ Record ─▶ status, metrics, bird.ctl

It only watches: nothing is decided by it. Memory is bounded by the sessions that are configured;
`keep` forgets the rest. Times are Unix seconds, given by the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from bgpd import causes
from bgpd.causes import Cause
from bgpd.speaker import (
    NotificationReceived,
    RoutesReceived,
    SessionDown,
    SessionRejected,
    SessionUp,
    SpeakerEvent,
    SpeakerLost,
)

NOTIFIED_WITHIN_S = 5.0
"""A session that goes down so soon after a NOTIFICATION went down because of it."""

MOST_STRANGERS = 1000
"""Peers noted before `keep` tells which are configured."""


@dataclass(slots=True)
class Record:
    """One session's story. `flaps` counts how often it went down after it was up."""

    is_up: bool = False
    since_s: float = 0.0
    flaps: int = 0
    attempts: int = 0
    updates: int = 0
    announced: int = 0
    withdrawn: int = 0
    families: frozenset[str] = frozenset()
    last_error: Cause | None = None
    last_error_s: float = 0.0
    notified: Cause | None = None
    notified_s: float = 0.0


class SessionLog:
    """Records by peer. `clock` gives Unix seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._records: dict[str, Record] = {}

    def of(self, peer: str) -> Record:
        """The record of a peer; an empty one for a peer that did nothing yet."""
        return self._records.get(peer) or Record()

    def keep(self, peers: Collection[str]) -> None:
        """Forget whoever is not configured any more and not up."""
        for peer in self._records.keys() - set(peers):
            if not self._records[peer].is_up:
                del self._records[peer]

    def note(self, event: SpeakerEvent) -> None:
        """Take in what the speaker said."""
        match event:
            case RoutesReceived():
                record = self._record(event.peer)
                record.updates += 1
                record.announced += len(event.announced)
                record.withdrawn += len(event.withdrawn)
            case SessionUp():
                record = self._record(event.peer)
                if not (event.resumed and record.is_up):
                    record.since_s, record.attempts = self._clock(), 0
                record.is_up, record.families = True, event.families
            case SessionDown():
                self._went_down(self._record(event.peer), event.reason)
            case SessionRejected():
                record = self._record(event.peer)
                record.attempts += 1
                self._failed(record, event.reason)
            case NotificationReceived():
                record = self._record(event.peer)
                record.notified = causes.of_notification(
                    event.code, event.subcode, event.data, sent=event.sent
                )
                record.notified_s = self._clock()
            case SpeakerLost():
                for record in self._records.values():
                    if record.is_up:
                        self._went_down(record, event.reason)
            case _:
                pass

    def _went_down(self, record: Record, reason: str) -> None:
        if record.is_up:
            record.flaps += 1
        record.is_up, record.since_s = False, self._clock()
        self._failed(record, reason)

    def _failed(self, record: Record, reason: str) -> None:
        now_s = self._clock()
        is_notified = record.notified is not None and now_s - record.notified_s < NOTIFIED_WITHIN_S
        record.last_error = record.notified if is_notified else causes.of_reason(reason)
        record.last_error_s = now_s
        record.notified = None

    def _record(self, peer: str) -> Record:
        record = self._records.get(peer)
        if record is None:
            if len(self._records) >= MOST_STRANGERS:
                self.keep(())
            record = self._records[peer] = Record(since_s=self._clock())
        return record
