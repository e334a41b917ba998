"""bgpd and ExaBGP against a peer that sends broken attributes (RFC 7606)."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fv import hostile_peer
from tests.fv.test_bgpd_routes import (
    OTHER,
    OTHER_BLOCK,
    OWN_BLOCK,
    ROUTER,
    ROUTER_ASN,
    THIRD,
    Lab,
    other,
)
from tests.support.eventually import eventually

pytestmark = [pytest.mark.root, pytest.mark.peers]

ORIGIN, AS_PATH = bytes.fromhex("40010100"), bytes.fromhex("40020602010000fd84")
NEXT_HOP, MED = bytes.fromhex("400304c6130809"), bytes.fromhex("80040400000007")
NLRI = bytes.fromhex("1ac6131080")  # THIRD

BROKEN = {
    "an origin that does not exist": bytes.fromhex("40010109") + AS_PATH + NEXT_HOP,
    "a MED of three bytes": ORIGIN + AS_PATH + NEXT_HOP + bytes.fromhex("800403000007"),
    "communities cut short": ORIGIN + AS_PATH + NEXT_HOP + bytes.fromhex("c00803000107"),
    "no next hop": ORIGIN + AS_PATH,
}


def update(attributes: bytes) -> str:
    """An UPDATE's body that announces THIRD."""
    return (b"\0\0" + len(attributes).to_bytes(2, "big") + attributes + NLRI).hex()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, name=f"cybr-{secrets.token_hex(2)}")
    try:
        yield made
    finally:
        made.close()


class Hostile:
    """The peer at ROUTER."""

    def __init__(self, lab: Lab) -> None:
        lab.attach("router", ROUTER)
        words = [sys.executable, hostile_peer.__file__, ROUTER, str(ROUTER_ASN)]
        command = [*lab._in("router"), *words]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def say(self, body: str) -> None:
        """Send an UPDATE."""
        assert self.process.stdin is not None
        self.process.stdin.write(body + "\n")
        self.process.stdin.flush()


@pytest.fixture
def hostile(lab: Lab) -> Iterator[Hostile]:
    peer = Hostile(lab)
    try:
        yield peer
    finally:
        peer.process.kill()
        peer.process.communicate()


@pytest.mark.parametrize("what", BROKEN)
async def test_broken_attributes(lab: Lab, hostile: Hostile, what: str) -> None:
    """The route with the broken attribute goes; all other routes and sessions stay."""
    await lab.fill()
    other(lab, OTHER_BLOCK)
    lab.exabgp()
    normal = {OWN_BLOCK, OTHER_BLOCK}
    async with lab.bgpd():
        await eventually(lambda: lab.kernel().keys() == normal, 60)
        await eventually(lambda: _is_up(lab, ROUTER), 60)
        hostile.say(update(ORIGIN + AS_PATH + NEXT_HOP + MED))
        await eventually(lambda: lab.kernel().keys() == normal | {THIRD}, 30)
        hostile.say(update(BROKEN[what]))
        await eventually(lambda: lab.kernel().keys() == normal, 30)
        assert await _is_up(lab, OTHER)
        assert await _is_up(lab, ROUTER)


async def _is_up(lab: Lab, address: str) -> bool:
    peers = (await lab.status())["peers"]
    assert isinstance(peers, list)
    return any(one["address"] == address and one["state"] == "up" for one in peers)
