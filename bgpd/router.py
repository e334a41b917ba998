"""The routing process: from what the datastore and the peers say to what peers and kernel are told.

    datastore ▶ View ─▶ peering ─────────────────▶ Speaker.expect_sessions
                   ├──▶ exports ─────────────────▶ Speaker.advertise
                   └──▶ import policy ─┐
    Speaker.events ▶ Rib (Adj-RIB-In) ─┴▶ decision ▶ Loc-RIB ▶ Fib ▶ kernel
                 └─▶ Restarts ▶ stale, sweep, drop, refresh

`on_updates` and the event listener only note; `work` does everything from the latest state, at most
once per turn of the loop. No I/O here: speaker and kernel are ports.

Invariants
- Nothing is advertised and no session expected before the datastore is in sync; the speaker is not
  listened to before, either, because nothing it says could be judged.
- A peer's set is advertised whole, also when it is empty: then the peer gets its End-of-RIB.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf
from typing import assert_never

import structlog

from bgpd.decision import Path, Peer
from bgpd.exports import Why, advertised, announcements, own_aggregates
from bgpd.fib import Wanted, desired_routes
from bgpd.graceful_restart import Action, Actions, Restarts
from bgpd.imports import ImportPolicy
from bgpd.rib import Rib
from bgpd.speaker import (
    Announcement,
    EndOfRIB,
    NotificationReceived,
    RefreshBegin,
    RefreshEnd,
    RoutesReceived,
    SessionDown,
    SessionRejected,
    SessionUp,
    Speaker,
    SpeakerConnected,
    SpeakerEvent,
    SpeakerLost,
)
from bgpd.view import View
from cymric.datastore.syncer import Update
from cymric.model.net import Address, Network, parse_address
from cymric.model.peering import Peering, Session
from cymric.model.prefix import prefix as to_prefix
from cymric.runtime.pacing import Kick

log = structlog.get_logger()

Clock = Callable[[], float]


class Router:
    """One node's routing. `on_routes_changed` is called when the kernel should be looked at; what
    peers should be told goes to `tell`, by default straight to the speaker.
    """

    def __init__(
        self,
        node: str,
        speaker: Speaker,
        *,
        on_routes_changed: Callable[[], None] = lambda: None,
        tell: Callable[[str, Mapping[str, Announcement]], None] | None = None,
        on_sessions: Callable[[Sequence[Session]], None] = lambda _: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.view = View(node)
        self.rib = Rib()
        self.restarts = Restarts(started_s=clock())
        self.kick = Kick()
        self.is_in_sync = False
        self.is_speaker_connected = False
        self.sessions: dict[str, Session] = {}
        self.advertising: dict[Network, Why] = {}
        self.aggregates: frozenset[Network] = frozenset()
        self.up: dict[str, SessionUp] = {}
        self.unsupported: Mapping[str, str] = {}
        self._speaker = speaker
        self._tell = tell or speaker.advertise
        self._on_routes_changed = on_routes_changed
        self._on_sessions = on_sessions
        self._clock = clock
        self._policy: ImportPolicy | None = None
        self._is_view_dirty = True
        self._was_over = False
        self._peers: dict[str, Peer] = {}
        self._told: dict[str, Mapping[str, Announcement]] = {}

    # --- noticing ---------------------------------------------------------------------------

    def on_updates(self, updates: Sequence[Update]) -> None:
        """The datastore changed."""
        self.view.update(updates)
        self._is_view_dirty = True
        self.kick()

    def on_in_sync(self) -> None:
        """The datastore was seen whole."""
        self.is_in_sync = True
        self.kick()

    def on_event(self, event: SpeakerEvent) -> None:
        """The speaker said something."""
        now_s = self._clock()
        self.kick()
        match event:
            case RoutesReceived():
                self._receive(event, now_s)
            case SessionUp():
                self._session_up(event, now_s)
            case SessionDown():
                log.warning("session down", peer=event.peer, reason=event.reason)
                self.up.pop(event.peer, None)
                if event.peer in self.sessions:
                    self._do(event.peer, self.restarts.on_session_down(event, now_s))
            case EndOfRIB():
                self._do(event.peer, self.restarts.on_end_of_rib(event))
            case RefreshBegin():
                self._do(event.peer, self.restarts.on_refresh_begin(event, now_s))
            case RefreshEnd():
                self._do(event.peer, self.restarts.on_refresh_end(event))
            case SpeakerConnected():
                log.info("speaker connected", lost_events=event.lost_events)
                self._lose_sessions(now_s)
                self.is_speaker_connected = True
            case SpeakerLost():
                log.warning("speaker lost, its paths are kept for a while", reason=event.reason)
                self.is_speaker_connected = False
                self._lose_sessions(now_s)
            case NotificationReceived():
                log.warning(
                    "notification",
                    peer=event.peer,
                    code=event.code,
                    subcode=event.subcode,
                    sent=event.sent,
                )
            case SessionRejected():
                log.debug("session not established", peer=event.peer, reason=event.reason)
            case _:
                assert_never(event)

    def on_path_failed(self, peer: str, reason: str, *, is_independent: bool) -> None:
        """BFD says that the way to a peer is dead: its paths leave the decision at once.

        A session that is down already may be a restart, which takes BFD along unless that is
        independent of the control plane on both sides (RFC 5882 §4.3.2).
        """
        if peer in self.up:
            log.warning("path to peer failed", peer=peer, reason=reason)
            self._speaker.session_lost(peer, reason)
            del self.up[peer]
        elif not is_independent:
            return
        self._do(peer, (Action.DROP,))
        self.kick()

    def _session_up(self, event: SessionUp, now_s: float) -> None:
        log.info(
            "session up",
            peer=event.peer,
            asn=event.asn,
            resumed=event.resumed,
            restart_time_s=event.restart_time_s,
        )
        self.up[event.peer] = event
        session = self.sessions.get(event.peer)
        if session is None:
            log.warning("session with a peer that is not configured", peer=event.peer)
            return
        self._name_peer(session, event)
        self._do(event.peer, self.restarts.on_session_up(event, now_s))

    def _receive(self, event: RoutesReceived, now_s: float) -> None:
        peer = self._peers.get(event.peer)
        if peer is None or event.peer not in self.up:
            return
        self.restarts.on_routes(event.peer, now_s)
        self.rib.receive(
            event.peer,
            announced=[
                Path(to_prefix(one.prefix), _address(one.next_hop), one.attributes, peer)
                for one in event.announced
            ],
            withdrawn=map(to_prefix, event.withdrawn),
        )

    def _name_peer(self, session: Session, up: SessionUp) -> None:
        """Know who sends what comes from this session, and who sent what it told already."""
        self._peers[up.peer] = Peer(
            address=session.peer_address,
            asn=session.peer_asn,
            local_asn=session.local_asn,
            router_id=parse_address(up.router_id) if up.router_id else None,
            node=session.peer_node,
        )
        self.rib.name_peer(up.peer, self._peers[up.peer])

    def _lose_sessions(self, now_s: float) -> None:
        self.up.clear()
        for peer, actions in self.restarts.on_speaker_lost(now_s).items():
            self._do(peer, actions)

    def _do(self, peer: str, actions: Actions) -> None:
        for action in actions:
            match action:
                case Action.MARK_STALE:
                    self.rib.mark_stale(peer)
                case Action.SWEEP:
                    if swept := self.rib.sweep(peer):
                        log.info("stale paths swept", peer=peer, paths=swept)
                case Action.DROP:
                    if dropped := self.rib.drop(peer):
                        log.info("paths dropped", peer=peer, paths=dropped)
                case Action.REQUEST_REFRESH:
                    self._speaker.request_refresh(peer)
                case _:
                    assert_never(action)

    # --- working ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Work whenever kicked or a deadline passes, until cancelled."""
        while True:
            pause_s = self.restarts.next_deadline_s() - self._clock()
            await self.kick.wait(None if pause_s == inf else max(0.01, pause_s))
            self.work()

    def work(self) -> None:
        """Bring everything in line with what is known now."""
        if not self.is_in_sync:
            return
        now_s = self._clock()
        is_changed = False
        if self._is_view_dirty:
            self._is_view_dirty = False
            is_changed = self._follow_view(now_s)
        for peer, actions in self.restarts.due(now_s).items():
            self._do(peer, actions)
        for peer in self.rib.peers_below_limit():
            self._speaker.request_refresh(peer)
        if self._policy is not None:
            is_changed = bool(self.rib.settle(self._policy.judge)) or is_changed
        is_over = self.restarts.is_over(now_s)
        if is_over and not self._was_over:
            log.info("start is over: kernel routes that nobody wants any more may go")
        if is_changed or is_over != self._was_over:
            self._on_routes_changed()
        self._was_over = is_over

    def wanted_in_kernel(self) -> Wanted | None:
        """What `Fib` should make true; None as long as too little is known."""
        if self._policy is None:
            return None
        return Wanted(
            routes=desired_routes(self.rib.loc_rib, self.aggregates),
            keep_inherited=not self.restarts.is_over(self._clock()),
        )

    def _follow_view(self, now_s: float) -> bool:
        """Sessions, policy and exports from the datastore; whether own blackholes changed."""
        is_first = self._policy is None
        self._follow_peering(self.view.peering(), now_s)
        policy = self.view.import_policy()
        if policy != self._policy:
            self._policy = policy
            self.rib.judge_again()
        inputs = self.view.export_inputs()
        before, self.aggregates = self.aggregates, own_aggregates(inputs)
        self._advertise(advertised(inputs))
        return is_first or before != self.aggregates

    def _follow_peering(self, peering: Peering, now_s: float) -> None:
        if peering.unsupported != self.unsupported:
            for name, reason in peering.unsupported.items():
                log.warning("peer cannot be honoured", name=name, reason=reason)
        self.unsupported = peering.unsupported
        sessions = {str(session.peer_address): session for session in peering.sessions}
        if sessions != self.sessions or self._policy is None:
            self._speaker.expect_sessions(peering.sessions)
            self._on_sessions(peering.sessions)
        new = sessions.keys() - self.sessions.keys()
        self.sessions = sessions
        for peer in self.restarts.expect(sessions.keys()):
            self._do(peer, (Action.DROP,))
        for known in (self._told, self._peers):
            for peer in known.keys() - sessions.keys():
                del known[peer]
        for peer, event in tuple(self.up.items()):
            if peer in new:  # it was up before we were told to care: what it said is lost
                self._session_up(replace(event, resumed=True), now_s)
            elif peer in sessions:
                self._name_peer(sessions[peer], event)

    def _advertise(self, prefixes: dict[Network, Why]) -> None:
        for prefix in prefixes.keys() - self.advertising.keys():
            log.info("advertising", prefix=str(prefix), why=prefixes[prefix].value)
        for prefix in self.advertising.keys() - prefixes.keys():
            log.info("withdrawing", prefix=str(prefix))
        self.advertising = prefixes
        for peer, session in self.sessions.items():
            routes = announcements(prefixes, session)
            if self._told.get(peer) != routes:
                self._told[peer] = routes
                self._tell(peer, routes)


@lru_cache(maxsize=4096)
def _address(text: str) -> Address:
    return parse_address(text)
