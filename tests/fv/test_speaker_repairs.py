"""What is repaired when ExaBGP itself fails: a lost route, reloads without effect."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bgpd import exabgp_orders, exabgp_proof, exabgp_reload
from bgpd.speaker import SessionUp
from tests.fv.speaker_lab import Listener, SpeakerLab, session, wanted
from tests.support.eventually import eventually

pytestmark = [pytest.mark.root, pytest.mark.peers]

FIRST, SECOND = "198.19.8.2", "198.19.8.3"
A, B, C = "198.19.16.0/26", "198.19.16.64/26", "198.19.16.128/26"

DEAF = """
from bgpd import launcher
from exabgp.reactor.loop import Reactor

reload, times = Reactor.reload, []

def reload_once(reactor):
    times.append(1)
    return reload(reactor) if len(times) == 1 else True

Reactor.reload = reload_once
launcher.main()
"""


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SpeakerLab]:
    built = SpeakerLab(tmp_path)
    try:
        yield built
    finally:
        built.close()


async def test_what_exabgp_holds_is_compared_and_repaired(
    lab: SpeakerLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routes changed behind our back (one gone, one too many, one with other attributes) are put
    right, named and counted.
    """
    monkeypatch.setattr(exabgp_proof, "CHECK_EVERY_S", 0.2)
    bird = lab.bird("p1", FIRST)
    lab.write_configuration(session(FIRST))
    lab.exabgp()
    async with Listener(lab) as listener:
        speaker = listener.speaker
        speaker.advertise(FIRST, wanted(A, B))
        await eventually(lambda: listener.is_settled(FIRST), 30)
        await eventually(lambda: speaker.proof()[FIRST].checked_s, 30)
        proof = speaker.proof()[FIRST]
        assert (proof.desired, proof.confirmed, proof.repaired) == (2, 2, 0)
        assert (proof.pending, proof.missing) == (0, 0)

        assert speaker._link is not None
        for command in (
            f"withdraw route {A} next-hop self",
            f"announce route {B} next-hop self med 77 community [ 65000:1 ]",
            f"announce route {C} next-hop self",
        ):
            assert (await speaker._link.ask(f"neighbor {FIRST} {command}")).ok
        await eventually(lambda: speaker.proof()[FIRST].repaired == 3, 30)
        assert speaker.proof()[FIRST].repaired_last == (A, C, B)
        await eventually(lambda: listener.is_settled(FIRST), 30)
        await eventually(lambda: bird.routes().keys() == {A, B}, 30)
        await eventually(lambda: "65000" not in bird.routes()[B], 30)
        assert speaker.proof()[FIRST].confirmed == 2
        assert speaker.proof()[FIRST].unconfirmed == ()
        checked_s = speaker.proof()[FIRST].checked_s
        await eventually(lambda: speaker.proof()[FIRST].checked_s > checked_s, 30)
        assert speaker.proof()[FIRST].repaired == 3


async def test_exabgp_that_ignores_reloads_starts_anew(
    lab: SpeakerLab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends, asking for a restart; the next process has the file, the peer kept our routes."""
    monkeypatch.setattr(exabgp_reload, "EFFECT_S", 0.2)
    monkeypatch.setattr(exabgp_reload, "RELOADS_BEFORE_RESTART", 2)
    first, second = lab.bird("p1", FIRST), lab.bird("p2", SECOND)
    lab.write_configuration(session(FIRST))
    deaf = lab.start("us", sys.executable, "-c", DEAF, log=lab.directory / "deaf.log")
    async with Listener(lab) as listener:
        for peer in (FIRST, SECOND):
            listener.speaker.advertise(peer, wanted(A))
        await eventually(lambda: listener.is_settled(FIRST), 30)
        await eventually(lambda: first.routes().keys() == {A}, 30)
        lab.write_configuration(session(FIRST), session(SECOND))
        await eventually(lambda: deaf.poll() is not None, 60)
        assert deaf.returncode == exabgp_orders.EXIT_RESTART
        assert first.routes().keys() == {A}, "it was told nothing, so it keeps them, stale"
        lab.exabgp()
        await eventually(lambda: listener.is_settled(SECOND), 60)
        await eventually(lambda: second.routes().keys() == {A}, 30)
        await eventually(lambda: listener.is_settled(FIRST), 60)
        assert first.routes().keys() == {A}
        assert len(listener.told(SessionUp, FIRST)) == 2
