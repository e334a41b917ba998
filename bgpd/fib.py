"""Loc-RIB to kernel routes (the FIB): what we chose, and a blackhole under each block of ours.

Peers that are reached through a gateway of their own (BGPPeer's `reachableBy`) have a static route.

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
from itertools import chain

import structlog
from prometheus_client import Counter, Gauge

from bgpd.decision import Choice, Path
from bgpd.exports import ROUTE_PRIORITY
from bgpd.filters import MOST_PREFERENCE
from bgpd.next_hops import ON_LINK, Resolver
from cymric.kernel.api import NextHop, Route, RouteRefused, Routes, RoutesApplied, blackhole
from cymric.model.net import Address, Network, host_network
from cymric.model.prefix import PrefixSet
from cymric.runtime.pacing import Backoff, Kick

log = structlog.get_logger()

LISTEN_S = 0.5
"""The longest pause between two looks at a busy table; a quiet one is looked at when kicked."""
RESYNC_S = 30.0
"""How often the kernel's routes are read back although nobody changed anything that we know of."""

CODED_PREFERENCE = 1 << 30
"""LOCAL_PREFs from here on stand for a metric; those of peers that know nothing of it are small."""
NOTHING = PrefixSet.of(())

INSTALLED = Gauge("cymric_bgp_kernel_routes", "Routes of ours in the kernel.")
REFUSED = Gauge("cymric_bgp_kernel_routes_refused", "Routes that the kernel does not take.")
WRITES = Counter("cymric_bgp_kernel_writes", "Routes written or removed.", ["change"])


def own_routes(
    aggregates: Iterable[Network],
    gateways: Mapping[Address, Address],
    priorities: tuple[int, int] = (ROUTE_PRIORITY, ROUTE_PRIORITY),
    resolver: Resolver = ON_LINK,
) -> dict[Network, Route]:
    """What no received path overrides: blackholes under own blocks, and the ways to `gateways`'
    keys through the gateways, as far as these are reached.
    """
    routes = {prefix: blackhole(metric=priorities[prefix.version == 6]) for prefix in aggregates}
    for address, gateway in gateways.items():
        if hops := resolver.resolve(gateway).hops:
            routes[host_network(address)] = _through(hops, priorities[address.version == 6])
    return routes


def desired_routes(
    loc_rib: Mapping[Network, Choice],
    own: Mapping[Network, Route],
    kept_out: PrefixSet = NOTHING,
    priorities: tuple[int, int] = (ROUTE_PRIORITY, ROUTE_PRIORITY),
    resolver: Resolver = ON_LINK,
) -> dict[Network, Route]:
    """All kernel routes that bgpd wants. `own` ones are never overridden by a received path.

    `kept_out` are ranges that belong into no routing table, `priorities` the usual metrics of IPv4
    and IPv6.
    """
    routes: dict[Network, Route] = {}
    by_choice: dict[tuple[int, int], Route | None] = {}  # choices are shared by many prefixes
    for prefix, choice in loc_rib.items():
        if kept_out.networks and kept_out.covers(prefix):
            continue
        key = id(choice), prefix.version
        if key not in by_choice:
            by_choice[key] = kernel_route(choice, priorities[prefix.version == 6], resolver)
        route = by_choice[key]
        if route is not None:
            routes[prefix] = route
    routes.update(own)
    return routes


def kernel_route(choice: Choice, priority: int, resolver: Resolver = ON_LINK) -> Route | None:
    """Through the gateways of the choice; the same object for the same ones.

    The metric is what the LOCAL_PREF stands for between nodes: both add up to 2147483647. Paths of
    peers that do not use LOCAL_PREF so have the usual metric. None if nothing is reached any more:
    the underlay changed, and the decision is about to.
    """
    metric = _metric(choice.path, priority)
    if not choice.used:
        hops = resolver.resolve(choice.path.next_hop).hops
    else:
        found = (resolver.resolve(hop).hops for hop in choice.next_hops)
        hops = tuple(dict.fromkeys(chain.from_iterable(found)))
    return _through(hops, metric) if hops else None


def _metric(path: Path, priority: int) -> int:
    local_pref = path.local_pref
    return priority if local_pref < CODED_PREFERENCE else max(1, MOST_PREFERENCE - local_pref)


@lru_cache(maxsize=4096)
def _through(hops: tuple[NextHop, ...], metric: int) -> Route:
    """The same object for the same gateways, so that comparing tables is comparing identities."""
    return Route(next_hops=hops, metric=metric)


@dataclass(frozen=True, slots=True)
class Wanted:
    """One whole picture for the kernel, and whether what an earlier process left stays as well.

    `routes` may change later: it is read at once. `changes` is what differs from the picture
    before, with None for what is gone; None altogether: anything may.
    """

    routes: Mapping[Network, Route] = field(default_factory=dict)
    keep_inherited: bool = True
    changes: Mapping[Network, Route | None] | None = None


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
        self._is_certain = False
        self._is_in_doubt = False

    def doubt(self) -> None:
        """Routes may have vanished: a device went down. Read before the next word is believed."""
        self._is_in_doubt = True
        self.kick()

    async def run(self) -> None:
        """Apply whenever kicked, until cancelled."""
        backoff = Backoff(first_s=0.2, most_s=self._resync_s)
        loop = asyncio.get_running_loop()
        resync_at_s = loop.time() + self._resync_s
        while True:
            await self.kick.wait(max(0.0, resync_at_s - loop.time()))
            if loop.time() >= resync_at_s or self._is_in_doubt:
                self._is_in_doubt = False
                self._routes.invalidate()
                self._is_certain = False
                resync_at_s = loop.time() + self._resync_s
            wanted = self._wanted()
            if wanted is None:
                continue
            started_s = loop.time()
            try:
                await self._apply(wanted)
            except (OSError, TimeoutError) as error:
                self._routes.invalidate()
                self._is_certain = False
                resync_at_s = loop.time() + backoff.next_s()
                log.warning("kernel routes not written, will try again", error=repr(error))
                continue
            if self.refused:
                resync_at_s = min(resync_at_s, loop.time() + backoff.next_s())
            else:
                backoff.succeeded()
            self._on_applied()
            # Many routes at once cost less than few at a time: leave time to listen in between.
            await asyncio.sleep(min(LISTEN_S, 2 * (loop.time() - started_s)))

    async def _apply(self, wanted: Wanted) -> None:
        if self._inherited is None:
            self._inherited = dict(await self._routes.list())
            log.info("kernel routes of an earlier process read", count=len(self._inherited))
        is_whole = wanted.changes is None or not self._is_certain or bool(self.refused)
        if self._inherited and not wanted.keep_inherited:
            self._inherited.clear()
            is_whole = True
        # Until all is written, only a look at everything can tell what is not.
        self._is_certain = False
        if is_whole or wanted.changes is None:
            for prefix in wanted.routes.keys() & self._inherited.keys():
                del self._inherited[prefix]
            routes = {**self._inherited, **wanted.routes}
            size = len(routes)
            applied = await self._routes.apply(routes)
        else:
            for prefix in self._inherited.keys() & wanted.changes.keys():
                del self._inherited[prefix]
            size = len(wanted.routes) + len(self._inherited)
            applied = await self._routes.change(wanted.changes)
        self._is_certain = True
        self._note(applied, size)

    def _note(self, applied: RoutesApplied, size: int) -> None:
        self._tell(applied.refused)
        self.installed = size - len(applied.refused)
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
