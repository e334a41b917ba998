"""IPAM as a state machine: nodes that crash at any call, borrowers, a collector, other tools.

Three nodes with an allocator each, which dies and starts again; beside them somebody at the command
line, pools that change their block size, and time that passes. What the callers were told is
remembered, and after every step compared with what is stored:

- no address has two owners, and every address somebody was told is stored under its handle;
- blocks, handles and affinities agree, no two blocks overlap;
- what is stored beyond that is an answer that a crash swallowed; a collector gets it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from ipaddress import IPv4Network, ip_address
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cymric.datastore.api import Datastore, OutcomeUnknown
from cymric.datastore.memory import MemoryDatastore
from ipam import affinity
from ipam.allocator import Allocator
from ipam.asking import Ask, Assignment, Release
from ipam.client import IPAM
from ipam.collect import Collector, release_due
from ipam.errors import AddressRefused, NoAddress, StaleRelease
from tests.support.crashing import Crashed, CrashingStore, Fault
from tests.support.ipam_world import assert_consistent, everything, feed, store_node, store_pool

NAMES = ("node-a", "node-b", "node-c")
POOL = "10.0.0.0/27"
GRACE_S = 60
SECOND = 1_000_000_000

NODES = st.sampled_from(NAMES)
HANDLES = st.sampled_from([f"net.{n}" for n in range(8)])
OFFSETS = st.integers(0, 31)
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

    @initialize(block_size=st.sampled_from([29, 30, 31]))
    def begin(self, block_size: int) -> None:
        """Three nodes, and a pool of 32 addresses."""
        for name in NAMES:
            self.run(store_node(self.store, name))
        self.run(store_pool(self.store, "pods", POOL, block_size=block_size))

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

    def request(self, node: str, handle: str, count: int = 1) -> Ask:
        """An ask like no other."""
        return Ask(
            handle=handle, ipv4=count, attributes={"node": node, "timestamp": str(self.clock())}
        )

    @rule(node=NODES, handle=HANDLES, count=st.integers(1, 3), fault=FAULTS)
    def assign(self, node: str, handle: str, count: int, fault: tuple[Fault, int] | None) -> None:
        """Some addresses; the daemon may die or lose an answer on the way."""
        process = self.alive(node, fault)
        try:
            given = self.call(process, process.allocator.assign(self.request(node, handle, count)))
        except (Crashed, OutcomeUnknown):
            self.doubted.add(handle)
        except NoAddress:
            pass
        else:
            self.note(node, handle, given)

    @rule(
        wishes=st.lists(st.tuples(NODES, HANDLES), min_size=2, max_size=8),
        fault=FAULTS,
        struck=NODES,
    )
    def assign_at_once(
        self, wishes: list[tuple[str, str]], fault: tuple[Fault, int] | None, struck: str
    ) -> None:
        """Several nodes at the same moment, one of which may be struck."""
        processes = {name: self.alive(name, fault if name == struck else None) for name in NAMES}

        async def race() -> None:
            calls = [
                asyncio.create_task(processes[n].allocator.assign(self.request(n, h)))
                for n, h in wishes
            ]
            dead = {asyncio.create_task(died(p.work)): name for name, p in processes.items()}
            pending = set(calls)
            while pending:
                done, _ = await asyncio.wait(
                    pending | dead.keys(), return_when=asyncio.FIRST_COMPLETED
                )
                gone = {name for task, name in dead.items() if task.done()}
                pending -= done
                for call, (name, _) in zip(calls, wishes, strict=True):
                    if name in gone and call in pending:
                        call.cancel()
                        pending.discard(call)
            await asyncio.gather(*calls, return_exceptions=True)
            for task in dead:
                task.cancel()
            await asyncio.gather(*dead, return_exceptions=True)
            for (name, handle), call in zip(wishes, calls, strict=True):
                if call.cancelled() or isinstance(call.exception(), OutcomeUnknown):
                    self.doubted.add(handle)
                elif (error := call.exception()) is not None:
                    assert isinstance(error, NoAddress), repr(error)
                else:
                    self.note(name, handle, call.result())

        self.run(race())

    @rule(node=NODES, handle=HANDLES, offset=OFFSETS, fault=FAULTS)
    def assign_by_name(
        self, node: str, handle: str, offset: int, fault: tuple[Fault, int] | None
    ) -> None:
        """An address by name."""
        process = self.alive(node, fault)
        address = ip_address("10.0.0.0") + offset
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

    @rule(node=st.one_of(st.none(), NODES), offset=OFFSETS, handle=st.one_of(st.none(), HANDLES))
    def release_address(self, node: str | None, offset: int, handle: str | None) -> None:
        """One address, by a node or at the command line, perhaps with a wrong idea of it."""
        address = ip_address("10.0.0.0") + offset
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

    @rule(node=NODES, number=st.integers(0, 15), require_empty=st.booleans())
    def release_block(self, node: str, number: int, require_empty: bool) -> None:
        """A block given up at the command line; what is held in it stays."""
        network = IPv4Network(f"10.0.0.{number * 2}/31")
        for length in (29, 30, 31):
            whole = network.supernet(new_prefix=length) if length < 31 else network
            self.run(affinity.release(self.store, node, whole, require_empty=require_empty))

    @rule(block_size=st.sampled_from([28, 29, 30, 31, 32]))
    def resize(self, block_size: int) -> None:
        """The pool is made anew with another block size; every node hears of it by and by."""
        self.run(store_pool(self.store, "pods", POOL, block_size=block_size))

    @rule(node=NODES)
    def hear(self, node: str) -> None:
        """A node hears what was stored meanwhile."""
        self.run(feed(self.alive(node).allocator, self.store))

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
