"""The expansion of BGPPeers and the mesh against Calico's rules, both families, both sides."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.model.bfd import BfdParameters
from cymric.model.peering import (
    NextHopMode,
    PasswordRef,
    PeeringInputs,
    Session,
    peering_of,
)
from cymric.model.resources import (
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPPeer,
    BGPPeerSpec,
    Node,
    NodeBGPSpec,
    NodeSpec,
    ObjectMeta,
)

NO_MESH: dict[str, Any] = {"node_to_node_mesh_enabled": False}


def node(name: str, v4: str = "", v6: str = "", *, asn: int | None = None, cluster: str = "",
         **labels: str) -> Node:  # fmt: skip
    """A node; labels by keyword."""
    bgp = NodeBGPSpec(
        ipv4_address=v4, ipv6_address=v6, as_number=asn, route_reflector_cluster_id=cluster
    )
    meta = ObjectMeta(name=name, labels=labels)
    return Node(metadata=meta, spec=NodeSpec(bgp=bgp if v4 or v6 else None))


def peer(name: str, annotations: dict[str, str] | None = None, **spec: Any) -> BGPPeer:
    """A BGPPeer."""
    return BGPPeer(
        metadata=ObjectMeta(name=name, annotations=annotations), spec=BGPPeerSpec(**spec)
    )


def inputs(
    *objects: Node | BGPPeer, nodes_own: dict[str, dict[str, Any]] | None = None, **cluster: Any
) -> PeeringInputs:
    """Objects by name, the cluster's settings by keyword, and those of single nodes."""
    specs = {"default": cluster, **{f"node.{n}": own for n, own in (nodes_own or {}).items()}}
    return PeeringInputs(
        nodes={each.metadata.name: each for each in objects if isinstance(each, Node)},
        peers={each.metadata.name: each for each in objects if isinstance(each, BGPPeer)},
        configurations={
            name: BGPConfiguration(
                metadata=ObjectMeta(name=name), spec=BGPConfigurationSpec(**spec)
            )
            for name, spec in specs.items()
        },
    )


def sessions(name: str, from_inputs: PeeringInputs) -> dict[str, Session]:
    """The sessions of a node by Calico's name."""
    return {each.name: each for each in peering_of(name, from_inputs).sessions}


A = node("a", "10.0.0.11/24", "fd00::11/64", rack="1")
B = node("b", "10.0.0.12/24", "fd00::12/64", rack="1")
C = node("c", "10.0.0.13/24", rack="2")


# --- mesh -----------------------------------------------------------------------------------------


def test_mesh_speaks_both_families() -> None:
    """Two nodes meet in each family that both have, on sessions of their own."""
    found = sessions("a", inputs(A, B, C))
    assert list(found) == ["Mesh_10_0_0_12", "Mesh_10_0_0_13", "Mesh_fd00__12"]
    six = found["Mesh_fd00__12"]
    assert (six.family, str(six.local_address)) == ("ipv6 unicast", "fd00::11")
    assert str(six.router_id) == "10.0.0.11"
    assert six.is_passive


def test_worked_example() -> None:
    """Two nodes of the default AS: the session's name, who waits, and from which address."""
    given = inputs(node("node-a", "10.0.0.11/24"), node("node-b", "10.0.0.12/24"))
    [on_a], [on_b] = (list(sessions(name, given).values()) for name in ("node-a", "node-b"))
    assert (on_a.name, on_a.is_passive) == ("Mesh_10_0_0_12", True)
    assert (on_b.name, on_b.is_passive) == ("Mesh_10_0_0_11", False)
    assert (on_b.local_address, on_b.peer_asn) == (ip_address("10.0.0.12"), 64512)
    assert (on_a.hold_time_s, on_a.restart_time_s, on_a.peer_port) == (240, 120, 179)


def test_reflectors_leave_the_mesh() -> None:
    """A node with a cluster id has no mesh session, nor has any other node one with it."""
    given = inputs(A, B, node("rr", "10.0.0.20/24", cluster="244.0.0.1"))
    assert sessions("rr", given) == {}
    assert set(sessions("a", given)) == {"Mesh_10_0_0_12", "Mesh_fd00__12"}


def test_mesh_options_come_from_the_cluster() -> None:
    """Password, restart time and annotations of the mesh are the cluster's; filters it has none."""
    given = inputs(
        A, C,
        node_mesh_password={"secretKeyRef": {"name": "bgp", "key": "mesh"}},
        node_mesh_max_restart_time="90s",
    )  # fmt: skip
    session = sessions("a", given)["Mesh_10_0_0_13"]
    assert (session.password, session.restart_time_s) == (PasswordRef("bgp", "mesh"), 90)
    assert session.filters == ()


def test_mesh_with_a_broken_password_is_no_mesh() -> None:
    """A mesh whose password reference is incomplete is reported, not built without password."""
    peering = peering_of("a", inputs(A, C, node_mesh_password={"secretKeyRef": {}}))
    assert peering.sessions == ()
    assert "secretKeyRef" in peering.unsupported["BGPConfiguration default"]


def test_node_with_ipv6_only() -> None:
    """Without IPv4 address the router id is made from the node's name, outside multicast."""
    only6 = node("six", "", "fd00::66/64")
    [session] = peering_of("six", inputs(only6, A)).sessions
    assert session.router_id.version == 4
    assert 0 < int(session.router_id) >> 24 < 224


# --- listening ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "name", "listen"),
    [
        ("", "a", ("0.0.0.0", "::")),
        ("None", "c", ("0.0.0.0",)),
        ("NodeIP", "a", ("10.0.0.11", "fd00::11")),
        ("NodeIP", "c", ("10.0.0.13",)),
    ],
)
def test_bind_mode(mode: str, name: str, listen: tuple[str, ...]) -> None:
    """Any address of the families the node has, or its own addresses alone."""
    assert peering_of(name, inputs(A, C, bind_mode=mode)).listen == listen


def test_ports_of_single_nodes() -> None:
    """A node's own listen port wins over the cluster's, also when it is the usual one."""
    given = inputs(A, B, C, listen_port=1790, nodes_own={"b": {"listen_port": 179}, "c": {}})
    found = sessions("a", given)
    assert [found[f"Mesh_10_0_0_{n}"].peer_port for n in (12, 13)] == [179, 1790]
    assert found["Mesh_10_0_0_12"].listen_port == 1790
    assert sessions("b", given)["Mesh_10_0_0_11"].listen_port == 179


def test_ignored_interfaces_are_passed_on() -> None:
    """What routing must not look at is part of the result."""
    assert peering_of("a", inputs(A, ignored_interfaces=("eth9", "t*"))).ignored_interfaces == (
        "eth9",
        "t*",
    )


# --- which peers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "port"),
    [
        pytest.param({"peer_ip": "10.0.9.1"}, "Global_10_0_9_1", 179, id="global"),
        pytest.param({"peer_ip": "10.0.9.1", "node": "a"}, "Node_10_0_9_1", 179, id="node"),
        pytest.param({"peer_ip": "10.0.9.1:7", "node_selector": "rack == '1'"},
                     "Node_10_0_9_1_port_7", 7, id="selector and port"),
        pytest.param({"peer_ip": "fd00::1"}, "Global_fd00__1", 179, id="IPv6"),
        pytest.param({"peer_ip": "[fd00::1]:1179"}, "Global_fd00__1_port_1179", 1179, id="v6 port"),
        pytest.param({"peer_ip": "10.0.0.13"}, "Global_10_0_0_13", 1790, id="a node: its port"),
        pytest.param({"peer_ip": "10.0.0.13", "as_number": 5}, "Global_10_0_0_13", 179,
                     id="a node's address in another AS is no node"),
    ],
)  # fmt: skip
def test_names_and_ports(spec: dict[str, Any], name: str, port: int) -> None:
    """Calico's names; a port of its own, that of the node behind it, or 179."""
    found = sessions("a", inputs(A, C, peer("p", **spec), listen_port=1790, **NO_MESH))
    assert {each.name: each.peer_port for each in found.values()} == {name: port}


def test_peer_selector_means_nodes() -> None:
    """Every matching node is a peer in each family that both sides have; a node never itself."""
    given = inputs(A, B, C, peer("rack", peer_selector="rack == '1'"), **NO_MESH)
    assert list(sessions("a", given)) == ["Global_10_0_0_12", "Node_10_0_0_13", "Global_fd00__12"]
    assert list(sessions("c", given)) == ["Global_10_0_0_11", "Global_10_0_0_12"]


def test_peers_of_a_selector_have_their_own_as() -> None:
    """The node's AS, else the cluster's."""
    given = inputs(A, node("d", "10.0.0.14/24", asn=65001), peer("p", peer_selector="all()"))
    assert sessions("a", given)["Global_10_0_0_14"].peer_asn == 65001


def test_reverse_peering_is_automatic() -> None:
    """A one-sided BGPPeer between nodes makes both sides, with the same options."""
    one_sided = peer(
        "to-rr", node_selector="rack == '2'", peer_ip="10.0.0.11", ttl_security=1,
        filters=("f",), keepalive_time="10s", local_as_number=65010,
    )  # fmt: skip
    given = inputs(A, B, C, one_sided, **NO_MESH)
    forward, back = sessions("c", given)["Node_10_0_0_11"], sessions("a", given)["Node_10_0_0_13"]
    assert (forward.local_asn, back.peer_asn) == (65010, 65010)
    assert (back.ttl_security, back.filters, back.hold_time_s) == (1, ("f",), 30)
    assert sessions("b", given) == {}
    assert forward.is_passive != back.is_passive


def test_reverse_peering_can_be_manual() -> None:
    """Then only the side that says so has the session."""
    given = inputs(
        A, C, peer("p", node="c", peer_ip="10.0.0.11", reverse_peering="Manual"), **NO_MESH
    )
    assert sessions("a", given) == {}
    assert list(sessions("c", given)) == ["Node_10_0_0_11"]


def test_explicit_peer_wins_over_the_reverse_of_another() -> None:
    """What this node says itself counts."""
    given = inputs(
        A, C,
        peer("a-there", node="c", peer_ip="10.0.0.11", filters=("there",)),
        peer("z-here", node="a", peer_ip="10.0.0.13", filters=("here",)),
        **NO_MESH,
    )  # fmt: skip
    assert sessions("a", given)["Node_10_0_0_13"].filters == ("here",)


def test_two_ports_on_one_address() -> None:
    """A speaker tells sessions apart by address: the second is reported, not merged."""
    given = inputs(A, peer("one", peer_ip="10.0.9.1"), peer("two", peer_ip="10.0.9.1:1179"))
    peering = peering_of("a", given)
    assert [each.name for each in peering.sessions] == ["Global_10_0_9_1"]
    assert "second port" in peering.unsupported["two"]


def test_refused_peer_keeps_the_mesh_away() -> None:
    """No session without password appears where one with password could not be made."""
    broken = peer("p", peer_ip="10.0.0.13", password={"secretKeyRef": {}})
    peering = peering_of("a", inputs(A, C, broken))
    assert peering.sessions == ()
    assert set(peering.unsupported) == {"p"}


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "field", "value"),
    [
        ({}, "hold_time_s", 240),
        ({"keepalive_time": "10s"}, "hold_time_s", 30),
        ({"keepalive_time": "100ms"}, "hold_time_s", 3),
        ({"keepalive_time": "24h"}, "hold_time_s", 65535),
        ({}, "restart_time_s", 120),
        ({"max_restart_time": "0s"}, "restart_time_s", 0),
        ({"max_restart_time": "1m30.4s"}, "restart_time_s", 90),
        ({}, "ttl_security", 0),
        ({"ttl_security": 2}, "ttl_security", 2),
        ({}, "is_source_fixed", True),
        ({"source_address": "None"}, "is_source_fixed", False),
        ({"local_as_number": "1.1"}, "local_asn", 65537),
        ({"num_allowed_local_as_numbers": 2}, "allowed_own_asns", 2),
        ({"reachable_by": "10.0.0.1"}, "reachable_by", ip_address("10.0.0.1")),
        ({"next_hop_mode": "Self"}, "next_hop_mode", NextHopMode.SELF),
        ({"keep_original_next_hop": True}, "next_hop_mode", NextHopMode.KEEP),
        ({"keep_original_next_hop": True, "as_number": 64512}, "next_hop_mode", NextHopMode.AUTO),
        ({"filters": ("x", "y")}, "filters", ("x", "y")),
        ({"password": {"secretKeyRef": {"name": "n", "key": "k"}}}, "password",
         PasswordRef("n", "k")),
        ({}, "bgp_peer", "p"),
    ],
)  # fmt: skip
def test_options(spec: dict[str, Any], field: str, value: object) -> None:
    """Each field of a BGPPeer reaches its session."""
    whole: dict[str, Any] = {"peer_ip": "10.0.9.1", "as_number": 65000} | spec
    given = inputs(A, peer("p", **whole))
    assert getattr(sessions("a", given)["Global_10_0_9_1"], field) == value


def test_own_annotations_travel_with_the_session() -> None:
    """Annotations of ours reach it, those of others do not."""
    notes = {"cymric.io/bfd": "off", "example.org/x": "y"}
    given = inputs(A, peer("p", notes, peer_ip="10.0.9.1"))
    assert sessions("a", given)["Global_10_0_9_1"].annotations == {"cymric.io/bfd": "off"}


@pytest.mark.parametrize(("text", "limit"), [("5000", 5000), ("0", None), ("many", None)])
def test_prefix_limit_is_an_annotation(text: str, limit: int | None) -> None:
    """A number is the limit; anything else is reported, and there is no session without limit."""
    given = inputs(A, peer("p", {"cymric.io/max-prefixes": text}, peer_ip="10.0.9.1"))
    peering = peering_of("a", given)
    assert [each.max_prefixes for each in peering.sessions] == ([limit] if limit else [])
    assert ("p" in peering.unsupported) is (limit is None)


def test_bfd_is_an_annotation() -> None:
    """It is read once, here; a text that means nothing is reported, and costs no session."""
    given = inputs(A, peer("p", {"cymric.io/bfd": "300ms x 3"}, peer_ip="10.0.9.1"))
    assert sessions("a", given)["Global_10_0_9_1"].bfd == BfdParameters()
    broken = inputs(A, peer("p", {"cymric.io/bfd": "quick"}, peer_ip="10.0.9.1"))
    peering = peering_of("a", broken)
    assert [each.bfd for each in peering.sessions] == [None]
    assert "quick" in peering.problems["p"]
    assert not peering.unsupported


@pytest.mark.parametrize(
    ("other", "asn", "is_client"),
    [
        pytest.param("", None, True, id="plain node"),
        pytest.param("244.0.0.2", None, True, id="reflector of another cluster"),
        pytest.param("244.0.0.1", None, False, id="reflector of the same cluster"),
        pytest.param("", 65009, False, id="eBGP"),
    ],
)
def test_reflection_clients(other: str, asn: int | None, is_client: bool) -> None:
    """An iBGP peer outside the reflector's own cluster is its client."""
    given = inputs(
        node("rr", "10.0.0.20/24", cluster="244.0.0.1"),
        node("x", "10.0.0.21/24", asn=asn, cluster=other),
        peer("all", peer_selector="all()"),
    )
    [session] = peering_of("rr", given).sessions
    assert (session.is_reflector_client, session.cluster_id) == (is_client, "244.0.0.1")
    [back] = peering_of("x", given).sessions
    assert back.is_reflector_client is bool(other and is_client)


# --- both sides together --------------------------------------------------------------------------

ADDRESSES = st.lists(st.integers(1, 250), min_size=2, max_size=4, unique=True)
PEERS = st.lists(
    st.fixed_dictionaries(
        {
            "node": st.sampled_from(["", "n0", "n1"]),
            "to": st.sampled_from(["all()", "x == '0'", "n0", "n1"]),
        }
    ),
    max_size=3,
)


@given(last_bytes=ADDRESSES, chosen=PEERS, has_mesh=st.booleans())
def test_both_sides_agree(
    last_bytes: list[int], chosen: list[dict[str, str]], has_mesh: bool
) -> None:
    """Whatever peers are drawn, each session has its other side, and one side alone connects."""
    nodes = [
        node(f"n{i}", f"10.0.0.{last}/24", f"fd00::{last:x}/64", x=str(i % 2), asn=65000 + i % 2)
        for i, last in enumerate(last_bytes)
    ]
    peers = []
    for number, wish in enumerate(chosen):
        spec: dict[str, Any] = {"node": wish["node"]}
        if wish["to"].startswith("n"):
            index = int(wish["to"][1:])
            spec |= {"peer_ip": f"10.0.0.{last_bytes[index]}", "as_number": 65000 + index % 2}
        else:
            spec["peer_selector"] = wish["to"]
        peers.append(peer(f"p{number}", **spec))
    everything = inputs(*nodes, *peers, node_to_node_mesh_enabled=has_mesh)
    sides = {
        (session.local_address, session.peer_address): session
        for each in nodes
        for session in peering_of(each.metadata.name, everything).sessions
    }
    for (here, there), session in sides.items():
        other = sides[there, here]
        assert session.is_passive != other.is_passive
        assert (session.peer_asn, session.local_asn) == (other.local_asn, other.peer_asn)
        assert session.peer_port == other.listen_port
