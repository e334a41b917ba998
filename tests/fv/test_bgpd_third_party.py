"""A top-of-rack router that peers with one of two nodes sends straight to the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bgp_node import BgpNode
from tests.support.bird import BirdRouter
from tests.support.eventually import eventually
from tests.support.frr import Frr
from tests.support.routing import block, node, peer, pool, store
from tests.support.underlay import Host, Underlay, run

pytestmark = [pytest.mark.root, pytest.mark.peers]

ASN, TOR_ASN, PATIENCE_S = 64512, 64900, 60
OWN, OTHERS = "198.19.16.0/26", "198.19.16.64/26"


@pytest.fixture
def underlay(tmp_path: Path) -> Iterator[Underlay]:
    made = Underlay(tmp_path, prefix="cyb2-")
    try:
        yield made
    finally:
        made.close()


async def cluster(underlay: Underlay, tor: Host) -> BgpNode:
    """Our node and, in the mesh with it, another that BIRD plays; the router knows ours alone."""
    us, other = underlay.host("us", 1), underlay.host("other", 2)
    BirdRouter.start(
        underlay,
        other,
        f"protocol static {{ ipv4; route {OTHERS} blackhole; }}\n"
        f"protocol bgp mesh {{ local {other.v4} as {ASN}; neighbor {us.v4} as {ASN};\n"
        "  ipv4 { import all; export where source = RTS_STATIC; }; }\n",
    )
    made = BgpNode(underlay, us)
    nodes = node("us", f"{us.v4}/20"), node("other", f"{other.v4}/20")
    await store(made.store, *nodes, peer(tor.v4, TOR_ASN), pool())
    await store(made.store, block(OWN, "us"), block(OTHERS, "other"))
    return made


def ways(tor: Host) -> dict[str, str]:
    """The router's kernel routes to the blocks: gateway by prefix."""
    lines = run(*tor.enter, "ip", "route", "show").splitlines()
    words = [line.split() for line in lines if " via " in line]
    return {line[0]: line[line.index("via") + 1] for line in words}


async def test_bird(underlay: Underlay) -> None:
    """BIRD installs the other node's block through that node, with our AS and the MED."""
    tor = underlay.host("tor", 9)
    made = await cluster(underlay, tor)
    bird = BirdRouter.start(
        underlay,
        tor,
        "protocol direct { ipv4; }\n"
        "protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }\n"
        f"protocol bgp node {{ local {tor.v4} as {TOR_ASN}; neighbor {made.host.v4} as {ASN};\n"
        "  ipv4 { import all; export none; }; }\n",
    )
    async with made.running():
        await eventually(lambda: ways(tor) == {OWN: "198.19.0.1", OTHERS: "198.19.0.2"}, PATIENCE_S)
        heard = bird.routes("node")[OTHERS]
        assert f"BGP.as_path: {ASN}\n" in heard
        assert "BGP.med: 100" in heard


async def test_frr(underlay: Underlay) -> None:
    """FRR does likewise."""
    tor = underlay.host("tor", 9)
    made = await cluster(underlay, tor)
    Frr.start(
        underlay,
        tor,
        f"router bgp {TOR_ASN}\n bgp router-id {tor.v4}\n no bgp ebgp-requires-policy\n"
        f" neighbor {made.host.v4} remote-as {ASN}\n",
    )
    async with made.running():
        await eventually(lambda: ways(tor) == {OWN: "198.19.0.1", OTHERS: "198.19.0.2"}, PATIENCE_S)
