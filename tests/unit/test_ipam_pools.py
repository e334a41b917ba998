"""Which pools may serve a request, and in which order their blocks are tried."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.model.resources import (
    IPPool,
    IPPoolSpec,
    IPReservation,
    IPReservationSpec,
    ObjectMeta,
)
from ipam.errors import NoPool
from ipam.pools import Reserved, Wanted, block_order, claimable, eligible


def pool(name: str, cidr: str, **spec: Any) -> IPPool:
    return IPPool(metadata=ObjectMeta(name=name), spec=IPPoolSpec(cidr=cidr, **spec))


POOLS = (
    pool("all", "10.1.0.0/24"),
    pool("disabled", "10.2.0.0/24", disabled=True),
    pool("manual", "10.3.0.0/24", assignment_mode="Manual"),
    pool("rack1", "10.4.0.0/24", node_selector="rack == '1'"),
    pool("six", "fd00::/64", block_size=122),
    pool("team", "10.5.0.0/24", namespace_selector="team == 'a'"),
    pool("tunnel", "10.6.0.0/24", allowed_uses=("Tunnel",)),
    IPPool(
        metadata=ObjectMeta(name="going"),
        spec=IPPoolSpec(cidr="10.7.0.0/24"),
        status={"conditions": [{"type": "Allocatable", "status": "False"}]},
    ),
)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        pytest.param({}, ["all"], id="by selectors"),
        pytest.param({"node_labels": {"rack": "1"}}, ["all", "rack1"], id="node labels"),
        pytest.param({"namespace_labels": {"team": "a"}}, ["all", "team"], id="namespace labels"),
        pytest.param({"namespace_labels": {}}, ["all"], id="namespace without the label"),
        pytest.param({"use": "Tunnel"}, ["all", "tunnel"], id="another use"),
        pytest.param({"pools": ("manual",)}, ["manual"], id="by name, whatever it selects"),
        pytest.param({"pools": ("10.4.0.0/24", "all")}, ["rack1", "all"], id="by CIDR, in order"),
    ],
)
def test_eligible_pools(wanted: dict[str, Any], names: list[str]) -> None:
    """Selectors decide, unless the request names pools."""
    request = Wanted(**{"host": "n", "node_labels": {}, **wanted})
    assert [p.metadata.name for p in eligible(POOLS, request)] == names


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        pytest.param({"pools": ("disabled",)}, "disabled does not exist, or is not", id="disabled"),
        pytest.param({"pools": ("10.9.0.0/24",)}, "10.9.0.0/24 does not exist", id="unknown"),
        pytest.param({"pools": ("going",)}, "not enabled", id="not allocatable"),
        pytest.param({"pools": ("tunnel",)}, "tunnel may not be used", id="not for workloads"),
        pytest.param({"pools": ("six",)}, "does not exist", id="other family"),
        pytest.param({"use": "LoadBalancer"}, "no pool for use", id="use nobody serves"),
    ],
)
def test_no_pool(wanted: dict[str, Any], text: str) -> None:
    """A request that no pool may serve says why."""
    with pytest.raises(NoPool, match=text):
        eligible(POOLS, Wanted(**{"host": "n", "node_labels": {}, **wanted}))


def test_no_pool_selects_the_node() -> None:
    """Without any pool for the node the error names it, as Calico's does."""
    with pytest.raises(NoPool, match="no configured Calico pools for node n7"):
        eligible((POOLS[3],), Wanted(host="n7", node_labels={}))


@given(st.text(min_size=1), st.integers(20, 26), st.integers(0, 6))
def test_every_block_once(host: str, length: int, bits: int) -> None:
    """The order has every block once, ascending with one wrap, and is the same every time."""
    whole = ip_network(f"10.64.0.0/{length}")
    tried = list(block_order(pool("p", str(whole), block_size=length + bits), host))
    expected = list(whole.subnets(bits))
    start = expected.index(tried[0])
    assert tried == expected[start:] + expected[:start]
    assert tried == list(block_order(pool("p", str(whole), block_size=length + bits), host))


def test_hosts_start_apart() -> None:
    """Nodes named alike start at different blocks, so that they rarely race."""
    starts = {next(block_order(pool("p", "10.0.0.0/16"), f"node-{n}")) for n in range(50)}
    assert len(starts) > 40


def test_reservations() -> None:
    """A reservation counts for the part of the block that it covers."""
    reserved = Reserved(
        [
            IPReservation(
                metadata=ObjectMeta(name="r"),
                spec=IPReservationSpec(reserved_cidrs=("10.0.0.0/30", "10.0.0.9", "fd00::/64")),
            )
        ]
    )
    assert reserved.ordinals(ip_network("10.0.0.0/28")) == {0, 1, 2, 3, 9}
    assert reserved.covers(ip_network("10.0.0.0/30"))
    assert not reserved.covers(ip_network("10.0.0.0/28"))


def test_no_claim_over_blocks_of_another_size() -> None:
    """Where a former pool left a block of another size, nothing is claimed over it."""
    existing = {ip_network("10.0.0.16/28")}
    pools = [pool("p", "10.0.0.0/26", block_size=27)]
    assert list(claimable(pools, "n", existing, Reserved())) == [ip_network("10.0.0.32/27")]
