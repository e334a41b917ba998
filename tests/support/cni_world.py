"""cnid in memory: a datastore, a kernel and a disk that outlive it, and a process that can die.

Every call that leaves the process is counted by its `Life`; at a chosen one the process dies,
before or after the call took effect, and whatever it calls after that fails without effect.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cni.addresses import Addresses
from cni.agent import Agent
from cni.cluster import KEY, Cluster
from cni.collect import Collector
from cni.hint import FelixHint
from cni.journal import Entry, Journal
from cni.status import StatusDirectory
from cni.stored import Endpoints
from cni.waiting import Waiting
from cni.wiring import Layout, Look, Pair, Wire
from cymric.datastore.api import KeyValue, Listing, Transaction, put
from cymric.datastore.memory import MemoryDatastore
from cymric.datastore.syncer import Update
from cymric.kernel.command import FakeCommands
from cymric.kernel.links import Link, kernel_error
from cymric.model import keys
from cymric.model.codec import encode
from cymric.model.resources import ClusterInformation, ClusterInformationSpec, ObjectMeta
from ipam.allocator import Allocator
from tests.support.ipam_world import feed, store_node, store_pool

NODE = "node-a"
POOL = "198.19.16.0/26"


class Killed(Exception):
    """The process is dead; nobody may make anything of this."""


@dataclass
class Life:
    """How many more calls until the process dies. None: it does not."""

    left: int | None = None
    takes_effect: bool = False
    is_over: bool = False
    calls: int = 0

    def begins(self) -> None:
        """A call leaves the process."""
        if self.is_over:
            raise Killed
        self.calls += 1
        if self.left is not None:
            self.left -= 1
            if self.left < 0 and not self.takes_effect:
                self.is_over = True
                raise Killed

    def ends(self) -> None:
        """The call took effect; does the process hear of it?"""
        if self.left is not None and self.left < 0:
            self.is_over = True
            raise Killed


class MortalStore:
    """A datastore as a mortal process sees it."""

    def __init__(self, store: MemoryDatastore, life: Life) -> None:
        self._store, self._life = store, life

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get(self, key: str) -> KeyValue | None:
        """As the store's."""
        self._life.begins()
        return await self._store.get(key)

    async def list(self, prefix: str) -> Listing:
        """As the store's."""
        self._life.begins()
        return await self._store.list(prefix)

    async def commit(self, transaction: Transaction) -> int:
        """As the store's."""
        self._life.begins()
        revision = await self._store.commit(transaction)
        self._life.ends()
        return revision


@dataclass
class Pairs:
    """The kernel: pairs by their host interface, as (namespace, layout)."""

    by_name: dict[str, tuple[Path, Layout | None]] = field(default_factory=dict)

    def in_namespace(self, netns: Path) -> str | None:
        """The host interface of the pair that ends there."""
        return next((name for name, (at, _) in self.by_name.items() if at == netns), None)


@dataclass
class FakePair:
    """A pair that was begun."""

    wiring: FakeWiring
    wire: Wire
    mtu: int = 1500

    async def finish(self, layout: Layout) -> None:
        """Give the pod its addresses."""
        with self.wiring.effect():
            self.wiring.pairs.by_name[self.wire.host_interface] = (self.wire.netns, layout)

    def close(self) -> None:
        """Nothing is open."""


@dataclass
class FakeWiring:
    """See `cni.wiring.Wiring`."""

    pairs: Pairs
    life: Life

    def effect(self) -> Any:
        """A call to the kernel."""
        return _Effect(self.life)

    async def begin(self, wire: Wire) -> Pair:
        """Make the pair. Raises AlreadyThere."""
        taken = wire.host_interface in self.pairs.by_name
        if taken or self.pairs.in_namespace(wire.netns):
            raise kernel_error(17, f"create veth {wire.host_interface}", "File exists")
        with self.effect():
            self.pairs.by_name[wire.host_interface] = (wire.netns, None)
        return FakePair(self, wire)

    async def unwire_host(self, host_interface: str) -> None:
        """Remove the pair by the node's end."""
        with self.effect():
            self.pairs.by_name.pop(host_interface, None)

    async def unwire_pod(self, netns: Path, pod_interface: str) -> None:
        """Remove the pair by the pod's end."""
        with self.effect():
            self.pairs.by_name.pop(self.pairs.in_namespace(netns) or "", None)

    async def is_there(self, host_interface: str) -> bool:
        """Whether the node has it."""
        return host_interface in self.pairs.by_name

    async def look(self, host_interface: str) -> Look:
        """What the node has."""
        there = host_interface in self.pairs.by_name
        return Look(Link(1, host_interface, mtu=1500) if there else None)

    async def faults(self, wire: Wire, layout: Layout) -> tuple[str, ...]:
        """What is not as it should be."""
        wanted = (wire.netns, layout)
        return () if self.pairs.by_name.get(wire.host_interface) == wanted else ("not as it was",)


@dataclass
class _Effect:
    life: Life

    def __enter__(self) -> None:
        self.life.begins()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.life.ends()


class MortalJournal(Journal):
    """A disk as a mortal process sees it."""

    def __init__(self, directory: Path, life: Life) -> None:
        super().__init__(directory)
        self._life = life

    def begin(self, entry: Entry) -> None:
        """Note an entry."""
        with _Effect(self._life):
            super().begin(entry)

    def finish(self, entry: Entry) -> None:
        """Forget an entry."""
        with _Effect(self._life):
            super().finish(entry)


@dataclass
class World:
    """What outlives cnid."""

    directory: Path
    store: MemoryDatastore = field(default_factory=MemoryDatastore)
    pairs: Pairs = field(default_factory=Pairs)

    async def set_up(self) -> None:
        """Store pool, node and cluster."""
        await store_node(self.store, NODE)
        await store_pool(self.store, "pods", POOL)
        spec = ClusterInformationSpec(datastoreReady=True)
        cluster = ClusterInformation(metadata=ObjectMeta(name="default"), spec=spec)
        await put(self.store, str(KEY), encode(cluster))

    @property
    def journal(self) -> Iterable[str]:
        """What the journal holds."""
        return sorted(path.name for path in (self.directory / "journal").iterdir())

    async def trees(self, prefix: str) -> list[str]:
        """The keys below a prefix."""
        return [pair.key for pair in (await self.store.list(prefix)).items]

    async def endpoints(self) -> list[str]:
        """The stored endpoints."""
        return await self.trees(keys.resource_prefix("WorkloadEndpoint"))

    async def handles(self) -> list[str]:
        """The stored handles: those whose addresses are held."""
        return await self.trees(keys.HANDLES)

    @asynccontextmanager
    async def process(self, life: Life | None = None, **options: Any) -> AsyncIterator[Process]:
        """A cnid of this node, until it is ended or killed; `options` for its allocator."""
        life = life or Life()
        allocator = Allocator(self.store, NODE, **options)
        await feed(allocator, self.store)
        running = asyncio.create_task(allocator.run())
        store = MortalStore(self.store, life)
        # The allocator is tested by itself; here each call of it is one that may be the last.
        ipam = _MortalIPAM(allocator, life)
        commands = FakeCommands({})
        wiring = FakeWiring(self.pairs, life)
        status = StatusDirectory(self.directory)
        hint = FelixHint(self.directory / "no-felix.sock")
        cluster = Cluster()
        spec = ClusterInformationSpec(datastoreReady=True)
        cluster.on_updates(
            [Update(KEY, ClusterInformation(metadata=ObjectMeta(name="default"), spec=spec))]
        )
        cluster.on_in_sync()
        endpoints = Endpoints(store, NODE)
        agent = Agent(
            node=NODE,
            endpoints=endpoints,
            addresses=Addresses(NODE, ipam, commands),
            cluster=cluster,
            wiring=wiring,
            journal=MortalJournal(self.directory / "journal", life),
            lent=MortalJournal(self.directory / "lent", life),
            waiting=Waiting(status, wiring, hint, 0.0),
            status=status,
            hint=hint,
            mtu_file=self.directory / "mtu",
        )
        try:
            yield Process(agent, Collector(NODE, store, endpoints, agent, commands), life)
        finally:
            running.cancel()
            await asyncio.wait({running})


@dataclass
class Process:
    """A cnid."""

    agent: Agent
    collector: Collector
    life: Life


class _MortalIPAM:
    def __init__(self, allocator: Any, life: Life) -> None:
        self._allocator, self._life = allocator, life

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(*args: Any) -> Any:
            self._life.begins()
            done = await getattr(self._allocator, name)(*args)
            self._life.ends()
            return done

        return call
