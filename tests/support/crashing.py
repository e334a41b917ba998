"""A datastore whose client dies, or loses answers, at a call that a test chooses.

Around any store. What a process that is killed has sent may land or not; an answer may be lost
before or after the write landed, and a write may land long after its answer was given up. Every
call lets others go first, as a network does, so that those who race do.
"""

from __future__ import annotations

import asyncio
from enum import StrEnum

from cymric.datastore.api import (
    Conflict,
    Datastore,
    KeyValue,
    Listing,
    OutcomeUnknown,
    Transaction,
)


class Crashed(Exception):
    """The process is dead. No error of the datastore: nobody may catch it."""


class Fault(StrEnum):
    """What happens to the chosen call."""

    CRASH_BEFORE = "the process dies before the call reaches the datastore"
    CRASH_AFTER = "the process dies when the call has landed"
    LOST_BEFORE = "the write did not land, and nobody says so"
    LOST_AFTER = "the write landed, and nobody says so"
    LOST_LATE = "the write lands two calls later, and nobody says so"


LATE_BY = 2


class CrashingStore:
    """See the chapter. `arm` chooses a call from now on; faults of answers concern writes only."""

    def __init__(self, store: Datastore) -> None:
        self._store = store
        self._countdown = 0
        self._fault: Fault | None = None
        self._late: tuple[int, Transaction] | None = None
        self.is_dead = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def arm(self, fault: Fault, calls: int) -> None:
        """Let the call after `calls` others fail."""
        self._fault, self._countdown = fault, calls

    async def get(self, key: str) -> KeyValue | None:
        """As the store's."""
        await self._before_read()
        return await self._store.get(key)

    async def list(self, prefix: str) -> Listing:
        """As the store's."""
        await self._before_read()
        return await self._store.list(prefix)

    async def commit(self, transaction: Transaction) -> int:
        """As the store's, but for the chosen fault."""
        await asyncio.sleep(0)
        await self._land_late()
        fault = self._due()
        if fault is Fault.CRASH_BEFORE:
            self._die()
        if fault is Fault.LOST_BEFORE:
            raise OutcomeUnknown("lost before it landed")
        if fault is Fault.LOST_LATE:
            self._late = (LATE_BY, transaction)
            raise OutcomeUnknown("not landed yet")
        revision = await self._store.commit(transaction)
        if fault is Fault.CRASH_AFTER:
            self._die()
        if fault is Fault.LOST_AFTER:
            raise OutcomeUnknown("lost after it landed")
        return revision

    async def _before_read(self) -> None:
        await asyncio.sleep(0)
        await self._land_late()
        if self._fault in (Fault.CRASH_BEFORE, Fault.CRASH_AFTER) and self._due():
            self._die()

    def _due(self) -> Fault | None:
        if self.is_dead:
            raise Crashed("a dead process called")
        if self._fault is None:
            return None
        self._countdown -= 1
        if self._countdown >= 0:
            return None
        fault, self._fault = self._fault, None
        return fault

    async def _land_late(self) -> None:
        if self._late is None:
            return
        left, transaction = self._late
        self._late = (left - 1, transaction) if left else None
        if not left:
            try:
                await self._store.commit(transaction)
            except Conflict:
                return  # somebody was faster: it never lands

    def _die(self) -> None:
        self.is_dead = True
        raise Crashed("killed")
