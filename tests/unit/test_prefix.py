"""Prefixes in bulk are the same as `ipaddress`'."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.model.net import Network, contains
from cymric.model.prefix import PrefixMap, PrefixSet, prefix, prefix_at, prefixes_inside

NETWORKS = st.one_of(
    st.builds(
        lambda number, length: IPv4Network((number >> (32 - length) << (32 - length), length)),
        st.integers(0xC6131000, 0xC6131FFF),
        st.integers(16, 32),
    ),
    st.sampled_from([ip_network("fd00::/64"), ip_network("fd00::40/122"), ip_network("::/0")]),
)


@given(NETWORKS)
def test_a_bulk_prefix_is_the_usual_one(network: Network) -> None:
    """Equal, of equal hash, found under each other, and the same object again."""
    bulk = prefix(str(network))
    assert (bulk, hash(bulk), str(bulk)) == (network, hash(network), str(network))
    assert {network: 1}[bulk] == {bulk: 1}[network] == 1
    assert prefix(str(network)) is bulk
    assert (bulk.network_address, bulk.netmask) == (network.network_address, network.netmask)
    assert (bulk.prefixlen, bulk.max_prefixlen) == (network.prefixlen, network.max_prefixlen)
    assert (bulk.broadcast_address, bulk.hostmask) == (network.broadcast_address, network.hostmask)
    assert prefix_at(network.version, int(network.network_address), network.prefixlen) == network


@given(st.frozensets(NETWORKS, max_size=6), st.frozensets(NETWORKS, max_size=3), NETWORKS)
def test_the_longest_network_that_holds(
    networks: frozenset[Network], gone: frozenset[Network], inner: Network
) -> None:
    """A map finds the most specific network around a prefix; what was discarded is not found."""
    held = PrefixMap({network: str(network) for network in networks})
    for network in gone:
        held.discard(network)
    around = [network for network in networks - gone if contains(network, inner)]
    best = max(around, key=lambda network: network.prefixlen, default=None)
    assert held.holding(inner) == (None if best is None else (best, str(best)))
    assert held.get(inner) == (str(inner) if inner in networks - gone else None)


def test_every_prefix_inside() -> None:
    """A network of four addresses holds itself, two halves and four hosts."""
    inside = list(prefixes_inside(ip_network("198.19.16.4/30")))
    assert len(inside) == len(set(inside)) == 7
    assert all(contains(ip_network("198.19.16.4/30"), one) for one in inside)


@given(st.frozensets(NETWORKS, max_size=5), NETWORKS)
def test_covers(networks: frozenset[Network], inner: Network) -> None:
    """A set covers what lies in one of its networks, of either family."""
    expected = any(contains(outer, inner) for outer in networks)
    assert PrefixSet.of(networks).covers(inner) is expected


@pytest.mark.parametrize("text", ["198.19.16.1/26", "fd00::1/64", "198.19.16.0/33", "pool"])
def test_no_prefix(text: str) -> None:
    """Host bits and nonsense are refused as ever."""
    with pytest.raises(ValueError, match=r".+"):
        prefix(text)
