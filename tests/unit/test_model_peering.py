"""Which sessions a node has: the mesh, global and node-specific peers."""

from __future__ import annotations

from typing import Any

import pytest

from cymric.model.durations import duration_s
from cymric.model.net import parse_asn
from cymric.model.peering import PeeringInputs, PeerType, Session, peering_of
from cymric.model.resources import (
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPPeer,
    BGPPeerSpec,
    Node,
    NodeBGPSpec,
    NodeSpec,
    ObjectMeta,
    split_peer_address,
)


def node(name: str, address: str, asn: int | None = None, **labels: str) -> Node:
    """A node with a BGP address ("" for none)."""
    bgp = NodeBGPSpec(ipv4_address=address, as_number=asn) if address else None
    return Node(metadata=ObjectMeta(name=name, labels=labels), spec=NodeSpec(bgp=bgp))


def inputs(
    nodes: list[Node], *peers: BGPPeer, configurations: dict[str, BGPConfiguration] | None = None
) -> PeeringInputs:
    """Objects by name, as the daemons keep them."""
    return PeeringInputs(
        nodes={item.metadata.name: item for item in nodes},
        peers={item.metadata.name: item for item in peers},
        configurations=configurations or {},
    )


def peer(name: str, **spec: Any) -> BGPPeer:
    """A BGPPeer."""
    return BGPPeer(metadata=ObjectMeta(name=name), spec=BGPPeerSpec(**spec))


def configuration(**spec: Any) -> dict[str, BGPConfiguration]:
    """The cluster's BGP configuration."""
    return {
        "default": BGPConfiguration(
            metadata=ObjectMeta(name="default"), spec=BGPConfigurationSpec(**spec)
        )
    }


A = node("node-a", "10.0.0.11/24", rack="1")
B = node("node-b", "10.0.0.12/24", rack="2")
C = node("node-c", "10.0.0.9/24")


def by_peer(node_name: str, given: PeeringInputs) -> dict[str, Session]:
    """The sessions by peer address."""
    return {str(item.peer_address): item for item in peering_of(node_name, given).sessions}


def test_mesh() -> None:
    """Every node with an address is a peer; of two the one with the smaller text waits."""
    sessions = by_peer("node-a", inputs([A, B, C, node("silent", "")]))
    assert list(sessions) == ["10.0.0.9", "10.0.0.12"]
    assert sessions["10.0.0.12"].is_passive, "10.0.0.12 is greater than 10.0.0.11"
    assert sessions["10.0.0.9"].is_passive, "as text 10.0.0.9 is greater than 10.0.0.11"
    assert sessions["10.0.0.12"].name == "Mesh_10_0_0_12"
    assert sessions["10.0.0.12"].peer_type is PeerType.MESH
    assert sessions["10.0.0.12"].peer_asn == sessions["10.0.0.12"].local_asn == 64512
    assert sessions["10.0.0.12"].peer_node == "node-b"
    assert not by_peer("node-b", inputs([A, B]))["10.0.0.11"].is_passive


def test_exactly_one_side_of_each_mesh_session_connects() -> None:
    """A session of which both sides wait would never come up."""
    given = inputs([A, B, C])
    for own, other in ((A, B), (A, C), (B, C)):
        sides = [
            next(
                session
                for session in peering_of(one.metadata.name, given).sessions
                if session.peer_node == two.metadata.name
            ).is_passive
            for one, two in ((own, other), (other, own))
        ]
        assert sorted(sides) == [False, True]


def test_mesh_can_be_switched_off() -> None:
    """Without the mesh only explicit peers are left."""
    given = inputs(
        [A, B],
        peer("tor", peer_ip="10.0.0.254", as_number=64601),
        configurations=configuration(node_to_node_mesh_enabled=False),
    )
    sessions = by_peer("node-a", given)
    assert list(sessions) == ["10.0.0.254"]
    assert sessions["10.0.0.254"].peer_type is PeerType.GLOBAL
    assert not sessions["10.0.0.254"].is_ibgp


def test_node_without_address_or_object_has_no_session() -> None:
    """BGP is off for a node without address, and for one that does not exist."""
    assert peering_of("silent", inputs([A, node("silent", "")])).sessions == ()
    assert peering_of("missing", inputs([A])).sessions == ()


def test_as_numbers() -> None:
    """A node's own AS counts; a mesh peer without one is taken to share ours, as Calico does."""
    given = inputs(
        [node("node-a", "10.0.0.11/24", 65001), B], configurations=configuration(as_number="1.10")
    )
    assert by_peer("node-a", given)["10.0.0.12"].peer_asn == 65001
    assert by_peer("node-b", given)["10.0.0.11"].peer_asn == 65001
    assert by_peer("node-b", given)["10.0.0.11"].local_asn == 65546


def test_global_peer_wins_over_node_specific_and_mesh() -> None:
    """One session per address: global, then node-specific, then mesh."""
    given = inputs(
        [A, B],
        peer("z-global", peer_ip="10.0.0.12", as_number=64512),
        peer("a-node", node="node-a", peer_ip="10.0.0.12", as_number=64999),
    )
    session = by_peer("node-a", given)["10.0.0.12"]
    assert session.peer_type is PeerType.GLOBAL
    assert session.is_passive, "a global peer that is a node follows the mesh's passive rule"


def test_selected_nodes() -> None:
    """Node and nodeSelector restrict a peer; a node never peers with itself."""
    given = inputs(
        [A, B],
        peer("one", node="node-a", peer_ip="10.1.0.1", as_number=1),
        peer("two", node_selector="rack == '2'", peer_ip="10.1.0.2:1179", as_number=1),
        peer("self", peer_ip="10.0.0.11", as_number=64512),
        configurations=configuration(node_to_node_mesh_enabled=False),
    )
    assert list(by_peer("node-a", given)) == ["10.0.0.12", "10.1.0.1"], "node-b peers with us"
    sessions = by_peer("node-b", given)
    assert list(sessions) == ["10.0.0.11", "10.1.0.2"]
    assert sessions["10.1.0.2"].peer_port == 1179
    assert sessions["10.1.0.2"].name == "Node_10_1_0_2_port_1179"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({}, "neither peerIP nor peerSelector"),
        ({"local_workload_selector": "all()", "as_number": 1}, "local workloads"),
        ({"peer_selector": "all()", "as_number": 1}, "exclude each other"),
        ({"peer_ip": "fd00::1", "as_number": 1}, "no IPv6 address"),
        ({"peer_ip": "10.0.0.1", "password": {"secretKeyRef": {"name": "s"}}}, "does not name"),
        ({"peer_ip": "10.0.0.1", "password": {"secretKeyRef": {"name": "..", "key": "k"}}}, "name"),
        ({"peer_ip": "10.0.0.1", "next_hop_mode": "Other"}, "nextHopMode"),
        ({"peer_ip": "10.0.0.1", "source_address": "Other"}, "sourceAddress"),
    ],
)
def test_what_cannot_be_honoured_is_named(spec: dict[str, Any], reason: str) -> None:
    """A peer that needs more than we can do gets no half session, and is reported by name."""
    peering = peering_of("node-a", inputs([A], peer("odd", **spec)))
    assert peering.sessions == ()
    assert list(peering.unsupported) == ["odd"]
    assert reason in peering.unsupported["odd"]


def test_ports_and_timers() -> None:
    """Listening ports of nodes and restart times reach the session."""
    given = inputs(
        [A, B],
        peer("tor", peer_ip="10.0.0.254", as_number=1, max_restart_time="2m30s"),
        configurations={
            **configuration(listen_port=1790, node_mesh_max_restart_time="90s"),
            "node.node-b": BGPConfiguration(
                metadata=ObjectMeta(name="node.node-b"), spec=BGPConfigurationSpec(listen_port=1791)
            ),
        },
    )
    sessions = by_peer("node-a", given)
    assert (sessions["10.0.0.12"].listen_port, sessions["10.0.0.12"].peer_port) == (1790, 1791)
    assert sessions["10.0.0.12"].restart_time_s == 90
    assert (sessions["10.0.0.254"].peer_port, sessions["10.0.0.254"].restart_time_s) == (179, 150)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2m0s", 120), ("1h1m1s", 3661), ("250ms", 0.25), ("1.5s", 1.5), ("0s", 0)],
)
def test_durations(text: str, seconds: float) -> None:
    """Go's durations are read to the second and below."""
    assert duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "90", "s", "1m 30s", "-1s", "1d"])
def test_bad_durations(text: str) -> None:
    """What Go would not read, we do not either."""
    with pytest.raises(ValueError, match="is not a duration"):
        duration_s(text)


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("10.0.0.1", "10.0.0.1", None),
        ("10.0.0.1:1179", "10.0.0.1", 1179),
        ("[fd00::1]:1179", "fd00::1", 1179),
        ("[fd00::1]", "fd00::1", None),
        ("fd00:0:0::1", "fd00::1", None),
    ],
)
def test_peer_addresses(text: str, address: str, port: int | None) -> None:
    """All of Calico's spellings of a peer's address are read."""
    assert split_peer_address(text) == (address, port)


@pytest.mark.parametrize("text", ["10.0.0.1:", "10.0.0.1:0", "10.0.0.1:70000", "[fd00::1", "x", ""])
def test_bad_peer_addresses(text: str) -> None:
    """A broken peer address is refused."""
    with pytest.raises(ValueError, match=r".+"):
        split_peer_address(text)


@pytest.mark.parametrize(("value", "asn"), [(7, 7), ("64512", 64512), ("1.10", 65546)])
def test_as_number_texts(value: int | str, asn: int) -> None:
    """AS numbers come as numbers, decimal text and asdot."""
    assert parse_asn(value) == asn


@pytest.mark.parametrize("value", [-1, 2**32, "1.70000", "x", "70000.1"])
def test_bad_as_numbers(value: int | str) -> None:
    """An AS number has 32 bits."""
    with pytest.raises(ValueError, match=r".+"):
        parse_asn(value)
