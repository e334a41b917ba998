"""IPAM for those who come and go: the command line, a test, a tool.

Nothing is remembered between calls: each reads what it needs and lands as the node's allocator
would. cnid itself uses `ipam.allocator`, which remembers its blocks and lands many calls at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cymric.datastore.api import Datastore, Operation
from cymric.model.ipam import DEFAULT_IPAM_CONFIG, IPAMConfig
from cymric.model.keys import IPAMConfigKey
from cymric.model.net import Address
from ipam import facts as facts_of
from ipam.asking import USE_WORKLOAD, Ask, Assignment, Release
from ipam.commit import land_one
from ipam.facts import Facts
from ipam.freeing import free_addresses, free_handle, held
from ipam.moments import Clock
from ipam.search import grant
from ipam.storage import View, land, put

__all__ = ["IPAM", "Assignment", "Release", "Request"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Who asks for one IPv4 address, and from where it may come; see `Ask` for the fields."""

    host: str
    handle: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    pools: tuple[str, ...] = ()
    use: str = USE_WORKLOAD
    namespace_labels: Mapping[str, str] | None = None
    max_blocks: int = 0

    def ask(self, *addresses: Address) -> Ask:
        """The same as an `Ask`, for one address or for the very ones given."""
        return Ask(
            handle=self.handle,
            attributes=self.attributes,
            ipv4=0 if addresses else 1,
            ipv4_pools=self.pools,
            addresses=addresses,
            namespace_labels=self.namespace_labels,
            use=self.use,
            max_blocks=self.max_blocks,
        )


class IPAM:
    """Assigns and releases addresses. `clock` gives nanoseconds since 1970."""

    def __init__(self, store: Datastore, *, clock: Clock = time.time_ns) -> None:
        self._store = store
        self._clock = clock

    async def assign(self, request: Request) -> Assignment:
        """One IPv4 address. Raises NoAddress, Contended."""
        return (await self.grant(request.host, request.ask()))[0]

    async def assign_address(self, address: Address, request: Request) -> Assignment:
        """The very address asked for. Raises AddressRefused, Contended."""
        return (await self.grant(request.host, request.ask(address)))[0]

    async def grant(self, host: str, ask: Ask) -> tuple[Assignment, ...]:
        """All that `ask` wants for a container on `host`, or nothing. Raises NoAddress, …"""
        await self.config()
        return await land_one(
            self._store,
            lambda drafts: grant(ask, drafts),
            facts=await facts_of.read(self._store, host),
            clock=self._clock,
        )

    async def release_handle(self, handle: str) -> tuple[Address, ...]:
        """Free everything a handle holds, and tell what it was; an unknown handle holds nothing."""
        return await land_one(
            self._store,
            lambda drafts: free_handle(handle, drafts),
            facts=Facts(node=""),
            clock=self._clock,
        )

    async def release(self, releases: Iterable[Release]) -> tuple[Address, ...]:
        """Free addresses; returns those that nobody held.

        Raises StaleRelease when a handle or sequence number is not what the caller says: then
        nothing of the block that was being freed is. Many are freed a hundred at a time.
        """
        wishes = sorted(releases, key=lambda wish: (wish.address.version, int(wish.address)))
        known = await facts_of.read(self._store, "")
        unheld: list[Address] = []
        for start in range(0, len(wishes), RELEASED_AT_ONCE):
            some = wishes[start : start + RELEASED_AT_ONCE]
            unheld += await self._release(some, known)
        return tuple(unheld)

    async def _release(self, wishes: Sequence[Release], known: Facts) -> tuple[Address, ...]:
        return await land_one(
            self._store,
            lambda drafts: free_addresses(wishes, drafts),
            facts=known,
            clock=self._clock,
        )

    async def held_by(self, handle: str) -> tuple[Address, ...]:
        """The addresses a handle holds, by what the blocks say."""
        return await land_one(
            self._store,
            lambda drafts: held(handle, drafts),
            facts=Facts(node=""),
            clock=self._clock,
        )

    async def config(self) -> IPAMConfig:
        """The cluster's settings; as Calico does, a missing key is created with the default."""
        key = IPAMConfigKey()

        def change(view: View) -> tuple[IPAMConfig, Sequence[Operation]]:
            found = view.get(key, IPAMConfig)
            if found is not None:
                return found, []
            return DEFAULT_IPAM_CONFIG, [put(key, DEFAULT_IPAM_CONFIG)]

        return await land(self._store, (key,), change)


RELEASED_AT_ONCE = 50
"""Addresses in one transaction: each may bring a block and a handle of its own."""
