"""Reloads of a real ExaBGP: what changes takes effect, what does not stays up."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bgpd.exabgp_link import Link
from bgpd.speaker import SessionDown, SessionUp
from tests.fv.speaker_lab import Listener, SpeakerLab, session, wanted
from tests.support.eventually import eventually

pytestmark = [pytest.mark.root, pytest.mark.peers]

FIRST, SECOND, UNREACHABLE = "198.19.8.2", "198.19.8.3", "198.19.8.9"
A, B = "198.19.16.0/26", "198.19.16.64/26"


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SpeakerLab]:
    built = SpeakerLab(tmp_path)
    try:
        yield built
    finally:
        built.close()


async def test_peer_is_added_while_another_is_unreachable(lab: SpeakerLab) -> None:
    """A peer behind a dead link, with routes wanted for it, delays no reload; others stay up."""
    first, second = lab.bird("p1", FIRST), lab.bird("p2", SECOND)
    lab.lose_packets_to(UNREACHABLE)
    lab.write_configuration(session(FIRST), session(UNREACHABLE))
    lab.exabgp()
    async with Listener(lab) as listener:
        for peer in (FIRST, SECOND, UNREACHABLE):
            listener.speaker.advertise(peer, wanted(A, B))
        await eventually(lambda: listener.is_settled(FIRST), 15)
        up_since = first.since
        lab.write_configuration(session(FIRST), session(SECOND), session(UNREACHABLE))
        await eventually(lambda: listener.is_settled(SECOND), 10)
        await eventually(lambda: second.routes().keys() == {A, B})
        assert first.since == up_since
        assert not listener.told(SessionDown, FIRST)
        assert listener.speaker.status().configuration == "3 sessions, as confd wrote them"


async def test_repaired_exabgp_reloads_while_routes_wait(lab: SpeakerLab) -> None:
    """Routes queued for an unreachable peer by anyone do not make ExaBGP drop a reload."""
    lab.bird("p2", SECOND)
    lab.lose_packets_to(UNREACHABLE)
    lab.write_configuration(session(UNREACHABLE))
    lab.exabgp()
    await eventually(lab.socket.exists)

    async def ignore(_line: object) -> None:
        pass

    link, _ = await Link.connect(str(lab.socket), ignore)
    reading = asyncio.create_task(link.run())
    try:
        queued = await link.ask(f"neighbor {UNREACHABLE} announce route {A} next-hop self")
        assert queued.ok
        lab.write_configuration(session(UNREACHABLE), session(SECOND))
        await link.ask("reload", alone=True)

        async def is_running() -> bool:
            shown = await link.ask("show neighbor configuration", alone=True)
            return any(f"neighbor {SECOND} " in line for line in shown.lines)

        await eventually(is_running, 3)
    finally:
        reading.cancel()
        link.close()


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param("neighbor 198.19.8.3 {\n  nonsense 1;\n}\n", id="unknown word"),
        pytest.param("neighbor 198.19.8.3 {\n  peer-as 64512;\n", id="cut off"),
        pytest.param("neighbor 198.19.8.3 {\n  peer-as 64512;\n}\n", id="incomplete peer"),
    ],
)
async def test_broken_file_does_no_harm(lab: SpeakerLab, broken: str) -> None:
    """A file ExaBGP refuses changes nothing, and the good one after it takes effect."""
    first, _ = lab.bird("p1", FIRST), lab.bird("p2", SECOND)
    lab.write_configuration(session(FIRST))
    lab.exabgp()
    async with Listener(lab) as listener:
        for peer in (FIRST, SECOND):
            listener.speaker.advertise(peer, wanted(A))
        await eventually(lambda: listener.is_settled(FIRST), 15)
        up_since = first.since
        good = lab.configuration.read_text()
        header = f"# cymric-peer {SECOND} x\n\nprocess"
        lab.install(good.replace("\nprocess", header, 1) + broken)
        await eventually(lambda: "configuration refused" in lab.exabgp_log)
        lab.write_configuration(session(FIRST), session(SECOND))
        await eventually(lambda: listener.is_settled(SECOND), 20)
        assert first.since == up_since
        await eventually(lambda: first.routes().keys() == {A})


async def test_missing_file_does_no_harm(lab: SpeakerLab) -> None:
    """A reload signalled while the file is away keeps sessions and the relay."""
    first = lab.bird("p1", FIRST)
    lab.write_configuration(session(FIRST))
    exabgp = lab.exabgp()
    async with Listener(lab) as listener:
        listener.speaker.advertise(FIRST, wanted(A))
        await eventually(lambda: listener.is_settled(FIRST), 15)
        up_since, relay = first.since, lab.relay_pid(exabgp)
        text = lab.configuration.read_text()
        lab.configuration.unlink()
        exabgp.send_signal(signal.SIGUSR1)
        await eventually(lambda: "configuration refused" in lab.exabgp_log)
        lab.install(text)
        listener.speaker.advertise(FIRST, wanted(B))
        await eventually(lambda: first.routes().keys() == {B})
        assert (first.since, lab.relay_pid(exabgp)) == (up_since, relay)


async def test_removed_peer_keeps_none_of_our_routes(lab: SpeakerLab) -> None:
    """Under graceful restart too, a peer that is removed has lost our routes a moment later."""
    first, second = lab.bird("p1", FIRST), lab.bird("p2", SECOND)
    lab.write_configuration(session(FIRST), session(SECOND))
    lab.exabgp()
    async with Listener(lab) as listener:
        for peer in (FIRST, SECOND):
            listener.speaker.advertise(peer, wanted(A, B))
        await eventually(lambda: listener.is_settled(FIRST) and listener.is_settled(SECOND), 15)
        up_since = first.since
        lab.write_configuration(session(FIRST))
        await eventually(lambda: not second.is_up, 10)
        assert second.routes() == {}
        assert (first.since, first.routes().keys()) == (up_since, {A, B})
        # Added again, it gets them again.
        lab.write_configuration(session(FIRST), session(SECOND))
        await eventually(lambda: listener.is_settled(SECOND), 30)
        await eventually(lambda: second.routes().keys() == {A, B})


async def test_changed_session_restarts_alone(lab: SpeakerLab) -> None:
    """Another restart time renews that one session and no other."""
    first, second = lab.bird("p1", FIRST), lab.bird("p2", SECOND)
    lab.write_configuration(session(FIRST), session(SECOND))
    lab.exabgp()
    async with Listener(lab) as listener:
        for peer in (FIRST, SECOND):
            listener.speaker.advertise(peer, wanted(A, B))
        await eventually(lambda: listener.is_settled(FIRST) and listener.is_settled(SECOND), 15)
        up_since = first.since
        lab.write_configuration(session(FIRST), session(SECOND, restart_time_s=33))
        await eventually(lambda: "Restart time: 33" in second.ask("show protocols all cymric"), 15)
        await eventually(lambda: listener.is_settled(SECOND), 20)
        await eventually(lambda: second.routes().keys() == {A, B})
        assert first.since == up_since


async def test_speaker_without_sessions_runs_and_gains_one(lab: SpeakerLab) -> None:
    """An empty file is enough to run, and a router that knocks early is let in when configured."""
    first = lab.bird("p1", FIRST)
    lab.write_configuration()
    exabgp = lab.exabgp()
    async with Listener(lab) as listener:
        listener.speaker.advertise(FIRST, wanted(A))
        await eventually(lambda: listener.speaker.status().connected)
        await eventually(lambda: "Received: " in first.ask("show protocols all cymric"), 10)
        lab.write_configuration(session(FIRST))
        await eventually(lambda: listener.is_settled(FIRST), 20)
        await eventually(lambda: first.routes().keys() == {A})
        assert exabgp.poll() is None


async def test_launcher_waits_for_its_file(lab: SpeakerLab) -> None:
    """Without a file, or with one that ExaBGP refuses, the launcher waits and says so."""
    first = lab.bird("p1", FIRST)
    exabgp = lab.exabgp()
    await eventually(lambda: "waiting for the configuration" in lab.exabgp_log)
    lab.install("# cymric-listen 0.0.0.0 179\nnonsense;\n")
    await eventually(lambda: "configuration refused" in lab.exabgp_log)
    assert exabgp.poll() is None
    lab.write_configuration(session(FIRST))
    async with Listener(lab) as listener:
        await eventually(lambda: listener.told(SessionUp, FIRST), 15)
        assert first.is_up


async def test_launcher_ends_cleanly(lab: SpeakerLab) -> None:
    """SIGTERM ends it with exit code 0, before and after ExaBGP started, and takes the relay."""
    waiting = lab.exabgp()
    await eventually(lambda: "waiting for the configuration" in lab.exabgp_log)
    waiting.terminate()
    assert waiting.wait(5) == 0
    lab.write_configuration(session(FIRST))
    running = lab.exabgp()
    await eventually(lab.socket.exists)
    relay = lab.relay_pid(running)
    running.terminate()
    assert running.wait(10) == 0
    await eventually(lambda: not Path(f"/proc/{relay}").exists())


async def test_listen_port_changes_with_the_file(lab: SpeakerLab) -> None:
    """A new listen port in the file is bound by the next reload, without a restart."""
    first = lab.bird("p1", FIRST, extra="neighbor port 1790;")
    passive = session(FIRST, is_passive=True)
    lab.write_configuration(passive)
    lab.exabgp()
    async with Listener(lab) as listener:
        await eventually(lambda: listener.speaker.status().connected)
        assert not first.is_up
        lab.write_configuration(session(FIRST, is_passive=True, restart_time_s=60), port=1790)
        await eventually(lambda: listener.told(SessionUp, FIRST), 15)
