"""Two racks with a router between them: next hops that are reached through it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cymric.model.resources import Node, NodeBGPSpec, NodeSpec, ObjectMeta
from tests.support.bgp_node import BgpNode
from tests.support.bird import BirdRouter
from tests.support.eventually import eventually
from tests.support.routing import block, configuration, node, peer, pool, store
from tests.support.underlay import Host, Underlay, run

pytestmark = [pytest.mark.root, pytest.mark.peers]

ASN, CLUSTER, PATIENCE_S = 64512, "1.0.0.1", 60
US, NEAR, FAR = "198.19.0.1", "198.19.0.2", "198.19.1.3"
ROUTER, OTHER_WAY, ROUTER_FAR = "198.19.0.254", "198.19.0.253", "198.19.1.254"
OWN, NEAR_BLOCK, FAR_BLOCK = "198.19.16.0/26", "198.19.16.64/26", "198.19.16.128/26"
NEAR_POD, FAR_POD = "198.19.16.65", "198.19.16.129"

CLIENT = f"""
protocol direct {{ ipv4; }}
protocol kernel {{ learn; ipv4 {{ import all; export where source = RTS_BGP; }}; }}
protocol static {{ ipv4; route BLOCK blackhole; }}
protocol bgp reflector {{
  local ADDRESS as {ASN}; neighbor {US} as {ASN}; multihop;
  ipv4 {{ gateway recursive; import all; export where proto = "static1"; }};
}}
"""


@dataclass
class Racks:
    """`us` reflects in one rack, `near` beside it, `far` in the other; `router` has a leg in both,
    and two addresses in ours.
    """

    us: BgpNode
    near: Host
    far: Host
    router: Host


@pytest.fixture
def racks(tmp_path: Path) -> Iterator[Racks]:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one = Underlay(tmp_path / "one", prefix="cyb2-")
    try:
        two = Underlay(tmp_path / "two", prefix="cyb2-")
        try:
            yield _build(one, two)
        finally:
            two.close()
    finally:
        one.close()


def _build(one: Underlay, two: Underlay) -> Racks:
    us, near, router = one.host("us", 1), one.host("near", 2), one.host("router", 254)
    far, leg = two.host("far", 3), two.host("leg", 254)
    for host, address in ((us, US), (near, NEAR), (far, FAR), (router, ROUTER)):
        run(*host.enter, "ip", "address", "flush", "dev", "eth0", "scope", "global")
        run(*host.enter, "ip", "address", "add", f"{address}/24", "dev", "eth0")
    run(*router.enter, "ip", "address", "add", f"{OTHER_WAY}/24", "dev", "eth0")
    run(*leg.enter, "ip", "link", "set", "eth0", "name", "eth1", "netns", router.namespace)
    run(*router.enter, "ip", "address", "add", f"{ROUTER_FAR}/24", "dev", "eth1")
    run(*router.enter, "ip", "link", "set", "eth1", "up")
    run(*router.enter, "sysctl", "-qw", "net.ipv4.ip_forward=1")
    for host, gateway in ((us, ROUTER), (near, ROUTER), (far, ROUTER_FAR)):
        run(*host.enter, "ip", "route", "add", "default", "via", gateway)
    # The router knows the pods' blocks, as a router of the underlay that speaks BGP would.
    run(*router.enter, "ip", "route", "add", NEAR_BLOCK, "via", NEAR)
    run(*router.enter, "ip", "route", "add", FAR_BLOCK, "via", FAR)
    for underlay, host, address, pods, pod in (
        (one, near, NEAR, NEAR_BLOCK, NEAR_POD),
        (two, far, FAR, FAR_BLOCK, FAR_POD),
    ):
        run(*host.enter, "ip", "address", "add", f"{pod}/32", "dev", "lo")
        BirdRouter.start(underlay, host, CLIENT.replace("ADDRESS", address).replace("BLOCK", pods))
    return Racks(BgpNode(one, us), near, far, router)


async def fill(us: BgpNode) -> None:
    """The cluster: no mesh, we reflect for both."""
    bgp = NodeBGPSpec(ipv4_address=f"{US}/24", route_reflector_cluster_id=CLUSTER)
    reflector = Node(metadata=ObjectMeta(name="us"), spec=NodeSpec(bgp=bgp))
    others = node("near", f"{NEAR}/24"), node("far", f"{FAR}/24")
    peers = peer(NEAR, ASN, name="near"), peer(FAR, ASN, name="far")
    await store(us.store, reflector, *others, *peers, pool())
    await store(us.store, configuration(nodeToNodeMeshEnabled=False))
    blocks = block(OWN, "us"), block(NEAR_BLOCK, "near"), block(FAR_BLOCK, "far")
    await store(us.store, *blocks)


def way(host: Host, prefix: str) -> str:
    """The gateway of a host's route to exactly that prefix."""
    words = run(*host.enter, "ip", "route", "show", prefix).split()
    return words[words.index("via") + 1] if "via" in words else ""


def answers(host: Host, source: str, pod: str) -> bool:
    """Whether a pod's address answers to one ping."""
    command = [*host.enter, "ping", "-n", "-c", "1", "-W", "2", "-I", source, pod]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


async def test_blocks_of_another_rack(racks: Racks) -> None:
    """A block whose owner is in another rack is reached through the router on the way to it, here
    and where we reflect to; it follows when the underlay is routed otherwise, is out of the
    decision while its owner cannot be reached, with the reason, and comes back.
    """
    us = racks.us
    await fill(us)
    async with us.running():
        await eventually(lambda: way(us.host, FAR_BLOCK) == ROUTER, PATIENCE_S)
        await eventually(lambda: way(us.host, NEAR_BLOCK) == NEAR, PATIENCE_S)
        await eventually(lambda: way(racks.near, FAR_BLOCK) == ROUTER, PATIENCE_S)
        await eventually(lambda: way(racks.far, NEAR_BLOCK) == ROUTER_FAR, PATIENCE_S)
        await eventually(lambda: answers(us.host, US, FAR_POD), PATIENCE_S)
        await eventually(lambda: answers(racks.far, FAR_POD, NEAR_POD), PATIENCE_S)
        (path,) = (await us.ask(f"why {FAR_BLOCK}"))["paths"]
        assert (path["next_hop"], path["reached_through"]) == (FAR, [ROUTER])

        # The session's own TCP connection needs a way meanwhile: to the peer's address alone.
        run(*us.host.enter, "ip", "route", "replace", "default", "via", OTHER_WAY)
        await eventually(lambda: way(us.host, FAR_BLOCK) == OTHER_WAY, PATIENCE_S)
        assert answers(us.host, US, FAR_POD)

        run(*us.host.enter, "ip", "route", "add", "blackhole", f"{FAR}/32")
        await eventually(lambda: not way(us.host, FAR_BLOCK), PATIENCE_S)
        (path,) = (await us.ask(f"why {FAR_BLOCK}"))["paths"]
        assert path["rejected"] == "next hop cannot be reached"
        assert path["unreachable"] == f"{FAR} is reached by a route that drops, {FAR}/32"
        run(*us.host.enter, "ip", "route", "delete", "blackhole", f"{FAR}/32")
        await eventually(lambda: way(us.host, FAR_BLOCK) == OTHER_WAY, PATIENCE_S)


async def test_a_link_that_flaps(racks: Racks) -> None:
    """A device that goes down takes all routes along and the kernel says nothing of them: they are
    back as soon as it is up and the node has its way again.
    """
    us = racks.us
    await fill(us)
    async with us.running():
        await eventually(lambda: way(us.host, FAR_BLOCK) == ROUTER, PATIENCE_S)
        run(*us.host.enter, "ip", "link", "set", "eth0", "down")
        run(*us.host.enter, "ip", "link", "set", "eth0", "up")
        assert not way(us.host, FAR_BLOCK)
        run(*us.host.enter, "ip", "route", "add", "default", "via", ROUTER)
        await eventually(lambda: way(us.host, NEAR_BLOCK) == NEAR, 20)
        await eventually(lambda: way(us.host, FAR_BLOCK) == ROUTER, 20)
