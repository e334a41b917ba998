"""When paths are kept although nobody vouches for them: RFC 4724, RFC 7313, and our own restarts.

Pure: events and the time go in, actions on the Adj-RIB-In of a peer come out. Four things happen:

- A peer that does graceful restart goes down: its paths stay, stale, until its End-of-RIB or until
  its restart time has passed. A peer that does not: its paths go at once.
- ExaBGP goes down (ours, not the peers): the paths of all peers stay likewise, because the peers
  still forward and so do we.
- A session is up that we did not hear from its start (bgpd restarted, events were lost): its paths
  are stale, the peer is asked for a refresh, and what it did not send again goes at the end marker
  (RFC 7313), or for peers without one when it has been quiet for some seconds.
- bgpd starts: kernel routes that an earlier bgpd left may be removed only when the start is over:
  every expected session has told everything it has, or has had its time to come up.

Invariant: every stale path has a deadline.

Source: RFC 4724 §4.1, §4.2; RFC 7313 §4; BIRD's restart time of 120 s.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from math import inf

from bgpd.speaker import EndOfRIB, RefreshBegin, RefreshEnd, SessionDown, SessionUp

OWN_RESTART_S = 120.0
"""How long paths outlive our own ExaBGP, and how long a start waits for sessions to come up."""
REFRESH_WITHIN_S = 60.0
"""The longest a peer may take to send everything again."""
QUIET_S = 5.0
"""A peer that marks no end has sent everything when it has said nothing for so long."""


class Action(Enum):
    """What to do with the paths of a peer. SWEEP removes the stale ones, DROP all."""

    MARK_STALE = 1
    SWEEP = 2
    DROP = 3
    REQUEST_REFRESH = 4


class Waiting(StrEnum):
    """What a peer's stale paths wait for, as status shows it."""

    NOTHING = ""
    SESSION = "session"
    END_OF_RIB = "end of RIB"
    REFRESH = "refresh"


Actions = tuple[Action, ...]


@dataclass(slots=True)
class _Peer:
    restart_time_s: int | None = None
    is_up: bool = False
    waiting: Waiting = Waiting.NOTHING
    deadline_s: float = inf
    quiet_at_s: float = inf
    has_end_marker: bool = True
    has_told_all: bool = False

    def wait_for(self, what: Waiting, *, until_s: float, now_s: float) -> None:
        self.waiting, self.deadline_s = what, until_s
        self.heard(now_s)

    def heard(self, now_s: float) -> None:
        is_open_ended = self.is_up and not self.has_end_marker
        self.quiet_at_s = now_s + QUIET_S if is_open_ended else inf

    def settle(self) -> None:
        self.waiting, self.deadline_s, self.quiet_at_s = Waiting.NOTHING, inf, inf
        self.has_told_all = True

    @property
    def due_s(self) -> float:
        return inf if self.waiting is Waiting.NOTHING else min(self.deadline_s, self.quiet_at_s)


@dataclass(slots=True)
class Restarts:
    """Who is waited for, and until when. All times are monotonic seconds."""

    started_s: float
    _peers: dict[str, _Peer] = field(default_factory=dict)
    _expected: frozenset[str] | None = None
    _is_over: bool = False

    def expect(self, peers: Collection[str]) -> tuple[str, ...]:
        """The sessions that are configured now. Returns peers that are gone: drop their paths."""
        self._expected = frozenset(peers)
        gone = tuple(sorted(self._peers.keys() - self._expected))
        for peer in gone:
            del self._peers[peer]
        return gone

    def on_session_up(self, event: SessionUp, now_s: float) -> Actions:
        """A session is up: new, or found up."""
        peer = self._peers.setdefault(event.peer, _Peer())
        peer.is_up, peer.restart_time_s = True, event.restart_time_s
        if event.resumed:
            # Without any refresh nothing will come: then the deadline alone must do.
            peer.has_end_marker = event.enhanced_refresh or not event.route_refresh
            peer.wait_for(Waiting.REFRESH, until_s=now_s + REFRESH_WITHIN_S, now_s=now_s)
            refresh = (Action.REQUEST_REFRESH,) if event.route_refresh else ()
            return (Action.MARK_STALE, *refresh)
        # RFC 4724 §4.2: what a restarted peer did not keep forwarding for is worth nothing.
        has_forgotten = event.peer_restarting and not event.families <= event.forwarding_families
        peer.has_end_marker = event.restart_time_s is not None
        restart_time_s = event.restart_time_s or OWN_RESTART_S
        peer.wait_for(Waiting.END_OF_RIB, until_s=now_s + restart_time_s, now_s=now_s)
        return (Action.SWEEP,) if has_forgotten else ()

    def on_session_down(self, event: SessionDown, now_s: float) -> Actions:
        """A session that was up is not any more."""
        peer = self._peers.setdefault(event.peer, _Peer())
        was_stale, peer.is_up = peer.waiting is not Waiting.NOTHING, False
        if peer.restart_time_s is None or event.drop_paths:
            peer.waiting = Waiting.NOTHING
            return (Action.DROP,)
        peer.wait_for(Waiting.SESSION, until_s=now_s + peer.restart_time_s, now_s=now_s)
        # RFC 4724 §4.2: a second restart in a row removes what the first one left stale.
        return (Action.SWEEP, Action.MARK_STALE) if was_stale else (Action.MARK_STALE,)

    def on_speaker_lost(self, now_s: float) -> dict[str, Actions]:
        """Our speaker is gone, and with it every session; the peers are not to blame."""
        actions: dict[str, Actions] = {}
        for name, peer in self._peers.items():
            if peer.is_up:
                peer.is_up = False
                peer.wait_for(Waiting.SESSION, until_s=now_s + OWN_RESTART_S, now_s=now_s)
                actions[name] = (Action.MARK_STALE,)
        return actions

    def on_routes(self, peer: str, now_s: float) -> None:
        """The peer said something: it is not quiet."""
        if peer in self._peers:
            self._peers[peer].heard(now_s)

    def on_end_of_rib(self, event: EndOfRIB) -> Actions:
        """The initial table is complete. While a refresh runs that says nothing of stale paths."""
        peer = self._peers.get(event.peer)
        if peer is None or peer.waiting is not Waiting.END_OF_RIB:
            return ()
        peer.settle()
        return (Action.SWEEP,)

    def on_refresh_begin(self, event: RefreshBegin, now_s: float) -> Actions:
        """The peer starts to send everything again (RFC 7313 §4)."""
        peer = self._peers.get(event.peer)
        if peer is None or not peer.is_up:
            return ()
        peer.has_end_marker = True
        peer.wait_for(Waiting.REFRESH, until_s=now_s + REFRESH_WITHIN_S, now_s=now_s)
        return (Action.MARK_STALE,)

    def on_refresh_end(self, event: RefreshEnd) -> Actions:
        """The peer has sent everything again."""
        peer = self._peers.get(event.peer)
        if peer is None or peer.waiting is not Waiting.REFRESH:
            return ()
        peer.settle()
        return (Action.SWEEP,)

    def due(self, now_s: float) -> dict[str, Actions]:
        """What has waited long enough."""
        actions: dict[str, Actions] = {}
        for name, peer in self._peers.items():
            if peer.due_s <= now_s:
                peer.settle()
                actions[name] = (Action.SWEEP,)
        return actions

    def next_deadline_s(self) -> float:
        """When `due` or `is_over` may have something new; infinity if never."""
        deadlines = [peer.due_s for peer in self._peers.values()]
        if not self._is_over:
            deadlines.append(self.started_s + OWN_RESTART_S)
        return min(deadlines, default=inf)

    def waiting(self, peer: str) -> Waiting:
        """What the stale paths of a peer wait for."""
        return self._peers[peer].waiting if peer in self._peers else Waiting.NOTHING

    def is_over(self, now_s: float) -> bool:
        """Whether the start is over, once and for all: what an earlier process left may go.

        Not before `expect` was told the sessions, that is, before the datastore was in sync.
        """
        if not self._is_over and self._expected is not None:
            told = {name for name, peer in self._peers.items() if peer.has_told_all}
            self._is_over = self._expected <= told or now_s >= self.started_s + OWN_RESTART_S
        return self._is_over
