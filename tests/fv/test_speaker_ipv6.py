"""An IPv6 session of a real ExaBGP with BIRD: both directions, End-of-RIB, refresh, restart."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from bgpd.announcement import IPV6_UNICAST, Announcement, PathAttributes
from bgpd.speaker import EndOfRIB, RefreshEnd, RoutesReceived, SessionUp
from tests.fv.speaker_lab import OUR_ASN, Bird, Listener, SpeakerLab, run, session
from tests.support.eventually import eventually

pytestmark = [pytest.mark.root, pytest.mark.peers]

OURS, PEER, PEER_ID = "fd00:8::1", "fd00:8::2", "198.19.8.2"
A, B, THEIRS = "fd00:16::/64", "fd00:17::/64", "fd00:20::/64"


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[SpeakerLab]:
    built = SpeakerLab(tmp_path)
    try:
        yield built
    finally:
        built.close()


def ipv6_bird(lab: SpeakerLab) -> Bird:
    """BIRD with one IPv6 session, which we start."""
    lab.attach("p6", PEER_ID)
    for name, address in (("us", OURS), ("p6", PEER)):
        run(
            "nsenter", f"--net=/run/netns/{lab.name}-{name}",
            "ip", "-6", "addr", "add", f"{address}/64", "dev", "eth0", "nodad",
        )  # fmt: skip
    directory = lab.directory / "p6"
    directory.mkdir()
    path, socket = directory / "bird.conf", directory / "bird.ctl"
    path.write_text(
        f"router id {PEER_ID};\nprotocol device {{}}\n"
        f"protocol static st {{\n  ipv6;\n  route {THEIRS} blackhole;\n}}\n"
        f"protocol bgp cymric {{\n  local {PEER} as {OUR_ASN};\n"
        f"  neighbor {OURS} as {OUR_ASN};\n  passive on; graceful restart on;\n"
        "  ipv6 { import all; export where source = RTS_STATIC; };\n}\n"
    )
    process = lab.start(
        "p6", "bird", "-f", "-c", str(path), "-s", str(socket), "-P", str(directory / "pid"),
        log=directory / "output",
    )  # fmt: skip
    bird = Bird("p6", PEER, f"{lab.name}-p6", socket, path, process)
    lab.birds["p6"] = bird
    return bird


async def test_routes_both_ways_and_through_a_restart(lab: SpeakerLab) -> None:
    """Routes arrive and End-of-RIB after them; ExaBGP's restart leaves ours at the peer."""
    bird = ipv6_bird(lab)
    lab.write_configuration(
        replace(
            session(PEER_ID),
            name="Global_v6",
            peer_address=ip_address(PEER),
            local_address=ip_address(OURS),
        )
    )
    exabgp = lab.exabgp()

    def held() -> set[str]:
        text = bird.ask("show route protocol cymric")
        return {word for word in text.split() if word in (A, B)}

    async with Listener(lab) as listener:
        speaker = listener.speaker

        def advertise(*prefixes: str) -> None:
            attributes = PathAttributes(local_pref=200)
            speaker.advertise(PEER, {one: Announcement(one, OURS, attributes) for one in prefixes})

        advertise(A, B)
        await eventually(lambda: listener.is_settled(PEER), 30)
        await eventually(lambda: held() == {A, B}, 30)
        (up,) = listener.told(SessionUp)
        assert (up.families, up.restart_time_s) == (frozenset({IPV6_UNICAST}), 120)
        # The relay may have been there before us; a refresh repeats what it could not tell.
        speaker.request_refresh(PEER)
        await eventually(lambda: listener.told(RefreshEnd, PEER), 30)
        (ended,) = listener.told(RefreshEnd, PEER)[:1]
        assert ended.family == IPV6_UNICAST
        received = [e for e in listener.told(RoutesReceived, PEER) if e.announced][-1]
        assert received.announced == (Announcement(THEIRS, PEER, PathAttributes(local_pref=100)),)

        exabgp.kill()
        exabgp.wait()
        advertise(B)
        assert A in held(), "the peer waits for us to come back"
        lab.exabgp()
        await eventually(lambda: len(listener.told(SessionUp)) == 2, 60)
        await eventually(lambda: listener.is_settled(PEER), 30)
        await eventually(lambda: held() == {B}, 30)
        await eventually(lambda: EndOfRIB(PEER, IPV6_UNICAST) in listener.events, 30)
