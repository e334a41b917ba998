"""Addresses a second: the node's allocator beside one transaction per address.

The peer is what a careful client does without an allocator of the node: for every address one
compare-and-swap of its block and its handle, one after the other, each with the values of the last
one in memory. Bytes and comparisons are the same, so the difference is group commit alone. With
twenty nodes the peer is twenty such loops at once. All of it runs on one etcd on this machine, ours
and the peer's turns alternating; each node's allocator is as it is in cnid, and they share one
process and one connection, so that a third of the figure is Python's.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from bench.row import Row, median
from cymric.datastore.api import ABSENT, Compare, Datastore, Put, Transaction, put
from cymric.datastore.etcd import open_datastore
from cymric.datastore.syncer import Syncer
from cymric.model.codec import encode
from cymric.model.ipam import AllocationHandle
from cymric.model.keys import BlockKey, HandleKey, ResourceKey
from cymric.model.resources import IPPool, IPPoolSpec, Node, ObjectMeta
from cymric.runtime.settings import Settings
from ipam import affinity
from ipam import block as blocks
from ipam.allocator import Allocator
from ipam.asking import Ask
from tests.support.etcd import EtcdServer

AT_ONCE = 64
NODES = 20
ROUNDS = 5
POOL = "10.0.0.0/12"
PEER = "a transaction an address"
ATTRIBUTES = {
    "namespace": "default",
    "pod": "web-1",
    "timestamp": "2026-01-02 03:05:00.1 +0000 UTC",
}


async def measure() -> Sequence[Row]:
    """The rows, both sides in the same run."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with tempfile.TemporaryDirectory(prefix="cymric-bench-") as scratch:
        server = EtcdServer(Path(scratch)).start()
        try:
            async with open_datastore(Settings(etcd_endpoints=(server.endpoint,))) as store:
                return await _rows(store)
        finally:
            server.kill()


async def _rows(store: Datastore) -> Sequence[Row]:
    pool = IPPool(metadata=ObjectMeta(name="pods"), spec=IPPoolSpec(cidr=POOL))
    await put(store, str(ResourceKey("IPPool", "pods")), encode(pool))
    names = [f"node-{n}" for n in range(NODES)]
    for name in names:
        node = Node(metadata=ObjectMeta(name=name))
        await put(store, str(ResourceKey("Node", name)), encode(node))
    async with _running(store, names) as allocators:
        peers = [Peer(store, n) for n in range(NODES)]
        rows: list[Row] = []
        for count in (1, NODES):
            ours, peer = list[float](), list[float]()
            sent = [a.counts.transactions for a in allocators[:count]]
            lost = [a.counts.conflicts for a in allocators[:count]]
            for number in range(ROUNDS):
                ours.append(await _ours(allocators[:count], f"{count}-{number}"))
                peer.append(await _theirs(peers[:count], f"{count}-{number}"))
            transactions = sum(a.counts.transactions for a in allocators[:count]) - sum(sent)
            conflicts = sum(a.counts.conflicts for a in allocators[:count]) - sum(lost)
            who = "one node" if count == 1 else f"{count} nodes at once"
            text = f"{AT_ONCE} addresses at once, {who}: time per address"
            rows.append(
                Row(what=text, unit="us", cymric=median(ours), peer_name=PEER, peer=median(peer))
            )
            each = transactions / ROUNDS / count
            text = f"the same: transactions for {AT_ONCE}, blocks claimed among them"
            rows.append(
                Row(what=text, unit="txn", cymric=each, peer_name=PEER, peer=float(AT_ONCE))
            )
            text = f"the same: conflicts in all {ROUNDS} rounds"
            rows.append(Row(what=text, unit="txn", cymric=float(conflicts)))
        return rows


async def _ours(allocators: Sequence[Allocator], mark: str) -> float:
    """Microseconds an address, over all nodes at once; what was assigned stays."""
    begun = time.perf_counter()
    await asyncio.gather(
        *(
            allocator.assign(Ask(handle=f"ours.{mark}-{n}-{i}", attributes=ATTRIBUTES, ipv4=1))
            for n, allocator in enumerate(allocators)
            for i in range(AT_ONCE)
        )
    )
    return (time.perf_counter() - begun) * 1e6 / AT_ONCE / len(allocators)


async def _theirs(peers: Sequence[Peer], mark: str) -> float:
    begun = time.perf_counter()
    await asyncio.gather(*(peer.assign(AT_ONCE, mark) for peer in peers))
    return (time.perf_counter() - begun) * 1e6 / AT_ONCE / len(peers)


class Peer:
    """A client that assigns one address after the other, each in a transaction of its own."""

    def __init__(self, store: Datastore, number: int) -> None:
        self._store = store
        self._number = number
        self._networks = IPPoolSpec(cidr=f"10.{32 + number}.0.0/16").network.subnets(new_prefix=26)

    async def assign(self, count: int, mark: str) -> None:
        """Take `count` addresses from a block of its own."""
        network = next(self._networks)
        await affinity.claim(self._store, f"peer-{self._number}", network)
        key = str(BlockKey(network))
        pair = await self._store.get(key)
        assert pair is not None
        revision = pair.revision
        block = blocks.new_block(network, affinity="host:p", claimed_at="", sequence_number=1)
        for n in range(count):
            handle = f"peer.{mark}-{self._number}-{n}"
            block, _ = blocks.take(block, 1, blocks.record_of(handle, ATTRIBUTES))
            text = str(HandleKey(handle))
            compares = (Compare(key, revision), Compare(text, ABSENT))
            counted = encode(AllocationHandle(block={str(network): 1}))
            writes = (Put(key, encode(block)), Put(text, counted))
            revision = await self._store.commit(Transaction(compares, writes))


@asynccontextmanager
async def _running(store: Datastore, names: Sequence[str]) -> AsyncIterator[list[Allocator]]:
    """An allocator a node, each fed by a watch of its own."""
    allocators = [Allocator(store, name) for name in names]
    tasks = []
    for allocator in allocators:
        syncer = Syncer(store, allocator.prefixes, allocator.on_updates, allocator.on_in_sync)
        tasks += [asyncio.create_task(syncer.run()), asyncio.create_task(allocator.run())]
    await asyncio.gather(*(allocator.held_by("nobody") for allocator in allocators))
    try:
        yield allocators
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
