"""A storm of flapping routes, from a peer and towards peers, on a real ExaBGP."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bgpd.speaker import RoutesReceived, SessionDown, SessionUp
from tests.fv.speaker_lab import Listener, SpeakerLab, our, session
from tests.support.eventually import eventually
from tests.support.flapping_peer import FLAPS_PER_S, ROUTES, prefix

pytestmark = [pytest.mark.root, pytest.mark.peers, pytest.mark.slow]

BIRD, FLAPPING = "198.19.8.2", "198.19.8.3"
STORM_S = 12.0
"""Twice the hold time of both peers."""


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SpeakerLab]:
    built = SpeakerLab(tmp_path)
    try:
        yield built
    finally:
        built.close()


def received(listener: Listener, peer: str) -> set[str]:
    """What the peer has announced and not withdrawn, as the events tell it."""
    held: set[str] = set()
    for event in listener.told(RoutesReceived, peer):
        held -= set(event.withdrawn)
        held |= {one.prefix for one in event.announced}
    return held


async def test_flap_storm_costs_no_session(lab: SpeakerLab) -> None:
    """A thousand routes flap ten times a second both ways: no session ends, all end up right."""
    bird = lab.bird("p1", BIRD, extra="hold time 6;")
    lab.attach("p2", FLAPPING)
    lab.write_configuration(session(BIRD), session(FLAPPING, is_passive=True))
    lab.exabgp()
    async with Listener(lab) as listener:
        speaker = listener.speaker
        routes = {f"172.16.{n // 4}.{n % 4 * 64}/26": n for n in range(ROUTES)}
        for peer in (BIRD, FLAPPING):
            speaker.advertise(peer, {})
        await eventually(lambda: listener.told(SessionUp, BIRD), 30)
        log = lab.directory / "flapping"
        words = ("-m", "tests.support.flapping_peer", "198.19.8.1", str(STORM_S))
        flapping = lab.start("p2", sys.executable, *words, log=log)
        await eventually(lambda: listener.told(SessionUp, FLAPPING), 30)

        turn = 0
        async with asyncio.timeout(120):
            while "flapped" not in log.read_text():
                turn += 1
                storm = {
                    text: our(text, med=turn + n % 10)
                    for text, n in routes.items()
                    if turn % 3 or n % 2
                }
                for peer in (BIRD, FLAPPING):
                    speaker.advertise(peer, storm)
                await asyncio.sleep(1 / FLAPS_PER_S)
        final = {text: our(text, med=7) for text, n in routes.items() if n % 3}
        for peer in (BIRD, FLAPPING):
            speaker.advertise(peer, final)

        await eventually(lambda: listener.is_settled(BIRD), 60)
        await eventually(lambda: listener.is_settled(FLAPPING), 60)
        await eventually(lambda: bird.routes().keys() == final.keys(), 60)
        assert all("BGP.med: 7\n" in text for text in bird.routes().values())
        stays = {prefix(number) for number in range(0, ROUTES, 2)}
        await eventually(lambda: received(listener, FLAPPING) == stays, 60)
        assert flapping.poll() is None, "it would have ended with the session"
        assert not listener.told(SessionDown)
        assert len(listener.told(SessionUp)) == 2
        assert turn > 5
