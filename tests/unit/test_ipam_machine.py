"""IPAM as a state machine: several nodes, lost answers, races; nothing ever disagrees."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from ipaddress import IPv4Network, ip_address
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cymric.datastore.memory import MemoryDatastore
from ipam import affinity
from ipam.client import IPAM, Assignment, Release, Request
from ipam.errors import AddressRefused, NoAddress, StaleRelease
from tests.support.ipam_world import assert_consistent, everything, store_node, store_pool

NODES = st.sampled_from(["node-a", "node-b", "node-c"])
HANDLES = st.sampled_from([f"net.{n}" for n in range(8)])
OFFSETS = st.integers(0, 31)
T = TypeVar("T")


class Cluster(RuleBasedStateMachine):
    """Three nodes with a client each, one pool of eight blocks of four addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.store = MemoryDatastore()
        self.tick = 0
        self.held: dict[str, set[str]] = {}
        self.clients = {f"node-{n}": IPAM(self.store, clock=self.now) for n in "abc"}
        for name in self.clients:
            self.run(store_node(self.store, name))
        self.run(store_pool(self.store, "pods", "10.0.0.0/27", block_size=30))

    def teardown(self) -> None:
        """Nothing runs on."""
        self.loop.close()

    def now(self) -> int:
        """A clock that never stands still."""
        self.tick += 1
        return 1_767_323_045_000_000_000 + self.tick

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to the end."""
        return self.loop.run_until_complete(work)

    def request(self, host: str, handle: str) -> Request:
        """A request like no other."""
        return Request(
            host=host, handle=handle, attributes={"node": host, "timestamp": str(self.now())}
        )

    def note(self, handle: str, assignment: Assignment) -> None:
        """Remember who was told what."""
        address = str(assignment.address)
        assert not any(address in held for held in self.held.values()), "given twice"
        self.held.setdefault(handle, set()).add(address)

    @rule(host=NODES, handle=HANDLES, lost=st.booleans())
    def assign(self, host: str, handle: str, lost: bool) -> None:
        """One address; the answer to the write may be lost."""
        self.store.lose_answers(int(lost))
        try:
            assignment = self.run(self.clients[host].assign(self.request(host, handle)))
        except NoAddress:
            assert sum(map(len, self.held.values())) == 32
        else:
            self.note(handle, assignment)
        self.store.lose_answers(0)

    @rule(wishes=st.lists(st.tuples(NODES, HANDLES), min_size=2, max_size=6))
    def assign_at_once(self, wishes: list[tuple[str, str]]) -> None:
        """Several nodes at the same time, through clients of their own."""

        async def race() -> list[Assignment | BaseException]:
            works = [self.clients[host].assign(self.request(host, h)) for host, h in wishes]
            return await asyncio.gather(*works, return_exceptions=True)

        for (_, handle), outcome in zip(wishes, self.run(race()), strict=True):
            if isinstance(outcome, Assignment):
                self.note(handle, outcome)
            else:
                assert isinstance(outcome, NoAddress)

    @rule(host=NODES, handle=HANDLES, offset=OFFSETS)
    def assign_address(self, host: str, handle: str, offset: int) -> None:
        """An address by name."""
        address = ip_address("10.0.0.0") + offset
        is_held = any(str(address) in held for held in self.held.values())
        try:
            work = self.clients[host].assign_address(address, self.request(host, handle))
            assignment = self.run(work)
        except AddressRefused:
            assert is_held
        else:
            self.note(handle, assignment)

    @rule(host=NODES, handle=HANDLES, lost=st.booleans())
    def release_handle(self, host: str, handle: str, lost: bool) -> None:
        """All of a handle, by any node."""
        self.store.lose_answers(int(lost))
        freed = self.run(self.clients[host].release_handle(handle))
        self.store.lose_answers(0)
        held = self.held.pop(handle, set())
        assert lost or {str(address) for address in freed} == held

    @rule(host=NODES, offset=OFFSETS, handle=st.one_of(st.none(), HANDLES))
    def release_address(self, host: str, offset: int, handle: str | None) -> None:
        """One address, perhaps with a wrong idea of who holds it."""
        address = ip_address("10.0.0.0") + offset
        holder = next((h for h, held in self.held.items() if str(address) in held), None)
        try:
            unheld = self.run(self.clients[host].release([Release(address, handle)]))
        except StaleRelease:
            assert holder not in (None, handle)
            return
        assert (unheld == (address,)) == (holder is None)
        if holder is not None:
            assert handle in (None, holder)
            self.held[holder].discard(str(address))

    @rule(host=NODES, number=st.integers(0, 7), require_empty=st.booleans())
    def release_block(self, host: str, number: int, require_empty: bool) -> None:
        """A block given up; what is held in it stays."""
        network = IPv4Network(f"10.0.0.{number * 4}/30")
        self.run(affinity.release(self.store, host, network, require_empty=require_empty))

    @invariant()
    def nothing_disagrees(self) -> None:
        """Blocks, handles and affinities agree, and with what the callers were told."""
        held = assert_consistent(self.run(everything(self.store)))
        assert {h: set(a) for h, a in held.items()} == {h: a for h, a in self.held.items() if a}


TestCluster = Cluster.TestCase
TestCluster.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)
