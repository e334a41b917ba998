"""A speaker in memory, for tests: it remembers what it is asked, and says what a test makes it say.

It keeps the promises of the port (`bgpd/speaker.py`) and refuses what ExaBGP would refuse, so that
a test on it means what one on the real speaker would.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING

from bgpd.announcement import Announcement
from bgpd.speaker import (
    EndOfRIB,
    NotificationReceived,
    PeerProof,
    PeerStatus,
    RefreshBegin,
    RefreshEnd,
    RoutesReceived,
    SessionDown,
    SessionRejected,
    SessionState,
    SessionUp,
    SpeakerConnected,
    SpeakerEvent,
    SpeakerLost,
    SpeakerStatus,
)

if TYPE_CHECKING:
    from cymric.model.peering import Session


class FakeSpeaker:
    """A speaker in memory: remembers what it is asked, and says what a test makes it say."""

    def __init__(self) -> None:
        self.advertised: dict[str, dict[str, Announcement]] = {}
        self.refreshes: list[str] = []
        self.sessions: tuple[Session, ...] = ()
        self.up: dict[str, SessionUp] = {}
        self.held: dict[str, tuple[str, float]] = {}
        self.lost: list[tuple[str, str]] = []
        self.generation = ""
        self._events: asyncio.Queue[SpeakerEvent] = asyncio.Queue()

    def say(self, event: SpeakerEvent) -> None:
        """Put an event where the listener reads it, and keep the session states it implies."""
        match event:
            case SpeakerConnected():
                self.generation = event.generation
            case SpeakerLost():
                self.generation = ""
                self.up.clear()
            case SessionUp():
                if event.peer in self.held:
                    raise ValueError(f"the session with {event.peer} is held down")
                self.up[event.peer] = event
            case SessionDown():
                self.up.pop(event.peer, None)
            case RoutesReceived() | EndOfRIB() | RefreshBegin() | RefreshEnd():
                if event.peer not in self.up:
                    raise ValueError(f"no session with {event.peer} is up, so it can say nothing")
            case NotificationReceived() | SessionRejected():
                pass
        self._events.put_nowait(event)

    def heard(self, peer: str) -> Mapping[str, Announcement]:
        """What that peer has received from us: nothing while its session is down."""
        return self.advertised.get(peer, {}) if peer in self.up else {}

    async def events(self) -> AsyncIterator[SpeakerEvent]:
        """See `Speaker`."""
        while True:
            yield await self._events.get()

    def advertise(self, peer: str, routes: Mapping[str, Announcement]) -> None:
        """See `Speaker`. Refuses what ExaBGP would refuse: keys that are not the routes' own."""
        _check(routes)
        self.advertised[peer] = dict(routes)

    def advertise_changes(self, peer: str, changes: Mapping[str, Announcement | None]) -> None:
        """See `Speaker`."""
        if peer not in self.advertised:
            raise ValueError(f"nothing was ever advertised to {peer} that could change")
        _check(changes)
        for prefix, route in changes.items():
            if route is None:
                self.advertised[peer].pop(prefix, None)
            else:
                self.advertised[peer][prefix] = route

    def request_refresh(self, peer: str) -> None:
        """See `Speaker`."""
        if peer in self.up:
            self.refreshes.append(peer)

    def expect_sessions(self, sessions: Sequence[Session]) -> None:
        """See `Speaker`."""
        self.sessions = tuple(sessions)

    def hold_session(self, peer: str, reason: str, retry_after_s: float) -> None:
        """See `Speaker`. A test ends the hold by asking for 0 s."""
        if retry_after_s <= 0:
            self.held.pop(peer, None)
            return
        self.held[peer] = (reason, retry_after_s)
        self._end(peer, reason)

    def session_lost(self, peer: str, reason: str) -> None:
        """See `Speaker`."""
        self.lost.append((peer, reason))
        self._end(peer, reason)

    def _end(self, peer: str, reason: str) -> None:
        if peer in self.up:
            self.say(SessionDown(peer, reason, drop_paths=True))

    def proof(self) -> Mapping[str, PeerProof]:
        """See `Speaker`: a session that is up has everything."""
        return {
            peer: PeerProof(
                desired=len(self.advertised.get(peer, {})),
                confirmed=len(self.heard(peer)),
                pending=len(self.advertised.get(peer, {})) - len(self.heard(peer)),
            )
            for peer in sorted(self.up.keys() | self.advertised.keys())
        }

    def status(self) -> SpeakerStatus:
        """See `Speaker`."""
        return SpeakerStatus(
            connected=bool(self.generation),
            generation=self.generation,
            peers={
                peer: PeerStatus(
                    peer=peer,
                    state=self._state(peer),
                    since_s=0.0,
                    reason=self.held.get(peer, ("", 0.0))[0],
                    retry_in_s=self.held[peer][1] if peer in self.held else None,
                    wanted=len(self.advertised.get(peer, {})),
                    commanded=len(self.heard(peer)),
                    confirmed=len(self.heard(peer)),
                )
                for peer in sorted(self.up.keys() | self.advertised.keys() | self.held.keys())
            },
        )

    def _state(self, peer: str) -> SessionState:
        if peer in self.up:
            return SessionState.UP
        return SessionState.HELD if peer in self.held else SessionState.DOWN

    async def run(self) -> None:
        """See `Speaker`: nothing to keep, so it waits to be cancelled."""
        await asyncio.Event().wait()


def _check(routes: Mapping[str, Announcement | None]) -> None:
    for prefix, route in routes.items():
        if route is not None and prefix != route.prefix:
            raise ValueError(f"{prefix} names a route for {route.prefix}")
