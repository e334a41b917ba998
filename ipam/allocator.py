"""The node's allocator: the one that lives in cnid, beside the blocks it owns.

    on_updates ──▶ Facts (pools, node, reservations, settings)
    assign, release ──▶ queue ──▶ Committer: one transaction for all that wait ──▶ answers
    every half minute ──▶ claims put in order, idle blocks given back

Calls that arrive while a write is in flight gather and land together in the next one. What the
node's keys hold is remembered (`mirror.py`), so an assignment reads nothing: it costs its share of
one transaction. Blocks are read at start, and when a new one has to be found.

Made once by cnid; `run` must be running for anything to be answered, and `on_updates` and
`on_in_sync` must be fed by a `Syncer` over `prefixes`: calls wait until the first in-sync mark.

    allocator = Allocator(store, settings.node_name, is_routed=routes.is_foreign)
    syncer = Syncer(store, allocator.prefixes, allocator.on_updates, allocator.on_in_sync)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(syncer.run())
        tasks.create_task(allocator.run())
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import structlog
from prometheus_client import Counter

from cymric.datastore.api import Datastore, DatastoreError
from cymric.datastore.syncer import Update
from cymric.model.codec import Malformed
from cymric.model.ipam import AllocationBlock
from cymric.model.keys import BlockKey
from cymric.model.net import Address, Network
from cymric.runtime.pacing import Backoff, Kick
from ipam import ahead
from ipam.affinity import Released
from ipam.asking import Ask, Assignment, Release
from ipam.client import IPAM
from ipam.commit import Change, Committer, Counts, Job
from ipam.drafts import Drafts, Unseen
from ipam.errors import IPAMError
from ipam.facts import Facts, Watched
from ipam.freeing import free_addresses, free_handle, held
from ipam.mirror import FAMILIES, Mirror, OnBlock
from ipam.moments import SECOND_NS, Clock
from ipam.search import grant

GATHERED_AT_ONCE = 120
"""Calls in one batch; what does not fit into one transaction goes into the next."""

IDLE_S = 900.0
"""How long a block stays empty before it is given back (Calico's grace period)."""

CLAIM_AHEAD_PAUSE_S = 60
"""How long no block is claimed ahead after there was none to be had."""

CARE_EVERY_S = 30.0
"""How often claims are looked after."""

ASSIGNED = Counter("cymric_ipam_assigned", "Addresses assigned.")
TRANSACTIONS = Counter("cymric_ipam_transactions", "Transactions sent for addresses and blocks.")
CONFLICTS = Counter("cymric_ipam_conflicts", "Transactions that another writer was faster than.")
CLAIMED_AHEAD = Counter("cymric_ipam_claimed_ahead", "Blocks claimed before they were needed.")
GIVEN_BACK = Counter("cymric_ipam_given_back", "Empty blocks given back.")
ROUTED = Counter("cymric_ipam_routed", "Free addresses passed over: the kernel routes them.")

T = TypeVar("T")

log = structlog.get_logger()


@dataclass(eq=False, slots=True)
class _Call(Generic[T]):
    """Somebody who waits; `give_up` makes the change that takes back what nobody wants."""

    job: Job[T]
    answer: asyncio.Future[T]
    give_up: Callable[[T], Change[Any]] | None = None


class Allocator:
    """Assigns and releases addresses for one node.

    `clock` gives nanoseconds since 1970. `is_routed` tells whether the kernel already routes an
    address to a workload: such an address is passed over and reported, never handed out.
    `on_block` is told of every block that names this node (see `collect.py`).
    `ahead_part` is the part of a block that shall be left (0: claim nothing ahead), `idle_s` how
    long a block stays empty before it is given back.
    """

    def __init__(
        self,
        store: Datastore,
        node: str,
        *,
        clock: Clock = time.time_ns,
        is_routed: Callable[[Address], bool] | None = None,
        on_block: OnBlock | None = None,
        ahead_part: float = ahead.PART,
        idle_s: float = IDLE_S,
    ) -> None:
        self._store = store
        self._watched = Watched(node)
        self._mirror = Mirror(node, on_block)
        self._clock = clock
        self._ahead_part = ahead_part
        self._idle_ns = int(idle_s * SECOND_NS)
        self._committer = Committer(
            store, self._mirror, lambda: self.facts, clock, is_routed, self._on_routed
        )
        self._queue: deque[_Call[Any]] = deque()
        self._kick = Kick()
        self._in_sync = asyncio.Event()
        self._reported: set[Address] = set()
        self._empty_since: dict[Network, int] = {}
        self._no_claim_before: dict[int, int] = {}
        self._counted = Counts()

    # --- what feeds it ---

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the Syncer that feeds this must follow."""
        return self._watched.prefixes

    @property
    def facts(self) -> Facts:
        """The pools, reservations and settings known now."""
        return self._watched.facts

    @property
    def counts(self) -> Counts:
        """What the datastore was asked for so far."""
        return self._committer.counts

    @property
    def blocks(self) -> tuple[AllocationBlock, ...]:
        """The node's own blocks as last seen."""
        found = (
            self._mirror.value(BlockKey(network), AllocationBlock)
            for version in FAMILIES
            for network in self._mirror.affine(version)
        )
        return tuple(b for b in found if b is not None and b.owner_host == self._mirror.node)

    def on_updates(self, updates: Sequence[Update]) -> None:
        """Note what changed. Keys that are of no interest here are passed over."""
        self._watched.on_updates(updates)

    def on_in_sync(self) -> None:
        """All pools, reservations and settings are known: from now on calls are answered."""
        self._in_sync.set()

    # --- what it is asked ---

    async def assign(self, ask: Ask) -> tuple[Assignment, ...]:
        """All that was asked for, explicit addresses first, then IPv4, then IPv6; or nothing.

        Recorded when this returns. Raises NoAddress, AddressRefused (nothing was given), Contended
        and DatastoreError (try again; after OutcomeUnknown release the handle). A caller that is
        cancelled gets nothing: what had been written is released again.
        """
        return await self._do(partial(grant, ask), partial(self._ungranted, ask))

    async def release_handle(self, handle: str) -> tuple[Address, ...]:
        """Free everything a handle holds, and tell what it was; an unknown handle holds nothing."""
        return await self._do(partial(free_handle, handle))

    async def release(self, releases: Iterable[Release]) -> tuple[Address, ...]:
        """Free addresses; returns those that nobody held. Raises StaleRelease (nothing freed)."""
        return await self._do(partial(free_addresses, tuple(releases)))

    async def held_by(self, handle: str) -> tuple[Address, ...]:
        """The addresses a handle holds now, by what the datastore's blocks say."""
        return await self._do(partial(held, handle))

    async def do(self, change: Change[T]) -> T:
        """Land any change together with the others."""
        return await self._do(change)

    # --- the work ---

    async def run(self) -> None:
        """Answer calls and look after the node's blocks until cancelled."""
        await self._in_sync.wait()
        await self._load()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._answer_calls(), name="answer")
            tasks.create_task(self._care(), name="care")

    async def look_after(self) -> None:
        """Put claims in order, give back what is idle; needs `run`. Errors wait for next time."""
        now = self._clock()
        for version in FAMILIES:
            for network in self._mirror.affine(version):
                await self._quietly(partial(ahead.put_in_order, network), network)
                is_gone = await self._quietly(partial(ahead.leave_unselected, network), network)
                if is_gone is Released.DELETED:
                    log.info("block of an unselected pool given back", block=str(network))
                elif self._is_idle(network, now):
                    given = partial(ahead.give_back, network, self._ahead_part)
                    if await self._quietly(given, network) is Released.DELETED:
                        GIVEN_BACK.inc()
                        log.info("idle block given back", block=str(network))

    async def _load(self) -> None:
        pauses = Backoff()
        while True:
            try:
                await IPAM(self._store).config()  # as Calico: a reader creates what is missing
                await self._committer.read(Unseen(owned=frozenset(FAMILIES)))
            except DatastoreError as error:
                log.warning("own blocks cannot be read, trying again", error=repr(error))
                await asyncio.sleep(pauses.next_s())
            else:
                self._mirror.forget_others()
                log.info("own blocks read", blocks=len(self.blocks))
                return

    async def _answer_calls(self) -> None:
        while True:
            await self._kick.wait()
            await asyncio.sleep(0)  # who is ready to ask in this moment shares the transaction
            while self._queue:
                await self._land_some()

    async def _land_some(self) -> None:
        calls: list[_Call[Any]] = []
        while self._queue and len(calls) < GATHERED_AT_ONCE:
            call = self._queue.popleft()
            if not call.answer.done():  # who gave up before it was their turn
                calls.append(call)
        if not calls:
            return
        await self._committer.land([call.job for call in calls])
        for call in calls:
            self._answer(call)
        self._count()
        for version in FAMILIES:
            self._claim_ahead(version)

    def _answer(self, call: _Call[Any]) -> None:
        job = call.job
        if not call.answer.done():
            if job.error is not None:
                call.answer.set_exception(job.error)
            else:
                call.answer.set_result(job.result)
        elif job.error is None and call.give_up is not None:
            change = call.give_up(job.result)
            log.info("the caller is gone, what it asked for is released")
            self._enqueue(change, lambda future: future.exception())

    async def _do(self, change: Change[T], give_up: Callable[[T], Change[Any]] | None = None) -> T:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._queue.append(_Call(Job(change), answer, give_up))
        self._kick()
        return await answer

    def _enqueue(self, change: Change[T], on_done: Callable[[asyncio.Future[T]], Any]) -> None:
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(on_done)
        self._queue.append(_Call(Job(change), answer))
        self._kick()

    async def _quietly(self, change: Change[T], network: Network) -> T | None:
        """For what is not urgent: a failure is logged and tried again next time.

        What by memory changes nothing is not asked for: nobody is in a hurry to hear so.
        """
        if not self._would_change(change):
            return None
        try:
            return await self._do(change)
        except (IPAMError, DatastoreError, Malformed) as error:
            log.warning("cannot look after a block now", block=str(network), error=repr(error))
            return None

    def _would_change(self, change: Change[Any]) -> bool:
        drafts = Drafts(self._mirror, self.facts, self._clock())
        try:
            change(drafts)
        except Unseen:
            return True
        except IPAMError:
            return False
        return drafts.mark() > 0

    async def _care(self) -> None:
        while True:
            await self.look_after()
            await asyncio.sleep(CARE_EVERY_S)

    def _is_idle(self, network: Network, now: int) -> bool:
        block = self._mirror.value(BlockKey(network), AllocationBlock)
        if block is None or not block.is_empty:
            self._empty_since.pop(network, None)
            return False
        return now - self._empty_since.setdefault(network, now) >= self._idle_ns

    def _claim_ahead(self, version: int) -> None:
        """Ask for the next block if little is left, without anybody waiting for it."""
        now, change = self._clock(), partial(ahead.claim_ahead, version, self._ahead_part)
        if now < self._no_claim_before.get(version, 0) or not self._would_change(change):
            return
        # Until this one has been answered, or when it finds nothing, do not ask again.
        self._no_claim_before[version] = now + CLAIM_AHEAD_PAUSE_S * SECOND_NS

        def told(future: asyncio.Future[Network | None]) -> None:
            if not future.cancelled() and future.exception() is None:
                del self._no_claim_before[version]
                if (network := future.result()) is not None:
                    CLAIMED_AHEAD.inc()
                    log.info("next block claimed ahead", block=str(network))

        self._enqueue(change, told)

    def _ungranted(self, ask: Ask, granted: tuple[Assignment, ...]) -> Change[Any]:
        """What takes back an assignment that nobody waits for, and only that one."""
        wishes = []
        for assignment in granted:
            block = self._mirror.value(BlockKey(assignment.block), AllocationBlock)
            ordinal = int(assignment.address) - int(assignment.block.network_address)
            sequences = (block.sequence_number_for_allocation or {}) if block is not None else {}
            wishes.append(Release(assignment.address, ask.handle, sequences.get(str(ordinal))))
        return partial(free_addresses, tuple(wishes))

    def _on_routed(self, address: Address) -> None:
        if address not in self._reported:
            self._reported.add(address)
            ROUTED.inc()
            log.warning("free address is routed to a workload, passed over", address=str(address))

    def _count(self) -> None:
        counts, counted = self.counts, self._counted
        TRANSACTIONS.inc(counts.transactions - counted.transactions)
        CONFLICTS.inc(counts.conflicts - counted.conflicts)
        self._counted = replace(counts)
