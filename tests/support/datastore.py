"""Watching in the background, for tests of anything that implements the datastore port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

from cymric.datastore.api import Datastore, DatastoreError, WatchEvent
from cymric.datastore.etcd import EtcdDatastore, open_datastore
from cymric.runtime.settings import Settings


def client(*endpoints: str, call_s: float = 5.0, **settings: str) -> EtcdDatastore:
    """An etcd adapter on these endpoints, with further settings by name."""
    return open_datastore(Settings(etcd_endpoints=endpoints, **settings), call_s=call_s)


class Heard:
    """What a watch delivered so far, and the error that ended it."""

    def __init__(self) -> None:
        self.events: list[WatchEvent] = []
        self.error: DatastoreError | None = None

    @property
    def values(self) -> list[bytes | None]:
        """The values in the order they came; None for a deletion."""
        return [event.value for event in self.events]


@asynccontextmanager
async def listening(store: Datastore, prefix: str, start_revision: int) -> AsyncIterator[Heard]:
    """Watch in the background for as long as the block lasts."""
    heard = Heard()

    async def listen() -> None:
        try:
            async with aclosing(store.watch(prefix, start_revision=start_revision)) as batches:
                async for batch in batches:
                    heard.events += batch
        except DatastoreError as error:
            heard.error = error

    task = asyncio.create_task(listen())
    try:
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
