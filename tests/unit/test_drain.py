"""What a node that is being emptied tells its peers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgpd.announcement import Announcement, PathAttributes
from bgpd.drain import (
    ANNOTATION,
    GRACEFUL_SHUTDOWN,
    MOVE_S,
    Drain,
    Phase,
    Role,
    Wish,
    advance,
    drained,
    is_told,
    marked,
    wish,
)

US = "198.19.0.2"
BLOCK, EMPTY, ADDRESS = "198.19.16.0/26", "198.19.16.128/26", "198.19.16.70/32"
SERVICE, FOREIGN = "10.96.0.0/12", "198.19.16.64/26"
ROLES = {
    BLOCK: Role.BLOCK,
    EMPTY: Role.BLOCK,
    ADDRESS: Role.ADDRESS,
    SERVICE: Role.SERVICE,
    FOREIGN: Role.PASSED_ON,
}
LOCAL_PREF = 2147482623


def routes(local_pref: int | None = LOCAL_PREF) -> dict[str, Announcement]:
    return {
        prefix: Announcement(prefix, US, PathAttributes(local_pref=local_pref)) for prefix in ROLES
    }


def told(drain: Drain, local_pref: int | None = LOCAL_PREF) -> dict[str, str]:
    """`as ever` or `marked` for each prefix that is still advertised."""
    after = drained(
        routes(local_pref), ROLES.__getitem__, drain, is_empty=lambda prefix: prefix == EMPTY
    )
    before = routes(local_pref)
    words = {}
    for prefix, route in after.items():
        if route != before[prefix]:
            assert route == marked(before[prefix])
        words[prefix] = "as ever" if route == before[prefix] else "marked"
    return words


@pytest.mark.parametrize(
    ("wanted", "phase", "expected"),
    [
        pytest.param(
            Wish.SERVICES,
            Phase.MARKING,
            {BLOCK: "as ever", EMPTY: "as ever", ADDRESS: "marked", SERVICE: "marked"},
            id="services, marking",
        ),
        pytest.param(
            Wish.SERVICES,
            Phase.LEFT,
            {BLOCK: "as ever", EMPTY: "as ever", ADDRESS: "marked"},
            id="services, left: their routes are withdrawn",
        ),
        pytest.param(
            Wish.REBOOT,
            Phase.MARKING,
            {BLOCK: "marked", EMPTY: "marked", ADDRESS: "marked", SERVICE: "marked"},
            id="reboot, marking",
        ),
        pytest.param(
            Wish.REBOOT,
            Phase.LEAVING,
            {BLOCK: "marked", ADDRESS: "marked"},
            id="reboot, leaving: a block with pods stays",
        ),
    ],
)
def test_what_is_told(wanted: Wish, phase: Phase, expected: dict[str, str]) -> None:
    """Per wish and phase: what is marked, what goes, and what others' routes are spared."""
    assert told(Drain(wish=wanted, phase=phase)) == {**expected, FOREIGN: "as ever"}


def test_marks() -> None:
    """A marked route has the community once and the lowest preference; eBGP has no preference."""
    plain = Announcement(BLOCK, US, PathAttributes(local_pref=LOCAL_PREF, communities=((1, 2),)))
    once = marked(plain)
    assert once.attributes.communities == ((1, 2), GRACEFUL_SHUTDOWN)
    assert once.attributes.local_pref == 0
    assert marked(once) == once
    outside = marked(Announcement(BLOCK, US, PathAttributes()))
    assert outside.attributes.local_pref is None


def test_no_drain_changes_nothing() -> None:
    """Without a drain the very same announcements come back."""
    given_routes = routes()
    assert drained(given_routes, ROLES.__getitem__, Drain()) is given_routes


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("", Wish.NONE),
        ("false", Wish.NONE),
        ("true", Wish.SERVICES),
        ("services", Wish.SERVICES),
        (" Reboot ", Wish.REBOOT),
    ],
)
def test_wishes(value: str, wanted: Wish) -> None:
    """The annotation's values; without annotation there is no drain."""
    assert wish({ANNOTATION: value}) is wanted
    assert wish({}) is Wish.NONE


def test_a_wish_that_is_none() -> None:
    """Another value is an error, to be told, and not guessed at."""
    with pytest.raises(ValueError, match="hurry"):
        wish({ANNOTATION: "hurry"})


def test_phases() -> None:
    """Marking lasts until peers were told and had their time; a peer that is not told holds it up;
    then services leave, and only when that is told as well it is over.
    """
    drain = advance(Drain(), Wish.SERVICES, is_told=True, now_s=100.0)
    assert drain.phase is Phase.MARKING
    drain = advance(drain, Wish.SERVICES, is_told=False, now_s=200.0)
    assert drain.phase is Phase.MARKING
    drain = advance(drain, Wish.SERVICES, is_told=True, now_s=201.0)
    drain = advance(drain, Wish.SERVICES, is_told=False, now_s=205.0)  # a new pod: tell again
    drain = advance(drain, Wish.SERVICES, is_told=True, now_s=206.0)
    drain = advance(drain, Wish.SERVICES, is_told=True, now_s=205.9 + MOVE_S)
    assert drain.phase is Phase.MARKING
    drain = advance(drain, Wish.SERVICES, is_told=True, now_s=206.0 + MOVE_S)
    assert drain.phase is Phase.LEAVING
    drain = advance(drain, Wish.SERVICES, is_told=False, now_s=220.0)
    assert drain.phase is Phase.LEAVING
    drain = advance(drain, Wish.SERVICES, is_told=True, now_s=221.0)
    assert drain.phase is Phase.LEFT
    assert advance(drain, Wish.SERVICES, is_told=False, now_s=300.0).phase is Phase.LEFT
    assert advance(drain, Wish.REBOOT, is_told=True, now_s=300.0).phase is Phase.MARKING
    assert advance(drain, Wish.NONE, is_told=True, now_s=300.0) == Drain()


@given(st.lists(st.tuples(st.sampled_from(Wish), st.booleans(), st.floats(0.1, 30.0)), max_size=30))
def test_phases_hold_whatever_happens(steps: list[tuple[Wish, bool, float]]) -> None:
    """A drain is active exactly while it is wished for, never skips marking, and never leaves
    before the peers had their time.
    """
    drain, now_s = Drain(), 0.0
    for wanted, all_told, passed_s in steps:
        now_s += passed_s
        before, drain = drain, advance(drain, wanted, is_told=all_told, now_s=now_s)
        assert drain.is_active is (wanted is not Wish.NONE)
        assert drain.wish is wanted
        if drain.phase is Phase.LEAVING and before.phase is not Phase.LEAVING:
            assert before.phase is Phase.MARKING
            assert all_told
            assert now_s - before.since_s >= MOVE_S
        if drain.phase is Phase.LEFT:
            assert before.phase in (Phase.LEAVING, Phase.LEFT)


def test_who_must_be_told() -> None:
    """Every session that is up, with everything; sessions that are down do not count."""
    assert is_told({"a": (3, 3), "b": (3, 1)}, up=["a"])
    assert not is_told({"a": (3, 3), "b": (3, 1)}, up=["a", "b"])
    assert not is_told({}, up=["a"])
    assert is_told({}, up=[])
