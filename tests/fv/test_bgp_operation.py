"""What an operator sees and does, on a real ExaBGP and a real BIRD: `cymric bgp`, BIRD's control
socket, and a drain as the peer hears it.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bgpd import drain
from cymric.cli.node_drain import drain_node, undrain_node
from tests.fv.speaker_lab import run
from tests.fv.test_bgpd_routes import OTHER, OTHER_BLOCK, OWN_BLOCK, Lab, other, remove_router
from tests.support.eventually import eventually

pytestmark = [pytest.mark.root, pytest.mark.peers]

OUTSIDE = "192.0.2.0/24"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, name=f"cybo-{secrets.token_hex(2)}")
    try:
        yield made
    finally:
        made.close()


async def cymric(lab: Lab, *words: str) -> Any:
    """What the command line prints as JSON."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "cymric.cli.main", *words, "-o", "json",
        env={**os.environ, "CYMRIC_RUN_DIR": str(lab.run_directory), "CYMRIC_NODE_NAME": "us"},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(60):
        printed, _ = await process.communicate()
    assert process.returncode == 0, printed
    return msgspec.json.decode(printed)


async def show_protocols(lab: Lab) -> list[str]:
    """The line of the session with the other node on our socket, as birdc shows it."""
    text = await asyncio.to_thread(
        run, "birdc", "-s", str(lab.run_directory / "bird.ctl"), "show", "protocols"
    )
    name = f"Mesh_{OTHER.replace('.', '_')}"
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return line.split()


async def test_what_the_operator_sees(lab: Lab) -> None:
    """Peers, what they sent and were told and why, agree with BIRD; so does our `show protocols`;
    a session that somebody shuts down over there is told with that cause, and their message.
    """
    await lab.fill()
    await remove_router(lab)
    bird = other(lab, OTHER_BLOCK, OUTSIDE)
    lab.exabgp()
    async with lab.bgpd():
        await eventually(lambda: OTHER_BLOCK in lab.kernel(), 60)
        await eventually(lambda: bird.routes().keys() == {OWN_BLOCK}, 30)

        received = (await cymric(lab, "bgp", "received", "other"))["routes"]
        assert {row["prefix"]: row["rejected"] for row in received} == {
            OTHER_BLOCK: "",
            OUTSIDE: "outside pools and service ranges",
        }
        (told,) = (await cymric(lab, "bgp", "advertised", OTHER))["routes"]
        assert (told["prefix"], told["why"]) == (OWN_BLOCK, "block of this node")
        why = await cymric(lab, "bgp", "why", OTHER_BLOCK)
        assert [(path["peer"], path["used"]) for path in why["paths"]] == [(OTHER, True)]
        (peer,) = await cymric(lab, "bgp", "peers")
        assert (peer["state"], peer["received"], peer["accepted"]) == ("up", 2, 1)
        assert peer["families"] == ["ipv4 unicast"]
        await eventually(lambda: _is_confirmed(lab), 30)

        words = await show_protocols(lab)
        assert words[1:4] == ["BGP", "master", "up"]
        assert words[5:] == ["Established"]

        await asyncio.to_thread(bird.ask, "disable cymric")
        await eventually(lambda: _is_down(lab), 60)
        (peer,) = await cymric(lab, "bgp", "peers")
        assert peer["last_error"].startswith("administrative shutdown, the peer ended it"), peer
        assert peer["flaps"] == 1
        words = await show_protocols(lab)
        assert words[3] == "start"
        assert "Administrative shutdown" in " ".join(words)


async def _is_confirmed(lab: Lab) -> bool:
    (peer,) = (await cymric(lab, "bgp", "diff"))["peers"]
    return bool(peer["wanted"] == peer["confirmed"] == 1 and peer["missing"] == 0)


async def _is_down(lab: Lab) -> bool:
    (peer,) = await cymric(lab, "bgp", "peers")
    return bool(peer["state"] == "start")


async def test_a_drain_as_the_peer_hears_it(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a reboot the peer hears the block with GRACEFUL_SHUTDOWN and the lowest preference, then
    its withdrawal, as no pod lives in it; after `undrain` the block as ever. The session stays.
    """
    monkeypatch.setattr(drain, "MOVE_S", 5.0)
    await lab.fill()
    await remove_router(lab)
    bird = other(lab, OTHER_BLOCK)
    lab.exabgp()
    async with lab.bgpd():
        await eventually(lambda: bird.routes().keys() == {OWN_BLOCK}, 60)
        since = bird.since
        draining = asyncio.create_task(drain_node(lab.store, "us", "reboot", 120.0))
        await eventually(lambda: "(65535,0)" in bird.routes().get(OWN_BLOCK, ""), 60)
        assert "BGP.local_pref: 0\n" in bird.routes()[OWN_BLOCK]
        assert not draining.done()
        await draining
        assert not bird.routes()
        await undrain_node(lab.store, "us", 60.0)
        await eventually(lambda: bird.routes().keys() == {OWN_BLOCK}, 60)
        assert "BGP.local_pref: 2147482623" in bird.routes()[OWN_BLOCK]
        assert "65535" not in bird.routes()[OWN_BLOCK]
        assert bird.since == since
