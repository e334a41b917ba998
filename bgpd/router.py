"""The routing process: from what the datastore and the peers say to what peers and kernel are told.

    underlay routes ▶ Resolver ▶ import policy, kernel routes
    datastore ▶ View ─▶ peering ─────────────────▶ Speaker.expect_sessions
                   ├──▶ local routes, policies ──┬▶ Adj-RIB-Out of each peer ▶ Speaker.advertise
                   └──▶ import policy ─┐         │
    Speaker.events ▶ Rib (Adj-RIB-In) ─┴▶ decision ▶ Loc-RIB ▶ Fib ▶ kernel
                 ├─▶ Restarts ▶ stale, sweep, drop, refresh
                 └─▶ over the prefix limit ▶ Speaker.hold_session

`on_updates` and the event listener only note; `work` does everything from the latest state, at most
once per turn of the loop. No I/O here: speaker and kernel are ports.

Invariants
- Nothing is advertised and no session expected before the datastore is in sync; the speaker is not
  listened to before, either, because nothing it says could be judged.
- A peer's set is first advertised whole, also when it is empty: then the peer gets its End-of-RIB.
- What changes in the Loc-RIB is followed prefix by prefix; what changes in the datastore is worked
  out whole. Both end in the same state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from math import inf
from typing import assert_never

import structlog

from bgpd.adj_rib_out import Exporter, ExportPolicy
from bgpd.announcement import Announcement
from bgpd.decision import DEFAULT_MAX_PATHS, Path, Peer
from bgpd.exports import (
    ROUTE_PRIORITY,
    Local,
    Why,
    kept_out_of_kernel,
    local_routes,
    own_aggregates,
)
from bgpd.fib import Wanted, desired_routes, kernel_route, own_routes
from bgpd.graceful_restart import Action, Actions, Restarts
from bgpd.imports import ImportPolicy
from bgpd.next_hops import Resolver
from bgpd.rib import Rib, Settled
from bgpd.speaker import (
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
from cymric.kernel.api import Route
from cymric.kernel.underlay import OtherRoute
from cymric.model.net import Address, Network, parse_address
from cymric.model.peering import Peering, Session
from cymric.model.prefix import PrefixSet
from cymric.model.prefix import prefix as to_prefix
from cymric.runtime.pacing import Kick

log = structlog.get_logger()

Clock = Callable[[], float]
TellChanges = Callable[[str, Mapping[str, Announcement], Mapping[str, Announcement | None]], None]
"""Told the peer, its whole Adj-RIB-Out (the mapping told last, changed in place), and what changed.
"""

NEARLY_FULL = 0.8
"""The share of a peer's prefix limit at which a warning is due."""
HOLD_S = 120.0
"""How long a session stays down whose peer announced too many prefixes."""


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
        tell_changes: TellChanges | None = None,
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
        self._failed_unheard: dict[str, str] = {}
        self.unsupported: Mapping[str, str] = {}
        self.problems: Mapping[str, str] = {}
        self.resolver = Resolver()
        self._speaker = speaker
        self._tell = tell or speaker.advertise
        self._tell_changes = tell_changes or (
            lambda peer, _, changes: speaker.advertise_changes(peer, changes)
        )
        self._on_routes_changed = on_routes_changed
        self._on_sessions = on_sessions
        self._clock = clock
        self._policy: ImportPolicy | None = None
        self._is_view_dirty = True
        self._is_kernel_dirty = False
        self._was_over = False
        self._peers: dict[str, Peer] = {}
        self._told: dict[str, dict[str, Announcement]] = {}
        self._local: Mapping[Network, Local] = {}
        self._export_policies: dict[str, ExportPolicy] = {}
        self._exporters: dict[str, Exporter] = {}
        self._kept_out = PrefixSet.of(())
        self._priorities = (ROUTE_PRIORITY, ROUTE_PRIORITY)
        self._max_paths = DEFAULT_MAX_PATHS
        self._gateways: dict[Address, Address] = {}
        self._ignored: tuple[str, ...] = ()
        self._own: Mapping[Network, Route] = {}
        self._kernel: dict[Network, Route] = {}
        self._kernel_changes: dict[Network, Route | None] | None = None
        self._warned: set[str] = set()

    # --- noticing ---------------------------------------------------------------------------

    def on_updates(self, updates: Sequence[Update]) -> None:
        """The datastore changed."""
        if self.view.update(updates):
            self._is_view_dirty = True
            self.kick()

    def on_service_addresses(self, addresses: frozenset[Network]) -> None:
        """Whoever watches services says for which addresses (/32, /128) this node stands."""
        self.view.service_addresses = addresses
        self._is_view_dirty = True
        self.kick()

    def on_underlay(self, routes: Iterable[OtherRoute]) -> None:
        """The routes by which next hops are reached are these."""
        used = self.rib.next_hops() | set(self._gateways.values())
        self._follow_reach(self.resolver.replace(routes, used))

    def _follow_reach(self, changed: Collection[Address]) -> None:
        """These next hops are reached differently."""
        if self._policy is not None:
            self._policy.hops.clear()
        if not changed:
            return
        log.info("next hops are reached differently", count=len(changed))
        self.rib.judge_again_through(changed)
        self._is_kernel_dirty = True
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
        elif not self.is_speaker_connected:
            self._failed_unheard[peer] = reason  # it may be up: we have only just begun
            return
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
        failed = self._failed_unheard.pop(event.peer, "")
        if failed and event.resumed:  # the path failed while nobody was there to act
            self._speaker.session_lost(event.peer, failed)
            return
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
        groups: list[tuple[Path, list[Network]]] = []
        last: Announcement | None = None
        for one in event.announced:
            if (
                last is None
                or one.attributes is not last.attributes
                or one.next_hop != last.next_hop
            ):
                prefixes: list[Network] = []
                groups.append((Path(_address(one.next_hop), one.attributes, peer), prefixes))
                last = one
            prefixes.append(to_prefix(one.prefix))
        self.rib.receive(event.peer, groups, map(to_prefix, event.withdrawn))

    def _follow_ways(self, peering: Peering) -> None:
        """Interfaces that are not to be looked at, and peers that are behind a gateway."""
        gateways = {
            session.peer_address: session.reachable_by
            for session in peering.sessions
            if session.reachable_by is not None
        }
        if (peering.ignored_interfaces, gateways) == (self._ignored, self._gateways):
            return
        self._ignored, self._gateways = peering.ignored_interfaces, gateways
        used = self.rib.next_hops() | set(gateways.values())
        self._is_kernel_dirty = True
        self._follow_reach(
            self.resolver.restrict(ignored=self._ignored, gateways=gateways, used=used)
        )

    def _name_peer(self, session: Session, up: SessionUp) -> None:
        """Know who sends what comes from this session, and who sent what it told already."""
        self._peers[up.peer] = Peer(
            address=session.peer_address,
            asn=session.peer_asn,
            local_asn=session.local_asn,
            router_id=parse_address(up.router_id) if up.router_id else None,
            node=session.peer_node,
            is_client=session.is_reflector_client,
            allowed_own_asns=session.allowed_own_asns,
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
        self._watch_limits()
        if self._policy is not None and self.rib.is_dirty:
            settled = self.rib.settle(self._policy, max_paths=self._max_paths)
            if settled:
                self._follow_loc_rib(settled)
                is_changed = True
        if self._is_kernel_dirty and self._policy is not None:
            self._picture_kernel()
            is_changed = True
        is_over = self.restarts.is_over(now_s)
        if is_over and not self._was_over:
            log.info("start is over: kernel routes that nobody wants any more may go")
        if is_changed or is_over != self._was_over:
            self._on_routes_changed()
        self._was_over = is_over

    def wanted_in_kernel(self) -> Wanted | None:
        """What `Fib` should make true; None as long as too little is known.

        `changes` is what changed since the last call.
        """
        if self._policy is None:
            return None
        changes, self._kernel_changes = self._kernel_changes, {}
        return Wanted(
            routes=self._kernel,
            keep_inherited=not self.restarts.is_over(self._clock()),
            changes=changes,
        )

    def _watch_limits(self) -> None:
        """A peer that announces more than it may loses its session for a while (RFC 4486 §4)."""
        for peer in tuple(self.rib.over_limit):
            limit = self.rib.limit(peer)
            reason = f"announced more than {limit} prefixes"
            log.error("session held down", peer=peer, reason=reason, retry_after_s=HOLD_S)
            self.rib.drop(peer)
            self.up.pop(peer, None)  # what it said before the session ends is not listened to
            self._speaker.hold_session(peer, reason, HOLD_S)
        for peer, table in self.rib.adj_ribs_in.items():
            is_nearly_full = len(table.paths) >= NEARLY_FULL * self.rib.limit(peer)
            if is_nearly_full and peer not in self._warned:
                log.warning(
                    "peer is close to its prefix limit",
                    peer=peer,
                    prefixes=len(table.paths),
                    limit=self.rib.limit(peer),
                )
                self._warned.add(peer)
            elif not is_nearly_full:
                self._warned.discard(peer)

    def _follow_view(self, now_s: float) -> bool:
        """Sessions, policies and own routes from the datastore; whether the kernel should know."""
        is_first = self._policy is None
        self._follow_peering(self.view.peering(), now_s)
        sessions = self.sessions.values()
        self.rib.max_prefixes = self.view.max_prefixes()
        self.rib.max_prefixes_by_peer = {
            session.key: session.max_prefixes
            for session in sessions
            if session.max_prefixes is not None
        }
        policy = self.view.import_policy(sessions, self.resolver)
        max_paths = self.view.max_paths()
        changed_claims = self.view.take_changed_claims()
        if policy != self._policy or max_paths != self._max_paths:
            self._policy, self._max_paths = policy, max_paths
            self.rib.judge_again()
        elif changed_claims:
            self.rib.judge_again_inside(changed_claims)
        inputs = self.view.export_inputs()
        before = self.aggregates, self._kept_out, self._priorities
        self.aggregates = own_aggregates(inputs)
        self._kept_out = kept_out_of_kernel(self.view.cluster)
        self._priorities = self.view.route_priority(4), self.view.route_priority(6)
        is_kernel_dirty = is_first or before != (
            self.aggregates,
            self._kept_out,
            self._priorities,
        )
        if is_kernel_dirty:
            self._picture_kernel()
        self._follow_exports(local_routes(inputs))
        return is_kernel_dirty

    def _picture_kernel(self) -> None:
        """All kernel routes anew."""
        self._is_kernel_dirty = False
        self._own = own_routes(self.aggregates, self._gateways, self._priorities, self.resolver)
        self._kernel = desired_routes(
            self.rib.loc_rib, self._own, self._kept_out, self._priorities, self.resolver
        )
        self._kernel_changes = None

    def _follow_loc_rib(self, settled: Settled) -> None:
        """Kernel and peers, for the prefixes whose choice changed."""
        installed: dict[Network, Route] = {}
        gone: dict[Network, None] = {}
        for choice, prefixes in settled.groups:
            if choice is None:
                gone.update(dict.fromkeys(prefixes))
            else:
                version = next(iter(prefixes)).version  # one next hop, so one family
                route = kernel_route(choice, self._priorities[version == 6], self.resolver)
                if route is None:
                    gone.update(dict.fromkeys(prefixes))
                else:
                    installed.update(dict.fromkeys(prefixes, route))
        for prefix in self._own:
            installed.pop(prefix, None)
            gone.pop(prefix, None)
        if self._kept_out.networks:
            for prefix in [p for p in installed if self._kept_out.covers(p)]:
                del installed[prefix]
        for prefix in gone:
            self._kernel.pop(prefix, None)
        self._kernel.update(installed)
        if self._kernel_changes is not None:
            self._kernel_changes.update(installed)
            self._kernel_changes.update(gone)
        for peer, exporter in self._exporters.items():
            told = self._told[peer]
            news = exporter.changes(settled, self._local, self.rib.loc_rib, told)
            if not news:
                continue
            for text, announcement in news.items():
                if announcement is None:
                    del told[text]
                else:
                    told[text] = announcement
            self._tell_changes(peer, told, news)

    def _follow_exports(self, local: Mapping[Network, Local]) -> None:
        """Own routes, and everything else, to every peer for which anything changed."""
        policies = self.view.export_policies(self.sessions.values())
        advertising = {p: one.why for p, one in local.items() if one.why is not None}
        for prefix in advertising.keys() - self.advertising.keys():
            log.info("advertising", prefix=str(prefix), why=advertising[prefix].value)
        for prefix in self.advertising.keys() - advertising.keys():
            log.info("withdrawing", prefix=str(prefix))
        self.advertising = advertising
        is_local_changed = local != self._local
        self._local = local
        for peer, policy in policies.items():
            if is_local_changed or policy != self._export_policies.get(peer):
                exporter = self._exporters[peer] = Exporter(policy)
                self._tell_peer(peer, exporter.whole(local, self.rib.loc_rib))
        self._export_policies = policies

    def _tell_peer(self, peer: str, routes: dict[str, Announcement]) -> None:
        if self._told.get(peer) != routes:
            self._told[peer] = routes
            self._tell(peer, routes)

    def _follow_peering(self, peering: Peering, now_s: float) -> None:
        if peering.unsupported != self.unsupported:
            for name, reason in peering.unsupported.items():
                log.warning("peer cannot be honoured", name=name, reason=reason)
        self.unsupported = peering.unsupported
        problems = {**peering.problems, **self.view.problems()}
        for name, problem in problems.items() - self.problems.items():
            log.warning("honoured in part", name=name, problem=problem)
        self.problems = problems
        sessions = {str(session.peer_address): session for session in peering.sessions}
        if sessions != self.sessions or self._policy is None:
            self._speaker.expect_sessions(peering.sessions)
            self._on_sessions(peering.sessions)
        new = sessions.keys() - self.sessions.keys()
        self.sessions = sessions
        self._follow_ways(peering)
        for peer in self.restarts.expect(sessions.keys()):
            self._do(peer, (Action.DROP,))
        gone = self._peers.keys() | self._told.keys()
        for peer in gone - sessions.keys():
            self._peers.pop(peer, None)
            self._told.pop(peer, None)
            self._exporters.pop(peer, None)
        for peer, event in tuple(self.up.items()):
            if peer in new:  # it was up before we were told to care: what it said is lost
                self._session_up(replace(event, resumed=True), now_s)
            elif peer in sessions:
                self._name_peer(sessions[peer], event)


@lru_cache(maxsize=4096)
def _address(text: str) -> Address:
    return parse_address(text)
