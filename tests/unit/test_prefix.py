"""Prefixes in bulk are the same as `ipaddress`'."""

from __future__ import annotations

from ipaddress import IPv4Network, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.model.net import Network, contains
from cymric.model.prefix import PrefixSet, prefix, prefix_at

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
    assert prefix_at(network.version, int(network.network_address), network.prefixlen) == network


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
