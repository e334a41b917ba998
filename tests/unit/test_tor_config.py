"""What a top-of-rack router is told, in each dialect."""

from __future__ import annotations

from typing import Any

import pytest

from cymric.model.bfd import BfdParameters
from cymric.model.net import parse_network
from cymric.model.resources import (
    IPPool,
    IPPoolSpec,
    NamedCommunity,
    ObjectMeta,
    PrefixAdvertisement,
)
from cymric.model.tor import DIALECTS, NoRouter, render, tor_config
from tests.unit.test_peering_expansion import inputs, node, peer

A = node("a", "10.0.0.11/24", "fd00::11/64", rack="1")
B = node("b", "10.0.0.12/24", asn=65001, rack="2")


def pool(name: str, cidr: str, *, is_closed: bool = False) -> IPPool:
    """A pool."""
    spec = IPPoolSpec(cidr=cidr, disable_bgp_export=is_closed)
    return IPPool(metadata=ObjectMeta(name=name), spec=spec)


POOLS = [
    pool("four", "192.168.0.0/16"),
    pool("six", "fd20::/64"),
    pool("closed", "172.16.0.0/16", is_closed=True),
]


def tor(annotations: dict[str, str] | None = None, **spec: Any) -> Any:
    """A BGPPeer called tor."""
    whole: dict[str, Any] = {"peer_ip": "10.0.0.1", "as_number": 64900} | spec
    return peer("tor", annotations, **whole)


def test_sessions_are_turned_round() -> None:
    """Each node is a neighbour with its own AS and address, as its side has them."""
    notes = {"cymric.io/bfd": "100ms x 5"}
    given = inputs(A, B, tor(notes, ttl_security=1, keepalive_time="5s"), listen_port=1790)
    config = tor_config("tor", given, POOLS)
    assert [(n.node, str(n.address), n.asn, n.port) for n in config.neighbors] == [
        ("a", "10.0.0.11", 64512, 1790),
        ("b", "10.0.0.12", 65001, 1790),
    ]
    first = config.neighbors[0]
    assert (first.ttl_security, first.hold_time_s) == (1, 15)
    assert first.bfd == BfdParameters(min_tx_ms=100, min_rx_ms=100, multiplier=5)
    assert config.prefixes == {4: ("192.168.0.0/16",), 6: ("fd20::/64",)}
    assert config.asn == 64900


def test_one_node_alone() -> None:
    """The session of one node, on request."""
    config = tor_config("tor", inputs(A, B, tor(local_as_number=65010)), POOLS, node="b")
    assert [(n.node, n.asn) for n in config.neighbors] == [("b", 65010)]


@pytest.mark.parametrize(
    ("name", "on", "spec", "reason"),
    [
        ("other", "", {}, "no BGPPeer other"),
        ("tor", "zzz", {}, "no node zzz"),
        ("tor", "", {"peer_ip": "", "as_number": None, "peer_selector": "all()"}, "means nodes"),
        ("tor", "", {"node_selector": "rack == '9'"}, "no node has a session"),
        ("tor", "b", {"peer_ip": "fd00::1"}, "no IPv6 address"),
    ],
)
def test_nothing_to_configure(name: str, on: str, spec: dict[str, Any], reason: str) -> None:
    """Why there is no router, or no session with it."""
    with pytest.raises(NoRouter, match=reason):
        tor_config(name, inputs(A, B, tor(**spec)), POOLS, node=on)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1"])
def test_every_dialect_says_everything(dialect: str, address: str) -> None:
    """Neighbour, AS, password's place, TTL security, BFD, limit and exactly our pools are there."""
    secret = {"secretKeyRef": {"name": "bgp", "key": "tor"}}
    wish = tor({"cymric.io/bfd": "310ms x 7"}, peer_ip=address, ttl_security=1, password=secret)
    given = inputs(
        A, wish,
        communities=(NamedCommunity(name="blue", value="64512:100"),),
        prefix_advertisements=(PrefixAdvertisement(cidr="192.168.0.0/16", communities=("blue",)),),
    )  # fmt: skip
    text = render(tor_config("tor", given, POOLS, max_prefixes=777), dialect)
    version = 6 if ":" in address else 4
    wanted = {4: ["10.0.0.11", "192.168.0.0/16"], 6: ["fd00::11", "fd20::/64"]}[version]
    wanted += ["64900", "64512", "PASSWORD-OF-bgp/tor", "ttl", "310", "777", "64512:100", "7"]
    assert [word for word in wanted if word not in text] == []
    assert "172.16" not in text
    assert "None" not in text


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_the_router_announces(dialect: str) -> None:
    """Prefixes of the router's own are let out towards the nodes, and only out."""
    more = [parse_network("198.51.100.0/24"), parse_network("fd99::/48")]
    with_more = render(tor_config("tor", inputs(A, B, tor()), POOLS, announced=more), dialect)
    without = render(tor_config("tor", inputs(A, B, tor()), POOLS), dialect)
    assert "198.51.100.0/24" in with_more
    assert "198.51.100.0/24" not in without
    added = [line for line in with_more.splitlines() if line not in without.splitlines()]
    assert not any("-IN" in line or "import" in line for line in added)
