"""A node as route reflector among real BIRDs: clients, a router of another AS, filters, limits."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cymric.datastore.memory import MemoryDatastore
from cymric.model.bgp_filter import BGPFilter, BGPFilterSpec
from cymric.model.peering import PeeringInputs, peering_of
from cymric.model.resources import BGPPeer, BGPPeerSpec, Node, NodeBGPSpec, NodeSpec, ObjectMeta
from tests.fv.speaker_lab import OUR_ADDRESS, OUR_ASN
from tests.fv.test_bgpd_routes import Lab, rewrite
from tests.support.eventually import eventually
from tests.support.routing import block, node, pool, store

pytestmark = [pytest.mark.root, pytest.mark.peers]

ONE, TWO, ROUTER, ROUTER_ASN = "198.19.8.2", "198.19.8.3", "198.19.8.9", 64900
CLUSTER = "1.0.0.1"
OWN_BLOCK, BLOCK_ONE, BLOCK_TWO = "198.19.16.0/26", "198.19.16.64/26", "198.19.16.128/26"
FREE = "198.19.17.0/26"


class Reflector(Lab):
    """Our node reflects for `one` and `two`, which BIRD plays, and has a router of another AS."""

    async def fill(self) -> None:
        """The cluster's objects, and the speaker's file as confd would render it."""
        self.store = MemoryDatastore()
        us = Node(
            metadata=ObjectMeta(name="us"),
            spec=NodeSpec(
                bgp=NodeBGPSpec(
                    ipv4_address=f"{OUR_ADDRESS}/20", route_reflector_cluster_id=CLUSTER
                )
            ),
        )
        nodes = {"us": us, "one": node("one", f"{ONE}/20"), "two": node("two", f"{TWO}/20")}
        peers = {
            "one": _peer("one", ONE, OUR_ASN),
            "two": _peer("two", TWO, OUR_ASN),
            "router": _peer("router", ROUTER, ROUTER_ASN, "hide", limit=5),
        }
        rule = {"cidr": BLOCK_TWO, "matchOperator": "Equal", "action": "Reject"}
        hide = BGPFilter(
            metadata=ObjectMeta(name="hide"),
            spec=msgspec.convert({"exportV4": [rule]}, BGPFilterSpec),
        )
        await store(self.store, *nodes.values(), *peers.values(), hide, pool())
        await store(self.store, block(OWN_BLOCK, "us"), block(BLOCK_ONE, "one"))
        await store(self.store, block(BLOCK_TWO, "two"))
        inputs = PeeringInputs(nodes=nodes, peers=peers, configurations={})
        self.write_configuration(*peering_of("us", inputs).sessions)


def _peer(name: str, address: str, asn: int, *filters: str, limit: int = 0) -> BGPPeer:
    annotations = {"cymric.io/max-prefixes": str(limit)} if limit else None
    return BGPPeer(
        metadata=ObjectMeta(name=name, annotations=annotations),
        spec=BGPPeerSpec(node="us", peer_ip=address, as_number=asn, filters=filters),
    )


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Reflector]:
    made = Reflector(tmp_path, name=f"cybr-{secrets.token_hex(2)}")
    try:
        yield made
    finally:
        made.close()


async def test_reflecting(lab: Reflector) -> None:
    """Clients hear each other's blocks from us, marked, with the owner's next hop; a router of
    another AS in the same network hears them likewise, with our AS and a MED, as far as the filter
    lets them; its route goes to the clients. A router that announces too much is held down, and its
    routes leave the kernel.
    """
    await lab.fill()
    one = lab.bird("one", ONE, routes=(BLOCK_ONE, BLOCK_TWO))  # the second is not its own
    two = lab.bird("two", TWO, routes=(BLOCK_TWO,))
    router = lab.bird("router", ROUTER, asn=ROUTER_ASN, routes=(FREE, BLOCK_ONE, OWN_BLOCK))
    lab.exabgp()
    async with lab.bgpd():
        expected = {
            OWN_BLOCK: "blackhole metric 1024",
            BLOCK_ONE: f"via {ONE} dev eth0 metric 1024",
            BLOCK_TWO: f"via {TWO} dev eth0 metric 1024",
            FREE: f"via {ROUTER} dev eth0 metric 1024",
        }
        await eventually(lambda: lab.kernel() == expected, 60)
        await eventually(lambda: two.routes().keys() == {OWN_BLOCK, BLOCK_ONE, FREE}, 30)
        heard = two.routes()
        assert f"BGP.originator_id: {ONE}" in heard[BLOCK_ONE]
        assert f"BGP.cluster_list: {CLUSTER}" in heard[BLOCK_ONE]
        assert f"BGP.next_hop: {ONE}" in heard[BLOCK_ONE]
        assert "BGP.local_pref: 100" in heard[BLOCK_ONE]
        assert "BGP.originator_id" not in heard[OWN_BLOCK]
        assert f"BGP.as_path: {ROUTER_ASN}" in heard[FREE]
        assert f"BGP.next_hop: {ROUTER}" in heard[FREE]
        await eventually(lambda: one.routes().keys() == {OWN_BLOCK, BLOCK_TWO, FREE}, 30)
        await eventually(lambda: router.routes().keys() == {OWN_BLOCK, BLOCK_ONE}, 30)
        assert "BGP.as_path: 64512" in router.routes()[BLOCK_ONE]
        assert "BGP.med: 100" in router.routes()[BLOCK_ONE]
        assert f"BGP.next_hop: {ONE}" in router.routes()[BLOCK_ONE]
        assert "BGP.med" not in router.routes()[OWN_BLOCK]

        await rewrite(router, *(f"198.19.18.{n}/32" for n in range(6)))
        await eventually(lambda: _is_held(lab), 30)
        del expected[FREE]
        await eventually(lambda: lab.kernel() == expected, 30)
        await eventually(lambda: two.routes().keys() == {OWN_BLOCK, BLOCK_ONE}, 30)


async def _is_held(lab: Lab) -> bool:
    peers = (await lab.status())["peers"]
    assert isinstance(peers, list)
    router = next(one for one in peers if one["address"] == ROUTER)
    return router["state"] != "up" and "more than 5 prefixes" in router["info"]
