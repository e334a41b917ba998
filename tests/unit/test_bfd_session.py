"""One BFD session as a state machine: states, polls, intervals, deadlines; two over a bad link."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from dataclasses import replace as replace_field
from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from bgpd.bfd.packet import ControlPacket, Diagnostic, State, decode, encode
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
from cymric.model.bfd import BfdParameters

FAST = BfdParameters()
A_DOWN, DOWN, INIT, UP = State.ADMIN_DOWN, State.DOWN, State.INIT, State.UP


def packet(state: State, **fields: object) -> ControlPacket:
    """What a peer at 300 ms x 3 says."""
    said = ControlPacket(
        state=state,
        my_discriminator=77,
        your_discriminator=1,
        desired_min_tx_us=300_000 if state is UP else 1_000_000,
        required_min_rx_us=300_000,
        multiplier=3,
    )
    return replace_field(said, **fields)  # type: ignore[arg-type]


def sent(actions: tuple[Action, ...]) -> list[ControlPacket]:
    return [action.packet for action in actions if isinstance(action, Send)]


def changed(actions: tuple[Action, ...]) -> list[Changed]:
    return [action for action in actions if isinstance(action, Changed)]


def session_in(state: State, parameters: BfdParameters = FAST) -> BfdSession:
    """A session in that state at second 10, polls answered."""
    session = start(parameters, 1, 10.0)
    if state is A_DOWN:
        return shut(session, 10.0, 1.0)[0]
    if state in (INIT, UP):
        session, _ = receive(session, packet(DOWN), 10.0, 1.0)
    if state is UP:
        session, _ = receive(session, packet(UP), 10.0, 1.0)
        session, _ = receive(session, packet(UP, final=True), 10.0, 1.0)
    assert session.state is state
    return session


@pytest.mark.parametrize(
    ("before", "received", "after", "cause"),
    [
        (DOWN, DOWN, INIT, Cause.HANDSHAKE),
        (DOWN, INIT, UP, Cause.HANDSHAKE),
        (DOWN, UP, DOWN, None),
        (DOWN, A_DOWN, DOWN, None),
        (INIT, DOWN, INIT, None),
        (INIT, INIT, UP, Cause.HANDSHAKE),
        (INIT, UP, UP, Cause.HANDSHAKE),
        (INIT, A_DOWN, DOWN, Cause.PEER_ADMIN_DOWN),
        (UP, DOWN, DOWN, Cause.PEER_DOWN),
        (UP, INIT, UP, None),
        (UP, UP, UP, None),
        (UP, A_DOWN, DOWN, Cause.PEER_ADMIN_DOWN),
        (A_DOWN, DOWN, A_DOWN, None),
        (A_DOWN, INIT, A_DOWN, None),
        (A_DOWN, UP, A_DOWN, None),
        (A_DOWN, A_DOWN, A_DOWN, None),
    ],
)
def test_states(before: State, received: State, after: State, cause: Cause | None) -> None:
    """The state table of RFC 5880 §6.2; every change is told to the peer at once."""
    session, actions = receive(session_in(before), packet(received), 10.1, 1.0)
    assert session.state is after
    assert [one.cause for one in changed(actions)] == ([] if cause is None else [cause])
    assert [one.state for one in sent(actions)] == ([] if cause is None else [after])


@pytest.mark.parametrize(
    ("before", "cause", "is_failure"),
    [
        (UP, Cause.EXPIRED, True),
        (UP, Cause.PEER_DOWN, True),
        (UP, Cause.PEER_ADMIN_DOWN, False),
        (UP, Cause.SHUT, False),
        (INIT, Cause.EXPIRED, False),
        (INIT, Cause.PEER_ADMIN_DOWN, False),
    ],
)
def test_what_is_a_failure(before: State, cause: Cause, is_failure: bool) -> None:
    """Only a session that was up can fail, and no operator's act is a failure (RFC 5882 §3.2)."""
    assert Changed(before, DOWN, cause).is_failure is is_failure


def test_silence_is_noticed_after_the_detection_time() -> None:
    """Three missing packets at 300 ms: at 0.9 s, not before, the session is down and says why."""
    session, _ = receive(session_in(UP), packet(UP), 20.0, 1.0)
    assert session.detection_time_s == pytest.approx(0.9)
    session, actions = on_time(session, 20.899, 1.0)
    assert changed(actions) == []
    session, actions = on_time(session, 20.901, 1.0)
    assert changed(actions) == [Changed(UP, DOWN, Cause.EXPIRED)]
    [last] = sent(actions)
    assert (last.state, last.diagnostic, last.your_discriminator) == (DOWN, Diagnostic.EXPIRED, 0)
    assert session.expires_at_s == inf


def test_a_session_not_up_is_slow() -> None:
    """Nothing is sent more than once in 0.75 s before the session is up, whatever is configured."""
    session = start(BfdParameters(min_tx_ms=50, min_rx_ms=50), 1, 0.0)
    at_s = []
    for _ in range(5):
        session, actions = on_time(session, session.due_s, 0.0)
        [one] = sent(actions)
        at_s.append(session.last_sent_s)
        assert one.desired_min_tx_us == 1_000_000
    assert [b - a for a, b in pairwise(at_s)] == [0.75] * 4


@pytest.mark.parametrize(
    ("multiplier", "chance", "interval_s"),
    [(3, 0.0, 0.225), (3, 1.0, 0.3), (1, 0.0, 0.225), (1, 1.0, 0.27)],
)
def test_jitter(multiplier: int, chance: float, interval_s: float) -> None:
    """An interval is 75 to 100 % of what was agreed, to 90 % if one loss is fatal (§6.8.7)."""
    session = session_in(UP, BfdParameters(multiplier=multiplier))
    session, actions = (
        on_time(session, 30.0, chance)
        if session.due_s > 30
        else on_time(replace(session, expires_at_s=inf), 30.0, chance)
    )
    assert len(sent(actions)) == 1
    assert session.send_at_s == pytest.approx(30.0 + interval_s)


@pytest.mark.parametrize(
    ("ours_ms", "their_rx_us", "interval_s"),
    [(300, 100_000, 0.3), (300, 500_000, 0.5), (300, 300_000, 0.3), (300, 0, inf)],
)
def test_the_slower_side_sets_the_pace(ours_ms: int, their_rx_us: int, interval_s: float) -> None:
    """We send at the larger of what we want and what the peer can take; 0 means not at all."""
    session = session_in(UP, BfdParameters(min_tx_ms=ours_ms, min_rx_ms=300))
    session, _ = receive(session, packet(UP, required_min_rx_us=their_rx_us), 10.1, 1.0)
    assert session.send_interval_s == interval_s


def test_a_peer_that_can_take_nothing_is_still_answered() -> None:
    """With a required interval of 0 nothing is sent but answers to polls."""
    session, actions = receive(
        session_in(UP), packet(UP, required_min_rx_us=0, poll=True), 10.1, 1.0
    )
    assert [one.final for one in sent(actions)] == [True]
    session, actions = (
        on_time(session, session.send_at_s, 1.0)
        if session.send_at_s < inf
        else (
            session,
            (),
        )
    )
    assert sent(actions) == []


def test_a_poll_is_answered_at_once() -> None:
    """P brings F, in between the regular packets, never P and F together."""
    session = session_in(INIT)
    session, actions = receive(session, packet(UP, poll=True), 10.1, 1.0)
    [answer] = sent(actions)
    assert (answer.final, answer.poll, answer.state) == (True, False, UP)
    session, actions = on_time(session, session.send_at_s, 1.0)
    assert [(one.poll, one.final) for one in sent(actions)] == [(True, False)]


def test_coming_up_polls_until_it_is_answered() -> None:
    """From a second down to 300 ms is a change of parameters: it is polled (§6.8.3)."""
    session, actions = receive(session_in(INIT), packet(UP), 10.1, 1.0)
    assert [one.poll for one in sent(actions)] == [True]
    session, actions = on_time(session, session.send_at_s, 1.0)
    assert [one.poll for one in sent(actions)] == [True]
    session, _ = receive(session, packet(UP, final=True), 10.6, 1.0)
    session, actions = on_time(session, session.send_at_s, 1.0)
    assert [one.poll for one in sent(actions)] == [False]


@pytest.mark.parametrize("state", [DOWN, INIT, UP])
@pytest.mark.parametrize(
    ("parameters", "is_polled"),
    [
        pytest.param(BfdParameters(min_tx_ms=2000), True, id="sending"),
        pytest.param(BfdParameters(min_rx_ms=100), True, id="receiving"),
        pytest.param(BfdParameters(multiplier=5), False, id="only the multiplier"),
    ],
)
def test_changed_intervals_are_polled_in_every_state(
    state: State, parameters: BfdParameters, is_polled: bool
) -> None:
    """Other intervals are said with P until the peer's F; a multiplier needs no agreement."""
    session, _ = configure(session_in(state), parameters, 10.1, 1.0)
    session, actions = on_time(session, session.send_at_s, 1.0)
    assert [one.poll for one in sent(actions)] == [is_polled]
    assert sent(actions)[0].multiplier == parameters.multiplier
    says = {DOWN: A_DOWN, INIT: DOWN, UP: UP}[state]  # what keeps the session in its state
    session, _ = receive(session, packet(says, final=True), 10.9, 1.0)
    session, actions = on_time(replace(session, expires_at_s=inf), session.send_at_s, 1.0)
    assert [one.poll for one in sent(actions)] == [False]


def test_an_interval_that_changes_nothing_now_is_not_polled() -> None:
    """Below a second a session that is not up sends once a second all the same, and says so."""
    session, _ = configure(session_in(DOWN), BfdParameters(min_tx_ms=50), 10.1, 1.0)
    assert not session.is_polling


def test_going_down_polls() -> None:
    """From 300 ms back to a second is a change as well; until F, and over the next states."""
    session, actions = receive(session_in(UP), packet(DOWN), 10.1, 1.0)
    assert [(one.state, one.poll) for one in sent(actions)] == [(DOWN, True)]
    session, actions = receive(session, packet(DOWN), 10.2, 1.0)
    assert [(one.state, one.poll) for one in sent(actions)] == [(INIT, True)]
    session, _ = receive(session, packet(DOWN, final=True), 10.3, 1.0)
    assert not session.is_polling


def test_slower_intervals_wait_for_the_peer() -> None:
    """In Up, sending slows down and detection speeds up only after the peer's F (§6.8.3)."""
    session = session_in(UP, BfdParameters(min_tx_ms=300, min_rx_ms=600))
    slower = BfdParameters(min_tx_ms=2000, min_rx_ms=100)
    session, actions = configure(session, slower, 10.1, 1.0)
    [told] = sent(actions)
    assert (told.poll, told.desired_min_tx_us, told.required_min_rx_us) == (
        True,
        2_000_000,
        100_000,
    )
    assert session.send_interval_s == 0.3
    assert session.detection_time_s == pytest.approx(1.8)
    session, _ = receive(session, packet(UP, final=True), 10.2, 1.0)
    assert session.send_interval_s == 2.0
    assert session.detection_time_s == pytest.approx(0.9)


def test_faster_intervals_hold_at_once() -> None:
    """Sending may speed up, and detection slow down, without waiting."""
    session = session_in(UP, BfdParameters(min_tx_ms=2000, min_rx_ms=300))
    session, _ = configure(session, BfdParameters(min_tx_ms=300, min_rx_ms=900), 10.1, 1.0)
    assert session.send_interval_s == 0.3
    assert session.detection_time_s == pytest.approx(2.7)


def test_a_change_during_a_poll_is_polled_again() -> None:
    """An answer that may be for older values does not confirm newer ones."""
    session, _ = configure(session_in(UP), BfdParameters(min_tx_ms=500), 10.1, 1.0)
    session, _ = configure(session, BfdParameters(min_tx_ms=900), 10.2, 1.0)
    session, _ = receive(session, packet(UP, final=True), 10.3, 1.0)
    assert session.is_polling
    assert session.send_interval_s == 0.3
    session, _ = receive(session, packet(UP, final=True), 10.4, 1.0)
    assert not session.is_polling
    assert session.send_interval_s == 0.9


def test_a_peer_that_can_take_more_gets_it_at_once() -> None:
    """A smaller required interval counts from the last packet sent (§6.8.3)."""
    session, _ = receive(session_in(UP), packet(UP, required_min_rx_us=5_000_000), 10.0, 1.0)
    session, _ = on_time(replace(session, expires_at_s=inf), 11.0, 1.0)
    assert session.send_at_s == 16.0
    session, _ = receive(session, packet(UP, required_min_rx_us=300_000), 12.0, 1.0)
    assert session.send_at_s <= 12.0


def test_a_regular_packet_does_not_hasten_the_next_of_ours() -> None:
    """Hearing the peer changes nothing about when we send."""
    session, _ = on_time(replace(session_in(UP), expires_at_s=inf), 11.0, 1.0)
    before = session.send_at_s
    session, _ = receive(session, packet(UP), 11.1, 0.0)
    assert session.send_at_s == before


def test_shutting_tells_the_peer_and_ends() -> None:
    """A session that is not wanted says AdminDown at once and then until its end."""
    session, actions = shut(session_in(UP), 10.1, 1.0)
    [told] = sent(actions)
    assert (told.state, told.diagnostic) == (A_DOWN, Diagnostic.ADMIN_DOWN)
    assert changed(actions) == [Changed(UP, A_DOWN, Cause.SHUT)]
    assert 10.1 < session.ends_at_s <= 10.1 + 6
    session, actions = on_time(session, session.send_at_s, 1.0)
    assert [one.state for one in sent(actions)] == [A_DOWN]
    assert shut(session, 10.2, 1.0) == (session, ())


def test_a_stall_of_ours_gives_the_peer_one_more_interval_once() -> None:
    """Who was away cannot know what was missed; but a second time the peer is not spared."""
    session, _ = receive(session_in(UP), packet(UP), 20.0, 1.0)
    session = spare(session, 25.0)
    assert session.expires_at_s == pytest.approx(25.3)
    assert spare(session, 25.4).expires_at_s == pytest.approx(25.3)
    session, _ = receive(session, packet(UP), 25.2, 1.0)
    assert spare(session, 30.0).expires_at_s == pytest.approx(30.3)


# --- two sessions and the link between them ------------------------------------------------------


@dataclass
class Pair:
    """Two sessions, a clock, and a link that loses and delays, in order."""

    chance: random.Random
    loss: float
    sides: list[BfdSession]
    now_s: float = 0.0
    failures: int = 0
    _under_way: list[tuple[float, int, int, bytes]] = field(default_factory=list)
    _count: int = 0
    _last_arrival_s: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def run(self, seconds: float) -> None:
        end_s = self.now_s + seconds
        while True:
            arrival_s = self._under_way[0][0] if self._under_way else inf
            at_s = min(arrival_s, *(side.due_s for side in self.sides))
            if at_s > end_s:
                self.now_s = end_s
                return
            self.now_s = max(self.now_s, at_s)
            if arrival_s <= at_s:
                _, _, to, data = heapq.heappop(self._under_way)
                step = receive(self.sides[to], decode(data), self.now_s, self.chance.random())
                self._take(to, *step)
                continue
            for index, side in enumerate(self.sides):
                if side.due_s <= at_s:
                    self._take(index, *on_time(side, self.now_s, self.chance.random()))

    def _take(self, index: int, side: BfdSession, actions: tuple[Action, ...]) -> None:
        self.sides[index] = side
        self.failures += sum(one.is_failure for one in changed(actions))
        for one in sent(actions):
            assert not (one.poll and one.final)
            if self.chance.random() >= self.loss:
                self._count += 1
                after_s = max(self.now_s, self._last_arrival_s[index])
                arrival_s = self._last_arrival_s[index] = after_s + self.chance.uniform(0, 0.005)
                item = (arrival_s, self._count, 1 - index, encode(one))
                heapq.heappush(self._under_way, item)

    @property
    def states(self) -> list[State]:
        return [side.state for side in self.sides]


INTERVALS = st.sampled_from([50, 300, 1700])
PARAMETERS = st.builds(
    BfdParameters, min_tx_ms=INTERVALS, min_rx_ms=INTERVALS, multiplier=st.integers(2, 4)
)


@given(
    one=PARAMETERS,
    other=PARAMETERS,
    changes=st.lists(st.tuples(st.integers(0, 1), PARAMETERS, st.floats(0, 3)), max_size=4),
    loss=st.floats(0, 0.9),
    seed=st.integers(0, 2**32),
)
def test_two_sessions_over_a_bad_link(
    one: BfdParameters,
    other: BfdParameters,
    changes: list[tuple[int, BfdParameters, float]],
    loss: float,
    seed: int,
) -> None:
    """Whatever is lost and changed: when the link is good, both come up at the agreed intervals and
    stay up; when it is dead, both notice within the detection time.
    """
    pair = Pair(random.Random(seed), loss, [start(one, 1, 0.0), start(other, 2, 0.0)])
    pair.run(5)
    for index, parameters, wait_s in changes:
        step = configure(pair.sides[index], parameters, pair.now_s, pair.chance.random())
        pair._take(index, *step)
        pair.run(wait_s)

    pair.loss = 0.0
    pair.run(25)  # the longest detection time of these parameters, and the handshake
    assert pair.states == [UP, UP]
    pair.failures = 0
    pair.run(10)
    assert pair.states == [UP, UP]
    assert pair.failures == 0
    ours, theirs = pair.sides
    assert not ours.is_polling
    assert not theirs.is_polling
    for a, b in ((ours, theirs), (theirs, ours)):
        agreed_s = max(a.parameters.min_tx_ms, b.parameters.min_rx_ms) / 1000
        assert a.send_interval_s == b.receive_interval_s == agreed_s
        assert b.detection_time_s == pytest.approx(a.parameters.multiplier * agreed_s)

    pair.loss = 1.0
    # Whoever notices first says so into a dead link, so each has its own detection time.
    pair.run(max(side.detection_time_s for side in pair.sides) + 0.03)
    assert pair.states == [DOWN, DOWN]
    assert pair.failures == 2


def test_peers_that_start_together() -> None:
    """Both come up within a few packets, from Down, without anybody waiting for the other."""
    pair = Pair(random.Random(1), 0.0, [start(FAST, 1, 0.0), start(FAST, 2, 0.3)])
    pair.run(1.5)
    assert pair.states == [UP, UP]


def test_a_peer_that_restarts_comes_back() -> None:
    """A new process at the peer, with another discriminator, is a failure, then a session again."""
    pair = Pair(random.Random(1), 0.0, [start(FAST, 1, 0.0), start(FAST, 2, 0.0)])
    pair.run(5)
    pair.sides[1] = start(FAST, 3, pair.now_s)
    pair.run(0.1)
    assert pair.failures == 1
    pair.run(5)
    assert pair.states == [UP, UP]
    assert pair.sides[0].remote_discriminator == 3


def test_shutting_one_side_is_no_failure_on_the_other() -> None:
    """The peer of a session that is shut goes down by AdminDown, at once."""
    pair = Pair(random.Random(1), 0.0, [start(FAST, 1, 0.0), start(FAST, 2, 0.0)])
    pair.run(5)
    pair._take(0, *shut(pair.sides[0], pair.now_s, 0.5))
    pair.run(0.1)
    assert pair.states == [A_DOWN, DOWN]
    assert pair.failures == 0
