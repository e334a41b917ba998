"""What must not exist for a block to be claimed."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.datastore.memory import MemoryDatastore
from cymric.model.keys import BlockKey
from cymric.model.net import Network, contains, network_of
from ipam import affinity
from ipam.overlap import enclosing, guards, prefixes
from tests.support.ipam_world import everything

# Zeros in all places: the shortest text of an IPv6 address depends on its longest run of them.
GROUPS = st.lists(st.sampled_from([0, 0, 0, 1, 0x10, 0xFD00]), min_size=7, max_size=7)
IPV6 = st.builds(
    lambda groups, last: IPv6Address(sum(g << 16 * (7 - n) for n, g in enumerate([*groups, last]))),
    GROUPS,
    st.integers(0, 0xFFFF),
)
IPV4 = st.builds(IPv4Address, st.integers(0, 2**32 - 1))
PAIRS = st.one_of(
    st.tuples(IPV4, st.integers(20, 32), st.integers(0, 12), st.integers(0, 4095)),
    st.tuples(IPV6, st.integers(116, 128), st.integers(0, 12), st.integers(0, 4095)),
)


@given(PAIRS)
def test_every_block_inside_is_under_a_prefix(
    drawn: tuple[IPv4Address | IPv6Address, int, int, int],
) -> None:
    """The key of any block inside another begins with one of its prefixes, in both families."""
    address, length, longer, offset = drawn
    outer = network_of(address, length)
    inside = outer[offset % outer.num_addresses]
    inner = network_of(inside, min(length + longer, outer.max_prefixlen))
    assert contains(outer, inner)
    assert str(BlockKey(inner)).startswith(prefixes(outer))
    assert inner == outer or outer in enclosing(inner)


@pytest.mark.parametrize(
    ("network", "texts"),
    [
        pytest.param("10.0.0.64/26", ["ipv4/block/10.0.0."], id="within one /24"),
        pytest.param(
            "10.0.4.0/22", [f"ipv4/block/10.0.{n}." for n in (4, 5, 6, 7)], id="several /24"
        ),
        pytest.param("fd00::40/122", ["ipv6/block/fd00::"], id="zeros to the end"),
        pytest.param(
            "fd00:1:1:1:1:1:0:40/122",
            ["ipv6/block/fd00:1:1:1:1:1::-", "ipv6/block/fd00:1:1:1:1:1:0:"],
            id="the zero of the last group joins a run",
        ),
    ],
)
def test_prefixes(network: str, texts: list[str]) -> None:
    """Few texts guard a block."""
    place = "/calico/ipam/v2/assignment/"
    assert prefixes(ip_network(network)) == tuple(place + text for text in texts)


def test_a_claim_fits_a_transaction() -> None:
    """Whatever the size of a block, its guards leave room for addresses beside them."""
    networks: list[Network] = [ip_network(f"10.0.0.0/{n}") for n in range(20, 33)]
    networks += [ip_network(f"fd00::/{n}") for n in range(116, 129)]
    assert max(sum(map(len, guards(network, 1))) for network in networks) <= 20


@given(
    st.lists(
        st.tuples(st.integers(26, 32), st.integers(0, 63), st.sampled_from(["a", "b", "c"])),
        min_size=2,
        max_size=8,
    )
)
def test_claims_of_all_sizes_at_once(wishes: list[tuple[int, int, str]]) -> None:
    """Nodes that claim blocks of different sizes at the same moment never get overlapping ones."""

    async def race() -> None:
        store = MemoryDatastore()
        networks = [network_of(IPv4Address("10.0.0.0") + n, length) for length, n, _ in wishes]
        claims = zip(wishes, networks, strict=True)
        await asyncio.gather(*(affinity.claim(store, w[2], network) for w, network in claims))
        stored = [key.cidr for key in await everything(store) if isinstance(key, BlockKey)]
        assert stored
        for number, network in enumerate(stored):
            assert not any(network.overlaps(other) for other in stored[:number])
        for network in networks:
            assert any(network.overlaps(other) for other in stored)

    asyncio.run(race())
