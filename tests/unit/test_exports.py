"""What a node advertises, as a truth table."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

import msgspec
import pytest

from bgpd.exports import (
    LOCAL_PREF,
    ExportInputs,
    Why,
    advertised,
    announcements,
    own_aggregates,
)
from bgpd.speaker import Announcement, PathAttributes
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.ipam import AffinityState, AllocationBlock
from cymric.model.peering import PeerType, Session
from cymric.model.resources import IPPool
from tests.support.routing import affinity, block, endpoint, pool

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


@pytest.mark.parametrize(
    ("peer_asn", "local_pref"),
    [pytest.param(64512, 2147482623, id="iBGP"), pytest.param(65001, None, id="eBGP")],
)
def test_announcements(peer_asn: int, local_pref: int | None) -> None:
    """Next hop is our address; LOCAL_PREF is Calico's, and left out towards another AS."""
    session = Session(
        name="x",
        peer_type=PeerType.GLOBAL,
        peer_address=ip_address("198.19.0.3"),
        peer_port=179,
        peer_asn=peer_asn,
        local_address=ip_address("198.19.0.2"),
        local_asn=64512,
        router_id=ip_address("198.19.0.2"),
        listen_port=179,
        is_passive=False,
    )
    prefixes = [ip_network(OURS), ip_network("fd00::/122")]
    assert announcements(prefixes, session) == {
        OURS: Announcement(OURS, "198.19.0.2", PathAttributes(local_pref=local_pref))
    }
    assert LOCAL_PREF == 2147482623
