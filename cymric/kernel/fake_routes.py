"""A routing table in memory that refuses what Linux refuses; see `tests/contract/test_routes.py`.

Several `FakeRoutes` of different protocols may share one `FakeRoutingTable`, as bgpd, felix and the
administrator share the kernel's main table.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from cymric.kernel.api import NextHop, Owns, Route, RouteKind, RouteRefused, RoutesApplied
from cymric.model.net import Address, Network


@dataclass(slots=True)
class FakeRoutingTable:
    """The kernel's side: devices with their on-link networks, and routes with their protocol."""

    networks_by_device: dict[str, tuple[Network, ...]] = field(default_factory=dict)
    entries: dict[tuple[Network, int], tuple[int, Route]] = field(default_factory=dict)
    writes: int = 0

    def remove_device(self, name: str) -> None:
        """A device goes, and its routes with it."""
        self.networks_by_device.pop(name, None)
        for key, (_, route) in tuple(self.entries.items()):
            if any(hop.device == name for hop in route.next_hops):
                del self.entries[key]

    def resolve(self, route: Route) -> Route | RouteRefused:
        """The route as the kernel would keep it, or why it does not."""
        hops = []
        for hop in route.next_hops:
            if hop.device is not None and hop.device not in self.networks_by_device:
                return RouteRefused(errno.ENODEV, f"there is no device {hop.device}")
            device = hop.device if hop.gateway is None else self._device_of(hop.gateway)
            if device is None:
                return RouteRefused(errno.ENETUNREACH, "Nexthop has invalid gateway")
            hops.append(NextHop(gateway=hop.gateway, device=device, weight=hop.weight))
        if route.kind is RouteKind.BLACKHOLE:
            return route
        return replace(route, next_hops=tuple(hops))

    def _device_of(self, gateway: Address) -> str | None:
        for device, networks in self.networks_by_device.items():
            if any(gateway in network for network in networks):
                return device
        return None


class FakeRoutes:
    """The `Routes` port over a `FakeRoutingTable`."""

    def __init__(
        self, table: FakeRoutingTable, *, protocol: int = 179, owns: Owns | None = None
    ) -> None:
        self.table = table
        self._protocol = protocol
        self._owns = owns
        self._actual: dict[tuple[Network, int], Route] | None = None

    def invalidate(self) -> None:
        """Forget what was read: the next `apply` reads the table first."""
        self._actual = None

    async def list(self) -> Mapping[Network, Route]:
        """Our routes as the table has them now."""
        self._actual = self._read()
        by_metric = sorted(self._actual.items(), key=lambda item: -item[0][1])
        return {prefix: route for (prefix, _), route in by_metric}

    async def change(self, changes: Mapping[Network, Route | None]) -> RoutesApplied:
        """Make our routes to these prefixes so, and leave all others as they are."""
        desired = {prefix: route for prefix, route in changes.items() if route is not None}
        return self._apply(desired, changes.keys())

    async def apply(self, desired: Mapping[Network, Route]) -> RoutesApplied:
        """Make our routes exactly `desired`."""
        return self._apply(desired, None)

    def _apply(
        self, desired: Mapping[Network, Route], only: Collection[Network] | None
    ) -> RoutesApplied:
        actual = self._read() if self._actual is None else self._actual
        wanted = {(prefix, route.metric): route for prefix, route in desired.items()}
        refused: dict[Network, RouteRefused] = {}
        added = replaced = deleted = 0
        for key, route in wanted.items():
            if key in actual and route.is_met_by(actual[key]):
                continue
            resolved = self.table.resolve(route)
            if key not in actual and key in self.table.entries:
                resolved = RouteRefused(errno.EEXIST, "File exists")
            if isinstance(resolved, RouteRefused):
                refused[key[0]] = resolved
                continue
            added, replaced = added + (key not in actual), replaced + (key in actual)
            self.table.entries[key] = (self._protocol, resolved)
            self.table.writes += 1
            actual[key] = resolved
        for key in tuple(actual):
            is_meant = only is None or key[0] in only
            if is_meant and key not in wanted and key[0] not in refused:
                if self.table.entries.get(key, (0,))[0] == self._protocol:
                    del self.table.entries[key]
                    self.table.writes += 1
                del actual[key]
                deleted += 1
        is_surprised = any(one.errno == errno.EEXIST for one in refused.values())
        self._actual = None if is_surprised else actual
        return RoutesApplied(added=added, replaced=replaced, deleted=deleted, refused=refused)

    def _read(self) -> dict[tuple[Network, int], Route]:
        return {
            key: route
            for key, (protocol, route) in self.table.entries.items()
            if protocol == self._protocol and (self._owns is None or self._owns(key[0], route))
        }
