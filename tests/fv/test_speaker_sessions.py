"""ExaBGP, driven through the speaker port, against BIRD."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bgpd.announcement import Announcement, PathAttributes, as_sequence
from bgpd.exabgp_link import Link
from bgpd.speaker import (
    EndOfRIB,
    RefreshBegin,
    RefreshEnd,
    RoutesReceived,
    SessionDown,
    SessionUp,
    SpeakerConnected,
    SpeakerLost,
)
from tests.fv.speaker_lab import (
    OUR_ADDRESS,
    OUR_ASN,
    Listener,
    SpeakerLab,
    our,
    session,
    wanted,
)
from tests.support.eventually import eventually

pytestmark = [pytest.mark.root, pytest.mark.peers]

PEER = "198.19.8.2"
A, B, C = "198.19.16.0/26", "198.19.16.64/26", "198.19.16.128/26"


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SpeakerLab]:
    built = SpeakerLab(tmp_path)
    try:
        yield built
    finally:
        built.close()


async def test_routes_reach_the_peer_and_leave_it(lab: SpeakerLab) -> None:
    """Exactly what is wanted is at the peer, with its attributes, and End-of-RIB came after it."""
    bird = lab.bird("p1", PEER, routes=["198.19.20.0/26"])
    lab.write_configuration()
    lab.exabgp()
    async with Listener(lab) as listener:
        listener.speaker.advertise(PEER, wanted(A, B, local_pref=200, communities=((65001, 7),)))
        await eventually(lambda: listener.speaker.status().connected)
        lab.write_configuration(session(PEER))  # with a listener from the first moment on
        await eventually(lambda: listener.is_settled(PEER), 20)
        await eventually(lambda: bird.routes().keys() == {A, B})
        assert "BGP.local_pref: 200" in bird.routes()[A]
        assert "(65001,7)" in bird.routes()[A]
        assert f"BGP.next_hop: {OUR_ADDRESS}" in bird.routes()[A]

        listener.speaker.advertise(PEER, wanted(B, C))
        await eventually(lambda: bird.routes().keys() == {B, C})
        await eventually(lambda: listener.is_settled(PEER))

        await eventually(lambda: listener.told(EndOfRIB, PEER))
        (up,) = listener.told(SessionUp)
        assert (up.asn, up.restart_time_s, up.route_refresh) == (OUR_ASN, 120, True)
        assert not up.resumed
        (received,) = [e for e in listener.told(RoutesReceived) if e.announced]
        assert received.announced == (
            Announcement("198.19.20.0/26", PEER, PathAttributes(local_pref=100)),
        )


async def test_external_session_prepends_once(lab: SpeakerLab) -> None:
    """Towards another AS an own route carries our AS, a passed-on one exactly the given path."""
    bird = lab.bird("p1", PEER, asn=64999)
    lab.write_configuration(session(PEER, asn=64999))
    async with Listener(lab) as listener:
        passed_on = our(B, as_path=as_sequence(OUR_ASN, 65010), local_pref=300)
        listener.speaker.advertise(PEER, {A: our(A), B: passed_on})
        lab.exabgp()
        await eventually(lambda: listener.is_settled(PEER), 15)
        await eventually(lambda: bird.routes().keys() == {A, B})
        assert f"BGP.as_path: {OUR_ASN}\n" in bird.routes()[A]
        assert f"BGP.as_path: {OUR_ASN} 65010\n" in bird.routes()[B]
        assert "BGP.local_pref: 100" in bird.routes()[B], "LOCAL_PREF stays inside the AS"


async def test_refresh_brings_all_routes_again(lab: SpeakerLab) -> None:
    """A requested refresh repeats the peer's routes between begin and end."""
    lab.bird("p1", PEER, routes=["198.19.20.0/26"])
    lab.write_configuration(session(PEER))
    lab.exabgp()
    async with Listener(lab) as listener:
        await eventually(lambda: listener.told(SessionUp, PEER), 15)
        listener.speaker.request_refresh(PEER)
        await eventually(lambda: listener.told(RefreshEnd, PEER))
        kinds = [
            type(event)
            for event in listener.events
            if isinstance(event, RefreshBegin | RoutesReceived | RefreshEnd)
        ]
        assert kinds[-3:] == [RefreshBegin, RoutesReceived, RefreshEnd]


async def test_last_wanted_state_wins_at_a_peer_that_stands_still(lab: SpeakerLab) -> None:
    """However a prefix flaps while the peer does not read, it ends with what is wanted last."""
    lab.small_buffers()
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    lab.exabgp()
    async with Listener(lab) as listener:
        speaker = listener.speaker
        speaker.advertise(PEER, wanted(A, C, med=1))
        await eventually(lambda: listener.is_settled(PEER), 15)
        bird.pause()
        # Each with attributes of its own: many UPDATEs, more than the peer's window takes.
        filler = {
            f"198.19.{24 + n // 256}.{n % 256}/32": our(
                f"198.19.{24 + n // 256}.{n % 256}/32", med=1000 + n
            )
            for n in range(4000)
        }
        steps = [
            {A: our(A, med=1), C: our(C, med=1)},
            {A: our(A, med=2)},
            {A: our(A, med=1), B: our(B, med=5), C: our(C, med=1)},
            {B: our(B, med=6), C: our(C, med=2)},
            {A: our(A, med=3), B: our(B, med=5)},
        ]
        for step in steps:
            speaker.advertise(PEER, {**filler, **step})
            for _ in range(20):
                await asyncio.sleep(0.01)
        assert not listener.is_settled(PEER), "the peer's window is closed, so nothing can settle"
        bird.resume()
        await eventually(lambda: listener.is_settled(PEER), 30)
        # What was written may still be on its way: a count alone is reached by older states, too.
        await eventually(lambda: "BGP.med: 3\n" in bird.routes().get(A, ""), 30)
        await eventually(lambda: "BGP.med: 5\n" in bird.routes().get(B, ""), 30)
        await eventually(lambda: bird.routes().keys() == {*filler, A, B}, 30)


async def test_repaired_exabgp_keeps_the_order_of_raw_commands(lab: SpeakerLab) -> None:
    """Without our discipline, commands written back to back still end in the last state."""
    lab.small_buffers()
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    lab.exabgp()
    await eventually(lab.socket.exists)
    await eventually(lambda: bird.is_up, 15)

    async def ignore(_line: object) -> None:
        pass

    link, _ = await Link.connect(str(lab.socket), ignore)
    reading = asyncio.create_task(link.run())
    to = f"neighbor {PEER}"
    try:
        bird.pause()
        filler = [f"{to} announce route 198.19.24.{n}/32 next-hop self med {n}" for n in range(250)]
        flap = [
            f"{to} announce route {A} next-hop self med 1",
            f"{to} announce route {A} next-hop self med 2",
            f"{to} announce route {A} next-hop self med 1",
            f"{to} announce route {B} next-hop self med 1",
            f"{to} withdraw route {B} next-hop self",
            f"{to} announce route {B} next-hop self med 1",
            f"{to} withdraw route {C} next-hop self",
            f"{to} announce route {C} next-hop self med 1",
            f"{to} withdraw route {C} next-hop self",
        ]
        replies = await asyncio.gather(*(link.ask(command) for command in filler + flap))
        assert all(reply.ok for reply in replies)
        bird.resume()
        fillers = {f"198.19.24.{n}/32" for n in range(250)}
        await eventually(lambda: bird.routes().keys() == {*fillers, A, B}, 30)
        await eventually(lambda: "BGP.med: 1\n" in bird.routes().get(A, ""), 30)
    finally:
        reading.cancel()
        link.close()


async def test_new_exabgp_gets_everything_again(lab: SpeakerLab) -> None:
    """After ExaBGP was killed and started, the listener knows, and the peer has our routes."""
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    first = lab.exabgp()
    async with Listener(lab) as listener:
        listener.speaker.advertise(PEER, wanted(A, B))
        await eventually(lambda: listener.is_settled(PEER), 15)
        first.kill()
        await eventually(lambda: listener.told(SpeakerLost))
        assert not listener.speaker.status().connected
        assert bird.routes().keys() == {A, B}, "graceful restart: the peer keeps our routes"
        listener.speaker.advertise(PEER, wanted(B, C))
        lab.exabgp()
        await eventually(lambda: listener.is_settled(PEER), 30)
        await eventually(lambda: bird.routes().keys() == {B, C}, 5)
        one, two = (event.generation for event in listener.told(SpeakerConnected))
        assert one != two


async def test_dead_peer_is_reported(lab: SpeakerLab) -> None:
    """A session that ends is told, with a reason, and comes back by itself with our routes."""
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    lab.exabgp()
    async with Listener(lab) as listener:
        listener.speaker.advertise(PEER, wanted(A))
        await eventually(lambda: listener.is_settled(PEER), 15)
        bird.ask("disable cymric")
        (down,) = await eventually(lambda: listener.told(SessionDown, PEER))
        assert down.reason
        listener.speaker.advertise(PEER, wanted(B, C))
        bird.ask("enable cymric")
        await eventually(lambda: listener.is_settled(PEER), 30)
        await eventually(lambda: bird.routes().keys() == {B, C})
        assert re.search(r"Routes:\s+2 imported", bird.ask("show protocols all cymric"))
