"""bgpd and the relay come and go: sessions stay, and what was left behind is put right."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bgpd.speaker import SessionDown, SessionUp, SpeakerConnected, SpeakerLost
from tests.fv.speaker_lab import Listener, SpeakerLab, our, session, wanted
from tests.support.eventually import eventually

pytestmark = [pytest.mark.root, pytest.mark.peers]

PEER = "198.19.8.2"
A, B, C = "198.19.16.0/26", "198.19.16.64/26", "198.19.16.128/26"

ANNOUNCER = """
import asyncio, sys
from pathlib import Path
from bgpd.exabgp import ExaBGPSpeaker
from tests.fv.speaker_lab import our

async def main():
    speaker = ExaBGPSpeaker(Path(sys.argv[1]), Path(sys.argv[2]))
    task = asyncio.create_task(speaker.run())
    med = 0
    while not task.done():
        med += 1
        speaker.advertise(sys.argv[3], {
            f"198.19.24.{n}/32": our(f"198.19.24.{n}/32", med=med + n) for n in range(250)
        })
        await asyncio.sleep(0.003)

asyncio.run(main())
"""


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SpeakerLab]:
    built = SpeakerLab(tmp_path)
    try:
        yield built
    finally:
        built.close()


async def test_killed_bgpd_costs_no_session(lab: SpeakerLab) -> None:
    """SIGKILL in the middle of announcing; the next one makes the peer have just what it wants."""
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    lab.exabgp()
    await eventually(lambda: bird.is_up and lab.socket.exists(), 15)
    up_since = bird.since
    for round_number in range(3):
        announcer = lab.start(
            "us", sys.executable, "-c", ANNOUNCER, str(lab.socket), str(lab.configuration), PEER,
            log=lab.directory / "announcer.log",
        )  # fmt: skip
        await eventually(lambda: len(bird.routes()) >= 250, 15)
        announcer.kill()
        announcer.wait()
        async with Listener(lab) as listener:
            listener.speaker.advertise(PEER, wanted(A, "198.19.24.7/32", med=round_number))
            await eventually(lambda: listener.is_settled(PEER), 15)
            await eventually(lambda: bird.routes().keys() == {A, "198.19.24.7/32"})
            assert all(f"BGP.med: {round_number}\n" in text for text in bird.routes().values())
            (up,) = listener.told(SessionUp)
            assert up.resumed
            assert (up.restart_time_s, up.route_refresh) == (120, True), "its OPEN is remembered"
    assert bird.since == up_since


async def test_half_a_command_of_a_dead_bgpd_is_dropped(lab: SpeakerLab) -> None:
    """A line cut off by death is never glued to the next one's first command."""
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    lab.exabgp()
    await eventually(lambda: bird.is_up and lab.socket.exists(), 15)
    with socket.socket(socket.AF_UNIX) as dying:
        dying.connect(str(lab.socket))
        whole = f"neighbor {PEER} announce route {B} next-hop self\n" * 5
        dying.sendall(f"{whole}neighbor {PEER} announce route 198.19.".encode())
    async with Listener(lab) as listener:
        listener.speaker.advertise(PEER, wanted(A))
        await eventually(lambda: listener.is_settled(PEER), 15)
        await eventually(lambda: bird.routes().keys() == {A})


async def test_reader_that_stops_costs_no_session(lab: SpeakerLab) -> None:
    """A bgpd that hangs for longer than the hold time slows nobody but itself."""
    bird = lab.bird("p1", PEER, extra="hold time 3;", routes=["198.19.20.0/26"])
    lab.write_configuration(session(PEER))
    lab.exabgp()
    await eventually(lambda: bird.is_up and lab.socket.exists(), 15)
    up_since = bird.since
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        hanging.connect(str(lab.socket))
        # Each refresh makes ExaBGP tell the route again: far more than pipe and socket hold.
        refresh = f"neighbor {PEER} announce route-refresh ipv4 unicast\n"
        deadline = time.monotonic() + 8

        async def is_over() -> bool:
            hanging.sendall(refresh.encode() * 20)
            return time.monotonic() > deadline

        await eventually(is_over, 20)
        assert bird.is_up
    async with Listener(lab) as listener:
        listener.speaker.advertise(PEER, wanted(A))
        await eventually(lambda: listener.is_settled(PEER), 30)
        (connected,) = listener.told(SpeakerConnected)
        assert connected.lost_events, "what the hanging one did not read is gone"
    assert bird.since == up_since


async def test_stopped_relay_host_process_is_replaced(lab: SpeakerLab) -> None:
    """When the relay is killed ExaBGP starts another; sessions stay and are known again."""
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    exabgp = lab.exabgp()
    async with Listener(lab) as listener:
        listener.speaker.advertise(PEER, wanted(A, B))
        await eventually(lambda: listener.is_settled(PEER), 15)
        up_since = bird.since
        os.kill(lab.relay_pid(exabgp), signal.SIGKILL)
        await eventually(lambda: len(listener.told(SpeakerConnected)) == 2, 15)
        listener.speaker.advertise(PEER, wanted(B, C))
        await eventually(lambda: listener.is_settled(PEER) and bird.routes().keys() == {B, C}, 15)
        assert not listener.told(SessionDown)
        assert not listener.told(SpeakerLost)
        assert listener.told(SessionUp)[-1].resumed
    assert bird.since == up_since


async def test_second_bgpd_replaces_the_first(lab: SpeakerLab) -> None:
    """A new connection is the one that counts; the old one is cut off."""
    lab.write_configuration()
    lab.exabgp()
    await eventually(lab.socket.exists)
    with socket.socket(socket.AF_UNIX) as old, socket.socket(socket.AF_UNIX) as new:
        old.connect(str(lab.socket))
        assert b'"relay": 1' in old.recv(65536)
        new.connect(str(lab.socket))
        assert b'"relay": 1' in new.recv(65536)
        old.settimeout(5)
        assert old.recv(65536) == b""
        new.sendall(b"version\n")
        new.settimeout(5)
        assert b"5.0.15" in new.recv(65536)
    assert lab.socket.stat().st_mode & 0o777 == 0o600


async def test_many_routes_at_once(lab: SpeakerLab) -> None:
    """Two thousand routes with different attributes all arrive, in bounded batches."""
    bird = lab.bird("p1", PEER)
    lab.write_configuration(session(PEER))
    lab.exabgp()
    routes = {
        prefix: our(prefix, communities=((64512, n % 7),))
        for n in range(2000)
        for prefix in (f"198.19.{24 + n // 256}.{n % 256}/32",)
    }
    async with Listener(lab) as listener:
        listener.speaker.advertise(PEER, routes)
        await eventually(lambda: listener.is_settled(PEER), 30)
        await eventually(lambda: bird.routes().keys() == routes.keys())
        listener.speaker.advertise(PEER, {})
        await eventually(lambda: bird.routes() == {}, 30)
