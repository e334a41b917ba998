"""Recursive next hops: through which gateways an address is reached."""

from __future__ import annotations

import pytest

from bgpd.next_hops import Resolver
from cymric.kernel.api import NextHop
from cymric.kernel.underlay import ANYTHING, Change, OtherRoute, Out
from cymric.model.net import parse_address, parse_network

NUMBERS = {"eth0": 2, "eth1": 3, "cali1": 9}


def route(prefix: str, *outs: str, metric: int = 0) -> OtherRoute:
    """`outs` are "gateway%device" or "%device"; none: the route drops."""
    found = []
    for out in outs:
        gateway, _, device = out.partition("%")
        found.append(Out(parse_address(gateway) if gateway else None, device, NUMBERS[device]))
    return OtherRoute(parse_network(prefix), tuple(found), metric)


LINKS = (route("198.19.0.0/24", "%eth0"), route("198.19.1.0/24", "%eth1"))
DEFAULT = route("0.0.0.0/0", "198.19.0.254%eth0")


@pytest.mark.parametrize(
    ("routes", "hop", "expected"),
    [
        pytest.param(LINKS, "198.19.0.7", ["198.19.0.7"], id="on-link"),
        pytest.param((*LINKS, DEFAULT), "203.0.113.9", ["198.19.0.254"], id="default route"),
        pytest.param(
            (*LINKS, DEFAULT, route("198.19.4.0/22", "198.19.1.1%eth1")),
            "198.19.5.9",
            ["198.19.1.1"],
            id="the longest match",
        ),
        pytest.param(
            (*LINKS, DEFAULT, route("0.0.0.0/0", "198.19.1.1%eth1", metric=100)),
            "203.0.113.9",
            ["198.19.0.254"],
            id="the lower metric",
        ),
        pytest.param(
            (*LINKS, route("198.19.4.0/22", "198.19.0.1%eth0", "198.19.1.1%eth1")),
            "198.19.5.9",
            ["198.19.0.1", "198.19.1.1"],
            id="several gateways of one route",
        ),
        pytest.param(
            (*LINKS, route("198.19.5.9/32", "%eth1"), DEFAULT),
            "198.19.5.9",
            ["198.19.5.9"],
            id="a host route straight out of a device",
        ),
        pytest.param(
            (
                *LINKS,
                route("10.1.0.0/16", "198.19.0.1%eth0"),
                route("10.2.0.0/16", "10.1.0.1%eth0"),
            ),
            "10.2.0.9",
            ["198.19.0.1"],
            id="a gateway that is reached through a gateway",
        ),
        pytest.param(
            (route("fd19::/64", "%eth0"), route("::/0", "fe80::1%eth0")),
            "2001:db8::1",
            ["fe80::1%eth0"],
            id="a router that announced itself",
        ),
    ],
)
def test_reached(routes: tuple[OtherRoute, ...], hop: str, expected: list[str]) -> None:
    """A next hop is reached as the kernel would reach it."""
    found = Resolver(routes).resolve(parse_address(hop))
    texts = [
        f"{one.gateway}%{one.device}" if one.device else str(one.gateway) for one in found.hops
    ]
    assert (texts, found.reason) == (expected, "")


@pytest.mark.parametrize(
    ("routes", "hop", "reason"),
    [
        pytest.param(LINKS, "203.0.113.9", "there is no route to 203.0.113.9", id="no route"),
        pytest.param(
            (*LINKS, DEFAULT, route("203.0.113.0/24")),
            "203.0.113.9",
            "203.0.113.9 is reached by a route that drops, 203.0.113.0/24",
            id="a blackhole before the default route",
        ),
        pytest.param(
            (*LINKS, route("203.0.113.0/24", "203.0.113.1%eth0")),
            "203.0.113.9",
            "its gateway 203.0.113.1 is not on-link",
            id="a gateway behind itself",
        ),
        pytest.param(
            (*LINKS, route("203.0.113.0/24", "192.0.2.1%eth0")),
            "203.0.113.9",
            "there is no route to 192.0.2.1",
            id="a gateway that nobody reaches",
        ),
    ],
)
def test_not_reached(routes: tuple[OtherRoute, ...], hop: str, reason: str) -> None:
    """What cannot be reached says why."""
    found = Resolver(routes).resolve(parse_address(hop))
    assert (found.hops, found.reason) == ((), reason)


def test_without_an_underlay() -> None:
    """Where nothing is known, every next hop counts as on-link."""
    hop = parse_address("203.0.113.9")
    assert Resolver().resolve(hop).hops == (NextHop(hop),)


def test_what_changed() -> None:
    """Of the next hops in use those are named that are reached otherwise than before."""
    near, far, gone = map(parse_address, ("198.19.0.7", "203.0.113.9", "198.19.1.7"))
    resolver = Resolver((*LINKS, DEFAULT))
    for hop in (near, far, gone):
        resolver.resolve(hop)
    moved = (LINKS[0], route("0.0.0.0/0", "198.19.0.253%eth0"))
    assert resolver.replace(moved, [near, far]) == {far}
    assert resolver.replace((*moved, LINKS[1]), [near, far]) == set()


def test_what_concerns_nobody() -> None:
    """Events about pods' routes and devices mean nothing; those on the way to a next hop do."""
    resolver = Resolver((*LINKS, DEFAULT, route("198.19.16.7/32", "%cali1")))
    resolver.resolve(parse_address("203.0.113.9"))
    concerning = ["203.0.113.9/32", "203.0.112.0/20", "0.0.0.0/0", "198.19.0.254/32"]
    for prefix in concerning:
        assert resolver.concerns(Change(prefix=parse_network(prefix))), prefix
    for prefix in ("198.19.16.7/32", "198.19.1.0/24", "::/0"):
        assert not resolver.concerns(Change(prefix=parse_network(prefix))), prefix
    assert resolver.concerns(Change(device=NUMBERS["eth0"]))
    assert not resolver.concerns(Change(device=NUMBERS["cali1"]))
    assert resolver.concerns(ANYTHING)


def test_ignored_interfaces_lead_nowhere() -> None:
    """Routes out of interfaces that fit a pattern do not count; others, and other ways, do."""
    near, far = map(parse_address, ("198.19.1.7", "203.0.113.9"))
    resolver = Resolver((*LINKS, route("0.0.0.0/0", "198.19.0.254%eth0", "198.19.1.254%eth1")))
    assert len(resolver.resolve(far).hops) == 2
    changed = resolver.restrict(ignored=("tun*", "eth1"), gateways={}, used=(near, far))
    assert changed == {near, far}
    assert resolver.resolve(far).hops == (NextHop(parse_address("198.19.0.254")),)
    assert resolver.resolve(near).hops == resolver.resolve(far).hops, "by the default route"
    assert resolver.restrict(ignored=("tun*", "eth1"), gateways={}, used=(near, far)) == set()
    assert resolver.replace((LINKS[1],), (near,)) == {near}
    assert not resolver.resolve(near).hops
    assert resolver.restrict(ignored=(), gateways={}, used=(near,)) == {near}


def test_a_peer_behind_its_own_gateway() -> None:
    """Its gateway comes before whatever route leads there, also where nothing else is known."""
    peer, gateway = map(parse_address, ("198.19.0.9", "198.19.1.1"))
    for resolver in (Resolver(LINKS), Resolver()):
        assert resolver.resolve(peer).hops == (NextHop(peer),)
        assert resolver.restrict(ignored=(), gateways={peer: gateway}, used=(peer,)) == {peer}
        assert resolver.resolve(peer).hops == (NextHop(gateway),)
    assert resolver.restrict(ignored=(), gateways={}, used=(peer,)) == {peer}
