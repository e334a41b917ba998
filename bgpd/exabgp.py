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
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

import msgspec
import structlog

from bgpd import exabgp_commands
from bgpd import exabgp_events as lines
from bgpd.exabgp_link import Link, LinkLost
from bgpd.exabgp_peer import AdjRibOut, Changes
from bgpd.exabgp_reload import Reloader
from bgpd.speaker import (
    IPV4_UNICAST,
    Announcement,
    EndOfRIB,
    NotificationReceived,
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
from cymric.model.peering import Session
from cymric.runtime.pacing import Backoff, Kick

GRACE_S = 3.0
EVENT_QUEUE = 10_000
VERIFY_EVERY_S = 30.0
STALLED_S = 60.0
FENCE_AFTER_S = 15.0
"""How long a change may be in flight before End-of-RIB is sent behind it to settle it."""

log = structlog.get_logger()


@dataclass(slots=True)
class _Peer:
    """What is known of one peer, also while its session is down."""

    rib: AdjRibOut = field(default_factory=AdjRibOut)
    kick: Kick = field(default_factory=Kick)
    up: SessionUp | None = None
    opened: lines.Open | None = None
    since_s: float = 0.0
    reason: str = ""
    refresh_wanted: bool = False
    task: asyncio.Task[None] | None = None


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
        self._peers: dict[str, _Peer] = {}
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
        for prefix, route in routes.items():
            if prefix != route.prefix:
                raise ValueError(f"{prefix} names a route for {route.prefix}")
            exabgp_commands.attribute_text(route.next_hop, route.attributes)
        known = self._peer(peer)
        known.rib.want(dict(routes))
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
            peers={peer: self._peer_status(peer) for peer in sorted(self._shown())},
        )

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
                self._reloader = Reloader(self._configuration, link.ask, self)
                tasks.create_task(link.run(), name="exabgp: read")
                tasks.create_task(self._confirm(link, unconfirmed), name="exabgp: confirm")
                tasks.create_task(self._reloader.run(), name="exabgp: configuration")
                tasks.create_task(self._verify(link), name="exabgp: verify")
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
        up = _established((await link.ask("show neighbor json")).lines)
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
            up = _established(reply.lines)
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
                self._on_sent(line)
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
        if state.state == "up":
            await self._session_up(state.peer, state.asn, resumed=False)
        elif state.state == "down":
            if self._peer(state.peer).up is not None:
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

    def _on_sent(self, update: lines.Update) -> None:
        peer = self._peer(update.peer)
        may_go_on = False
        for prefix in update.withdrawn:
            may_go_on |= peer.rib.sent(prefix, None)
        for route in update.announced:
            may_go_on |= peer.rib.sent(route.prefix, route)
        if may_go_on or peer.rib.is_fence_due:
            peer.kick()

    async def _session_up(
        self, name: str, asn: int, *, resumed: bool, seen: _Established | None = None
    ) -> None:
        peer = self._peer(name)
        if peer.up is not None and not resumed:
            await self._session_down(name, "came up again")
        opened = peer.opened
        peer.up = SessionUp(
            peer=name,
            asn=asn,
            families=_common(opened, seen),
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
        peer.task = self._tasks.create_task(self._serve_peer(name, peer), name=f"peer {name}")
        log.info("session up", peer=name, asn=asn, resumed=resumed)
        await self._say(peer.up)

    async def _session_down(self, name: str, reason: str) -> None:
        peer = self._peer(name)
        peer.up, peer.opened, peer.since_s, peer.reason = None, None, self._clock(), reason
        peer.rib.stop()
        if peer.task is not None:
            peer.task.cancel()
            peer.task = None
        log.info("session down", peer=name, reason=reason)
        await self._say(SessionDown(name, reason))

    async def _say(self, event: SpeakerEvent) -> None:
        await self._events.put(event)

    # --- one session ---------------------------------------------------------------------------

    async def _serve_peer(self, name: str, peer: _Peer) -> None:
        """Make the session's Adj-RIB-Out what is wanted, for as long as the session is up."""
        link = self._link
        assert link is not None
        await self._running.wait()
        reply = await link.ask(f"show adj-rib out {name}")
        peer.rib.learn(_held_prefixes(name, reply.lines))
        while True:
            await self._running.wait()
            if peer.refresh_wanted:
                peer.refresh_wanted = False
                await self._refresh(link, name, peer)
            if changes := peer.rib.take():
                await self._command(link, name, peer, changes)
            elif peer.rib.is_fence_due or not await self._woken(peer):
                await self._fence(link, name, peer)

    async def _woken(self, peer: _Peer) -> bool:
        """Wait for something to do; False if changes are in flight for suspiciously long."""
        is_waiting = bool(peer.rib.in_flight) and not peer.rib.is_fenced
        return await peer.kick.wait(FENCE_AFTER_S if is_waiting else None)

    async def _command(self, link: Link, name: str, peer: _Peer, changes: Changes) -> None:
        async def one(command: str, prefixes: tuple[str, ...]) -> None:
            reply = await link.ask(command)
            if not reply.ok and peer.up is not None:
                peer.rib.unsettle(prefixes)
                await asyncio.sleep(1.0)  # what was refused once is not repeated at full speed
                peer.kick()

        async with asyncio.TaskGroup() as commands:
            for command, prefixes in exabgp_commands.withdraw(name, changes.withdraw):
                commands.create_task(one(command, prefixes))
            for command, prefixes in exabgp_commands.announce(name, changes.announce):
                commands.create_task(one(command, prefixes))

    async def _fence(self, link: Link, name: str, peer: _Peer) -> None:
        for family in sorted(peer.rib.fence()):
            await link.ask(exabgp_commands.end_of_rib(name, family))

    async def _refresh(self, link: Link, name: str, peer: _Peer) -> None:
        if peer.up is None or not peer.up.route_refresh:
            log.info("peer cannot refresh its routes", peer=name)
            return
        for family in sorted(peer.up.families):
            await link.ask(exabgp_commands.route_refresh(name, family))

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

    def _peer(self, name: str) -> _Peer:
        return self._peers.setdefault(name, _Peer())

    def _note(self, name: str, reason: str) -> None:
        peer = self._peer(name)
        peer.since_s, peer.reason = self._clock(), reason

    def _peer_status(self, name: str) -> PeerStatus:
        peer = self._peers.get(name, _Peer())
        state = SessionState.UP if peer.up is not None else SessionState.DOWN
        return PeerStatus(
            peer=name,
            state=state if self._is_connected else SessionState.UNKNOWN,
            since_s=peer.since_s,
            reason=peer.reason,
            wanted=len(peer.rib.wanted or {}),
            commanded=len(peer.rib.held),
            confirmed=len(peer.rib.held.keys() - set(peer.rib.in_flight)),
            end_of_rib_sent=peer.rib.end_of_rib_sent,
        )

    def _configuration_status(self) -> str:
        if self._reloader is None:
            return "not read yet"
        missing = (self._expected or {}).keys() - self._reloader.status.wanted.keys()
        if missing:
            return f"waiting for confd to write {', '.join(sorted(missing))}"
        return str(self._reloader.status)


@dataclass(frozen=True, slots=True)
class _Established:
    """A session as `show neighbor json` has it."""

    asn: int
    families: frozenset[str]
    route_refresh: bool


def _established(answer: Sequence[str]) -> dict[str, _Established]:
    """Sessions that are up, by peer. Raises TimeoutError if the answer is none."""
    try:
        neighbors = msgspec.json.decode("".join(answer))
        return {
            neighbor["peer"]["address"]: _Established(
                asn=int(neighbor["peer"]["as"]),
                families=frozenset(neighbor["families"]),
                route_refresh=bool(neighbor["peer"]["capabilities"].get("route-refresh")),
            )
            for neighbor in neighbors
            # Not "state": that says "down" in the first second, when the duration rounds to 0.
            if neighbor["fsm"] == "ESTABLISHED"
        }
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise TimeoutError(f"show neighbor json was answered by {answer[:1]!r}") from error


def _common(opened: lines.Open | None, seen: _Established | None) -> frozenset[str]:
    """The families of a session; we offer IPv4 unicast."""
    if opened is not None:
        return opened.families & {IPV4_UNICAST}
    return frozenset({IPV4_UNICAST}) if seen is None else seen.families


def _held_prefixes(name: str, answer: Sequence[str]) -> list[str]:
    """Prefixes in the answer to `show adj-rib out`: `<peer> <afi> <safi> <prefix> …` a line."""
    words = (line.split() for line in answer)
    return [parts[3] for parts in words if len(parts) > 3 and parts[0] == name]
