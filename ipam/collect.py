"""Addresses of this node that no workload has any more: found, reported, released after a grace.

    allocator ── blocks that name this node ──▶ Collector ──▶ leaks: reported at once
    cnid ── what kernel, namespaces, endpoints know ──▶ │ ──▶ due: after the grace period, released

A container may be gone without its DEL: a runtime that crashed, a disk that was restored. On a node
without Kubernetes nobody else would ever free its address. An allocation is this node's if its
`node` attribute says so; tunnel addresses and Windows' reservations (`type`, or no node) are never
touched. It leaks if neither its address nor its handle is known to those who would know. The mark
goes when it becomes known again, or was released and assigned anew; what is released is guarded by
handle and sequence number, so an address that changed hands meanwhile is left alone. As Calico
does, a handle is released only when all its addresses on this node leak.

The Collector is pure, and looks again only at blocks that changed and allocations already in doubt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

import structlog

from cymric.model.ipam import WINDOWS_RESERVED_HANDLE, AllocationBlock
from cymric.model.net import Address, Network
from ipam.asking import Release
from ipam.errors import StaleRelease
from ipam.moments import SECOND_NS

GRACE_S = 900.0
"""How long an address must be unknown to everybody before it is released (Calico's default)."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Held:
    """One address that this node was given; equal only while nobody released it."""

    address: Address
    handle: str
    sequence_number: int | None


@dataclass(frozen=True, slots=True)
class Leak:
    """An address that nobody knows, and since when (nanoseconds)."""

    held: Held
    since_ns: int


class Collector:
    """See the chapter."""

    def __init__(self, node: str, *, grace_s: float = GRACE_S) -> None:
        self._node = node
        self._grace_ns = int(grace_s * SECOND_NS)
        self._dirty: dict[Network, AllocationBlock | None] = {}
        self._held_by_block: dict[Network, frozenset[Held]] = {}
        self._held_by_handle: dict[str, set[Held]] = {}
        self._since: dict[Held, int] = {}

    def on_block(self, network: Network, block: AllocationBlock | None) -> None:
        """A block that names, or named, this node; None: it is gone."""
        self._dirty[network] = block

    def leaks(
        self, *, addresses: Collection[Address], handles: Collection[str], now_ns: int
    ) -> tuple[Leak, ...]:
        """What nobody knows: neither its address nor its handle is among those given."""
        self._work_off()
        for held in self._held():
            if held.address in addresses or held.handle in handles:
                self._since.pop(held, None)
            else:
                self._since.setdefault(held, now_ns)
        return tuple(Leak(held, since) for held, since in sorted(self._since.items(), key=_order))

    def due(self, leaks: Iterable[Leak], *, now_ns: int) -> tuple[tuple[Leak, ...], ...]:
        """The leaks to be released, by handle: all of it leaks, and has for the grace period."""
        by_handle: dict[str, list[Leak]] = {}
        for leak in leaks:
            if now_ns - leak.since_ns >= self._grace_ns:
                by_handle.setdefault(leak.held.handle, []).append(leak)
        return tuple(
            tuple(found)
            for handle, found in by_handle.items()
            if len(found) == len(self._held_by_handle.get(handle, ()))
        )

    def _held(self) -> Iterable[Held]:
        return (held for found in self._held_by_block.values() for held in found)

    def _work_off(self) -> None:
        for network, block in self._dirty.items():
            before = self._held_by_block.pop(network, frozenset())
            now = frozenset[Held]() if block is None else held_by_node(block, self._node)
            if now:
                self._held_by_block[network] = now
            for held in before - now:
                self._since.pop(held, None)
                self._held_by_handle[held.handle].discard(held)
                if not self._held_by_handle[held.handle]:
                    del self._held_by_handle[held.handle]
            for held in now - before:
                self._held_by_handle.setdefault(held.handle, set()).add(held)
        self._dirty.clear()


def held_by_node(block: AllocationBlock, node: str) -> frozenset[Held]:
    """The workload addresses of a block that were given on a node."""
    sequences = block.sequence_number_for_allocation or {}
    return frozenset(
        Held(block.address(ordinal), holder.handle, sequences.get(str(ordinal)))
        for ordinal, holder in block.held()
        if holder.handle not in (None, WINDOWS_RESERVED_HANDLE)
        and holder.attributes.get("node") == node
        and "type" not in holder.attributes
        and holder.handle is not None
    )


class Releasing(Protocol):
    """As much of the allocator as is needed here."""

    async def release(self, releases: Iterable[Release]) -> tuple[Address, ...]:
        """Free addresses."""
        ...


async def release_due(
    allocator: Releasing, collector: Collector, leaks: Iterable[Leak], *, now_ns: int
) -> tuple[Held, ...]:
    """Release what is due; returns what was. Raises what the datastore raises."""
    released: list[Held] = []
    for found in collector.due(leaks, now_ns=now_ns):
        wishes = [
            Release(leak.held.address, leak.held.handle, leak.held.sequence_number)
            for leak in found
        ]
        try:
            unheld = await allocator.release(wishes)
        except StaleRelease as error:
            log.info("an address in doubt has changed hands", why=str(error))
            continue
        freed = [leak.held for leak in found if leak.held.address not in unheld]
        for held in freed:
            log.warning("leaked address released", address=str(held.address), handle=held.handle)
        released += freed
    return tuple(released)


def _order(item: tuple[Held, int]) -> tuple[int, int]:
    address = item[0].address
    return address.version, int(address)
