# ruff: noqa: F811 - fixtures of the other IPAM tests are used by name
"""The node's allocator, on the memory store and on a real etcd alike."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from cymric.datastore.api import Datastore, Transaction, Unavailable, put
from cymric.datastore.memory import MemoryDatastore
from cymric.datastore.syncer import Update
from cymric.model.codec import encode
from cymric.model.ipam import IPAMConfig
from cymric.model.keys import (
    IPAM_CONFIG,
    AffinityKey,
    BlockKey,
    HandleKey,
    IPAMConfigKey,
    ResourceKey,
)
from cymric.model.net import Address
from cymric.model.resources import IPReservation, IPReservationSpec, ObjectMeta
from ipam import affinity
from ipam import block as blocks
from ipam.affinity import Released, rfc3339
from ipam.allocator import Allocator
from ipam.asking import Ask, Release
from ipam.client import IPAM
from ipam.errors import (
    AddressRefused,
    AddressRouted,
    BlockLimitReached,
    NoAddress,
    NoFreeAddresses,
    StaleRelease,
)
from tests.contract.test_ipam import Connect, connect, store  # noqa: F401 - fixtures
from tests.support.eventually import eventually
from tests.support.ipam_world import (
    addresses,
    assert_consistent,
    everything,
    feed,
    owned_by,
    running,
    store_node,
    store_pool,
)

SECOND = 1_000_000_000


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_ns = 1_767_323_045_000_000_000

    def __call__(self) -> int:
        self.now_ns += 1
        return self.now_ns


def ask(number: object, ipv4: int = 1, **fields: Any) -> Ask:
    attributes = {"node": "node-a", "number": str(number)}
    return Ask(handle=f"net.{number}", attributes=attributes, ipv4=ipv4, **fields)


async def test_what_gathers_lands_together(store: Datastore) -> None:
    """Sixty-four calls at once take at most three transactions, the claim of a block included."""
    await store_pool(store, "pods", "10.0.0.0/20")
    async with running(store, "node-a", ahead_part=0) as allocator:
        given = await asyncio.gather(*(allocator.assign(ask(n)) for n in range(64)))
        assert allocator.counts.transactions <= 3
        assert len({assignment.address for (assignment,) in given}) == 64
        assert allocator.counts.listings <= 4  # two families at start, one look for a block
        before = allocator.counts.reads + allocator.counts.listings
        held = assert_consistent(await everything(store))
        assert held == {f"net.{n}": addresses(given[n]) for n in range(64)}
        freed = await asyncio.gather(*(allocator.release_handle(f"net.{n}") for n in range(64)))
        assert allocator.counts.transactions <= 6
        assert [one for (one,) in freed] == [a.address for (a,) in given]
        await asyncio.gather(*(allocator.assign(ask(n)) for n in range(64)))
        assert allocator.counts.reads + allocator.counts.listings == before, "the hot path reads"
    assert_consistent(await everything(store))


async def test_more_than_a_transaction_holds(store: Datastore) -> None:
    """Some three hundred calls at once are split at etcd's limit of operations."""
    await store_pool(store, "pods", "10.0.0.0/20")
    async with running(store, "node-a") as allocator:
        await asyncio.gather(*(allocator.assign(ask(n)) for n in range(310)))
        await eventually(lambda: len(allocator.blocks) == 6, what="the next block claimed ahead")
    stored = await everything(store)
    assert len(assert_consistent(stored)) == 310
    assert len(owned_by(stored, "node-a")) == 6


async def test_dual_stack(store: Datastore) -> None:
    """Both families are given in one transaction, and one handle counts both."""
    await store_pool(store, "six", "fd00:10:244::/112", block_size=122)
    async with running(store, "node-a") as allocator:
        four, six = await allocator.assign(ask(1, ipv6=1))
        assert (four.address.version, six.address.version) == (4, 6)
        assert allocator.counts.transactions == 1
        stored = await everything(store)
        assert stored[HandleKey("net.1")].block == {str(four.block): 1, str(six.block): 1}
        assert_consistent(stored)
        assert set(await allocator.held_by("net.1")) == {four.address, six.address}
        assert set(await allocator.release_handle("net.1")) == {four.address, six.address}
        assert await allocator.held_by("net.1") == ()


async def test_all_families_or_nothing(store: Datastore) -> None:
    """Without an IPv6 pool the IPv4 address of the same ask is not taken either."""
    async with running(store, "node-a") as allocator:
        with pytest.raises(NoAddress, match="no configured Calico pools"):
            await allocator.assign(ask(1, ipv6=1))
        assert allocator.counts.transactions == 0
        given, refused = await asyncio.gather(
            allocator.assign(ask(2)), allocator.assign(ask(3, ipv6=1)), return_exceptions=True
        )
        assert isinstance(refused, NoAddress)
        assert not isinstance(given, BaseException)
    assert list(assert_consistent(await everything(store))) == ["net.2"]


async def test_several_addresses_and_some_by_name(store: Datastore) -> None:
    """One ask may want addresses by name and any number of others, over several blocks."""
    named = ip_address("192.168.10.9")
    async with running(store, "node-a") as allocator:
        given = await allocator.assign(ask(1, ipv4=6, addresses=(named,)))
        assert given[0].address == named
        assert len({assignment.address for assignment in given}) == 7
        with pytest.raises(AddressRefused):
            await allocator.assign(ask(2, ipv4=1, addresses=(named,)))
        assert await allocator.held_by("net.2") == ()
    stored = await everything(store)
    assert_consistent(stored)
    assert sum(stored[HandleKey("net.1")].block.values()) == 7


async def test_too_many_is_nothing(store: Datastore) -> None:
    """An ask that the pools cannot grant in full takes nothing, and says how far it came."""
    async with running(store, "node-a") as allocator:
        with pytest.raises(NoFreeAddresses, match="Assigned 16 out of 17 requested IPv4 addresses"):
            await allocator.assign(ask(1, ipv4=17))
        assert len(await allocator.assign(ask(2, ipv4=16))) == 16
    assert list(assert_consistent(await everything(store))) == ["net.2"]


async def test_next_block_is_claimed_ahead(store: Datastore) -> None:
    """When less than the part of a block is left, the next one is claimed before it is needed."""
    async with running(store, "node-a", ahead_part=0.5) as allocator:
        await allocator.assign(ask(1, ipv4=2))
        assert len(allocator.blocks) == 1
        await allocator.assign(ask(2))
        await eventually(lambda: len(allocator.blocks) == 2)
        await allocator.assign(ask(3, ipv4=4))
        await eventually(lambda: len(allocator.blocks) == 3)
    assert len(owned_by(await everything(store), "node-a")) == 3


async def test_nothing_is_claimed_ahead_beyond_the_limit(store: Datastore) -> None:
    """A limit of blocks holds for what is claimed ahead, too."""
    config = IPAMConfig(strict_affinity=True, auto_allocate_blocks=True, maxBlocksPerHost=1)
    await put(store, IPAM_CONFIG, encode(config))
    async with running(store, "node-a") as allocator:
        await allocator.assign(ask(1, ipv4=4))
        with pytest.raises(BlockLimitReached):
            await allocator.assign(ask(2))
        assert len(allocator.blocks) == 1


async def test_idle_blocks_are_given_back(store: Datastore) -> None:
    """A block that was empty for the idle time goes, but never one that is needed, or the last."""
    clock = Time()
    async with running(store, "node-a", clock=clock, idle_s=900) as allocator:
        await allocator.assign(ask(1, ipv4=4))
        await eventually(lambda: len(allocator.blocks) == 2)
        await allocator.look_after()
        clock.now_ns += 1000 * SECOND
        await allocator.look_after()
        assert len(allocator.blocks) == 2, "it is the next block, claimed ahead"
        await allocator.release_handle("net.1")
        await allocator.look_after()
        clock.now_ns += 800 * SECOND
        await allocator.look_after()
        assert len(allocator.blocks) == 1, "one was idle for long enough"
        clock.now_ns += 2000 * SECOND
        await allocator.look_after()
        assert len(allocator.blocks) == 1, "the last one stays"
    assert len(owned_by(await everything(store), "node-a")) == 1


async def test_routed_addresses_are_passed_over(store: Datastore) -> None:
    """What the kernel routes to a workload is never given, neither from the row nor by name."""
    routed: set[Address] = set()
    async with running(store, "node-a", is_routed=routed.__contains__, ahead_part=0) as allocator:
        (first,) = await allocator.assign(ask(1))
        routed.add(first.block[1])
        (second,) = await allocator.assign(ask(2))
        assert second.address == first.block[2]
        with pytest.raises(AddressRouted):
            await allocator.assign(ask(3, ipv4=0, addresses=(first.block[1],)))
        routed.clear()
        (third,) = await allocator.assign(ask(4))
        assert third.address == first.block[1], "it kept its place in the row"


async def test_reserved_addresses(store: Datastore) -> None:
    """Reservations are heard of by the watch, and kept but for addresses by name."""
    spec = IPReservationSpec(reserved_cidrs=("192.168.10.0/29", "192.168.10.8", "192.168.10.14/31"))
    reservation = IPReservation(metadata=ObjectMeta(name="r"), spec=spec)
    async with running(store, "node-a") as allocator:
        allocator.on_updates([Update(ResourceKey("IPReservation", "r"), reservation)])
        given = await allocator.assign(ask(1, ipv4=5))
        assert sorted(addresses(given)) == sorted(f"192.168.10.{n}" for n in (9, 10, 11, 12, 13))
        with pytest.raises(NoFreeAddresses):
            await allocator.assign(ask(2))
        (named,) = await allocator.assign(ask(3, ipv4=0, addresses=(ip_address("192.168.10.8"),)))
        assert str(named.address) == "192.168.10.8"


async def test_settings_are_heard_of(store: Datastore) -> None:
    """A change of the settings holds for the next call, without reading anything."""
    for number in range(4):
        await affinity.claim(store, "node-b", ip_network(f"192.168.10.{number * 4}/30"))
    async with running(store, "node-a") as allocator:
        (borrowed,) = await allocator.assign(ask(1))
        assert borrowed.is_borrowed
        strict = IPAMConfig(strict_affinity=True, auto_allocate_blocks=True)
        allocator.on_updates([Update(IPAMConfigKey(), strict)])
        with pytest.raises(NoFreeAddresses, match="strict affinity"):
            await allocator.assign(ask(2))
        assert await allocator.release_handle("net.1") == (borrowed.address,)


async def test_empty_blocks_of_others_are_taken_over(store: Datastore) -> None:
    """With the pools cut up, an empty block that another claimed a minute ago becomes ours."""
    clock = Time()
    for number in range(4):
        network = ip_network(f"192.168.10.{number * 4}/30")
        await affinity.claim(store, "node-b", network, clock=clock)
    used = await IPAM(store, clock=clock).grant("node-b", ask("b"))
    async with running(store, "node-a", clock=clock, ahead_part=0) as allocator:
        (young,) = await allocator.assign(ask(1))
        assert young.is_borrowed, "claimed a moment ago: its owner may be about to use it"
        await allocator.release_handle("net.1")
        clock.now_ns += 61 * SECOND
        (taken,) = await allocator.assign(ask(2))
        assert not taken.is_borrowed
        await allocator.release_handle("net.2")
        await affinity.release(store, "node-a", taken.block)
        await affinity.claim(store, "node-b", taken.block, clock=clock)
        clock.now_ns += 61 * SECOND
        both = await asyncio.gather(*(allocator.assign(ask(n, ipv4=4)) for n in (3, 4)))
        assert both[0][0].block != both[1][0].block, "no block is taken over twice at once"
    stored = await everything(store)
    assert_consistent(stored)
    assert owned_by(stored, "node-a") == {str(given[0].block) for given in both}
    assert str(used[0].block) in owned_by(stored, "node-b")
    assert len(owned_by(stored, "node-b")) == 2


async def test_others_may_write_our_blocks(connect: Connect, store: Datastore) -> None:
    """Releases, borrowing and takeovers by others cost a lost try, never a wrong answer."""
    other = IPAM(connect())
    async with running(store, "node-a", ahead_part=0) as allocator:
        (mine,) = await allocator.assign(ask(1))
        await other.release_handle("net.1")
        await allocator.assign(ask(2, ipv4=3))
        assert allocator.counts.conflicts == 1
        await other.grant("node-b", Ask(handle="theirs", addresses=(mine.address,)))
        with pytest.raises(StaleRelease):
            await allocator.release([Release(mine.address, "net.1")])
        await allocator.release_handle("net.2")
        await other.release_handle("theirs")
        assert await affinity.release(connect(), "node-a", mine.block) is Released.DELETED
        await affinity.claim(connect(), "node-b", mine.block)
        (elsewhere,) = await allocator.assign(ask(3))
        assert elsewhere.block != mine.block
        assert mine.block not in [block.network for block in allocator.blocks]
    assert_consistent(await everything(store))


async def test_full_by_memory_is_looked_at_again(connect: Connect, store: Datastore) -> None:
    """That nothing is free is concluded from what is stored now, not from what was last seen."""
    async with running(store, "node-a", ahead_part=0) as allocator:
        await allocator.assign(ask(1, ipv4=16))
        await IPAM(connect()).release([Release(ip_address("192.168.10.6"))])
        (given,) = await allocator.assign(ask(2))
        assert str(given.address) == "192.168.10.6"
        with pytest.raises(NoFreeAddresses):
            await allocator.assign(ask(3))


async def test_restart(store: Datastore) -> None:
    """A new process knows its blocks, and releases what the former one gave."""
    async with running(store, "node-a", ahead_part=0) as allocator:
        (first,) = await allocator.assign(ask(1))
    async with running(store, "node-a", ahead_part=0) as allocator:
        (second,) = await allocator.assign(ask(2))
        assert [block.network for block in allocator.blocks] == [first.block]
        assert second.block == first.block
        assert await allocator.release_handle("net.1") == (first.address,)
        assert await allocator.release([Release(second.address, "net.2")]) == ()
    assert assert_consistent(await everything(store)) == {}


async def test_claims_left_half_way_are_put_in_order(store: Datastore) -> None:
    """At start a pending claim is confirmed, a stale one removed, one without block dropped."""
    pending, stale, lost = (ip_network(f"192.168.10.{n}/30") for n in (0, 4, 8))
    ours = blocks.new_block(
        pending, affinity="host:node-a", claimed_at=rfc3339(1), sequence_number=5
    )
    await put(store, str(BlockKey(pending)), encode(ours))
    await affinity.claim(store, "node-b", stale)
    for network in (pending, stale, lost):
        await put(store, str(AffinityKey("node-a", network)), b'{"state":"pending"}')
    async with running(store, "node-a"):

        async def is_settled() -> bool:
            stored = await everything(store)
            return owned_by(stored, "node-a") == {str(pending)} and (
                stored[AffinityKey("node-a", pending)].state == "confirmed"
            )

        await eventually(is_settled)
    assert_consistent(await everything(store))


async def test_unselected_pool(store: Datastore) -> None:
    """An empty block goes as soon as its pool offers itself to other nodes only."""
    async with running(store, "node-a") as allocator:
        await allocator.assign(ask(1))
        await store_pool(
            store, "pods", "192.168.10.0/28", block_size=30, node_selector="rack == '1'"
        )
        await feed(allocator, store)
        await allocator.look_after()
        assert len(allocator.blocks) == 1, "it is in use"
        await allocator.release_handle("net.1")
        await allocator.look_after()
        assert allocator.blocks == ()
    assert owned_by(await everything(store), "node-a") == set()


async def test_another_block_size(connect: Connect, store: Datastore) -> None:
    """After a pool was made anew with larger blocks, none of them covers a block that was left."""
    async with running(store, "node-a") as allocator:
        (left,) = await allocator.assign(ask(1))
    await store_pool(store, "pods", "192.168.10.0/28", block_size=29)
    async with running(store, "node-b") as allocator:
        (new,) = await allocator.assign(ask(2))
        assert new.block.prefixlen == 29
        assert not new.block.overlaps(left.block)
        around = next(n for n in ip_network("192.168.10.0/28").subnets(1) if n != new.block)
        free = next(address for address in around if address not in left.block)
        with pytest.raises(AddressRefused, match="would overlap"):
            await allocator.assign(ask(3, ipv4=0, addresses=(free,)))
    assert_consistent(await everything(store))


async def test_caller_that_gives_up(store: Datastore) -> None:
    """An address whose caller was cancelled while it was written is released again."""
    written, go_on = asyncio.Event(), asyncio.Event()

    class Slow:
        """Every write takes until the test says so."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        async def commit(self, transaction: Transaction) -> int:
            revision = await store.commit(transaction)
            written.set()
            await go_on.wait()
            return revision

    async with running(Slow(), "node-a", ahead_part=0) as allocator:  # type: ignore[arg-type]
        go_on.set()
        await allocator.assign(ask(0))
        go_on.clear()
        written.clear()
        call = asyncio.create_task(allocator.assign(ask(1)))
        await written.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        assert "net.1" in assert_consistent(await everything(store))
        go_on.set()

        async def is_released() -> bool:
            return "net.1" not in assert_consistent(await everything(store))

        await eventually(is_released)
    assert list(assert_consistent(await everything(store))) == ["net.0"]


@pytest.fixture
def memory() -> MemoryDatastore:
    return MemoryDatastore()


async def test_outage(memory: MemoryDatastore) -> None:
    """With the datastore away calls fail as such, and the next ones work again."""
    await store_node(memory, "node-a")
    await store_pool(memory, "pods", "10.0.0.0/24")
    async with running(memory, "node-a") as allocator:
        await allocator.assign(ask(1))
        memory.go_down()
        with pytest.raises(Unavailable):
            await allocator.assign(ask(2))
        memory.come_up()
        await allocator.assign(ask(3))
    assert list(assert_consistent(await everything(memory))) == ["net.1", "net.3"]


async def test_lost_answers(memory: MemoryDatastore) -> None:
    """A write whose answer is lost is recognised: nothing is given twice or lost."""
    await store_node(memory, "node-a")
    await store_pool(memory, "pods", "10.0.0.0/24")
    async with running(memory, "node-a") as allocator:
        for number in range(5):
            memory.lose_answers(1)
            given = await asyncio.gather(
                *(allocator.assign(ask(f"{number}-{n}")) for n in range(5))
            )
            held = assert_consistent(await everything(memory))
            assert [held[f"net.{number}-{n}"] for n in range(5)] == list(map(addresses, given))
        memory.lose_answers(50)
        await allocator.release_handle("net.0-0")
        await allocator.assign(ask("lost"))
    held = assert_consistent(await everything(memory))
    assert "net.0-0" not in held
    assert len(held["net.lost"]) == 1


async def test_calls_wait_for_the_first_snapshot(memory: MemoryDatastore) -> None:
    """Nothing is answered before pools and settings are known."""
    await store_node(memory, "node-a")
    await store_pool(memory, "pods", "10.0.0.0/24")
    allocator = Allocator(memory, "node-a")
    work = asyncio.create_task(allocator.run())
    call = asyncio.create_task(allocator.assign(ask(1)))
    for _ in range(50):
        await asyncio.sleep(0)
    assert not call.done()
    await feed(allocator, memory)
    assert len(await call) == 1
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
