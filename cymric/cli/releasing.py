"""Freeing many addresses that were seen to be unused, each only if it still is what was seen.

An address is named with its handle and the sequence number of its allocation; IPAM frees a block's
batch only if all of it is unchanged. So a batch that meets a change is done again one by one, and
what changed hands is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cymric.datastore.api import Datastore
from cymric.model.net import Address, Network
from ipam.audit import Allocation


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the addresses: freed now, free already, held by somebody new."""

    released: tuple[Address, ...]
    unheld: tuple[Address, ...]
    changed: tuple[Address, ...]


async def release_seen(store: Datastore, allocations: Iterable[Allocation]) -> Outcome:
    """Free these allocations as they were seen."""
    from ipam.client import IPAM, Release
    from ipam.errors import StaleRelease

    addresses = IPAM(store)
    released: list[Address] = []
    unheld: list[Address] = []
    changed: list[Address] = []

    async def free(batch: Sequence[Allocation]) -> None:
        gone = await addresses.release(
            [Release(a.address, a.handle, a.sequence_number) for a in batch]
        )
        unheld.extend(gone)
        released.extend(a.address for a in batch if a.address not in gone)

    for batch in _by_block(allocations).values():
        try:
            await free(batch)
        except StaleRelease:
            for allocation in batch:
                try:
                    await free([allocation])
                except StaleRelease:
                    changed.append(allocation.address)
    return Outcome(tuple(released), tuple(unheld), tuple(changed))


def _by_block(allocations: Iterable[Allocation]) -> Mapping[Network, list[Allocation]]:
    found: dict[Network, list[Allocation]] = {}
    for allocation in allocations:
        found.setdefault(allocation.block, []).append(allocation)
    return found
