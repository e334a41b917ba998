"""Addresses that nobody on this node has any more: looked for every minute, released after long.

    journal, lent addresses ─▶ handles in use  ┐
    endpoints in the datastore ─▶ addresses    ├─▶ ipam.collect ─▶ leaks: a metric, the log
    kernel's routes, pods' namespaces ─▶ also  ┘        └─▶ released after the grace period

Kernel and namespaces are only asked about addresses that the datastore does not know, so on a sound
node a sweep costs one listing. Addresses given to other main plugins have no endpoint; they are
noted on the node's disk (`lent`) from their ADD to their DEL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from prometheus_client import Counter, Gauge

from cni.journal import Journal
from cni.stored import Endpoints
from cymric.kernel import namespace
from cymric.kernel.netlink import Netlink
from cymric.model.net import Address
from ipam.collect import Collector, Held, Leak, Releasing, release_due

EVERY_S = 60.0
NAMESPACE_DIRECTORIES = (Path("/run/netns"), Path("/run/docker/netns"))

LEAKED = Gauge("cymric_cni_leaked_addresses", "Addresses of this node that no workload has")
RELEASED = Counter("cymric_cni_leaked_addresses_released", "Leaked addresses that were released")

log = structlog.get_logger()


@dataclass(slots=True)
class Sweeper:
    """Looks for leaks of one node. `clock` gives nanoseconds since 1970."""

    endpoints: Endpoints
    journal: Journal
    lent: Journal
    collector: Collector
    ipam: Releasing
    is_routed: Callable[[Address], bool]
    directories: tuple[Path, ...] = NAMESPACE_DIRECTORIES
    clock: Callable[[], int] = time.time_ns
    _reported: set[Held] = field(default_factory=set)

    async def sweep(self) -> tuple[Leak, ...]:
        """Look once, release what is due; the leaks that remain. Raises DatastoreError."""
        # Handles before endpoints: an ADD that ends in between is in one of the two.
        handles = {entry.handle for book in (self.journal, self.lent) for entry in book.entries()}
        stored = await self.endpoints.refresh()
        known = {address for one in stored for address in one.value.spec.addresses}
        now = self.clock()
        leaks = self.collector.leaks(addresses=known, handles=handles, now_ns=now)
        if leaks:
            known |= {leak.held.address for leak in leaks if self.is_routed(leak.held.address)}
            known |= await addresses_in_namespaces(self.directories)
            leaks = self.collector.leaks(addresses=known, handles=handles, now_ns=now)
        self._report(leaks, now)
        released = set(await release_due(self.ipam, self.collector, leaks, now_ns=now))
        RELEASED.inc(len(released))
        remaining = tuple(leak for leak in leaks if leak.held not in released)
        LEAKED.set(len(remaining))
        return remaining

    def _report(self, leaks: tuple[Leak, ...], now: int) -> None:
        """Name each leak once, and only one that a second look confirms."""
        for leak in leaks:
            if leak.since_ns < now and leak.held not in self._reported:
                held = leak.held
                log.warning("nobody has an address", address=str(held.address), handle=held.handle)
                self._reported.add(held)
        self._reported &= {leak.held for leak in leaks}


async def addresses_in_namespaces(directories: tuple[Path, ...]) -> set[Address]:
    """All addresses of all links in the namespaces that have a name on this machine."""
    found: set[Address] = set()
    for path in _files(directories):
        try:
            with namespace.opened(path) as there:
                links = Netlink(there)
        except OSError as error:
            log.debug("namespace passed over", path=str(path), why=str(error))
            continue
        try:
            for link in await links.all():
                found |= {interface.ip for interface in await links.addresses(link.index)}
        finally:
            links.close()
    return found


def _files(directories: tuple[Path, ...]) -> Iterator[Path]:
    for directory in directories:
        if directory.is_dir():
            yield from sorted(directory.iterdir())
