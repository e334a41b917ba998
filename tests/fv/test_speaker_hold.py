"""Sessions that we end ourselves, on a real ExaBGP against BIRD: held down, and cut at once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bgpd.speaker import SessionDown, SessionState, SessionUp
from tests.fv.speaker_lab import Listener, SpeakerLab, session, wanted
from tests.support.eventually import eventually

pytestmark = [pytest.mark.root, pytest.mark.peers]

PEER = "198.19.8.2"
A = "198.19.16.0/26"


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SpeakerLab]:
    built = SpeakerLab(tmp_path)
    try:
        yield built
    finally:
        built.close()


@pytest.mark.parametrize("is_passive", [False, True], ids=["we connect", "the peer connects"])
async def test_held_session_stays_down_and_comes_back(lab: SpeakerLab, is_passive: bool) -> None:
    """The peer hears Cease, maximum prefixes, drops our routes, gets in again after the hold."""
    extra = "" if is_passive else "passive on;"
    bird = lab.bird("p1", PEER, extra=extra)
    lab.write_configuration(session(PEER, is_passive=is_passive))
    lab.exabgp()
    async with Listener(lab) as listener:
        speaker = listener.speaker
        speaker.advertise(PEER, wanted(A))
        await eventually(lambda: listener.is_settled(PEER), 30)
        await eventually(lambda: bird.routes().keys() == {A}, 30)

        speaker.hold_session(PEER, "101 prefixes, 100 allowed", 600.0)
        await eventually(lambda: listener.told(SessionDown), 30)
        (down,) = listener.told(SessionDown)
        assert (down.reason, down.drop_paths) == ("101 prefixes, 100 allowed", True)
        log = lab.directory / "p1" / "bird.log"
        await eventually(lambda: "Maximum number of prefixes reached" in log.read_text(), 30)
        await eventually(lambda: not bird.routes(), 30)
        held = speaker.status().peers[PEER]
        assert held.state is SessionState.HELD
        assert held.reason == "101 prefixes, 100 allowed"
        assert held.retry_in_s is not None
        assert 500 < held.retry_in_s <= 600
        if is_passive:  # it knocks and is turned away
            await eventually(lambda: "Connection rejected" in log.read_text(), 30)
        assert len(listener.told(SessionUp)) == 1

        speaker.hold_session(PEER, "", 0.0)
        await eventually(lambda: len(listener.told(SessionUp)) == 2, 60)
        await eventually(lambda: bird.routes().keys() == {A}, 30)
        assert speaker.status().peers[PEER].retry_in_s is None


async def test_hold_ends_by_itself_and_outlives_exabgp(lab: SpeakerLab) -> None:
    """A new ExaBGP process is told to hold what is held; when the time is over the session is."""
    lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    exabgp = lab.exabgp()
    async with Listener(lab) as listener:
        speaker = listener.speaker
        speaker.advertise(PEER, wanted(A))
        await eventually(lambda: listener.is_settled(PEER), 30)
        speaker.hold_session(PEER, "too many", 600.0)
        await eventually(lambda: listener.told(SessionDown), 30)
        exabgp.kill()
        exabgp.wait()
        lab.exabgp()
        await eventually(lambda: "ended by bgpd" in lab.exabgp_log or _is_held(listener), 30)
        await eventually(lambda: speaker.status().connected, 30)
        assert len(listener.told(SessionUp)) == 1
        speaker.hold_session(PEER, "too many, still", 2.0)
        await eventually(lambda: len(listener.told(SessionUp)) == 2, 60)


def _is_held(listener: Listener) -> bool:
    return listener.speaker.status().peers[PEER].state is SessionState.HELD


async def test_lost_session_is_cut_over_a_dead_link(lab: SpeakerLab) -> None:
    """With packets vanishing, the listener knows and TCP is closed, long before the hold timer."""
    lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    lab.exabgp()
    async with Listener(lab) as listener:
        await eventually(lambda: listener.told(SessionUp), 30)
        assert lab.connections_to(PEER)
        lab.lose_packets_to(PEER)
        listener.speaker.session_lost(PEER, "BFD: no packet for 900 ms")
        await eventually(lambda: listener.told(SessionDown), 30)
        (down,) = listener.told(SessionDown)
        assert (down.reason, down.drop_paths) == ("BFD: no packet for 900 ms", True)
        await eventually(lambda: not lab.connections_to(PEER), 30)
        status = listener.speaker.status().peers[PEER]
        assert (status.state, status.reason) == (SessionState.DOWN, "BFD: no packet for 900 ms")


async def test_cut_session_comes_back_when_it_can(lab: SpeakerLab) -> None:
    """Over a link that works, the peer hears why, and the session starts again."""
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    lab.exabgp()
    async with Listener(lab) as listener:
        listener.speaker.advertise(PEER, wanted(A))
        await eventually(lambda: listener.is_settled(PEER), 30)
        listener.speaker.session_lost(PEER, "BFD")
        await eventually(lambda: len(listener.told(SessionUp)) == 2, 60)
        await eventually(lambda: bird.routes().keys() == {A}, 30)
        assert "Received: " in (lab.directory / "p1" / "bird.log").read_text()
