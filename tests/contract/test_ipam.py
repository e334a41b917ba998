"""Assigning and releasing, on the memory store and on a real etcd alike."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from ipaddress import ip_address, ip_network

import pytest

from cymric.datastore.api import Datastore, Transaction, put
from cymric.datastore.memory import MemoryDatastore
from cymric.model.codec import encode
from cymric.model.ipam import AllocationBlock, IPAMConfig
from cymric.model.keys import IPAM, IPAM_CONFIG, AffinityKey, BlockKey, HandleKey, IPAMConfigKey
from ipam import affinity
from ipam import block as blocks
from ipam import client as ipam_client
from ipam.affinity import Released, go_time, rfc3339
from ipam.client import Request
from ipam.errors import (
    AddressOutsidePools,
    AddressTaken,
    BlockLimitReached,
    NoFreeAddresses,
    NoPool,
    NotOurBlock,
)
from tests.support.datastore import client
from tests.support.etcd import EtcdServer
from tests.support.ipam_world import (
    addresses,
    assert_consistent,
    everything,
    owned_by,
    store_node,
    store_pool,
)

Client = ipam_client.IPAM
NOW_NS = 1767323045123456789
Connect = Callable[[], Datastore]


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def connect(request: pytest.FixtureRequest) -> AsyncIterator[Connect]:
    """A connection of one's own to an empty store, for each call."""
    if request.param == "memory":
        memory = MemoryDatastore()
        yield lambda: memory
        return
    server: EtcdServer = request.getfixturevalue("etcd_server")
    server.etcdctl("del", "--prefix", "/calico/")
    opened: list[Datastore] = []

    def fresh() -> Datastore:
        opened.append(client(server.endpoint))
        return opened[-1]

    yield fresh
    for store in opened:
        await store.close()
    server.etcdctl("del", "--prefix", "/calico/")


@pytest.fixture
async def store(connect: Connect) -> Datastore:
    """A store with two nodes and a pool of four blocks of four addresses."""
    made = connect()
    for name in ("node-a", "node-b"):
        await store_node(made, name)
    await store_pool(made, "pods", "192.168.10.0/28", block_size=30)
    return made


def wish(host: str = "node-a", handle: str = "net.1", **options: object) -> Request:
    return Request(host=host, handle=handle, attributes={"node": host}, **options)  # type: ignore[arg-type]


async def configure(store: Datastore, **fields: object) -> None:
    await put(store, IPAM_CONFIG, encode(IPAMConfig(**fields)))  # type: ignore[arg-type]


async def test_first_address_writes_calicos_values(store: Datastore) -> None:
    """The first address of a node makes exactly the keys and values that Calico would leave."""
    await store_pool(store, "small", "192.168.99.0/30", block_size=30)
    request = Request(
        host="node-a",
        handle="k8s-pod-network.0d9c5e1c2f",
        attributes={
            "node": "node-a",
            "pod": "web-1",
            "namespace": "prod",
            "timestamp": go_time(NOW_NS),
        },
        pools=("small",),
    )
    await Client(store, clock=lambda: NOW_NS).assign(request)
    stored = {pair.key: pair.value for pair in (await store.list(IPAM)).items}
    assert stored == {
        "/calico/ipam/v2/assignment/ipv4/block/192.168.99.0-30": (
            b'{"cidr":"192.168.99.0/30","affinity":"host:node-a",'
            b'"affinity_claim_time":"2026-01-02T03:04:05Z","allocations":[0,null,null,null],'
            b'"unallocated":[1,2,3],"attributes":[{"handle_id":"k8s-pod-network.0d9c5e1c2f",'
            b'"secondary":{"namespace":"prod","node":"node-a","pod":"web-1",'
            b'"timestamp":"2026-01-02 03:04:05.123456789 +0000 UTC"}}],'
            b'"sequenceNumber":1767323045123456790,'
            b'"sequenceNumberForAllocation":{"0":1767323045123456789},"deleted":false}'
        ),
        "/calico/ipam/v2/config": (
            b'{"auto_allocate_blocks":true,"kubeVirtVMAddressPersistence":"Enabled"}'
        ),
        "/calico/ipam/v2/handle/k8s-pod-network.0d9c5e1c2f": (
            b'{"block":{"192.168.99.0/30":1},"deleted":false}'
        ),
        "/calico/ipam/v2/host/node-a/ipv4/block/192.168.99.0-30": (
            b'{"state":"confirmed","deleted":false}'
        ),
    }


async def test_two_nodes_race_for_the_last_block(connect: Connect, store: Datastore) -> None:
    """Of two nodes that claim the same last block at the same moment exactly one gets it."""
    await configure(store, strict_affinity=True, auto_allocate_blocks=True)
    last = ip_network("192.168.20.0/30")
    for attempt in range(20):
        await store_pool(store, "last", str(last), block_size=30)
        clients = {host: Client(connect()) for host in ("node-a", "node-b")}
        outcomes = await asyncio.gather(
            *(
                ipam.assign(wish(host, f"net.{attempt}-{host}", pools=("last",)))
                for host, ipam in clients.items()
            ),
            return_exceptions=True,
        )
        losers = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert [type(loser) for loser in losers] == [NoFreeAddresses]
        stored = await everything(store)
        assert_consistent(stored)
        owners = [host for host in clients if str(last) in owned_by(stored, host)]
        assert len(owners) == 1
        for host, ipam in clients.items():
            await ipam.release_handle(f"net.{attempt}-{host}")
        assert await affinity.release(store, owners[0], last) is Released.DELETED


async def test_many_writers_never_share_an_address(connect: Connect, store: Datastore) -> None:
    """Clients of two nodes that assign at once fill the pool without a double or a gap."""
    clients = [(host, Client(connect())) for host in ("node-a", "node-b") for _ in range(2)]
    given = await asyncio.gather(
        *(clients[n % 4][1].assign(wish(clients[n % 4][0], f"net.{n}")) for n in range(16))
    )
    assert sorted(addresses(given)) == sorted(map(str, ip_network("192.168.10.0/28")))
    assert_consistent(await everything(store))
    with pytest.raises(NoFreeAddresses, match=r"No IPs available in pools: \[192.168.10.0/28\]"):
        await clients[0][1].assign(wish(handle="net.one-too-many"))


async def test_release_by_handle(store: Datastore) -> None:
    """Everything a handle holds is freed, in every block; twice is fine; the block stays ours."""
    ipam = Client(store)
    given = [await ipam.assign(wish()) for _ in range(5)]
    assert set(await ipam.held_by("net.1")) == {assignment.address for assignment in given}
    assert set(await ipam.release_handle("net.1")) == {a.address for a in given}
    assert await ipam.release_handle("net.1") == ()
    stored = await everything(store)
    assert assert_consistent(stored) == {}
    assert len(owned_by(stored, "node-a")) == 2


async def test_borrowing_and_strict_affinity(store: Datastore) -> None:
    """With the pool claimed by others a node borrows, unless strict affinity forbids it."""
    ipam = Client(store)
    for network in ip_network("192.168.10.0/28").subnets(2):
        await affinity.claim(store, "node-b", network)
    borrowed = await ipam.assign(wish())
    assert borrowed.is_borrowed
    assert owned_by(await everything(store), "node-a") == set()
    await configure(store, strict_affinity=True, auto_allocate_blocks=True)
    with pytest.raises(NoFreeAddresses, match="strict affinity"):
        await ipam.assign(wish(handle="net.2"))
    with pytest.raises(NotOurBlock):
        await ipam.assign_address(ip_address("192.168.10.1"), wish(handle="net.2"))
    assert_consistent(await everything(store))


async def test_block_limit_stops_borrowing_too(store: Datastore) -> None:
    """A node at its limit of blocks gets nothing more, though addresses are free elsewhere."""
    ipam = Client(store)
    await affinity.claim(store, "node-b", ip_network("192.168.10.0/30"))
    for number in range(4):
        await ipam.assign(wish(handle=f"net.{number}", max_blocks=1))
    with pytest.raises(BlockLimitReached):
        await ipam.assign(wish(handle="net.4", max_blocks=1))
    assert len(owned_by(await everything(store), "node-a")) == 1


async def test_default_limit_is_twenty_blocks(store: Datastore) -> None:
    """Without any setting a node owns at most twenty blocks."""
    await store_pool(store, "wide", "10.9.0.0/26", block_size=32)
    ipam = Client(store)
    for number in range(20):
        await ipam.assign(wish(handle=f"net.{number}", pools=("wide",)))
    with pytest.raises(BlockLimitReached, match="20 blocks"):
        await ipam.assign(wish(handle="net.20", pools=("wide",)))


async def test_no_blocks_without_auto_allocation(store: Datastore) -> None:
    """With auto_allocate_blocks off, a node uses the blocks it has and claims none."""
    await configure(store, strict_affinity=True)
    ipam = Client(store)
    with pytest.raises(NoFreeAddresses, match="auto_allocate_blocks"):
        await ipam.assign(wish())
    await affinity.claim(store, "node-a", ip_network("192.168.10.4/30"))
    assert str((await ipam.assign(wish())).address) == "192.168.10.4"


async def test_explicit_addresses(store: Datastore) -> None:
    """An address by name is given once, also from a block that does not exist yet."""
    ipam = Client(store)
    address = ip_address("192.168.10.9")
    given = await ipam.assign_address(address, wish())
    assert (given.address, str(given.block)) == (address, "192.168.10.8/30")
    with pytest.raises(AddressTaken):
        await ipam.assign_address(address, wish(handle="net.2"))
    with pytest.raises(AddressOutsidePools, match=r"10\.0\.0\.1 is not in a configured pool"):
        await ipam.assign_address(ip_address("10.0.0.1"), wish())
    assert_consistent(await everything(store))


async def test_unknown_node(store: Datastore) -> None:
    """A host without Node object gets no address, and the error names it."""
    with pytest.raises(NoPool, match="node stranger does not exist"):
        await Client(store).assign(wish("stranger"))


BLOCK = ip_network("192.168.10.4/30")


def owned_block(owner: str | None) -> AllocationBlock:
    return blocks.new_block(BLOCK, affinity=owner, claimed_at=rfc3339(1), sequence_number=5)


@pytest.mark.parametrize(
    ("block_owner", "state", "is_ours"),
    [
        pytest.param("host:node-a", b'{"state":"pending","deleted":false}', True, id="unconfirmed"),
        pytest.param("host:node-a", b'{"state":"pendingDeletion"}', True, id="half released"),
        pytest.param("host:node-a", None, True, id="affinity lost"),
        pytest.param("missing", b'{"state":"pending","deleted":false}', True, id="no block yet"),
        pytest.param("missing", b'{"state":"confirmed"}', True, id="block lost"),
        pytest.param("missing", b"", True, id="legacy empty affinity, block lost"),
        pytest.param("host:node-b", b'{"state":"pending","deleted":false}', False, id="lost race"),
        pytest.param(None, b'{"state":"confirmed","deleted":false}', False, id="ownerless block"),
    ],
)
async def test_claims_that_calico_left_half_way(
    store: Datastore, block_owner: str | None, state: bytes | None, is_ours: bool
) -> None:
    """Whatever a crash left behind: the claim is finished, or the stale affinity removed."""
    key = AffinityKey("node-a", BLOCK)
    if block_owner != "missing":
        await put(store, str(BlockKey(BLOCK)), encode(owned_block(block_owner)))
    if state is not None:
        await put(store, str(key), state)
    claimed = await affinity.claim(store, "node-a", BLOCK)
    stored = await everything(store)
    assert (claimed is not None) == is_ours
    assert (key in stored) == is_ours
    if is_ours:
        assert stored[BlockKey(BLOCK)] == claimed
        assert stored[key].state == "confirmed"
        if block_owner == "host:node-a":
            assert claimed is not None
            assert claimed.sequence_number == 6  # written, so that a releaser half way fails
    elif block_owner is not None:
        assert stored[BlockKey(BLOCK)] == owned_block(block_owner)


async def test_release_of_a_block(store: Datastore) -> None:
    """A block in use is kept or orphaned, an empty one deleted; a changed one is left alone."""
    ipam = Client(store)
    given = await ipam.assign(wish())
    assert await affinity.release(store, "node-a", given.block) is Released.NOT_EMPTY
    assert await affinity.release(store, "node-b", given.block) is Released.NOT_OURS
    outcome = await affinity.release(store, "node-a", given.block, sequence_number=1)
    assert outcome is Released.CHANGED
    outcome = await affinity.release(store, "node-a", given.block, require_empty=False)
    assert outcome is Released.ORPHANED
    assert_consistent(await everything(store))
    await ipam.release_handle("net.1")  # the last address takes the ownerless block along
    assert set(await everything(store)) == {IPAMConfigKey()}


async def test_unreadable_block_is_passed_over(store: Datastore) -> None:
    """A broken block of ours is neither used nor destroyed; another one serves."""
    ipam = Client(store)
    first = await ipam.assign(wish())
    broken = str(BlockKey(first.block))
    await put(store, broken, b'{"cidr":"192.168.10.0/30"')
    second = await ipam.assign(wish(handle="net.2"))
    assert second.block != first.block
    kept = await store.get(broken)
    assert kept is not None
    assert kept.value == b'{"cidr":"192.168.10.0/30"'


async def test_handle_counts_left_too_high_are_mended(store: Datastore) -> None:
    """A handle that a crash left counting more than there is goes with its release."""
    ipam = Client(store)
    given = await ipam.assign(wish())
    key = str(HandleKey("net.1"))
    await put(store, key, b'{"block":{"%s":3,"192.168.10.12/30":1}}' % str(given.block).encode())
    await ipam.release_handle("net.1")
    assert await store.get(key) is None


async def test_contention_is_bounded(connect: Connect, store: Datastore) -> None:
    """A block that changes before every write ends in an error, not in an endless loop."""
    from ipam.errors import Contended

    class Busy:
        """Another writer gets in between every time."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        async def commit(self, transaction: Transaction) -> int:
            if any("/block/" in compare.key for compare in transaction.compares):
                await put(
                    store, str(HandleKey("net.1")), encode({"block": {}, "x": uuid.uuid4().hex})
                )
            return await store.commit(transaction)

    with pytest.raises(Contended):
        await Client(Busy()).assign(wish())  # type: ignore[arg-type]
