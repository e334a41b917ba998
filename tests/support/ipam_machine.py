"""IPAM as a state machine: nodes that crash at any call, borrowers, a collector, other tools.

Three nodes with an allocator each, which dies and starts again, for IPv4, IPv6 and both together.
Beside them somebody at the command line, who also takes away blocks, nodes and pools that are in
use; pools that change their block size, go, come back and overlap; and time that passes. What the
callers were told is remembered, and after every step compared with what is stored:

- no address has two owners, and every address somebody was told is stored under its handle;
- blocks, handles and affinities agree, no two blocks overlap;
- what is stored beyond that is an answer that a crash swallowed; a collector gets it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cymric.datastore.api import Datastore, OutcomeUnknown, delete
from cymric.datastore.memory import MemoryDatastore
from cymric.datastore.syncer import Update
from cymric.model.keys import ResourceKey
from cymric.model.net import Address, Network
from cymric.model.resources import IPPool, IPPoolSpec, ObjectMeta
from ipam import affinity
from ipam.allocator import Allocator
from ipam.asking import Ask, Assignment, Release
from ipam.client import IPAM
from ipam.collect import Collector, release_due
from ipam.errors import AddressRefused, NoAddress, StaleRelease
from tests.support.crashing import Crashed, CrashingStore, Fault
from tests.support.ipam_world import assert_consistent, everything, feed, store_node, store_pool

NAMES = ("node-a", "node-b", "node-c")
POOLS = {"pods": ip_network("10.0.0.0/27"), "pods6": ip_network("fd00::/123")}
"""32 addresses of each family."""
OVERLAPPING = (
    ip_network("10.0.0.0/28"),
    ip_network("10.0.0.0/26"),
    ip_network("fd00::10/124"),
    ip_network("fd00::/122"),
)
"""What somebody may store as one more pool, by a tool that does not look."""
GRACE_S = 60
SECOND = 1_000_000_000

NODES = st.sampled_from(NAMES)
HANDLES = st.sampled_from([f"net.{n}" for n in range(8)])
ADDRESSES = st.builds(
    lambda pool, n: pool[n], st.sampled_from(list(POOLS.values())), st.integers(0, 31)
)
FAMILIES = st.sampled_from([(4,), (6,), (4, 6)])
BITS = st.integers(0, 4)
"""How many bits of an address are inside a block."""
FAULTS = st.one_of(st.none(), st.tuples(st.sampled_from(Fault), st.integers(0, 4)))
T = TypeVar("T")


@dataclass(eq=False)
class Process:
    """One life of a node's daemon."""

    store: CrashingStore
    allocator: Allocator
    work: asyncio.Task[None]


@dataclass(eq=False)
class NodeState:
    """What outlives the daemon: what its containers were told, and what its journal doubts."""

    name: str
    collector: Collector
    held: dict[str, set[str]] = field(default_factory=dict)
    process: Process | None = None


class Cluster(RuleBasedStateMachine):
    """See the chapter; a subclass may bring a real datastore."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.store = self.open_store()
        self.now_ns = 1_767_323_045 * SECOND
        self.nodes = {name: NodeState(name, Collector(name, grace_s=GRACE_S)) for name in NAMES}
        self.doubted: set[str] = set()
        self.client = IPAM(self.store, clock=self.clock)

    def open_store(self) -> Datastore:
        """An empty datastore."""
        return MemoryDatastore()

    def teardown(self) -> None:
        """Nothing runs on."""
        for node in self.nodes.values():
            self.stop(node)
        self.run(self.store.close())
        self.loop.close()

    def clock(self) -> int:
        """A clock that never stands still."""
        self.now_ns += 1000
        return self.now_ns

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end."""
        return self.loop.run_until_complete(asyncio.wait_for(work, 20))

    @initialize(bits=st.tuples(st.integers(1, 3), st.integers(1, 3)))
    def begin(self, bits: tuple[int, int]) -> None:
        """Three nodes, and a pool of each family."""
        for name in NAMES:
            self.run(store_node(self.store, name))
        for (name, network), inside in zip(POOLS.items(), bits, strict=True):
            self.store_pool(name, network, inside)

    def store_pool(self, name: str, network: Network, bits: int) -> None:
        """A pool, made or made anew, whose blocks have that many bits."""
        size = network.max_prefixlen - bits
        self.run(store_pool(self.store, name, str(network), block_size=size))

    # --- lives of daemons ---

    def alive(self, name: str, fault: tuple[Fault, int] | None = None) -> Process:
        """The node's daemon, started if need be, with a fault that waits for it."""
        node = self.nodes[name]
        if node.process is not None and node.process.work.done():
            self.stop(node)
        if node.process is None:
            node.process = self.run(self.start(node))
        if fault is not None:
            node.process.store.arm(*fault)
        return node.process

    async def start(self, node: NodeState) -> Process:
        """A new daemon, fed with a snapshot."""
        store = CrashingStore(self.store)
        # What a new process knows of leaks it finds out anew.
        node.collector = Collector(node.name, grace_s=GRACE_S)
        allocator = Allocator(
            store,  # type: ignore[arg-type]  # a store in all but name
            node.name,
            clock=self.clock,
            on_block=node.collector.on_block,
            idle_s=GRACE_S,
        )
        await feed(allocator, self.store)
        return Process(store, allocator, asyncio.create_task(allocator.run()))

    def stop(self, node: NodeState) -> None:
        """The daemon is gone, and with it all it knew."""
        process, node.process = node.process, None
        if process is not None:
            process.work.cancel()
            (outcome,) = self.run(gathered(process.work))
            assert is_death(outcome), f"the allocator ended: {outcome!r}"

    def call(self, process: Process, work: Coroutine[Any, Any, T]) -> T:
        """What a caller in the daemon gets. Raises Crashed when the daemon dies meanwhile."""

        async def either() -> T:
            answer = asyncio.create_task(work)
            await asyncio.wait({answer, process.work}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            answer.cancel()
            raise Crashed("the daemon died")

        return self.run(either())

    # --- what happens ---

    def note(self, node: str, handle: str, given: tuple[Assignment, ...]) -> None:
        """A caller was told of addresses."""
        for assignment in given:
            address = str(assignment.address)
            assert self.holder_of(address) is None, f"{address} was given twice"
            self.nodes[node].held.setdefault(handle, set()).add(address)

    def holder_of(self, address: str) -> str | None:
        """The handle under which somebody was told of an address."""
        return next((h for h, held in self.told().items() if address in held), None)

    def told(self) -> dict[str, set[str]]:
        """All that callers were told and did not give back."""
        told: dict[str, set[str]] = {}
        for node in self.nodes.values():
            for handle, held in node.held.items():
                told.setdefault(handle, set()).update(held)
        return told

    def forget(self, handle: str) -> None:
        """Nobody holds a handle any more."""
        for node in self.nodes.values():
            node.held.pop(handle, None)

    def request(self, node: str, handle: str, families: tuple[int, ...], count: int = 1) -> Ask:
        """An ask like no other, for `count` addresses of each family."""
        return Ask(
            handle=handle,
            ipv4=count * families.count(4),
            ipv6=count * families.count(6),
            attributes={"node": node, "timestamp": str(self.clock())},
        )

    @rule(node=NODES, handle=HANDLES, families=FAMILIES, count=st.integers(1, 3), fault=FAULTS)
    def assign(
        self,
        node: str,
        handle: str,
        families: tuple[int, ...],
        count: int,
        fault: tuple[Fault, int] | None,
    ) -> None:
        """Some addresses; the daemon may die or lose an answer on the way."""
        process = self.alive(node, fault)
        ask = self.request(node, handle, families, count)
        try:
            given = self.call(process, process.allocator.assign(ask))
        except (Crashed, OutcomeUnknown):
            self.doubted.add(handle)
        except NoAddress:
            pass
        else:
            versions = [assignment.address.version for assignment in given]
            assert versions == [v for v in families for _ in range(count)]
            self.note(node, handle, given)

    @rule(
        wishes=st.lists(st.tuples(NODES, HANDLES, FAMILIES), min_size=2, max_size=8),
        fault=FAULTS,
        struck=NODES,
    )
    def assign_at_once(
        self,
        wishes: list[tuple[str, str, tuple[int, ...]]],
        fault: tuple[Fault, int] | None,
        struck: str,
    ) -> None:
        """Several nodes at the same moment, one of which may be struck."""
        self.at_once(
            [(n, self.request(n, h, families)) for n, h, families in wishes], fault, struck
        )

    @rule(
        address=ADDRESSES,
        handles=st.tuples(HANDLES, HANDLES),
        bits=st.tuples(BITS, BITS),
        nodes=st.permutations(NAMES),
    )
    def claim_in_one_place(
        self, address: Address, handles: tuple[str, str], bits: tuple[int, int], nodes: list[str]
    ) -> None:
        """Two nodes with different ideas of a pool's blocks claim where they may overlap."""
        name = next(name for name, network in POOLS.items() if address in network)
        asks = []
        for node, handle, inside, place in zip(nodes, handles, bits, (0, 1), strict=False):
            allocator = self.alive(node).allocator
            spec = IPPoolSpec(cidr=str(POOLS[name]), block_size=address.max_prefixlen - inside)
            pool = IPPool(metadata=ObjectMeta(name=name), spec=spec)
            allocator.on_updates([Update(ResourceKey("IPPool", name), pool)])
            wanted = address + place if address + place in POOLS[name] else address - place
            asks.append((node, Ask(handle=handle, attributes={"node": node}, addresses=(wanted,))))
        self.at_once(asks)

    def at_once(
        self,
        asks: list[tuple[str, Ask]],
        fault: tuple[Fault, int] | None = None,
        struck: str | None = None,
    ) -> None:
        """Ask all nodes at the same moment, one of which may be struck."""
        processes = {name: self.alive(name, fault if name == struck else None) for name in NAMES}

        async def race() -> None:
            calls = [asyncio.create_task(processes[n].allocator.assign(ask)) for n, ask in asks]
            dead = {asyncio.create_task(died(p.work)): name for name, p in processes.items()}
            pending = set(calls)
            while pending:
                done, _ = await asyncio.wait(
                    pending | dead.keys(), return_when=asyncio.FIRST_COMPLETED
                )
                gone = {name for task, name in dead.items() if task.done()}
                pending -= done
                for call, (name, _) in zip(calls, asks, strict=True):
                    if name in gone and call in pending:
                        call.cancel()
                        pending.discard(call)
            await asyncio.gather(*calls, return_exceptions=True)
            for task in dead:
                task.cancel()
            await asyncio.gather(*dead, return_exceptions=True)
            for (name, ask), call in zip(asks, calls, strict=True):
                if call.cancelled() or isinstance(call.exception(), OutcomeUnknown):
                    self.doubted.add(ask.handle)
                elif (error := call.exception()) is not None:
                    assert isinstance(error, NoAddress | AddressRefused), repr(error)
                else:
                    self.note(name, ask.handle, call.result())

        self.run(race())

    @rule(node=NODES, handle=HANDLES, address=ADDRESSES, fault=FAULTS)
    def assign_by_name(
        self, node: str, handle: str, address: Address, fault: tuple[Fault, int] | None
    ) -> None:
        """An address by name."""
        process = self.alive(node, fault)
        ask = Ask(handle=handle, attributes={"node": node}, addresses=(address,))
        try:
            given = self.call(process, process.allocator.assign(ask))
        except (Crashed, OutcomeUnknown):
            self.doubted.add(handle)
        except AddressRefused:
            pass
        else:
            self.note(node, handle, given)

    @rule(node=NODES, handle=HANDLES, fault=FAULTS)
    def release_handle(self, node: str, handle: str, fault: tuple[Fault, int] | None) -> None:
        """All of a handle, by any node; after a crash the journal asks again."""
        process = self.alive(node, fault)
        try:
            self.call(process, process.allocator.release_handle(handle))
        except (Crashed, OutcomeUnknown):
            process = self.alive(node)
            process.store.arm(Fault.LOST_AFTER, 10**9)
            self.call(process, process.allocator.release_handle(handle))
        self.forget(handle)
        assert handle not in assert_consistent(self.run(everything(self.store)))
        self.doubted.discard(handle)

    @rule(node=st.one_of(st.none(), NODES), address=ADDRESSES, handle=st.none() | HANDLES)
    def release_address(self, node: str | None, address: Address, handle: str | None) -> None:
        """One address, by a node or at the command line, perhaps with a wrong idea of it."""
        wish = [Release(address, handle)]
        try:
            if node is not None:
                process = self.alive(node)
                try:
                    self.call(process, process.allocator.release(wish))
                except (Crashed, OutcomeUnknown):
                    self.run(self.client.release(wish))  # whoever is in doubt asks again
            else:
                self.run(self.client.release(wish))
        except StaleRelease:
            return
        for state in self.nodes.values():
            for held in state.held.values():
                held.discard(str(address))

    @rule(node=NODES, address=ADDRESSES, require_empty=st.booleans())
    def release_block(self, node: str, address: Address, require_empty: bool) -> None:
        """A block given up at the command line; what is held in it stays."""
        for bits in (1, 2, 3):
            block = ip_network(f"{address}/{address.max_prefixlen - bits}", strict=False)
            self.run(affinity.release(self.store, node, block, require_empty=require_empty))

    @rule(node=NODES, is_dead=st.booleans())
    def remove_node(self, node: str, is_dead: bool) -> None:
        """All blocks of a node are given up while it and others have addresses in them.

        One that runs on, as it was taken for dead, keeps what its containers have.
        """
        if is_dead:
            self.stop(self.nodes[node])
        self.run(affinity.remove_host(self.store, node))

    @rule(name=st.sampled_from(list(POOLS)), bits=BITS)
    def resize(self, name: str, bits: int) -> None:
        """A pool is made anew with another block size; every node hears of it by and by."""
        self.store_pool(name, POOLS[name], bits)

    @rule(network=st.sampled_from(OVERLAPPING), bits=BITS)
    def overlap(self, network: Network, bits: int) -> None:
        """One more pool, which shares addresses with another."""
        self.store_pool("more", network, bits)

    @rule(name=st.sampled_from([*POOLS, "more"]))
    def remove_pool(self, name: str) -> None:
        """A pool goes while its addresses are in use; `resize` and `overlap` bring it back."""
        key = ResourceKey("IPPool", name)
        self.run(delete(self.store, str(key)))
        if name in POOLS:
            self.run(affinity.release_pool(self.store, POOLS[name]))

    @rule(node=NODES)
    def hear(self, node: str) -> None:
        """A node hears what was stored and deleted meanwhile."""
        allocator = self.alive(node).allocator
        # That all pools are gone, and at once of those that are there.
        gone = [Update(ResourceKey("IPPool", name), None) for name in (*POOLS, "more")]
        allocator.on_updates(gone)
        self.run(feed(allocator, self.store))

    @rule(seconds=st.integers(1, 120))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.now_ns += seconds * SECOND

    @rule(node=NODES, fault=FAULTS)
    def look_after(self, node: str, fault: tuple[Fault, int] | None) -> None:
        """What the daemon does every half minute."""
        process = self.alive(node, fault)
        try:
            self.call(process, process.allocator.look_after())
        except Crashed:
            return

    @rule(node=NODES)
    def kill(self, node: str) -> None:
        """Killed at rest."""
        self.stop(self.nodes[node])

    @precondition(lambda self: self.doubted)
    @rule()
    def collect(self) -> None:
        """Every node's collector finds what nobody was told of, and gets it back."""
        for name, node in self.nodes.items():
            process = self.alive(name)
            process.store.arm(Fault.LOST_AFTER, 10**9)
            # A daemon that lost the race for a block may have an old idea of what it borrowed.
            self.stop(node)
            process = self.alive(name)
            known = {ip_address(a) for held in self.told().values() for a in held}
            self.call(process, process.allocator.held_by("nobody"))
            for _ in range(2):
                now = self.clock()
                leaks = node.collector.leaks(addresses=known, handles=(), now_ns=now)
                released = release_due(process.allocator, node.collector, leaks, now_ns=now)
                self.call(process, released)
                self.now_ns += (GRACE_S + 1) * SECOND
        held = assert_consistent(self.run(everything(self.store)))
        told = self.told()
        for handle in self.doubted:
            # A handle with an address in use is kept whole; without any, nothing of it is left.
            assert handle not in held or told.get(handle), f"{handle} is lost for good"
        self.doubted = {handle for handle in self.doubted if handle in held}

    @invariant()
    def nothing_disagrees(self) -> None:
        """See the chapter."""
        self.run(asyncio.sleep(0))
        stored = {h: set(a) for h, a in assert_consistent(self.run(everything(self.store))).items()}
        for handle, held in self.told().items():
            assert held <= stored.get(handle, set()), f"{handle} was told of {held}"
        for handle, held in stored.items():
            extra = held - self.told().get(handle, set())
            assert not extra or handle in self.doubted, f"{extra} of {handle} nobody asked for"


def is_death(outcome: object) -> bool:
    """Whether a daemon ended as one that was killed."""
    if isinstance(outcome, BaseExceptionGroup):
        return all(map(is_death, outcome.exceptions))
    return isinstance(outcome, Crashed | asyncio.CancelledError)


async def died(work: asyncio.Task[None]) -> None:
    """Return when the daemon is gone."""
    await asyncio.wait({work})


async def gathered(*works: asyncio.Task[Any]) -> list[Any]:
    """How tasks ended."""
    return await asyncio.gather(*works, return_exceptions=True)
