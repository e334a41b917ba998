"""One BFD session: what it knows, and what packets, time and the operator make of it. Pure.

    receive, on_time, configure, shut: (session, …, now) ─▶ (session, actions)

Time comes in as monotonic seconds; chance (0 up to 1, for the jitter) comes in as a number. The
engine carries out the actions and asks again at `due_s`.

Invariants
- Not Up means at least a second between packets (§6.8.3).
- Every change of what we say of our intervals is polled, in whatever state but AdminDown, in which
  nothing is heard (§6.8.3).
- In Up no interval gets longer, and no detection time shorter, before the peer has confirmed the
  new value by a poll (§6.8.3): while a poll runs, the faster sending and the slower detection hold.
- A session has a deadline while it is Init or Up.

Source: RFC 5880 §6.8.1 (variables), §6.8.2 to §6.8.4 (timers), §6.8.6 (reception), §6.8.7
(transmission), §6.5 (polls), §6.8.16 (administrative control).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import inf

import msgspec
from msgspec.structs import replace  # a tenth of the time that dataclasses' takes

from bgpd.bfd.packet import ControlPacket, Diagnostic, State
from cymric.model.bfd import BfdParameters

SLOW_US = 1_000_000
"""The least interval while a session is not Up (RFC 5880 §6.8.3)."""


class Cause(StrEnum):
    """Why a session changed its state."""

    HANDSHAKE = "handshake"
    EXPIRED = "nothing heard within the detection time"
    PEER_DOWN = "the peer says down"
    PEER_ADMIN_DOWN = "the peer is administratively down"
    SHUT = "not wanted any more"


@dataclass(frozen=True, slots=True)
class Send:
    """Send this packet now."""

    packet: ControlPacket


@dataclass(frozen=True, slots=True)
class Changed:
    """The session went from one state to another."""

    before: State
    after: State
    cause: Cause

    @property
    def is_failure(self) -> bool:
        """Whether the path to the peer must be taken for dead (RFC 5882 §3.2, §4.2)."""
        return self.before is State.UP and self.cause in (Cause.EXPIRED, Cause.PEER_DOWN)


Action = Send | Changed


class BfdSession(msgspec.Struct, frozen=True, kw_only=True):
    """The variables of RFC 5880 §6.8.1. `remote_…` is what the peer said last.

    `agreed_…_us` are our intervals as the peer has confirmed them. `send_at_s` is when the next
    packet is due, `expires_at_s` when the peer counts as dead, `ends_at_s` when a session that was
    shut may be forgotten. `is_spared`: the peer got more time since it was last heard.
    """

    parameters: BfdParameters
    discriminator: int
    state: State = State.DOWN
    diagnostic: Diagnostic = Diagnostic.NONE
    remote_state: State = State.DOWN
    remote_discriminator: int = 0
    remote_diagnostic: int = 0
    remote_min_tx_us: int = 0
    remote_min_rx_us: int = 1
    remote_multiplier: int = 0
    remote_independent: bool = False
    agreed_tx_us: int = SLOW_US
    agreed_rx_us: int = 0
    is_polling: bool = False
    polls_again: bool = False
    last_sent_s: float = -inf
    heard_at_s: float = -inf
    send_at_s: float = -inf
    expires_at_s: float = inf
    ends_at_s: float = inf
    is_spared: bool = False

    @property
    def desired_tx_us(self) -> int:
        """The interval at which we say that we want to send."""
        wanted_us = self.parameters.min_tx_ms * 1000
        return wanted_us if self.state is State.UP else max(wanted_us, SLOW_US)

    @property
    def required_rx_us(self) -> int:
        """The least interval at which we say that we can receive."""
        return self.parameters.min_rx_ms * 1000

    @property
    def send_interval_s(self) -> float:
        """The time between two packets of ours, without jitter; infinity if the peer wants none."""
        if self.remote_min_rx_us == 0:
            return inf
        ours_us = self.desired_tx_us
        if self.is_polling:
            ours_us = min(ours_us, self.agreed_tx_us)
        return max(ours_us, self.remote_min_rx_us) / 1e6

    @property
    def receive_interval_s(self) -> float:
        """The time between two packets of the peer, as agreed."""
        ours_us = self.required_rx_us
        if self.is_polling:
            ours_us = max(ours_us, self.agreed_rx_us)
        return max(ours_us, self.remote_min_tx_us) / 1e6

    @property
    def detection_time_s(self) -> float:
        """How long the peer may be silent (§6.8.4)."""
        return self.remote_multiplier * self.receive_interval_s

    @property
    def due_s(self) -> float:
        """When `on_time` has something to do."""
        return min(self.send_at_s, self.expires_at_s, self.ends_at_s)


Step = tuple[BfdSession, tuple[Action, ...]]


def start(parameters: BfdParameters, discriminator: int, now_s: float) -> BfdSession:
    """A new session, Down, that sends at once."""
    session = BfdSession(parameters=parameters, discriminator=discriminator, send_at_s=now_s)
    return _agreed(session)


def receive(session: BfdSession, packet: ControlPacket, now_s: float, chance: float) -> Step:
    """A packet of the peer, already found to be for this session (§6.8.6, from 'Set
    bfd.RemoteDiscr' on). Nothing happens in AdminDown.
    """
    if session.state is State.ADMIN_DOWN:
        return session, ()
    before = session
    session = replace(
        session,
        remote_state=packet.state,
        remote_discriminator=packet.my_discriminator,
        remote_diagnostic=packet.diagnostic,
        remote_min_tx_us=packet.desired_min_tx_us,
        remote_min_rx_us=packet.required_min_rx_us,
        remote_multiplier=packet.multiplier,
        remote_independent=packet.independent,
        heard_at_s=now_s,
        is_spared=False,
    )
    if packet.final:
        session = _poll_answered(session)
    session, changes = _follow(session, packet.state)
    session = _restart_detection(session)
    if packet.poll:
        answer = Send(_packet(session, final=True))
        return _no_later(before, session, chance), (*changes, answer)
    if changes:
        session, news = _send(session, now_s, chance)
        return session, (*changes, *news)
    return _no_later(before, session, chance), ()


def on_time(session: BfdSession, now_s: float, chance: float) -> Step:
    """What is due now: the detection time is over, a packet is to be sent, or both."""
    changes: tuple[Changed, ...] = ()
    if session.expires_at_s <= now_s:
        session, changes = _expire(session)
    if changes or session.send_at_s <= now_s:
        session, sent = _send(session, now_s, chance)
        return session, (*changes, *sent)
    return session, ()


def configure(session: BfdSession, parameters: BfdParameters, now_s: float, chance: float) -> Step:
    """The operator wants other values. In Up the peer must confirm intervals first (§6.8.3).

    Not in Up they hold at once, and are told with the next packet, which is due within a second.
    """
    if parameters == session.parameters or session.state is State.ADMIN_DOWN:
        return session, ()
    before, session = session, _poll(session, replace(session, parameters=parameters))
    if session.state is not State.UP:
        return _no_later(before, _agreed(session), chance), ()
    return _send(_restart_detection(session), now_s, chance)


def shut(session: BfdSession, now_s: float, chance: float) -> Step:
    """The operator wants no session any more: say so until the peer must have heard (§6.8.16)."""
    if session.state is State.ADMIN_DOWN:
        return session, ()
    before = session.state
    session = _enter(session, State.ADMIN_DOWN, Diagnostic.ADMIN_DOWN)
    told_s = session.parameters.multiplier * min(session.send_interval_s, 2 * SLOW_US / 1e6)
    session = replace(session, expires_at_s=inf, ends_at_s=now_s + told_s)
    session, sent = _send(session, now_s, chance)
    return session, (Changed(before, State.ADMIN_DOWN, Cause.SHUT), *sent)


def spare(session: BfdSession, now_s: float) -> BfdSession:
    """We ourselves were away and cannot know what we missed: one more interval for the peer.

    Once until it is heard again; otherwise a machine that always stalls would notice nothing.
    """
    if session.is_spared:
        return session
    later_s = max(session.expires_at_s, now_s + session.receive_interval_s)
    return replace(session, expires_at_s=later_s, is_spared=True)


def _follow(session: BfdSession, remote: State) -> tuple[BfdSession, tuple[Changed, ...]]:
    """The state table of §6.2 and §6.8.6."""
    ours = session.state
    if remote is State.ADMIN_DOWN:
        if ours is State.DOWN:
            return session, ()
        return _leave(session, Cause.PEER_ADMIN_DOWN)
    match ours, remote:
        case State.DOWN, State.DOWN:
            return _rise(session, State.INIT)
        case (State.DOWN, State.INIT) | (State.INIT, State.INIT | State.UP):
            return _rise(session, State.UP)
        case State.UP, State.DOWN:
            return _leave(session, Cause.PEER_DOWN)
        case _:
            return session, ()


def _rise(session: BfdSession, state: State) -> tuple[BfdSession, tuple[Changed, ...]]:
    changed = Changed(session.state, state, Cause.HANDSHAKE)
    return _enter(session, state, Diagnostic.NONE), (changed,)


def _leave(session: BfdSession, cause: Cause) -> tuple[BfdSession, tuple[Changed, ...]]:
    changed = Changed(session.state, State.DOWN, cause)
    return _enter(session, State.DOWN, Diagnostic.NEIGHBOR_DOWN), (changed,)


def _expire(session: BfdSession) -> tuple[BfdSession, tuple[Changed, ...]]:
    """The peer was silent for the detection time: forget it (§6.8.1, §6.8.4)."""
    changes: tuple[Changed, ...] = ()
    if session.state in (State.INIT, State.UP):
        changes = (Changed(session.state, State.DOWN, Cause.EXPIRED),)
        session = _enter(session, State.DOWN, Diagnostic.EXPIRED)
    forgotten = replace(
        session,
        remote_state=State.DOWN,
        remote_discriminator=0,
        remote_min_rx_us=1,
        expires_at_s=inf,
    )
    return forgotten, changes


def _enter(session: BfdSession, state: State, diagnostic: Diagnostic) -> BfdSession:
    """Be in `state`. Entering and leaving Up change what we want to send at, so they poll."""
    # The diagnostic says why the session was last down, so a session on its way up keeps it.
    kept = session.diagnostic if state is State.INIT else diagnostic
    entered = replace(session, state=state, diagnostic=kept)
    if state is State.ADMIN_DOWN:
        return _agreed(replace(entered, is_polling=False, polls_again=False))
    entered = _poll(session, entered)
    if state is not State.UP:
        return _agreed(entered)
    return replace(entered, agreed_tx_us=session.desired_tx_us, agreed_rx_us=session.required_rx_us)


def _poll(before: BfdSession, session: BfdSession) -> BfdSession:
    """Poll if we say other intervals than before; a poll that runs goes on."""
    if (before.desired_tx_us, before.required_rx_us) == (
        session.desired_tx_us,
        session.required_rx_us,
    ):
        return session
    return replace(session, is_polling=True, polls_again=before.is_polling)


def _agreed(session: BfdSession) -> BfdSession:
    return replace(session, agreed_tx_us=session.desired_tx_us, agreed_rx_us=session.required_rx_us)


def _poll_answered(session: BfdSession) -> BfdSession:
    if session.polls_again:  # this answer may be for the values before the last change
        return replace(session, polls_again=False)
    return _agreed(replace(session, is_polling=False))


def _restart_detection(session: BfdSession) -> BfdSession:
    return replace(session, expires_at_s=session.heard_at_s + session.detection_time_s)


def _no_later(before: BfdSession, session: BfdSession, chance: float) -> BfdSession:
    """A shorter interval holds at once, counted from the last packet (§6.8.3)."""
    if session.send_interval_s >= before.send_interval_s:
        return session
    latest_s = session.last_sent_s + _jittered_s(session, chance)
    return replace(session, send_at_s=min(session.send_at_s, latest_s))


def _send(session: BfdSession, now_s: float, chance: float) -> Step:
    """Send now; the next packet is due an interval later. Nothing if the peer wants nothing."""
    interval_s = _jittered_s(session, chance)
    if interval_s == inf:
        return replace(session, send_at_s=inf), ()
    sent = replace(session, last_sent_s=now_s, send_at_s=now_s + interval_s)
    return sent, (Send(_packet(session)),)


def _packet(session: BfdSession, *, final: bool = False) -> ControlPacket:
    """What we say now (§6.8.7). The answer to a poll is not itself a poll."""
    return ControlPacket(
        state=session.state,
        diagnostic=session.diagnostic,
        my_discriminator=session.discriminator,
        your_discriminator=session.remote_discriminator,
        desired_min_tx_us=session.desired_tx_us,
        required_min_rx_us=session.required_rx_us,
        multiplier=session.parameters.multiplier,
        poll=session.is_polling and not final,
        final=final,
        independent=True,  # neither bgpd nor ExaBGP can take this process along
    )


def _jittered_s(session: BfdSession, chance: float) -> float:
    """75 to 100 % of the interval; at most 90 % if a single loss is fatal (§6.8.7)."""
    spread = 0.15 if session.parameters.multiplier == 1 else 0.25
    return session.send_interval_s * (0.75 + spread * chance)
