"""Landing changes: many at once, in one transaction, again and again until it succeeds.

    changes ─▶ Drafts ─▶ Unseen? read those keys, start over
                 │
                 ▼
            one transaction ─▶ landed: remember, answer everybody
                 │          ─▶ Conflict: remember what is there, start over
                 │          ─▶ OutcomeUnknown: read it all; a trace of ours? landed : start over
                 ▼
            does not fit any more: the rest goes into the next one

A change that fails (no address, stale release) fails alone; its traces are taken back. What a
change concludes without writing rests on keys that were read for it, never on memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import structlog

from cymric.datastore.api import (
    Conflict,
    Datastore,
    DatastoreError,
    OutcomeUnknown,
    Unavailable,
)
from cymric.model.codec import Malformed
from cymric.model.keys import affinity_prefix, block_prefix
from cymric.model.net import Address
from ipam.changes import Changes
from ipam.drafts import Drafts, Unseen
from ipam.errors import Contended, IPAMError
from ipam.facts import Facts
from ipam.mirror import Mirror
from ipam.moments import Clock

CAS_ATTEMPTS = 100
"""How often changes are tried against other writers (Calico's number)."""

UNKNOWN_ATTEMPTS = 5
"""How often in a row an answer may be lost before the caller is told so."""

T = TypeVar("T")

log = structlog.get_logger()

Change = Callable[[Drafts], T]


@dataclass(eq=False, slots=True)
class Job(Generic[T]):
    """A change, and what became of it: a result or an error."""

    change: Change[T]
    is_done: bool = False
    result: T | None = None
    error: BaseException | None = None

    def outcome(self) -> T:
        """The result, or the error raised."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]  # done without error: it is a T


@dataclass(slots=True)
class Counts:
    """What it took, for metrics and benchmarks."""

    transactions: int = 0
    conflicts: int = 0
    listings: int = 0
    reads: int = 0


@dataclass(eq=False, slots=True)
class _Attempt:
    """A transaction whose answer was lost, and what it would have meant."""

    changes: Changes
    answers: Sequence[tuple[Job[Any], Any]]


@dataclass(eq=False)
class Committer:
    """Lands jobs for one node. Not reentrant: one batch after the other."""

    store: Datastore
    mirror: Mirror
    facts: Callable[[], Facts]
    clock: Clock
    is_routed: Callable[[Address], bool] | None = None
    on_routed: Callable[[Address], None] = lambda _: None
    counts: Counts = field(default_factory=Counts)

    async def land(self, jobs: Sequence[Job[Any]]) -> None:
        """Do all `jobs`; each one tells its result or error. Raises nothing but cancellation."""
        try:
            await self._land(jobs)
        except (DatastoreError, Contended) as error:
            for job in jobs:
                if not job.is_done:
                    job.is_done, job.error = True, error

    async def _land(self, jobs: Sequence[Job[Any]]) -> None:
        self.mirror.grow_old()
        doubts: list[_Attempt] = []
        most, conflicts = len(jobs), 0
        has_read = False
        while True:
            self._settle_if_landed(doubts)
            if not (waiting := [job for job in jobs if not job.is_done]):
                break
            try:
                changes, answers = self._gather(waiting[:most])
            except Unseen as unseen:
                has_read = True
                await self.read(unseen)
                continue
            if changes.is_too_large and most > 1:
                most = max(1, min(most, len(waiting)) // 2)
                continue
            if changes.values:
                try:
                    self.counts.transactions += 1
                    revision = await self.store.commit(changes.transaction)
                except Conflict as conflict:
                    self.counts.conflicts += 1
                    conflicts += 1
                    if conflicts >= CAS_ATTEMPTS:
                        raise Contended(f"gave up after {CAS_ATTEMPTS} tries: {conflict}") from None
                    self._saw(conflict, changes)
                    continue
                except OutcomeUnknown:
                    doubts.append(_Attempt(changes, answers))
                    await self._read_again(changes, doubts)
                    continue
                except DatastoreError:
                    self.mirror.forget(changes.before)
                    raise
                changes.remember(self.mirror, revision)
                # Whatever compared a key that was written now can land no more.
                doubts = [doubt for doubt in doubts if not changes.rules_out(doubt.changes)]
            _settle([(job, _answer_in_doubt(job, answer, doubts)) for job, answer in answers])
        if has_read:
            self.mirror.forget_others()

    def _gather(self, jobs: Sequence[Job[Any]]) -> tuple[Changes, list[tuple[Job[Any], Any]]]:
        """The changes of as many jobs as fit, and the jobs' answers. Raises Unseen."""
        drafts = Drafts(
            self.mirror, self.facts(), self.clock(), self.is_routed, on_routed=self.on_routed
        )
        answers: list[tuple[Job[Any], Any]] = []
        unseen_keys, unseen_versions, unseen_owned = set[str](), set[int](), set[int]()
        for job in jobs:
            mark = drafts.mark()
            drafts.looked.clear()
            answer: Any
            try:
                answer = job.change(drafts)
            except Unseen as unseen:
                unseen_keys |= unseen.keys
                unseen_versions |= unseen.versions
                unseen_owned |= unseen.owned
                drafts.undo(mark)
                continue
            except (IPAMError, Malformed) as error:
                answer = error
                drafts.undo(mark)
            if drafts.mark() == mark:
                # Nothing is written, so no comparison proves what the answer rests on.
                unseen_keys |= {text for text in drafts.looked if not self.mirror.is_fresh(text)}
            elif drafts.is_overfull and answers:
                drafts.undo(mark)
                break
            answers.append((job, answer))
        if unseen_keys or unseen_versions or unseen_owned:
            raise Unseen(
                frozenset(unseen_keys), frozenset(unseen_versions), frozenset(unseen_owned)
            )
        return drafts.changes(), answers

    async def read(self, unseen: Unseen) -> None:
        """Look at what a change wants to know."""
        for version in unseen.owned:
            prefix = affinity_prefix(self.mirror.node, version)
            self.mirror.see_affinities(version, await self.store.list(prefix))
        for version in unseen.versions | unseen.owned:
            self.counts.listings += 1
            self.mirror.see_blocks(version, await self.store.list(block_prefix(version)))
        texts = sorted(unseen.keys)
        self.counts.reads += len(texts)
        # gather, not a TaskGroup: the caller sorts errors by class, and a group would wrap them.
        pairs = await asyncio.gather(*(self.store.get(text) for text in texts))
        self.mirror.see(dict(zip(texts, pairs, strict=True)))

    async def _read_again(self, changes: Changes, doubts: Sequence[_Attempt]) -> None:
        texts = sorted(changes.before)
        try:
            if len(doubts) >= UNKNOWN_ATTEMPTS:
                raise OutcomeUnknown("the answers to several writes in a row were lost")
            await self.read(Unseen(frozenset(texts)))
        except Unavailable:
            self.mirror.forget(texts)
            raise OutcomeUnknown("the answer to a write was lost, and then the datastore") from None
        except DatastoreError:
            self.mirror.forget(texts)
            raise
        self.mirror.unlist()

    def _saw(self, conflict: Conflict, changes: Changes) -> None:
        self.mirror.see(conflict.current)
        if changes.transaction.none_created:
            self.mirror.unlist()  # what exists is not what the claims rested on

    def _settle_if_landed(self, doubts: list[_Attempt]) -> None:
        """Asked again and again: a write may land long after its answer was lost."""
        for attempt in doubts:
            if attempt.changes.has_landed(self.mirror):
                _settle(attempt.answers)
                doubts.clear()
                return


def _answer_in_doubt(job: Job[Any], answer: Any, doubts: Sequence[_Attempt]) -> Any:
    """A refusal may not be told while an earlier try of the same job may still land."""
    if isinstance(answer, BaseException) and any(
        job is tried for doubt in doubts for tried, _ in doubt.answers
    ):
        return OutcomeUnknown(f"the answer to a write was lost; tried again: {answer}")
    return answer


def _settle(answers: Sequence[tuple[Job[Any], Any]]) -> None:
    for job, answer in answers:
        job.is_done = True
        if isinstance(answer, BaseException):
            job.error = answer
        else:
            job.result = answer


async def land_one(store: Datastore, change: Change[T], *, facts: Facts, clock: Clock) -> T:
    """Land one change for somebody who remembers nothing. Raises what it raises, Contended."""
    job = Job(change)
    await Committer(store, Mirror(facts.node), lambda: facts, clock).land([job])
    return job.outcome()
