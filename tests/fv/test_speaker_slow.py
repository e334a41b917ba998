"""A peer that reads by fits and starts: whatever flaps meanwhile, the last wanted state wins."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bgpd.announcement import Announcement
from bgpd.speaker import SessionDown
from tests.fv.speaker_lab import Bird, Listener, SpeakerLab, our, session
from tests.support.eventually import eventually

pytestmark = [pytest.mark.root, pytest.mark.peers]

PEER = "198.19.8.2"
PREFIXES = [f"198.19.16.{number}/32" for number in range(200)]


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SpeakerLab]:
    built = SpeakerLab(tmp_path)
    try:
        yield built
    finally:
        built.close()


def some(chance: random.Random) -> dict[str, Announcement]:
    """About half the prefixes, each with one of five MEDs."""
    chosen = [prefix for prefix in PREFIXES if chance.random() < 0.5]
    return {prefix: our(prefix, med=chance.randrange(1, 6)) for prefix in chosen}


def meds(bird: Bird) -> dict[str, int]:
    """What BIRD has from us: prefixes, and their MEDs."""
    found = {}
    for prefix, said in bird.routes().items():
        med = re.search(r"BGP.med: (\d+)", said)
        found[prefix] = int(med[1]) if med else 0
    return found


@pytest.mark.parametrize("seed", range(3))
async def test_random_flaps_end_in_the_last_state(lab: SpeakerLab, seed: int) -> None:
    """Announced, changed and withdrawn at random while the window opens and closes."""
    chance = random.Random(seed)
    lab.small_buffers()
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    lab.exabgp()
    async with Listener(lab) as listener:
        speaker = listener.speaker
        speaker.advertise(PEER, some(chance))
        await eventually(lambda: listener.is_settled(PEER), 30)
        for _ in range(60):
            if chance.random() < 0.2:
                bird.pause()
            elif chance.random() < 0.2:
                bird.resume()
            last = some(chance)
            speaker.advertise(PEER, last)
            await asyncio.sleep(chance.choice((0, 0.01, 0.05)))
        bird.resume()
        await eventually(lambda: listener.is_settled(PEER), 60)
        expected = {prefix: route.attributes.med for prefix, route in last.items()}
        await eventually(lambda: meds(bird) == expected, 30)
        assert listener.told(SessionDown) == []
