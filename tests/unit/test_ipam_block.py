"""Pure changes to one block."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.model.codec import decode_as, encode
from cymric.model.ipam import AllocationBlock
from ipam import block as blocks

BORN = 1767323045123456789
CIDR = ip_network("192.168.10.0/30")


def fresh() -> AllocationBlock:
    return blocks.new_block(
        CIDR, affinity="host:node-a", claimed_at="2026-01-02T03:04:05Z", sequence_number=BORN
    )


def test_fresh_block_has_calicos_bytes() -> None:
    """A new block is stored exactly as Calico 3.32 stores one."""
    assert encode(fresh()) == (
        b'{"cidr":"192.168.10.0/30","affinity":"host:node-a",'
        b'"affinity_claim_time":"2026-01-02T03:04:05Z","allocations":[null,null,null,null],'
        b'"unallocated":[0,1,2,3],"attributes":null,"sequenceNumber":1767323045123456789,'
        b'"sequenceNumberForAllocation":{},"deleted":false}'
    )


def test_two_allocations_have_calicos_bytes() -> None:
    """Two addresses taken by two holders give the data model's example, byte for byte."""
    block, _ = blocks.take(
        fresh(),
        1,
        blocks.record_of(
            "ipip-tunnel-addr-node-a", {"type": "ipipTunnelAddress", "node": "node-a"}
        ),
    )
    block, _ = blocks.take(
        block,
        1,
        blocks.record_of(
            "k8s-pod-network.0d9c5e1c2f",
            {
                "pod": "web-1",
                "node": "node-a",
                "namespace": "prod",
                "timestamp": "2026-01-02 03:05:00.1 +0000 UTC",
            },
        ),
    )
    assert encode(block) == (
        b'{"cidr":"192.168.10.0/30","affinity":"host:node-a",'
        b'"affinity_claim_time":"2026-01-02T03:04:05Z","allocations":[0,1,null,null],'
        b'"unallocated":[2,3],"attributes":[{"handle_id":"ipip-tunnel-addr-node-a",'
        b'"secondary":{"node":"node-a","type":"ipipTunnelAddress"}},'
        b'{"handle_id":"k8s-pod-network.0d9c5e1c2f","secondary":{"namespace":"prod",'
        b'"node":"node-a","pod":"web-1","timestamp":"2026-01-02 03:05:00.1 +0000 UTC"}}],'
        b'"sequenceNumber":1767323045123456791,"sequenceNumberForAllocation":'
        b'{"0":1767323045123456789,"1":1767323045123456790},"deleted":false}'
    )


def test_freed_addresses_wait_longest() -> None:
    """A freed ordinal goes to the tail, so it is used again only after all others."""
    block, (first,) = blocks.take(fresh(), 1, blocks.record_of("a", {}))
    block = blocks.give_back(block, (first,))
    assert block.unallocated == (1, 2, 3, 0)
    assert block.attributes == ()
    assert b'"attributes":[]' in encode(block)


def test_equal_holders_share_a_record() -> None:
    """Allocations with equal handle and attributes share one record, others have their own."""
    block, _ = blocks.take(fresh(), 2, blocks.record_of("a", {"node": "x"}))
    block, _ = blocks.take(block, 1, blocks.record_of("a", {"node": "y"}))
    block, _ = blocks.take(block, 1, blocks.record_of("a", {"node": "x"}))
    assert block.allocations == (0, 0, 1, 0)
    block = blocks.give_back(block, (0, 1, 3))
    assert block.allocations == (None, None, 0, None)
    assert [record.attributes for record in block.attributes or ()] == [{"node": "y"}]


def test_reserved_ordinals_keep_their_place() -> None:
    """Reserved addresses are passed over and stay where they are in the order."""
    block, taken = blocks.take(fresh(), 2, blocks.record_of("a", {}), {0, 2})
    assert (taken, block.unallocated) == ((1, 3), (0, 2))


def test_nothing_to_do_is_no_change() -> None:
    """A full block gives nothing, and freeing what is free writes nothing."""
    full, _ = blocks.take(fresh(), 4, blocks.record_of("a", {}))
    assert blocks.take(full, 1, blocks.record_of("b", {})) == (full, ())
    assert blocks.take_ordinal(full, 2, blocks.record_of("b", {})) is None
    empty = fresh()
    assert blocks.give_back(empty, (0, 3)) is empty


def test_old_values_are_understood() -> None:
    """A record of an older release, with null fields, is shared with an equal new one."""
    old = b"""{"cidr":"192.168.10.0/30","affinity":null,"allocations":[0,null,null,null],
        "unallocated":[1,2,3],"attributes":[{"handle_id":"a","secondary":null}],
        "sequenceNumber":7,"sequenceNumberForAllocation":null,"deleted":false}"""
    block, taken = blocks.take(decode_as(AllocationBlock, old), 1, blocks.record_of("a", {}))
    assert (taken, block.allocations) == ((1,), (0, 0, None, None))


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 5), st.sampled_from("abc")),
        st.tuples(st.just("free"), st.integers(0, 15), st.just("")),
        st.tuples(st.just("by handle"), st.just(0), st.sampled_from("abc")),
    ),
    max_size=40,
)


@given(STEPS)
def test_block_against_a_simple_model(steps: list[tuple[str, int, str]]) -> None:
    """Whatever happens: the order is first in, first out, owners are right, nothing dangles."""
    block = blocks.new_block(
        ip_network("10.0.0.0/28"), affinity="host:a", claimed_at="x", sequence_number=1
    )
    free, owners = list(range(16)), dict[int, str]()
    for kind, number, handle in steps:
        before = block
        if kind == "take":
            block, taken = blocks.take(block, number, blocks.record_of(handle, {"h": handle}))
            assert list(taken) == free[:number]
            owners.update(dict.fromkeys(taken, handle))
            del free[:number]
        else:
            gone = [number] if kind == "free" else sorted(n for n in owners if owners[n] == handle)
            assert kind == "free" or blocks.ordinals_of_handle(block, handle) == tuple(gone)
            block = blocks.give_back(block, gone)
            free += [n for n in gone if owners.pop(n, None) is not None]
        assert list(block.unallocated) == free
        assert {n: holder.handle for n, holder in block.held()} == owners
        assert blocks.problems(block) == ()
        assert block.sequence_number == before.sequence_number + (block is not before)
        assert decode_as(AllocationBlock, encode(block)) == block
        assert set(block.sequence_number_for_allocation or {}) == {str(n) for n in owners}


@pytest.mark.parametrize("owner", ["host:node-b", None])
def test_ownership_changes(owner: str | None) -> None:
    """A new owner comes with its claim time; without owner there is none, addresses stay."""
    held, _ = blocks.take(fresh(), 1, blocks.record_of("a", {}))
    changed = blocks.own(held, owner, claimed_at="now") if owner else blocks.disown(held)
    assert changed.affinity == owner
    assert (b"affinity_claim_time" in encode(changed)) == (owner is not None)
    assert changed.allocations == held.allocations
    assert changed.sequence_number == held.sequence_number + 1
