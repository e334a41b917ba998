"""The speaker behind which ExaBGP 5 works: sessions, events, and an Adj-RIB-Out per peer made so.

    daemon ─ advertise ─▶ AdjRibOut (exabgp_peer) ─▶ commands ─▶ Link ─▶ relay ─▶ ExaBGP ─▶ peers
    daemon ◀─ events ──── this file ◀───────────── lines ◀────── Link ◀─ relay ◀─ ExaBGP ◀─ peers

One task per session that is up: it reads what ExaBGP already holds for the peer, then commands the
difference to what is wanted, then End-of-RIB, then waits to be woken. Wake-ups say only that
something changed.

Invariants:

- Commands go only to peers that are up; what was commanded before a session (by us, or by a bgpd
  that was killed) is read from ExaBGP, never from memory or disk. See docs/design/speaker.md.
- The reader of events never waits for a command.
- A connection lost for less than `GRACE_S` to the same ExaBGP costs no session: what may have been
  missed is told by `SpeakerConnected(lost_events=True)` and `SessionUp(resumed=True)`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import assert_never

import structlog

from bgpd import exabgp_commands, exabgp_orders
from bgpd import exabgp_events as lines
from bgpd.announcement import Announcement
from bgpd.exabgp_answers import Established, common, established
from bgpd.exabgp_link import Link, LinkLost
from bgpd.exabgp_proof import keep_proving
from bgpd.exabgp_reload import Reloader, is_accepted
from bgpd.exabgp_session import PeerSession
from bgpd.speaker import (
    EndOfRIB,
    NotificationReceived,
    PeerProof,
    RefreshBegin,
    RefreshEnd,
    RoutesReceived,
    SessionDown,
    SessionRejected,
    SessionUp,
    SpeakerConnected,
    SpeakerEvent,
    SpeakerLost,
    SpeakerStatus,
)
from cymric.model.peering import Session
from cymric.runtime.pacing import Backoff

GRACE_S = 3.0
EVENT_QUEUE = 10_000
VERIFY_EVERY_S = 30.0
STALLED_S = 60.0

log = structlog.get_logger()


class ExaBGPSpeaker:
    """See `bgpd.speaker.Speaker`. `clock` gives Unix time in seconds, for status only."""

    def __init__(
        self,
        socket_path: Path,
        configuration: Path,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._socket_path = socket_path
        self._configuration = configuration
        self._clock = clock
        self._peers: dict[str, PeerSession] = {}
        self._events: asyncio.Queue[SpeakerEvent] = asyncio.Queue(EVENT_QUEUE)
        self._generation = ""
        self._is_connected = False
        self._expected: Mapping[str, Session] | None = None
        self._running = asyncio.Event()
        self._running.set()
        self._link: Link | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._reloader: Reloader | None = None

    # --- the port ------------------------------------------------------------------------------

    async def events(self) -> AsyncIterator[SpeakerEvent]:
        """See `Speaker`."""
        while True:
            yield await self._events.get()

    def advertise(self, peer: str, routes: Mapping[str, Announcement]) -> None:
        """See `Speaker`. Raises ValueError for a route that cannot be said in BGP."""
        exabgp_commands.check(routes)
        known = self._peer(peer)
        known.rib.want(routes)
        known.kick()

    def advertise_changes(self, peer: str, changes: Mapping[str, Announcement | None]) -> None:
        """See `Speaker`. Raises ValueError for a route that cannot be said in BGP."""
        exabgp_commands.check(changes)
        known = self._peers.get(peer)
        if known is None or known.rib.wanted is None:
            raise ValueError(f"nothing was ever advertised to {peer} that could change")
        known.rib.want_changes(changes)
        known.kick()

    def request_refresh(self, peer: str) -> None:
        """See `Speaker`."""
        known = self._peers.get(peer)
        if known is None or known.up is None:
            return
        known.refresh_wanted = True
        known.kick()

    def expect_sessions(self, sessions: Sequence[Session]) -> None:
        """See `Speaker`. The file decides; this is what `status` compares it with."""
        self._expected = {str(session.peer_address): session for session in sessions}
        for peer in list(self._peers):
            if peer not in self._expected and self._peers[peer].up is None:
                del self._peers[peer]

    def status(self) -> SpeakerStatus:
        """See `Speaker`."""
        return SpeakerStatus(
            connected=self._is_connected,
            generation=self._generation,
            configuration=self._configuration_status(),
            peers={
                peer: self._peers.get(peer, PeerSession(peer)).status(
                    now_s=_now_s(), is_connected=self._is_connected
                )
                for peer in sorted(self._shown())
            },
        )

    def proof(self) -> Mapping[str, PeerProof]:
        """See `Speaker`."""
        return {name: peer.proof() for name, peer in sorted(self._peers.items())}

    def _shown(self) -> set[str]:
        """Peers worth showing: expected or up; without expectations, all ever heard of."""
        if self._expected is None:
            return set(self._peers)
        return self._expected.keys() | {n for n, peer in self._peers.items() if peer.up}

    async def run(self) -> None:
        """See `Speaker`."""
        backoff = Backoff(first_s=0.05, most_s=1.0)
        lost_since: float | None = asyncio.get_running_loop().time()
        while True:
            reason = "cannot connect"
            try:
                link, greeting = await Link.connect(str(self._socket_path), self._on_line)
            except (OSError, LinkLost) as error:
                reason = str(error)
            else:
                backoff.succeeded()
                reason = await self._serve(link, greeting)
                lost_since = asyncio.get_running_loop().time()
            if lost_since is not None and await self._give_up(lost_since, reason):
                lost_since = None
            await asyncio.sleep(backoff.next_s())

    # --- connection ----------------------------------------------------------------------------

    async def _serve(self, link: Link, greeting: lines.Greeting) -> str:
        """Work on one connection until it is lost; why it was."""
        reason = ""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._link, self._tasks = link, tasks
                self._running.set()
                unconfirmed = await self._greet(greeting)
                self._reloader = Reloader(
                    self._configuration,
                    link.ask,
                    self,
                    restart=lambda: link.tell(exabgp_orders.restart()),
                    is_accepted=is_accepted,
                )
                tasks.create_task(link.run(), name="exabgp: read")
                tasks.create_task(self._confirm(link, unconfirmed), name="exabgp: confirm")
                tasks.create_task(self._reloader.run(), name="exabgp: configuration")
                tasks.create_task(self._verify(link), name="exabgp: verify")
                proving = keep_proving(link, self._peers.values, self._clock)
                tasks.create_task(proving, name="exabgp: prove")
        except* (LinkLost, OSError, TimeoutError) as group:
            reason = "; ".join(sorted({str(error) or "no answer" for error in group.exceptions}))
        finally:
            link.close()
            self._link = self._tasks = None
            self._is_connected = False
            for peer in self._peers.values():
                peer.task = None
                peer.rib.stop()
        log.warning("speaker connection lost", reason=reason)
        return reason

    async def _greet(self, greeting: lines.Greeting) -> frozenset[str]:
        """Tell the listener where we stand; sessions of which the relay does not know."""
        if greeting.generation != self._generation:
            await self._forget("exabgp is a new process")
        self._generation = greeting.generation
        self._is_connected = True
        await self._say(SpeakerConnected(greeting.generation, greeting.lost))
        log.info("speaker connected", generation=greeting.generation, lost_events=greeting.lost)
        for state, opened in greeting.sessions:
            self._peer(state.peer).opened = opened
            await self._session_up(state.peer, state.asn, resumed=True)
        alive = {state.peer for state, _ in greeting.sessions}
        return frozenset(n for n, p in self._peers.items() if p.up is not None and n not in alive)

    async def _confirm(self, link: Link, names: frozenset[str]) -> None:
        """A relay that ExaBGP started anew remembers no session; ExaBGP itself does."""
        if not names:
            return
        up = established((await link.ask("show neighbor json")).lines)
        for name in sorted(names):
            if self._peer(name).up is None:
                continue  # it went down, and came up perhaps, since
            if name in up:
                await self._session_up(name, up[name].asn, resumed=True, seen=up[name])
            else:
                await self._session_down(name, "went down while nobody listened")

    async def _give_up(self, lost_since: float, reason: str) -> bool:
        """After the grace period, tell that all sessions are down. True when told."""
        if asyncio.get_running_loop().time() - lost_since < GRACE_S:
            return False
        await self._forget(reason)
        return True

    async def _forget(self, reason: str) -> None:
        had_sessions = bool(self._generation)
        self._generation = ""
        for peer in self._peers.values():
            if peer.up is not None:
                peer.up, peer.since_s, peer.reason = None, self._clock(), reason
        if had_sessions:
            await self._say(SpeakerLost(reason))

    async def _verify(self, link: Link) -> None:
        """Now and then ask what is up: ExaBGP must answer, and agree with what we believe."""
        suspects: set[str] = set()
        while True:
            async with asyncio.timeout(STALLED_S):
                reply = await link.ask("show neighbor json")
            up = established(reply.lines)
            differing = up.keys() ^ {n for n, peer in self._peers.items() if peer.up is not None}
            for name in sorted(differing & suspects):
                if name in up:
                    await self._session_up(name, up[name].asn, resumed=True, seen=up[name])
                else:
                    await self._session_down(name, "is not up, as exabgp says")
            suspects = differing - suspects
            await asyncio.sleep(1.0 if suspects else VERIFY_EVERY_S)

    # --- events --------------------------------------------------------------------------------

    async def _on_line(self, line: lines.Line) -> None:
        match line:
            case lines.Update(sent=True):
                self._peer(line.peer).on_sent(line)
            case lines.Update():
                await self._say(RoutesReceived(line.peer, line.announced, line.withdrawn))
            case lines.EndOfRIBLine(sent=True):
                peer = self._peer(line.peer)
                if peer.rib.ended(line.family):
                    peer.kick()
            case lines.EndOfRIBLine():
                await self._say(EndOfRIB(line.peer, line.family))
            case lines.Refresh(subtype="begin"):
                await self._say(RefreshBegin(line.peer, line.family))
            case lines.Refresh(subtype="end"):
                await self._say(RefreshEnd(line.peer, line.family))
            case lines.Open():
                self._peer(line.peer).opened = line
            case lines.State():
                await self._on_state(line)
            case lines.NotificationLine():
                await self._on_notification(line)
            case lines.Shutdown():
                log.info("exabgp is shutting down")
            case lines.Refresh() | lines.Ignored():
                pass  # ExaBGP answers a query itself, from its adj-rib-out
            case lines.Greeting() | lines.Answer() | lines.Text() | lines.Malformed():
                log.warning("line out of place", line=repr(line)[:300])
            case _:
                assert_never(line)

    async def _on_state(self, state: lines.State) -> None:
        peer = self._peer(state.peer)
        if state.state == "up":
            peer.is_ending = False
            await self._session_up(state.peer, state.asn, resumed=False)
        elif state.state == "down":
            if peer.is_ending or peer.held_until_s > _now_s():
                peer.is_ending = False  # told already, with the true reason
            elif peer.up is not None:
                await self._session_down(state.peer, state.reason)
            else:
                self._note(state.peer, state.reason)
                await self._say(SessionRejected(state.peer, state.reason))

    async def _on_notification(self, line: lines.NotificationLine) -> None:
        word = "sent" if line.sent else "received"
        log.info(
            "notification", peer=line.peer, direction=word, code=line.code, subcode=line.subcode
        )
        await self._say(
            NotificationReceived(line.peer, line.code, line.subcode, line.data, line.sent)
        )

    async def _session_up(
        self, name: str, asn: int, *, resumed: bool, seen: Established | None = None
    ) -> None:
        peer = self._peer(name)
        held_for_s = peer.held_until_s - _now_s()
        if held_for_s > 0:  # it was quicker than the order to stay down, or ExaBGP is a new one
            self._order(exabgp_orders.hold(name, held_for_s))
            return
        if peer.up is not None and not resumed:
            await self._session_down(name, "came up again")
        opened = peer.opened
        peer.up = SessionUp(
            peer=name,
            asn=asn,
            families=common(name, opened, seen),
            restart_time_s=opened.restart_time_s if opened else None,
            forwarding_families=opened.forwarding_families if opened else frozenset(),
            peer_restarting=opened.restarting if opened else False,
            route_refresh=opened.route_refresh if opened else bool(seen and seen.route_refresh),
            enhanced_refresh=opened.enhanced_refresh if opened else False,
            router_id=opened.router_id if opened else "",
            resumed=resumed,
        )
        peer.since_s, peer.reason = self._clock(), ""
        peer.rib.start(peer.up.families)
        assert self._tasks is not None
        if peer.task is not None:
            peer.task.cancel()
        assert self._link is not None
        serving = peer.serve(self._link, self._running)
        peer.task = self._tasks.create_task(serving, name=f"peer {name}")
        log.info("session up", peer=name, asn=asn, resumed=resumed)
        await self._say(peer.up)

    async def _session_down(self, name: str, reason: str, *, drop_paths: bool = False) -> None:
        peer = self._peer(name)
        peer.end()
        self._note(name, reason)
        log.info("session down", peer=name, reason=reason)
        await self._say(SessionDown(name, reason, drop_paths))

    # --- sessions that we end ------------------------------------------------------------------

    def hold_session(self, peer: str, reason: str, retry_after_s: float) -> None:
        """See `Speaker`."""
        known = self._peer(peer)
        known.held_until_s = _now_s() + retry_after_s
        self._order(exabgp_orders.hold(peer, retry_after_s))
        if retry_after_s > 0:
            self._end_session(known, reason)

    def session_lost(self, peer: str, reason: str) -> None:
        """See `Speaker`."""
        self._order(exabgp_orders.cut(peer))
        self._end_session(self._peer(peer), reason)

    def _order(self, command: str) -> None:
        if self._link is not None:
            self._link.tell(command)

    def _end_session(self, peer: PeerSession, reason: str) -> None:
        """Count it as down now; should ExaBGP not obey, `_verify` finds that it is still up."""
        if peer.up is None or self._tasks is None:
            self._note(peer.name, reason)
            return
        peer.end()
        peer.is_ending = True
        self._tasks.create_task(self._session_down(peer.name, reason, drop_paths=True))

    async def _say(self, event: SpeakerEvent) -> None:
        await self._events.put(event)

    # --- what the reloader needs ---------------------------------------------------------------

    def leave(self, peers: Iterable[str]) -> None:
        """See `exabgp_reload.Peers`."""
        leaving = set(peers)
        for name, peer in self._peers.items():
            if peer.rib.is_leaving != (name in leaving):
                peer.rib.leave(is_leaving=name in leaving)
                peer.kick()

    def is_settled(self, peers: Iterable[str]) -> bool:
        """See `exabgp_reload.Peers`."""
        known = (self._peers[name] for name in peers if name in self._peers)
        return all(peer.up is None or peer.rib.is_settled for peer in known)

    def pause(self) -> None:
        """See `exabgp_reload.Peers`."""
        self._running.clear()

    def is_quiet(self) -> bool:
        """See `exabgp_reload.Peers`."""
        return all(not peer.rib.in_flight for peer in self._peers.values())

    def resume(self) -> None:
        """See `exabgp_reload.Peers`."""
        self._running.set()

    # --- helpers -------------------------------------------------------------------------------

    def _peer(self, name: str) -> PeerSession:
        if name not in self._peers:
            self._peers[name] = PeerSession(name)
        return self._peers[name]

    def _note(self, name: str, reason: str) -> None:
        peer = self._peer(name)
        peer.since_s, peer.reason = self._clock(), reason

    def _configuration_status(self) -> str:
        if self._reloader is None:
            return "not read yet"
        missing = (self._expected or {}).keys() - self._reloader.status.wanted.keys()
        if missing:
            return f"waiting for confd to write {', '.join(sorted(missing))}"
        return str(self._reloader.status)


def _now_s() -> float:
    return time.monotonic()
