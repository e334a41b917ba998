"""What a BGPPeer and the cluster say about reaching and believing a peer, against a real BIRD."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cymric.datastore.api import delete, put
from cymric.model.keys import ResourceKey
from tests.support.bgp_node import BgpNode
from tests.support.bird import BirdRouter
from tests.support.eventually import eventually
from tests.support.frr import Frr
from tests.support.routing import block, pool, store
from tests.support.underlay import Host, Underlay, run

pytestmark = [pytest.mark.root, pytest.mark.peers]

PATIENCE_S = 60.0
POOL, OURS, THEIRS = "198.19.16.0/24", "198.19.16.0/26", "198.19.16.64/26"
TOR_ASN, CLUSTER_ASN = 64900, 64512


@pytest.fixture
def underlay(tmp_path: Path) -> Iterator[Underlay]:
    made = Underlay(tmp_path, prefix="cybe-")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
async def us(underlay: Underlay) -> BgpNode:
    """Our node, with a block and no mesh."""
    made = BgpNode(underlay, underlay.host("us", 1))
    await resource(made, "Node", "us", {"bgp": {"ipv4Address": f"{made.host.v4}/20"}})
    await cluster(made)
    await store(made.store, pool(POOL), block(OURS, "us"))
    return made


async def resource(us: BgpNode, kind: str, name: str, spec: dict[str, Any]) -> None:
    """Store an object as calicoctl would."""
    tree = {"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": {"name": name}}
    await put(us.store, str(ResourceKey(kind, name)), json.dumps({**tree, "spec": spec}).encode())


async def cluster(us: BgpNode, **spec: Any) -> None:
    """The cluster's settings."""
    await resource(us, "BGPConfiguration", "default", {"nodeToNodeMeshEnabled": False, **spec})


async def tor_peer(us: BgpNode, address: str, **spec: Any) -> None:
    """The router as a BGPPeer."""
    await resource(us, "BGPPeer", "tor", {"peerIP": address, "asNumber": TOR_ASN, **spec})


def router(
    underlay: Underlay, host: Host, *, own: str = "", neighbor: str = "", more: str = "", out: str
) -> BirdRouter:
    """A BIRD that announces THEIRS, worked over by the statements `out`."""
    text = f"""
protocol static st {{ ipv4; route {THEIRS} blackhole; }}
protocol bgp ours {{
  local {own or host.v4} as {TOR_ASN};
  neighbor {neighbor or "198.19.0.1"} as {CLUSTER_ASN};
  {more}
  connect delay time 1; connect retry time 1; error wait time 1, 2;
  ipv4 {{ import all; export filter {{ {out} accept; }}; }};
}}
"""
    return BirdRouter.start(underlay, host, text)


def inside(host: Host, *words: str) -> str:
    """What `ip` prints on a host."""
    return run(*host.enter, "ip", *words)


async def test_peer_behind_a_gateway(underlay: Underlay, us: BgpNode) -> None:
    """`reachableBy` alone makes the session possible; what it brings goes the same way; its route
    is ours and goes with the peer.
    """
    gateway, tor = underlay.host("gw", 2), underlay.host("tor", 9)
    inside(gateway, "link", "add", "rack0", "type", "veth",
           "peer", "name", "rack1", "netns", tor.namespace)  # fmt: skip
    inside(gateway, "addr", "add", "198.19.15.1/24", "dev", "rack0")
    inside(gateway, "link", "set", "rack0", "up")
    run(*gateway.enter, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    inside(tor, "addr", "flush", "dev", "eth0")
    inside(tor, "addr", "add", "198.19.15.9/24", "dev", "rack1")
    inside(tor, "link", "set", "rack1", "up")
    inside(tor, "route", "add", f"{us.host.v4}/32", "via", "198.19.15.1")
    bird = router(underlay, tor, own="198.19.15.9", more="multihop 2;", out="")
    await tor_peer(us, "198.19.15.9", reachableBy=gateway.v4)

    def way(*to: str) -> str:
        return inside(us.host, "route", "show", "proto", "179", *to)

    async with us.running():
        await eventually(lambda: bird.is_up("ours"), PATIENCE_S)
        await eventually(lambda: f"via {gateway.v4} " in way("198.19.15.9"), PATIENCE_S)
        await eventually(lambda: f"via {gateway.v4} " in way(THEIRS), PATIENCE_S)
        await eventually(lambda: OURS in bird.routes("ours"), PATIENCE_S)
        await delete(us.store, str(ResourceKey("BGPPeer", "tor")))
        await eventually(lambda: not way("198.19.15.9"), PATIENCE_S)
        assert OURS in way()


async def test_own_as_in_the_path(underlay: Underlay, us: BgpNode) -> None:
    """A path with our AS is a loop, unless numAllowedLocalASNumbers says otherwise; a change of
    that is followed without touching the session.
    """
    tor = underlay.host("tor", 9)
    bird = router(underlay, tor, out=f"bgp_path.prepend({CLUSTER_ASN});")
    await tor_peer(us, tor.v4)

    async def why() -> str:
        paths = (await us.ask(f"why {THEIRS}"))["paths"]
        return "".join(str(path["rejected"]) or "used" for path in paths)

    async with us.running():
        await eventually(lambda: bird.is_up("ours"), PATIENCE_S)
        since = bird.since("ours")
        for allowed, expected in ((0, "own AS"), (1, "used"), (0, "own AS")):
            await tor_peer(us, tor.v4, numAllowedLocalASNumbers=allowed)

            async def is_so(expected: str) -> bool:
                return expected in await why()

            await eventually(partial(is_so, expected), PATIENCE_S, what=expected)
            is_used = expected == "used"
            await eventually(
                lambda is_used=is_used: (THEIRS in us.kernel()) is is_used,  # type: ignore[misc]
                PATIENCE_S,
            )
        assert bird.since("ours") == since


async def test_source_address_left_to_the_kernel(underlay: Underlay, us: BgpNode) -> None:
    """With sourceAddress None we connect from the address that the kernel's route names."""
    tor = underlay.host("tor", 9)
    inside(us.host, "addr", "add", "198.19.0.101/20", "dev", "eth0")
    inside(us.host, "route", "add", f"{tor.v4}/32", "dev", "eth0", "src", "198.19.0.101")
    bird = router(underlay, tor, neighbor="198.19.0.101", more="passive on;", out="")
    await tor_peer(us, tor.v4)
    async with us.running():
        refused = "Unexpected connect from unknown address 198.19.0.1 "
        messages = tor.directory / "bird.messages"
        await eventually(lambda: refused in messages.read_text(), PATIENCE_S)
        await tor_peer(us, tor.v4, sourceAddress="None")
        await eventually(lambda: bird.is_up("ours"), PATIENCE_S)
        await eventually(lambda: "via 198.19.0.1 " in bird.routes("ours").get(OURS, ""), PATIENCE_S)
        await eventually(lambda: THEIRS in us.kernel(), PATIENCE_S)


async def test_ignored_interfaces(underlay: Underlay, us: BgpNode) -> None:
    """A next hop that only an ignored interface leads to is none; the rest is as it was."""
    tor = underlay.host("tor", 9)
    inside(us.host, "link", "add", "side0", "type", "veth", "peer", "name", "other")
    inside(us.host, "addr", "add", "203.0.113.1/24", "dev", "side0")
    for name in ("side0", "other"):
        inside(us.host, "link", "set", name, "up")
    bird = router(underlay, tor, out="bgp_next_hop = 203.0.113.9;")
    await tor_peer(us, tor.v4)
    async with us.running():
        await eventually(lambda: THEIRS in us.kernel(), PATIENCE_S)
        since = bird.since("ours")
        for patterns in (["docker*", "side?"], []):
            await cluster(us, ignoredInterfaces=patterns)
            await eventually(
                lambda patterns=patterns: (THEIRS in us.kernel()) is not bool(patterns),  # type: ignore[misc]
                PATIENCE_S,
            )
        assert bird.since("ours") == since


@pytest.mark.parametrize("kind", ["bird", "frr"])
async def test_peer_that_offers_add_path(underlay: Underlay, us: BgpNode, kind: str) -> None:
    """A router offers several paths per prefix (RFC 7911), we do not: the best one comes."""
    tor = underlay.host("tor", 9)
    # Two paths to one prefix, so that there is something to add.
    for number, host in ((1, underlay.host("one", 10)), (2, underlay.host("two", 11))):
        BirdRouter.start(underlay, host, f"""
protocol static st {{ ipv4; route {THEIRS} blackhole; }}
protocol bgp up {{
  local {host.v4} as {65000 + number}; neighbor {tor.v4} as {TOR_ASN};
  connect delay time 1; connect retry time 1; error wait time 1, 2;
  ipv4 {{ import none; export all; }};
}}
""")  # fmt: skip
    await tor_peer(us, tor.v4)
    offers = partial(START[kind], underlay, tor, us.host.v4)
    async with us.running():
        is_up, from_us, is_offered = offers()
        await eventually(is_up, PATIENCE_S)
        assert is_offered()
        await eventually(lambda: from_us(OURS), PATIENCE_S)
        await eventually(lambda: THEIRS in us.kernel(), PATIENCE_S)
        answer = await us.ask(f"why {THEIRS}")
        assert [path["as_path"][0][0] for path in answer["paths"]] == [TOR_ASN]
        assert len(answer["paths"][0]["as_path"][0]) == 2


Router = tuple[Callable[[], bool], Callable[[str], bool], Callable[[], bool]]


def start_bird(underlay: Underlay, tor: Host, us: str) -> Router:
    """Whether the session is up, whether a prefix came from us, whether ADD-PATH was offered."""
    sessions = "".join(
        f"""
protocol bgp {name} {{
  local {tor.v4} as {TOR_ASN}; neighbor {address} as {asn};
  connect delay time 1; connect retry time 1; error wait time 1, 2;
  ipv4 {{ import all; export all; add paths on; }};
}}
"""
        for name, address, asn in (
            ("ours", us, CLUSTER_ASN), ("b1", "198.19.0.10", 65001), ("b2", "198.19.0.11", 65002),
        )
    )  # fmt: skip
    bird = BirdRouter.start(underlay, tor, sessions)
    return (
        lambda: bird.is_up("ours") and bird.is_up("b1") and bird.is_up("b2"),
        lambda prefix: prefix in bird.routes("ours"),
        lambda: "ADD-PATH" in bird.ask("show protocols all ours"),
    )


def start_frr(underlay: Underlay, tor: Host, us: str) -> Router:
    """The same."""
    others = "".join(
        f" neighbor {address} remote-as {asn}\n neighbor {address} timers connect 1\n"
        for address, asn in (("198.19.0.10", 65001), ("198.19.0.11", 65002))
    )
    frr = Frr.start(underlay, tor, f"""\
router bgp {TOR_ASN}
 bgp router-id {tor.v4}
 no bgp ebgp-requires-policy
 neighbor {us} remote-as {CLUSTER_ASN}
 neighbor {us} timers connect 1
{others} address-family ipv4 unicast
  neighbor {us} addpath-tx-all-paths
 exit-address-family
""")  # fmt: skip
    return (
        lambda: all(frr.is_up(peer) for peer in (us, "198.19.0.10", "198.19.0.11")),
        lambda prefix: prefix in frr.routes(),
        lambda: "advertised" in str(frr.neighbor(us)["neighborCapabilities"]["addPath"]).lower(),
    )


START: dict[str, Callable[[Underlay, Host, str], Router]] = {"bird": start_bird, "frr": start_frr}
