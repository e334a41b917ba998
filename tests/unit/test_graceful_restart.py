"""When stale paths stay and when they go, as event tables."""

from __future__ import annotations

from dataclasses import replace

from bgpd.announcement import IPV4_UNICAST
from bgpd.graceful_restart import (
    OWN_RESTART_S,
    QUIET_S,
    REFRESH_WITHIN_S,
    Action,
    Restarts,
    Waiting,
)
from bgpd.speaker import EndOfRIB, RefreshBegin, RefreshEnd, SessionDown, SessionUp

P = "198.19.0.3"
UP = SessionUp(
    P,
    64512,
    frozenset({IPV4_UNICAST}),
    restart_time_s=90,
    route_refresh=True,
    enhanced_refresh=True,
)
PLAIN = SessionUp(P, 64512, frozenset({IPV4_UNICAST}))
DOWN = SessionDown(P, "gone")
EOR = EndOfRIB(P, IPV4_UNICAST)
BEGIN, END = RefreshBegin(P, IPV4_UNICAST), RefreshEnd(P, IPV4_UNICAST)
SWEEP, MARK, DROP, REFRESH = (
    Action.SWEEP,
    Action.MARK_STALE,
    Action.DROP,
    Action.REQUEST_REFRESH,
)


def started(up: SessionUp = UP, *, is_complete: bool = True) -> Restarts:
    """One expected peer whose session is up since second 0."""
    restarts = Restarts(0)
    restarts.expect([P])
    restarts.on_session_up(up, 0)
    if is_complete:
        restarts.on_end_of_rib(EOR)
    return restarts


def test_a_peer_with_graceful_restart_goes_and_returns() -> None:
    """Its paths are stale while it is away and what it does not repeat goes at its End-of-RIB."""
    restarts = started()
    assert restarts.on_session_down(DOWN, 10) == (MARK,)
    assert restarts.waiting(P) is Waiting.SESSION
    back = replace(UP, peer_restarting=True, forwarding_families=UP.families)
    assert restarts.on_session_up(back, 20) == ()
    assert restarts.on_end_of_rib(EOR) == (SWEEP,)
    assert restarts.on_end_of_rib(EOR) == ()


def test_a_peer_that_does_not_return_in_time() -> None:
    """After its own restart time, not before, its paths go."""
    restarts = started()
    restarts.on_session_down(DOWN, 10)
    assert restarts.next_deadline_s() == 100
    assert restarts.due(99) == {}
    assert restarts.due(100) == {P: (SWEEP,)}
    assert restarts.due(101) == {}


def test_a_peer_without_graceful_restart() -> None:
    """Its paths go at once."""
    restarts = started(PLAIN)
    assert restarts.on_session_down(DOWN, 10) == (DROP,)
    assert restarts.waiting(P) is Waiting.NOTHING


def test_a_peer_that_lost_its_forwarding_state() -> None:
    """A restarted peer that says it kept nothing loses its stale paths at once (RFC 4724 §4.2)."""
    restarts = started()
    restarts.on_session_down(DOWN, 10)
    assert restarts.on_session_up(replace(UP, peer_restarting=True), 20) == (SWEEP,)


def test_a_session_lost_without_any_restart() -> None:
    """A peer that only lost the connection has no restart to speak of: its paths stay stale."""
    restarts = started()
    restarts.on_session_down(DOWN, 10)
    assert restarts.on_session_up(UP, 20) == ()
    assert restarts.on_end_of_rib(EOR) == (SWEEP,)


def test_two_restarts_in_a_row() -> None:
    """What was stale already goes when the session is lost again (RFC 4724 §4.2)."""
    restarts = started()
    restarts.on_session_down(DOWN, 10)
    restarts.on_session_up(UP, 20)
    assert restarts.on_session_down(DOWN, 30) == (SWEEP, MARK)


def test_a_peer_that_never_ends_its_rib() -> None:
    """A peer with graceful restart has its restart time; one without has ended when it is quiet."""
    restarts = started(is_complete=False)
    assert restarts.due(89) == {}
    assert restarts.due(90) == {P: (SWEEP,)}
    restarts = started(PLAIN, is_complete=False)
    restarts.on_routes(P, QUIET_S - 1)
    assert restarts.due(QUIET_S + 1) == {}
    assert restarts.due(2 * QUIET_S - 1) == {P: (SWEEP,)}


def test_our_own_speaker_restarts() -> None:
    """Paths of all peers stay, also of those without graceful restart, for a bounded time."""
    for up in (UP, PLAIN):
        restarts = started(up)
        assert restarts.on_speaker_lost(10) == {P: (MARK,)}
        assert restarts.on_speaker_lost(11) == {}
        assert restarts.due(9 + OWN_RESTART_S) == {}
        assert restarts.due(10 + OWN_RESTART_S) == {P: (SWEEP,)}


def test_a_session_found_up() -> None:
    """Its paths are unconfirmed until the peer has sent everything again."""
    restarts = started()
    assert restarts.on_session_up(replace(UP, resumed=True), 10) == (MARK, REFRESH)
    assert restarts.on_end_of_rib(EOR) == ()
    assert restarts.on_refresh_begin(BEGIN, 11) == (MARK,)
    assert restarts.on_refresh_end(END) == (SWEEP,)


def test_a_refresh_without_end() -> None:
    """The end marker may be lost: then a deadline ends the refresh."""
    restarts = started()
    restarts.on_session_up(replace(UP, resumed=True), 10)
    assert restarts.due(10 + QUIET_S) == {}
    assert restarts.due(10 + REFRESH_WITHIN_S) == {P: (SWEEP,)}


def test_a_refresh_of_a_peer_without_markers() -> None:
    """It has sent everything when it has been quiet for a while."""
    restarts = started()
    resumed = replace(UP, resumed=True, enhanced_refresh=False)
    assert restarts.on_session_up(resumed, 10) == (MARK, REFRESH)
    restarts.on_routes(P, 12)
    assert restarts.due(11 + QUIET_S) == {}
    assert restarts.due(12 + QUIET_S) == {P: (SWEEP,)}


def test_a_peer_that_cannot_refresh() -> None:
    """Nothing will come, so only the deadline ends the wait."""
    restarts = started()
    resumed = replace(UP, resumed=True, route_refresh=False, enhanced_refresh=False)
    assert restarts.on_session_up(resumed, 10) == (MARK,)
    assert restarts.due(9 + REFRESH_WITHIN_S) == {}
    assert restarts.due(10 + REFRESH_WITHIN_S) == {P: (SWEEP,)}


def test_a_peer_that_is_configured_no_more() -> None:
    """It is forgotten, and named so that its paths can be dropped."""
    restarts = started()
    assert restarts.expect([]) == (P,)
    assert restarts.due(1000) == {}


def test_the_start_ends_when_every_expected_peer_has_told_all() -> None:
    """Not before the sessions are known, not before the last of them has ended its RIB."""
    restarts = Restarts(0)
    assert not restarts.is_over(1)
    restarts.expect([P, "198.19.0.4"])
    restarts.on_session_up(UP, 1)
    restarts.on_end_of_rib(EOR)
    assert not restarts.is_over(2)
    restarts.on_session_up(replace(UP, peer="198.19.0.4", resumed=True), 2)
    restarts.on_refresh_end(RefreshEnd("198.19.0.4", IPV4_UNICAST))
    assert restarts.is_over(3)


def test_the_start_is_bounded() -> None:
    """A peer that never comes up holds the start back only for a while, and once only."""
    restarts = Restarts(0)
    restarts.expect([P])
    assert restarts.next_deadline_s() == OWN_RESTART_S
    assert not restarts.is_over(OWN_RESTART_S - 1)
    assert restarts.is_over(OWN_RESTART_S)
    restarts.expect([P, "198.19.0.4"])
    assert restarts.is_over(OWN_RESTART_S + 1)


def test_without_peers_the_start_ends_with_the_datastore_in_sync() -> None:
    """A node without sessions has nobody to wait for."""
    restarts = Restarts(0)
    restarts.expect([])
    assert restarts.is_over(0)


def test_a_session_whose_paths_are_dead() -> None:
    """A way known to be broken, or a peer held down: graceful restart keeps nothing alive."""
    restarts = started()
    assert restarts.on_session_down(replace(DOWN, drop_paths=True), 10) == (DROP,)
    assert restarts.waiting(P) is Waiting.NOTHING
    assert restarts.due(1000) == {}
    assert restarts.on_session_up(UP, 1001) == ()
    assert restarts.on_session_down(DOWN, 1002) == (SWEEP, MARK), "the next time it counts again"
