"""Addresses that no workload has any more."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from cymric.model.ipam import AllocationBlock
from ipam import block as blocks
from ipam.collect import Collector, Held

NETWORK = ip_network("10.0.0.0/29")
S = 1_000_000_000


def block_of(*holders: tuple[str, dict[str, str]]) -> AllocationBlock:
    block = blocks.new_block(NETWORK, affinity="host:a", claimed_at="", sequence_number=1)
    for handle, attributes in holders:
        block, _ = blocks.take(block, 1, blocks.record_of(handle, attributes))
    return block


def addresses(found: tuple[object, ...]) -> list[str]:
    return [str(leak.held.address) for leak in found]  # type: ignore[attr-defined]


@pytest.fixture
def collector() -> Collector:
    return Collector("a", grace_s=60)


def test_what_is_known_is_no_leak(collector: Collector) -> None:
    """An allocation is no leak if the kernel or an endpoint has its address, or a handle lives."""
    on_a = {"node": "a"}
    collector.on_block(NETWORK, block_of(("n.1", on_a), ("n.2", on_a), ("n.3", on_a)))
    found = collector.leaks(addresses={ip_address("10.0.0.0")}, handles={"n.2"}, now_ns=5 * S)
    assert addresses(found) == ["10.0.0.2"]


@pytest.mark.parametrize(
    ("handle", "attributes"),
    [
        pytest.param("n.1", {"node": "b"}, id="another node's"),
        pytest.param("n.1", {}, id="of nobody knows which node"),
        pytest.param("t", {"node": "a", "type": "ipipTunnelAddress"}, id="a tunnel's"),
        pytest.param("windows-reserved-ipam-handle", {"node": "a"}, id="reserved by Windows"),
    ],
)
def test_what_is_never_touched(
    collector: Collector, handle: str, attributes: dict[str, str]
) -> None:
    """Only workload addresses that were given on this node can leak."""
    collector.on_block(NETWORK, block_of((handle, attributes)))
    assert collector.leaks(addresses=(), handles=(), now_ns=0) == ()


def test_grace_period(collector: Collector) -> None:
    """A leak is due when it was unknown for all of the grace period, without a break."""
    collector.on_block(NETWORK, block_of(("n.1", {"node": "a"})))
    first = collector.leaks(addresses=(), handles=(), now_ns=0)
    assert collector.due(first, now_ns=59 * S) == ()
    assert addresses(collector.due(first, now_ns=60 * S)[0]) == ["10.0.0.0"]
    assert collector.leaks(addresses=(), handles={"n.1"}, now_ns=50 * S) == ()
    again = collector.leaks(addresses=(), handles=(), now_ns=61 * S)
    assert collector.due(again, now_ns=70 * S) == ()


def test_reassigned_address_starts_anew(collector: Collector) -> None:
    """An address released and given again, even to the same handle, is in doubt from then on."""
    block = block_of(("n.1", {"node": "a"}))
    collector.on_block(NETWORK, block)
    collector.leaks(addresses=(), handles=(), now_ns=0)
    freed = blocks.give_back(block, (0,))
    again = blocks.take_ordinal(freed, 0, blocks.record_of("n.1", {"node": "a"}))
    collector.on_block(NETWORK, again)
    (leak,) = collector.leaks(addresses=(), handles=(), now_ns=100 * S)
    assert (leak.since_ns, leak.held) == (100 * S, Held(ip_address("10.0.0.0"), "n.1", 3))


def test_half_a_handle_is_not_released(collector: Collector) -> None:
    """As long as one address of a handle is in use, none of them is due."""
    collector.on_block(NETWORK, block_of(("n.1", {"node": "a"}), ("n.1", {"node": "a"})))
    found = collector.leaks(addresses={ip_address("10.0.0.1")}, handles=(), now_ns=0)
    assert addresses(found) == ["10.0.0.0"]
    assert collector.due(found, now_ns=1000 * S) == ()


def test_a_block_that_is_gone_leaks_nothing(collector: Collector) -> None:
    """What the blocks no longer say is no leak any more."""
    collector.on_block(NETWORK, block_of(("n.1", {"node": "a"})))
    assert collector.leaks(addresses=(), handles=(), now_ns=0)
    collector.on_block(NETWORK, None)
    assert collector.leaks(addresses=(), handles=(), now_ns=1) == ()
