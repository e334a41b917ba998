"""What bgpd does when BFD says that the way to a peer is dead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from bgpd.announcement import Announcement, PathAttributes
from bgpd.bfd.client import watched
from bgpd.bfd.messages import WantedSession
from bgpd.fake_speaker import FakeSpeaker
from bgpd.router import Router
from bgpd.speaker import RoutesReceived, SessionDown, SessionUp, SpeakerConnected
from cymric.datastore.syncer import Update
from cymric.model.bfd import BFD_ANNOTATION, BfdParameters
from cymric.model.peering import Session
from cymric.model.resources import BGPPeer
from tests.support.routing import key_of, node, peer, pool

TOR, BLOCK = "198.19.8.9", "198.19.16.64/26"
IPV4 = frozenset({"ipv4 unicast"})


def with_bfd(one: BGPPeer, text: str) -> BGPPeer:
    """The same peer with the annotation."""
    metadata = msgspec.structs.replace(one.metadata, annotations={BFD_ANNOTATION: text})
    return BGPPeer(metadata=metadata, spec=one.spec)


class World:
    """A router with a speaker in memory and one ToR that does graceful restart."""

    def __init__(self) -> None:
        self.speaker = FakeSpeaker()
        self.sessions: Sequence[Session] = ()
        self.router = Router("us", self.speaker, on_sessions=self._sessions, clock=lambda: 100.0)
        tor = with_bfd(peer(TOR, 64900), "150ms x 5")
        values = (node("us", "198.19.8.1/20"), pool(), tor)
        self.router.on_updates([Update(key_of(value), value) for value in values])
        self.router.on_in_sync()
        self.router.work()

    def _sessions(self, sessions: Sequence[Session]) -> None:
        self.sessions = sessions

    def speak(self, *events: object) -> None:
        for event in events:
            self.router.on_event(event)  # type: ignore[arg-type]
        self.router.work()

    def bring_up(self, *, resumed: bool = False) -> None:
        """The ToR's session is up and told a route."""
        if not self.router.is_speaker_connected:
            self.speak(SpeakerConnected("one", lost_events=False))
        up = SessionUp(
            TOR, 64900, IPV4, restart_time_s=120, forwarding_families=IPV4, resumed=resumed
        )
        self.speaker.up[TOR] = up
        self.speak(up, RoutesReceived(TOR, (Announcement(BLOCK, TOR, PathAttributes()),)))

    @property
    def prefixes(self) -> set[str]:
        """The prefixes with a path in use."""
        return {str(prefix) for prefix in self.router.rib.loc_rib}


@pytest.fixture
def world() -> World:
    return World()


def test_sessions_that_want_bfd_are_told(world: World) -> None:
    """The annotation of a BGPPeer reaches BFD with addresses and intervals."""
    parameters = BfdParameters(min_tx_ms=150, min_rx_ms=150, multiplier=5)
    expected = WantedSession(peer=TOR, local="198.19.8.1", parameters=parameters)
    assert list(watched(world.sessions)) == [expected]
    assert list(watched([replace(one, bfd=None) for one in world.sessions])) == []


@pytest.mark.parametrize("is_independent", [False, True])
def test_a_failure_of_a_session_that_is_up(world: World, is_independent: bool) -> None:
    """Paths go at once, whatever graceful restart says, and the session is torn down."""
    world.bring_up()
    assert world.prefixes == {BLOCK}
    world.router.on_path_failed(TOR, "silence", is_independent=is_independent)
    world.router.work()
    assert world.prefixes == set()
    assert world.speaker.lost == [(TOR, "silence")]


def test_what_was_under_way_does_not_come_back(world: World) -> None:
    """Routes that were read before the failure and are told after it are not used."""
    world.bring_up()
    world.router.on_path_failed(TOR, "silence", is_independent=True)
    late = RoutesReceived(TOR, (Announcement(BLOCK, TOR, PathAttributes()),))
    world.speak(late, SessionDown(TOR, "silence", drop_paths=True))
    assert world.prefixes == set()


def test_a_restart_that_takes_bfd_along(world: World) -> None:
    """The BGP session went first, so the peer restarts: stale paths stay if its BFD shares the
    control plane's fate, and go if it does not (RFC 5882 §4.3.2).
    """
    world.bring_up()
    world.speak(SessionDown(TOR, "connection lost"))
    world.router.on_path_failed(TOR, "silence", is_independent=False)
    world.router.work()
    assert world.prefixes == {BLOCK}
    world.router.on_path_failed(TOR, "silence", is_independent=True)
    world.router.work()
    assert world.prefixes == set()
    assert world.speaker.lost == []


def test_a_session_that_comes_back_is_used(world: World) -> None:
    """After a failure the next session counts, with or without BFD."""
    world.bring_up()
    world.router.on_path_failed(TOR, "silence", is_independent=True)
    world.speak(SessionDown(TOR, "silence", drop_paths=True))
    world.bring_up()
    assert world.prefixes == {BLOCK}


@pytest.mark.parametrize(("resumed", "prefixes"), [(True, set()), (False, {BLOCK})])
def test_a_failure_told_before_the_speaker_is_heard(
    world: World, resumed: bool, prefixes: set[str]
) -> None:
    """What failed while bgpd was away ends the session that was up all the time, not a new one."""
    world.router.on_path_failed(TOR, "silence", is_independent=False)
    world.bring_up(resumed=resumed)
    assert world.prefixes == prefixes
    assert world.speaker.lost == ([(TOR, "silence")] if resumed else [])


def test_a_failure_of_a_peer_nobody_knows(world: World) -> None:
    """A peer that was removed meanwhile is no reason to stumble."""
    world.router.on_path_failed("198.19.8.77", "silence", is_independent=True)
    world.router.work()
    assert world.speaker.lost == []
