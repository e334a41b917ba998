"""Whether the datastore is open for changes: the ClusterInformation, kept by a watch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cni.errors import try_again
from cymric.datastore.syncer import Update
from cymric.model.keys import ResourceKey, resource_prefix
from cymric.model.resources import ClusterInformation

KEY = ResourceKey("ClusterInformation", "default")


class Cluster:
    """What the datastore says of itself; fed by a Syncer over `prefix`."""

    prefix = resource_prefix("ClusterInformation")

    def __init__(self) -> None:
        self._information: ClusterInformation | None = None
        self._in_sync = asyncio.Event()

    def on_updates(self, updates: Sequence[Update]) -> None:
        """Note what changed."""
        for update in updates:
            if update.key == KEY:
                value = update.value
                self._information = value if isinstance(value, ClusterInformation) else None

    def on_in_sync(self) -> None:
        """What was noted is all there is."""
        self._in_sync.set()

    async def refuse_when_locked(self) -> None:
        """Wait for the first look; return if pods may be made. Raises CniError, try again."""
        await self._in_sync.wait()
        if self._information is None:
            raise try_again("the cluster is not set up", f"{KEY} is missing")
        if not self._information.spec.datastoreReady:
            raise try_again("the datastore is locked", "datastoreReady is not true")
