"""How old what felix knows is: seconds since the datastore was last heard.

A datastore that is silent changes nothing: rules stay as they are for as long as it takes. But who
looks after nodes should know that this one enforces what was true then; so past a limit the node is
not ready. A watch that hears nothing is no proof, for nothing may have happened: so a key is read
every few seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from cymric.datastore.api import Datastore, DatastoreError
from cymric.model.keys import ResourceKey
from cymric.runtime.health import Health

HEARD = "datastore heard of late"
ASK_EVERY_S = 10.0
ANSWER_WITHIN_S = 5.0
_KEY = str(ResourceKey("ClusterInformation", "default"))

log = structlog.get_logger()


class Knowledge:
    """See the chapter. `clock` gives monotonic seconds; with a limit of 0 s age does not matter."""

    def __init__(self, health: Health, limit_s: float, clock: Callable[[], float]) -> None:
        self._health = health
        self._limit_s = limit_s
        self._clock = clock
        self._heard_s = clock()
        self._is_fresh = True

    @property
    def age_s(self) -> float:
        """Seconds since the datastore was heard."""
        return self._clock() - self._heard_s

    def heard(self) -> None:
        """It said something."""
        self._heard_s = self._clock()
        self.judge()

    def judge(self) -> None:
        """Say whether what is known is fresh enough."""
        is_fresh = not self._limit_s or self.age_s <= self._limit_s
        if is_fresh != self._is_fresh:
            self._is_fresh = is_fresh
            if is_fresh:
                log.info("the datastore is heard again")
            else:
                log.error("THE DATASTORE IS SILENT, not ready", age_s=round(self.age_s))
        self._health.set_ready(HEARD, is_ready=is_fresh)

    async def ask(self, store: Datastore) -> None:
        """Ask the datastore every few seconds until cancelled."""
        while True:
            try:
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    await store.get(_KEY)
                self.heard()
            except (DatastoreError, TimeoutError):
                self.judge()
            await asyncio.sleep(ASK_EVERY_S)
