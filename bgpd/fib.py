"""Loc-RIB to kernel routes (the FIB): what we chose, and a blackhole under each block of ours.

    Rib ▶ desired_routes ▶ Fib ▶ cymric.kernel.routes ▶ kernel

The blackhole drops traffic to addresses of our blocks that nobody holds, which would otherwise go
out by the default route and come back; felix' /32 of a live workload is more specific and wins.

Invariants
- Ours is protocol 179. Until the start is over (`keep_inherited`), a route that an earlier process
  left stays as long as this one never had an opinion about its prefix: the peer may not have
  spoken yet.
- What the kernel refuses is retried, first soon, then slowly; everything is read back and repaired
  from time to time, because others can delete routes and a device that goes takes its routes along.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import structlog
from prometheus_client import Counter, Gauge

from bgpd.decision import Choice
from bgpd.exports import ROUTE_PRIORITY
from cymric.kernel.api import Route, RouteRefused, Routes, blackhole, via
from cymric.model.net import Address, Network
from cymric.runtime.pacing import Backoff, Kick

log = structlog.get_logger()

LISTEN_S = 0.5
"""The longest pause between two looks at a busy table; a quiet one is looked at when kicked."""
RESYNC_S = 30.0
"""How often the kernel's routes are read back although nobody changed anything that we know of."""

INSTALLED = Gauge("cymric_bgp_kernel_routes", "Routes of ours in the kernel.")
REFUSED = Gauge("cymric_bgp_kernel_routes_refused", "Routes that the kernel does not take.")
WRITES = Counter("cymric_bgp_kernel_writes", "Routes written or removed.", ["change"])


def desired_routes(
    loc_rib: Mapping[Network, Choice], aggregates: Iterable[Network]
) -> dict[Network, Route]:
    """All kernel routes that bgpd wants. An own block is never overridden by a received path."""
    routes: dict[Network, Route] = {}
    last: Address | None = None
    for prefix, choice in loc_rib.items():
        gateway = choice.path.next_hop
        if gateway is not last:  # mostly it is, and looking up an address is slow
            last, route = gateway, _through(gateway)
        routes[prefix] = route
    return routes | dict.fromkeys(aggregates, blackhole(metric=ROUTE_PRIORITY))


@lru_cache(maxsize=4096)
def _through(gateway: Address) -> Route:
    """The same object for the same gateway, so that comparing tables is comparing identities."""
    return via(gateway, metric=ROUTE_PRIORITY)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One whole picture for the kernel, and whether what an earlier process left stays as well."""

    routes: Mapping[Network, Route] = field(default_factory=dict)
    keep_inherited: bool = True


class Fib:
    """Keeps the kernel at what `wanted` says whenever somebody kicks, and repairs it in between.

    `wanted` returns None as long as nothing may be written at all.
    """

    def __init__(
        self,
        routes: Routes,
        wanted: Callable[[], Wanted | None],
        *,
        on_applied: Callable[[], None] = lambda: None,
        resync_s: float = RESYNC_S,
    ) -> None:
        self.kick = Kick()
        self.refused: Mapping[Network, RouteRefused] = {}
        self.installed = 0
        self._routes = routes
        self._wanted = wanted
        self._on_applied = on_applied
        self._resync_s = resync_s
        self._inherited: dict[Network, Route] | None = None

    async def run(self) -> None:
        """Apply whenever kicked, until cancelled."""
        backoff = Backoff(first_s=0.2, most_s=self._resync_s)
        pause_s = self._resync_s
        loop = asyncio.get_running_loop()
        while True:
            if not await self.kick.wait(pause_s):
                self._routes.invalidate()
            wanted = self._wanted()
            if wanted is None:
                continue
            started_s = loop.time()
            try:
                await self._apply(wanted)
            except (OSError, TimeoutError) as error:
                self._routes.invalidate()
                pause_s = backoff.next_s()
                log.warning("kernel routes not written, will try again", error=repr(error))
                continue
            if self.refused:
                pause_s = backoff.next_s()
            else:
                backoff.succeeded()
                pause_s = self._resync_s
            self._on_applied()
            # Comparing whole tables costs: while a peer sends its own, leave time to listen.
            await asyncio.sleep(min(LISTEN_S, 2 * (loop.time() - started_s)))

    async def _apply(self, wanted: Wanted) -> None:
        if self._inherited is None:
            self._inherited = dict(await self._routes.list())
            log.info("kernel routes of an earlier process read", count=len(self._inherited))
        if not wanted.keep_inherited:
            self._inherited.clear()
        for prefix in wanted.routes.keys() & self._inherited.keys():
            del self._inherited[prefix]
        routes = {**self._inherited, **wanted.routes}
        applied = await self._routes.apply(routes)
        self._tell(applied.refused)
        self.installed = len(routes) - len(applied.refused)
        self.refused = applied.refused
        INSTALLED.set(self.installed)
        REFUSED.set(len(applied.refused))
        for change in ("added", "replaced", "deleted"):
            WRITES.labels(change).inc(getattr(applied, change))
        if applied.changed:
            log.info(
                "kernel routes changed",
                added=applied.added,
                replaced=applied.replaced,
                deleted=applied.deleted,
                refused=len(applied.refused),
            )

    def _tell(self, refused: Mapping[Network, RouteRefused]) -> None:
        """Warn once for each route that is newly refused, the first few by name."""
        new = [prefix for prefix in refused if prefix not in self.refused]
        for prefix in new[:5]:
            log.warning("route refused", prefix=str(prefix), reason=refused[prefix].reason)
        if len(new) > 5:
            log.warning("more routes refused", count=len(new) - 5)
