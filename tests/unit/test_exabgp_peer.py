"""The Adj-RIB-Out of one session against a model of ExaBGP with its worst habits."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bgpd.announcement import IPV4_UNICAST, IPV6_UNICAST, Announcement, PathAttributes, as_sequence
from bgpd.exabgp_peer import UNKNOWN, AdjRibOut

FAMILIES = frozenset({IPV4_UNICAST})
A, B = "10.0.0.0/26", "10.0.0.64/26"


def route(prefix: str, med: int = 0) -> Announcement:
    """A route whose MED tells its versions apart."""
    return Announcement(prefix, "192.0.2.1", PathAttributes(med=med))


def started(**wanted: int) -> AdjRibOut:
    """A session just up, for which ExaBGP holds nothing yet."""
    rib = AdjRibOut()
    rib.start(FAMILIES)
    rib.learn([])
    if wanted:
        rib.want({A: route(A, wanted["a"])})
    return rib


def test_states_in_between_are_never_sent() -> None:
    """While a change is in flight the newest state waits, alone."""
    rib = started(a=1)
    assert rib.take().announce == (route(A, 1),)
    rib.want({A: route(A, 2)})
    rib.want({})
    rib.want({A: route(A, 3)})
    assert not rib.take()
    assert not rib.sent(A, route(A, 9)), "an older state written again releases nothing"
    assert rib.sent(A, route(A, 1))
    assert rib.take().announce == (route(A, 3),)


def test_what_exabgp_holds_is_not_sent_again() -> None:
    """A change taken back before it could be sent leaves nothing to do."""
    rib = started(a=1)
    rib.take()
    rib.want({A: route(A, 2)})
    rib.want({A: route(A, 1)})
    assert not rib.sent(A, route(A, 1))
    assert not rib.take()


def test_end_of_rib_follows_the_routes() -> None:
    """It is due once all routes were written, not before, and once."""
    rib = started(a=1)
    assert not rib.is_fence_due
    rib.take()
    assert not rib.is_fence_due
    rib.sent(A, route(A, 1))
    assert rib.is_fence_due
    assert rib.fence() == FAMILIES
    assert not rib.is_fence_due
    assert not rib.is_settled
    rib.ended(IPV4_UNICAST)
    assert rib.is_settled
    assert not rib.is_fence_due


def test_nothing_is_said_before_anything_is_wanted() -> None:
    """No advertise: no withdrawal of what is held, and no End-of-RIB that would flush the peer."""
    rib = AdjRibOut()
    rib.start(FAMILIES)
    rib.learn([A])
    assert not rib.take()
    assert not rib.is_fence_due
    rib.want({})
    assert rib.take().withdraw == (A,)


def test_learned_prefixes_are_settled_by_end_of_rib_only() -> None:
    """Their events may be missing, or be those of older commands."""
    rib = AdjRibOut()
    rib.start(FAMILIES)
    rib.want({A: route(A, 2)})
    rib.learn([A, B])
    changes = rib.take()
    assert (changes.announce, changes.withdraw) == ((route(A, 2),), (B,))
    rib.want({A: route(A, 3)})
    assert not rib.sent(A, route(A, 2))
    assert not rib.take()
    assert rib.is_fence_due
    rib.fence()
    assert rib.ended(IPV4_UNICAST)
    assert rib.take().announce == (route(A, 3),)


def test_other_families_are_left_out() -> None:
    """Nothing is commanded for a family the session does not carry: it would never be written."""
    rib = started()
    rib.want({"2001:db8::/32": route("2001:db8::/32"), A: route(A)})
    assert rib.take().announce == (route(A),)
    rib.start(FAMILIES | {IPV6_UNICAST})
    rib.learn([])
    assert len(rib.take().announce) == 2


def test_attributes_exabgp_adds_make_no_difference() -> None:
    """AS_PATH and LOCAL_PREF in the UPDATE depend on the kind of session."""
    rib = started(a=1)
    rib.take()
    path = PathAttributes(med=1, as_path=as_sequence(64512), local_pref=100)
    rib.sent(A, Announcement(A, "192.0.2.1", path))
    assert rib.in_flight == set()


def test_refused_command_is_tried_again() -> None:
    """After an error nobody knows what is held, so the route is announced again."""
    rib = started(a=1)
    rib.take()
    rib.unsettle([A])
    assert rib.held[A] is UNKNOWN
    assert rib.take().announce == (route(A, 1),)


PREFIXES = [f"10.0.0.{n * 64}/26" for n in range(4)]
WANTED = st.dictionaries(st.sampled_from(PREFIXES), st.integers(0, 2)).map(
    lambda meds: {prefix: route(prefix, med) for prefix, med in meds.items()}
)

CHANGES = st.dictionaries(st.sampled_from(PREFIXES), st.none() | st.integers(0, 2)).map(
    lambda meds: {p: None if med is None else route(p, med) for p, med in meds.items()}
)


class Session(RuleBasedStateMachine):
    """ExaBGP queues, drops duplicates and writes when it likes; a new bgpd knows nothing.

    Unlike the repaired one it may write waiting changes of *different* prefixes in any order, and
    the wrong one last of two that wait for the same prefix; the machine fails if that ever happens.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rib = AdjRibOut()
        self.wanted: dict[str, Announcement] = {}
        self.cache: dict[str, Announcement] = {}
        self.waiting: list[tuple[str, Announcement | None]] = []
        self.peer: dict[str, Announcement] = {}
        self.old_waiting = 0
        self.end_waits = False
        self.is_up = False

    @rule(wanted=WANTED)
    def want(self, wanted: dict[str, Announcement]) -> None:
        """The daemon wants something else."""
        self.wanted = wanted
        self.rib.want(wanted)

    @precondition(lambda self: self.rib.wanted is not None)
    @rule(changes=CHANGES)
    def want_changes(self, changes: dict[str, Announcement | None]) -> None:
        """The daemon wants some prefixes otherwise, and says no more."""
        wanted = {**self.wanted, **changes}
        self.wanted = {prefix: one for prefix, one in wanted.items() if one is not None}
        self.rib.want_changes(changes)

    @precondition(lambda self: not self.is_up)
    @rule()
    def come_up(self) -> None:
        """A session: ExaBGP repeats what it holds."""
        self.is_up = True
        self.peer = {}
        self.waiting = list(self.cache.items())
        self.begin()

    @precondition(lambda self: self.is_up)
    @rule()
    def go_down(self) -> None:
        """The session ends; ExaBGP keeps what it holds."""
        self.is_up = False
        self.waiting = []
        self.end_waits = False
        self.rib.stop()

    @precondition(lambda self: self.is_up)
    @rule()
    def new_bgpd(self) -> None:
        """A killed bgpd is followed by one that knows nothing."""
        self.rib = AdjRibOut()
        self.rib.want(self.wanted)
        self.end_waits = False
        self.begin()

    def begin(self) -> None:
        """What the adapter does at the start of a session."""
        self.old_waiting = len(self.waiting)
        self.rib.start(FAMILIES)
        self.rib.learn(list(self.cache))

    @precondition(lambda self: self.is_up)
    @rule(limit=st.integers(1, 3))
    def command(self, limit: int) -> None:
        """Commands are taken and answered."""
        changes = self.rib.take(limit)
        new = {prefix for prefix, _ in self.waiting[self.old_waiting :]}
        for prefix in changes.withdraw:
            assert prefix not in new, "two changes of one prefix wait at once"
            self.cache.pop(prefix, None)
            self.waiting.append((prefix, None))
        for each in changes.announce:
            assert each.prefix not in new, "two changes of one prefix wait at once"
            if self.cache.get(each.prefix) != each:
                self.cache[each.prefix] = each
                self.waiting.append((each.prefix, each))

    @precondition(lambda self: self.is_up and self.rib.is_fence_due)
    @rule()
    def fence(self) -> None:
        """End-of-RIB is commanded."""
        self.rib.fence()
        self.end_waits = True

    @precondition(lambda self: self.is_up and self.waiting)
    @rule(count=st.integers(1, 4))
    def write(self, count: int) -> None:
        """ExaBGP writes UPDATEs, after telling so."""
        for prefix, each in self.waiting[:count]:
            if each is None:
                self.peer.pop(prefix, None)
            else:
                self.peer[prefix] = each
            self.rib.sent(prefix, each)
        del self.waiting[:count]
        self.old_waiting = max(0, self.old_waiting - count)

    @precondition(lambda self: self.is_up and not self.waiting and self.end_waits)
    @rule()
    def write_end(self) -> None:
        """ExaBGP writes End-of-RIB, once nothing waits."""
        self.end_waits = False
        self.rib.ended(IPV4_UNICAST)

    @invariant()
    def settled_is_wanted(self) -> None:
        """Whenever all is said to be settled, the peer has what is wanted."""
        if self.is_up and self.rib.end_of_rib_sent and self.rib.is_settled:
            assert self.peer == self.wanted

    def teardown(self) -> None:
        """Left alone, everything settles."""
        if not self.is_up:
            self.come_up()
        self.want(self.wanted)
        for _ in range(50):
            self.command(4)
            self.write(10)
            if self.rib.is_fence_due:
                self.fence()
            if self.end_waits and not self.waiting:
                self.write_end()
        assert self.rib.is_settled
        assert self.peer == self.wanted


TestSession = Session.TestCase
TestSession.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)


def test_what_is_wanted_is_confirmed_or_pending() -> None:
    """Each wanted prefix is counted where it is on its way; missing ones have no way at all."""
    rib = AdjRibOut()
    rib.want({A: route(A), B: route(B)})
    assert (rib.confirmed, rib.pending, rib.missing) == (0, 0, 2), "no session"
    rib.start(FAMILIES)
    rib.learn([])
    assert (rib.confirmed, rib.pending, rib.missing) == (0, 2, 0)
    (first,) = rib.take(limit=1).announce
    assert (rib.confirmed, rib.pending, rib.missing) == (0, 2, 0)
    rib.sent(first.prefix, first)
    assert (rib.confirmed, rib.pending, rib.missing) == (1, 1, 0)
    (second,) = rib.take().announce
    rib.sent(second.prefix, second)
    assert (rib.confirmed, rib.pending, rib.missing) == (2, 0, 0)


def test_what_exabgp_lost_or_invented_is_commanded_again() -> None:
    """Asked when nothing is in flight, ExaBGP is believed: lost routes go again, others leave."""
    rib = started(a=1)
    rib.take()
    rib.sent(A, route(A, 1))
    assert not rib.correct({A: route(A, 1)})
    assert not rib.correct({A: None}), "nobody knows its attributes"
    assert not rib.take()
    assert rib.correct({B: None}) == {A, B}
    changes = rib.take()
    assert (changes.announce, changes.withdraw) == ((route(A, 1),), (B,))


@pytest.mark.parametrize(
    ("wanted", "actual", "is_right"),
    [
        pytest.param({}, {}, True, id="as commanded"),
        pytest.param({}, {"med": 7}, False, id="another MED"),
        pytest.param({"communities": ((1, 2),)}, {}, False, id="a community less"),
        pytest.param({"communities": ((3, 4), (1, 2))}, {"communities": ((1, 2), (3, 4))}, True,
                     id="communities in another order"),
        pytest.param({"local_pref": 200}, {"local_pref": 100}, False, id="another LOCAL_PREF"),
        pytest.param({"local_pref": 200}, {}, True, id="no LOCAL_PREF to another AS"),
        pytest.param({}, {"local_pref": 100}, True, id="the LOCAL_PREF that ExaBGP adds"),
        pytest.param({}, {"as_path": as_sequence(64512)}, True, id="the AS that ExaBGP adds"),
        pytest.param({"as_path": as_sequence(1, 2)}, {"as_path": as_sequence(1, 3)}, False,
                     id="another AS path"),
    ],
)  # fmt: skip
def test_attributes_are_compared(
    wanted: dict[str, Any], actual: dict[str, Any], is_right: bool
) -> None:
    """What ExaBGP would send is compared with what was commanded; what differs goes again."""
    rib = started()
    commanded = Announcement(A, "192.0.2.1", PathAttributes(**wanted))
    rib.want({A: commanded})
    rib.take()
    rib.sent(A, commanded)
    found = rib.correct({A: Announcement(A, "192.0.2.1", PathAttributes(**actual))})
    assert found == (set() if is_right else {A})
    assert rib.take().announce == (() if is_right else (commanded,))
    assert rib.unconfirmed(9) == (() if is_right else (A,))


def test_what_is_not_confirmed_is_named() -> None:
    """Also what is still to be withdrawn; never more than asked for."""
    rib = started(a=1)
    assert rib.unconfirmed(9) == (A,)
    rib.sent(A, rib.take().announce[0])
    assert rib.unconfirmed(9) == ()
    rib.want({B: route(B)})
    assert set(rib.unconfirmed(9)) == {A, B}
    assert len(rib.unconfirmed(1)) == 1
