"""What a node advertises, as a truth table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_network

import msgspec
import pytest

from bgpd.exports import (
    ExportInputs,
    Local,
    Why,
    advertised,
    kept_out_of_kernel,
    local_routes,
    own_aggregates,
)
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.ipam import AffinityState, AllocationBlock
from cymric.model.resources import IPPool
from tests.support.routing import affinity, block, configuration, endpoint, pool

OURS, THEIRS = "198.19.16.0/26", "198.19.16.64/26"
CONFIRMED, PENDING, DELETING, LEGACY = (
    AffinityState.CONFIRMED,
    AffinityState.PENDING,
    AffinityState.PENDING_DELETION,
    AffinityState.EMPTY,
)


def inputs(
    *,
    blocks: tuple[AllocationBlock, ...] = (),
    affinities: Mapping[str, AffinityState] | None = None,
    endpoints: tuple[WorkloadEndpoint, ...] = (),
    pools: tuple[IPPool, ...] = (pool(),),
) -> ExportInputs:
    """What node `us` sees; by default one pool."""
    return ExportInputs(
        node="us",
        pools=pools,
        blocks={one.network: one for one in blocks},
        affinities={
            ip_network(cidr): affinity(state) for cidr, state in (affinities or {}).items()
        },
        endpoints=endpoints,
    )


def announced(one: WorkloadEndpoint) -> WorkloadEndpoint:
    """The same endpoint, with addresses from another IPAM."""
    notes = {"cymric.io/announce": "true"}
    metadata = msgspec.structs.replace(one.metadata, annotations=notes)
    return msgspec.structs.replace(one, metadata=metadata)


FOREIGN = endpoint("f1", "us", "198.19.24.5")
A1 = endpoint("a1", "us", "198.19.16.5")
A2 = endpoint("a2", "us", "198.19.16.70")
ELSEWHERE = endpoint("b1", "other", "198.19.16.71")
OWN_BLOCK = block(OURS, "us", {"198.19.16.5/32": "us"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(
            inputs(blocks=(OWN_BLOCK,), affinities={OURS: CONFIRMED}, endpoints=(A1,)),
            {OURS: Why.OWN_BLOCK},
            id="own block covers its workloads",
        ),
        pytest.param(
            inputs(blocks=(OWN_BLOCK,), affinities={OURS: LEGACY}),
            {OURS: Why.OWN_BLOCK},
            id="legacy empty state is confirmed",
        ),
        pytest.param(inputs(endpoints=(FOREIGN,)), {}, id="outside the pools"),
        pytest.param(
            inputs(endpoints=(announced(FOREIGN),)),
            {"198.19.24.5/32": Why.FOREIGN},
            id="outside the pools, from another IPAM",
        ),
        pytest.param(
            inputs(endpoints=(announced(FOREIGN),), pools=(pool(),)),
            {"198.19.24.5/32": Why.FOREIGN},
            id="other pools do not matter to it",
        ),
        pytest.param(
            inputs(endpoints=(announced(endpoint("b2", "other", "198.19.24.6")),)),
            {},
            id="another node's, from another IPAM",
        ),
        pytest.param(
            inputs(
                endpoints=(announced(FOREIGN),),
                pools=(pool("198.19.24.0/24", disable_bgp_export=True),),
            ),
            {},
            id="from another IPAM, in a pool that is not exported",
        ),
        pytest.param(inputs(blocks=(OWN_BLOCK,)), {}, id="no affinity"),
        pytest.param(inputs(affinities={OURS: CONFIRMED}), {}, id="no block object"),
        pytest.param(
            inputs(blocks=(block(OURS, "other"),), affinities={OURS: CONFIRMED}),
            {},
            id="the block names another node",
        ),
        pytest.param(
            inputs(blocks=(OWN_BLOCK,), affinities={OURS: PENDING}), {}, id="claim pending"
        ),
        pytest.param(
            inputs(blocks=(OWN_BLOCK,), affinities={OURS: DELETING}, endpoints=(A1,)),
            {"198.19.16.5/32": Why.WORKLOAD},
            id="a block being given up leaves its workloads",
        ),
        pytest.param(
            inputs(
                blocks=(block(THEIRS, "other", {"198.19.16.70/32": "us"}),),
                endpoints=(A2, ELSEWHERE),
            ),
            {"198.19.16.70/32": Why.WORKLOAD},
            id="borrowed address",
        ),
        pytest.param(
            inputs(blocks=(block(THEIRS, "other", {"198.19.16.70/32": "third"}),), endpoints=(A2,)),
            {},
            id="the block says somebody else holds it",
        ),
        pytest.param(
            inputs(endpoints=(endpoint("x", "us", "192.0.2.9"),)), {}, id="workload outside pools"
        ),
        pytest.param(
            inputs(
                blocks=(OWN_BLOCK,),
                affinities={OURS: CONFIRMED},
                endpoints=(A2,),
                pools=(pool(disable_bgp_export=True),),
            ),
            {},
            id="pool not exported",
        ),
        pytest.param(
            inputs(blocks=(OWN_BLOCK,), affinities={OURS: CONFIRMED}, pools=()),
            {OURS: Why.OWN_BLOCK},
            id="own block whose pool is gone",
        ),
        pytest.param(
            inputs(
                blocks=(block("198.19.16.5/32", "us", {"198.19.16.5/32": "us"}),),
                affinities={"198.19.16.5/32": CONFIRMED},
                endpoints=(A1,),
            ),
            {"198.19.16.5/32": Why.WORKLOAD},
            id="a block of one address is its workload",
        ),
    ],
)
def test_advertised(given: ExportInputs, expected: dict[str, Why]) -> None:
    """A node advertises what is provably its own and nothing else."""
    assert {str(prefix): why for prefix, why in advertised(given).items()} == expected


def test_a_block_of_one_address_gets_no_blackhole() -> None:
    """A blackhole /32 would hide the workload's own route."""
    single = "198.19.16.5/32"
    given = inputs(blocks=(block(single, "us"),), affinities={single: CONFIRMED})
    assert own_aggregates(given) == frozenset()


def test_what_only_a_filter_lets_out() -> None:
    """Addresses inside own blocks, outside pools, and closed pools are known, not advertised."""
    given = inputs(blocks=(OWN_BLOCK,), affinities={OURS: CONFIRMED}, endpoints=(A1, A2, FOREIGN))
    assert {str(prefix): local for prefix, local in local_routes(given).items()} == {
        OURS: Local(Why.OWN_BLOCK),
        "198.19.16.5/32": Local(None, "calia1"),
        "198.19.16.70/32": Local(Why.WORKLOAD, "calia2"),
        "198.19.24.5/32": Local(None, "calif1"),
    }


SERVICES: dict[str, object] = {
    "serviceClusterIPs": [{"cidr": "10.96.0.0/12"}, {"cidr": "fd00:96::/112"}],
    "serviceExternalIPs": [{"cidr": "192.0.2.0/28"}, {"cidr": "192.0.2.100/32"}],
    "serviceLoadBalancerIPs": [{"cidr": "198.51.100.0/24"}, {"cidr": "198.51.101.1/32"}],
}
RANGES = {"10.96.0.0/12", "fd00:96::/112", "192.0.2.0/28", "198.51.100.0/24"}
ONE_SERVICE = "192.0.2.100/32"


@pytest.mark.parametrize(
    ("spec", "labels", "expected"),
    [
        pytest.param(SERVICES, {}, RANGES | {ONE_SERVICE}, id="ranges and single services"),
        pytest.param(
            SERVICES | {"serviceLoadBalancerAggregation": "Disabled"},
            {},
            RANGES - {"198.51.100.0/24"} | {ONE_SERVICE},
            id="load balancers one by one",
        ),
        pytest.param(
            SERVICES,
            {"node.kubernetes.io/exclude-from-external-load-balancers": "true"},
            set(),
            id="a node kept out of load balancing",
        ),
    ],
)
def test_services(spec: dict[str, object], labels: dict[str, str], expected: set[str]) -> None:
    """Ranges of several addresses go out from every node, single services where they are told."""
    given = replace(
        inputs(),
        configuration=configuration(**spec),
        labels=labels,
        service_addresses=frozenset({ip_network(ONE_SERVICE)}),
    )
    assert set(map(str, advertised(given))) == expected
    assert set(map(str, kept_out_of_kernel(given.configuration).networks)) == RANGES
