"""All BFD sessions of a node: which packet is whose, whose deadline is next, what changed.

    Expect ─▶ expect ─┐
    sockets ─▶ drain ─┴▶ work ─▶ session.py ─▶ Sender, on_change, on_failure
                          └─▶ when it must be called again

`work` first takes in everything that has arrived, and only then looks at deadlines, so a packet
that waited for us is never a packet that was missing.

Invariants
- One session per peer address; a session that is shut goes on saying AdminDown until its end.
- A deadline that passed while we were away (`LATE_S`), or with packets still unread, spares the
  peer one interval, once.

Source: RFC 5880 §6.3 (demultiplexing), §6.8.6; RFC 5881 §3 (first packets by address), §5 (TTL).
"""

from __future__ import annotations

import heapq
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from random import random

from msgspec.structs import replace

from bgpd.bfd.messages import Failed, Report, SessionReport, WantedSession
from bgpd.bfd.packet import BadPacket, ControlPacket, Discard, State, decode, encode
from bgpd.bfd.session import (
    Action,
    BfdSession,
    Cause,
    Changed,
    Send,
    configure,
    on_time,
    receive,
    shut,
    spare,
    start,
)
from bgpd.bfd.transport import TTL, Datagram, Sender, Transport
from cymric.model.bfd import BfdParameters

LATE_S = 0.05
"""Waking later than this, we cannot know what we missed."""
MOST_AT_ONCE = 1000
"""Packets read from one socket before deadlines are looked at: a flood must not stop the clock."""
RETRY_S = 1.0
"""How soon an address that could not be used is tried again."""


@dataclass(slots=True)
class _Entry:
    wanted: WantedSession
    session: BfdSession
    since_s: float
    sender: Sender | None = None
    open_problem: str = ""
    send_problem: str = ""
    reason: str = ""
    scheduled_s: float = inf
    sent: int = 0
    received: int = 0
    send_errors: int = 0
    transitions: int = 0
    failures: int = 0


class Engine:
    """See the module. `clock` is monotonic, `wall_clock` Unix time, both in seconds."""

    def __init__(
        self,
        transport: Transport,
        *,
        on_change: Callable[[], None],
        on_failure: Callable[[Failed], None],
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        chance: Callable[[], float] = random,
    ) -> None:
        self.discarded: Counter[Discard] = Counter()
        self.stalls = 0
        self._transport = transport
        self._on_change = on_change
        self._on_failure = on_failure
        self._clock = clock
        self._wall_clock = wall_clock
        self._chance = chance
        self._by_peer: dict[str, _Entry] = {}
        self._by_discriminator: dict[int, _Entry] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._retry_at_s = inf

    def __len__(self) -> int:
        """How many sessions there are, those that are being shut included."""
        return len(self._by_peer)

    def expect(self, wanted: Iterable[WantedSession]) -> None:
        """Have exactly these sessions: start, change and shut what differs.

        One without parameters is left as it is, whatever it is.
        """
        now_s = self._clock()
        by_peer = {one.peer: one for one in wanted}
        for peer, entry in tuple(self._by_peer.items()):
            if peer not in by_peer:
                self._take(entry, shut(entry.session, now_s, self._chance()))
            elif by_peer[peer].parameters is None:
                continue
            elif entry.wanted.local != by_peer[peer].local or entry.session.ends_at_s < inf:
                self._remove(entry)  # another session in its place, with another discriminator
        for peer, one in by_peer.items():
            if one.parameters is None:
                continue
            if peer in self._by_peer:
                entry = self._by_peer[peer]
                entry.wanted = one
                self._take(entry, configure(entry.session, one.parameters, now_s, self._chance()))
            else:
                self._add(one, one.parameters, now_s)
        self._open(now_s)
        self._on_change()

    def shut_all(self) -> None:
        """Say AdminDown to everybody, now."""
        now_s = self._clock()
        for entry in self._by_peer.values():
            if entry.session.state is State.ADMIN_DOWN:
                entry.session = replace(entry.session, send_at_s=now_s)
                self._take(entry, on_time(entry.session, now_s, self._chance()))
            else:
                self._take(entry, shut(entry.session, now_s, self._chance()))

    def work(self) -> float:
        """Take in what arrived, do what is due. Returns when to be called again, at the latest."""
        unread = MOST_AT_ONCE
        for datagram in self._transport.drain(MOST_AT_ONCE):
            unread -= 1
            self._receive(datagram, self._clock())
        now_s = self._clock()
        if self._retry_at_s <= now_s:
            self._open(now_s)
            self._on_change()
        due_s = self._deadlines[0][0] if self._deadlines else inf
        is_away = now_s - due_s > LATE_S
        self.stalls += is_away
        while self._deadlines and self._deadlines[0][0] <= now_s:
            at_s, discriminator = heapq.heappop(self._deadlines)
            entry = self._by_discriminator.get(discriminator)
            if entry is not None and entry.scheduled_s == at_s:  # else an earlier one took over
                entry.scheduled_s = inf
                self._meet_deadline(entry, now_s, may_have_missed=is_away or unread <= 0)
        return min(self._retry_at_s, self._deadlines[0][0] if self._deadlines else inf)

    def report(self) -> Report:
        """Everything, for people."""
        return Report(
            sessions=tuple(_report(self._by_peer[peer]) for peer in sorted(self._by_peer)),
            discarded={reason.value: count for reason, count in self.discarded.items()},
            stalls=self.stalls,
        )

    # --- sessions ---------------------------------------------------------------------------

    def _add(self, wanted: WantedSession, parameters: BfdParameters, now_s: float) -> None:
        discriminator = 0
        while discriminator == 0 or discriminator in self._by_discriminator:
            discriminator = secrets.randbits(32)
        session = start(parameters, discriminator, now_s)
        entry = _Entry(wanted, session, self._wall_clock())
        self._by_peer[wanted.peer] = self._by_discriminator[discriminator] = entry
        self._schedule(entry)

    def _remove(self, entry: _Entry) -> None:
        if entry.sender is not None:
            entry.sender.close()
        del self._by_peer[entry.wanted.peer]
        del self._by_discriminator[entry.session.discriminator]

    def _open(self, now_s: float) -> None:
        """Have the sockets; what fails is tried again, because an address may come later."""
        locals_ = {entry.wanted.local for entry in self._by_peer.values()}
        problems = self._transport.listen(locals_)
        for entry in self._by_peer.values():
            entry.open_problem = problems.get(entry.wanted.local, "")
            if entry.sender is None:
                try:
                    entry.sender = self._transport.sender(entry.wanted.local, entry.wanted.peer)
                except OSError as error:
                    entry.open_problem = f"cannot send from {entry.wanted.local}: {error.strerror}"
        has_problem = any(entry.open_problem for entry in self._by_peer.values())
        self._retry_at_s = now_s + RETRY_S if has_problem else inf

    # --- packets and deadlines --------------------------------------------------------------

    def _receive(self, datagram: Datagram, now_s: float) -> None:
        try:
            if datagram.ttl != TTL:
                raise BadPacket(Discard.TTL)
            packet = decode(datagram.data)
            entry = self._find(packet, datagram)
        except BadPacket as error:
            self.discarded[error.reason] += 1
            return
        entry.received += 1
        self._take(entry, receive(entry.session, packet, now_s, self._chance()))

    def _find(self, packet: ControlPacket, datagram: Datagram) -> _Entry:
        """The session a packet is for. Raises BadPacket."""
        if packet.your_discriminator:
            entry = self._by_discriminator.get(packet.your_discriminator)
        else:
            entry = self._by_peer.get(datagram.source)
        if entry is None:
            raise BadPacket(Discard.NO_SESSION)
        if (entry.wanted.peer, entry.wanted.local) != (datagram.source, datagram.local):
            raise BadPacket(Discard.WRONG_PEER)
        if entry.session.state is State.ADMIN_DOWN:
            raise BadPacket(Discard.ADMIN_DOWN)
        return entry

    def _meet_deadline(self, entry: _Entry, now_s: float, *, may_have_missed: bool) -> None:
        if entry.session.ends_at_s <= now_s:
            self._remove(entry)
            self._open(now_s)
            self._on_change()
            return
        if may_have_missed and entry.session.expires_at_s <= now_s:
            entry.session = spare(entry.session, now_s)
        self._take(entry, on_time(entry.session, now_s, self._chance()))

    def _take(self, entry: _Entry, step: tuple[BfdSession, tuple[Action, ...]]) -> None:
        entry.session, actions = step
        for action in actions:
            match action:
                case Send(packet):
                    self._send(entry, packet)
                case Changed():
                    self._note(entry, action)
        self._schedule(entry)

    def _send(self, entry: _Entry, packet: ControlPacket) -> None:
        if entry.sender is None:
            return
        refusal = entry.sender.send(encode(packet))
        if refusal:
            entry.send_errors += 1
        else:
            entry.sent += 1
        problem = f"cannot send: {refusal}" if refusal else ""
        if problem != entry.send_problem:
            entry.send_problem = problem
            self._on_change()

    def _note(self, entry: _Entry, changed: Changed) -> None:
        entry.transitions += 1
        entry.since_s = self._wall_clock()
        entry.reason = "" if changed.cause is Cause.HANDSHAKE else changed.cause.value
        if changed.is_failure:
            entry.failures += 1
            self._on_failure(
                Failed(
                    peer=entry.wanted.peer,
                    reason=changed.cause.value,
                    is_independent=entry.session.remote_independent,
                    at_s=entry.since_s,
                )
            )
        self._on_change()

    def _schedule(self, entry: _Entry) -> None:
        """One place in the heap per session; a deadline that moved on is met early and put back."""
        due_s = entry.session.due_s
        if due_s < entry.scheduled_s:
            entry.scheduled_s = due_s
            heapq.heappush(self._deadlines, (due_s, entry.session.discriminator))


def _report(entry: _Entry) -> SessionReport:
    session = entry.session
    is_heard = session.remote_discriminator != 0
    return SessionReport(
        peer=entry.wanted.peer,
        local=entry.wanted.local,
        parameters=session.parameters,
        state=session.state,
        remote_state=session.remote_state,
        since_s=entry.since_s,
        reason=entry.reason,
        problem=entry.open_problem or entry.send_problem,
        send_interval_s=None if session.send_interval_s == inf else session.send_interval_s,
        detection_time_s=session.detection_time_s if is_heard else None,
        local_discriminator=session.discriminator,
        remote_discriminator=session.remote_discriminator,
        remote_multiplier=session.remote_multiplier,
        is_independent=session.remote_independent,
        sent=entry.sent,
        received=entry.received,
        send_errors=entry.send_errors,
        transitions=entry.transitions,
        failures=entry.failures,
    )
