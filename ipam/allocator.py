"""The node's allocator: the one that lives in cnid, beside the blocks it owns.

    on_updates ──▶ pools, node, reservations, configuration
    assign, release ──▶ queue ──▶ plan (pure) ──▶ one transaction for all that wait ──▶ answers

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
from collections.abc import Callable, Iterable, Sequence

from cymric.datastore.api import Datastore
from cymric.datastore.syncer import Update
from cymric.model import keys
from cymric.model.keys import ResourceKey
from cymric.model.net import Address
from ipam.asking import Ask, Assignment, Release
from ipam.client import IPAM, Request


def nothing_is_routed(_: Address) -> bool:
    """For a caller that has no kernel to ask."""
    return False


class Allocator:
    """Assigns and releases addresses for one node.

    `clock` gives nanoseconds since 1970. `is_routed` tells whether the kernel already routes an
    address to a workload: such an address is passed over and reported, never handed out.
    """

    def __init__(
        self,
        store: Datastore,
        node: str,
        *,
        clock: Callable[[], int] = time.time_ns,
        is_routed: Callable[[Address], bool] = nothing_is_routed,
    ) -> None:
        self._node = node
        self._client = IPAM(store, clock=clock)
        self._is_routed = is_routed
        self._in_sync = asyncio.Event()

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the Syncer that feeds this must follow."""
        return (
            keys.resource_prefix("IPPool"),
            keys.resource_prefix("IPReservation"),
            str(ResourceKey("Node", self._node)),
            keys.IPAM_CONFIG,
        )

    def on_updates(self, updates: Sequence[Update]) -> None:
        """Note what changed. Keys that are of no interest here are passed over."""

    def on_in_sync(self) -> None:
        """All pools, reservations and settings are known: from now on calls are answered."""
        self._in_sync.set()

    async def run(self) -> None:
        """Answer calls and look after the node's blocks until cancelled."""
        await asyncio.Event().wait()

    async def assign(self, ask: Ask) -> tuple[Assignment, ...]:
        """All that was asked for, explicit addresses first, then IPv4, then IPv6; or nothing.

        Recorded when this returns. Raises NoAddress, AddressRefused (nothing was given), Contended
        and DatastoreError (try again; after OutcomeUnknown release the handle). A caller that is
        cancelled gets nothing: what had been written is released again.
        """
        await self._in_sync.wait()
        if ask.ipv6 or ask.ipv4 + len(ask.addresses) != 1:
            raise NotImplementedError("one IPv4 address a call so far")
        request = Request(
            host=self._node,
            handle=ask.handle,
            attributes=ask.attributes,
            pools=ask.ipv4_pools,
            use=ask.use,
            namespace_labels=ask.namespace_labels,
            max_blocks=ask.max_blocks,
        )
        if ask.addresses:
            return (await self._client.assign_address(ask.addresses[0], request),)
        return (await self._client.assign(request),)

    async def release_handle(self, handle: str) -> tuple[Address, ...]:
        """Free everything a handle holds, and tell what it was; an unknown handle holds nothing."""
        return await self._client.release_handle(handle)

    async def release(self, releases: Iterable[Release]) -> tuple[Address, ...]:
        """Free addresses; returns those that nobody held. Raises StaleRelease (nothing freed)."""
        return await self._client.release(releases)

    async def held_by(self, handle: str) -> tuple[Address, ...]:
        """The addresses a handle holds now, by what the datastore's blocks say."""
        return await self._client.held_by(handle)
