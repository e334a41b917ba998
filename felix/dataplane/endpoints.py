"""The endpoint manager: switches, neighbour entries, routes and status of local endpoints.

An endpoint is complete when its link carries, its interface is configured, all of its routes are in
the kernel and its policy was written (the caller says that by calling `report`). Interfaces are
configured when they come up, since going down makes the kernel forget neighbours and routes.

Routes: /32, straight out of the interface, on every interface with a workload prefix; those are all
ours. One that nobody wants is removed, but only when its interface has been known for `GRACE_S`: a
plugin may have put it there before its endpoint reached us.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

import structlog

from cymric.kernel.api import Route, Routes, on_link
from cymric.kernel.links import Link, Links
from cymric.model.net import Network
from felix import metrics
from felix.calc.config import FelixConfig
from felix.calc.values import Desired, Endpoint
from felix.dataplane.interfaces import Interfaces
from felix.dataplane.status import StatusFiles
from felix.dataplane.sysctls import Sysctls

GRACE_S = 10.0

_LINK_ERRORS = frozenset({errno.ENODEV, errno.ENETDOWN, errno.ENXIO})
"""The link went: its next event wakes us, no retry is needed."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Configured:
    """What an interface was configured for."""

    index: int
    endpoint: Endpoint


class RouteOwnership:
    """Which routes of our protocol number are ours to remove: see the chapter."""

    def __init__(self, interfaces: Interfaces, config: FelixConfig) -> None:
        self._interfaces = interfaces
        self._config = config
        self.wanted: dict[Network, Route] = {}

    def __call__(self, prefix: Network, route: Route) -> bool:
        """Whether the route may be replaced and removed."""
        devices = [hop.device or "" for hop in route.next_hops]
        if not devices or not all(map(self._config.is_workload_interface, devices)):
            return False
        if prefix in self.wanted:
            return True
        return all(self._interfaces.age_s(device) >= GRACE_S for device in devices)


class EndpointManager:
    """See the chapter."""

    def __init__(
        self,
        *,
        config: FelixConfig,
        links: Links,
        interfaces: Interfaces,
        routes: Routes,
        ownership: RouteOwnership,
        sysctls: Sysctls,
        status: StatusFiles,
    ) -> None:
        self._config = config
        self._links = links
        self._interfaces = interfaces
        self._routes = routes
        self._ownership = ownership
        self._sysctls = sysctls
        self._status = status
        self._endpoints: dict[str, Endpoint] = {}
        self._configured: dict[str, _Configured] = {}
        self._configured_before: dict[str, _Configured] = {}
        self._refused: frozenset[Network] = frozenset()

    def want(self, desired: Desired) -> None:
        """State the endpoints; those that went or changed are no longer complete at once."""
        self._endpoints = {one.interface: one for one in desired.endpoints}
        self._status.keep_only({one.id: one for one in desired.endpoints})
        metrics.LOCAL_ENDPOINTS.set(len(self._endpoints))

    def on_link(self, name: str, before: Link | None, link: Link | None) -> bool:
        """Note a changed interface; whether that concerns us."""
        if not self._config.is_workload_interface(name):
            return False
        if before is not None and (link is None or not link.is_up or link.index != before.index):
            # The kernel removed its routes and neighbours without a word.
            self._configured.pop(name, None)
            self._routes.invalidate()
        return True

    async def apply(self) -> bool:
        """Configure interfaces and write routes; False if something must be tried again soon."""
        is_done = await self._configure()
        wanted = self._wanted_routes()
        self._ownership.wanted = wanted
        applied = await self._routes.apply(wanted)
        self._refused = frozenset(applied.refused)
        for prefix, refusal in applied.refused.items():
            if refusal.errno in _LINK_ERRORS:
                continue
            is_done = False
            log.warning("route refused", prefix=str(prefix), reason=refusal.reason)
        metrics.ROUTES.labels("254").set(len(wanted) - len(applied.refused))
        return is_done

    def report(self) -> None:
        """Write and remove status files; call when policy is in the kernel."""
        for name, endpoint in self._endpoints.items():
            if self._is_complete(name, endpoint):
                if self._status.set_up(endpoint):
                    log.info("endpoint is up", endpoint=str(endpoint.id), interface=name)
            elif self._status.set_down(endpoint.id):
                log.info("endpoint is down", endpoint=str(endpoint.id), interface=name)

    def check_soon(self) -> None:
        """Read routes and configure all interfaces anew at the next `apply`."""
        self._routes.invalidate()
        self._configured.clear()

    def interface_by_address(self) -> dict[IPv4Address, str]:
        """Each address of our endpoints with the interface it is behind, up or not."""
        found: dict[IPv4Address, str] = {}
        for name in sorted(self._endpoints):
            for address in self._endpoints[name].addresses:
                found.setdefault(address, name)
        return found

    def _is_complete(self, name: str, endpoint: Endpoint) -> bool:
        link = self._interfaces.get(name)
        return (
            link is not None
            and link.is_running
            and self._configured.get(name) == _Configured(link.index, endpoint)
            and not any(IPv4Network(address) in self._refused for address in endpoint.addresses)
        )

    def _wanted_routes(self) -> dict[Network, Route]:
        """Of two interfaces with one address the first by name has it."""
        wanted: dict[Network, Route] = {}
        for name in sorted(self._endpoints):
            link = self._interfaces.get(name)
            if link is None or not link.is_up:
                continue
            route = on_link(name, metric=self._config.normal_route_priority)
            for address in self._endpoints[name].addresses:
                wanted.setdefault(IPv4Network(address), route)
        return wanted

    async def _configure(self) -> bool:
        is_done = True
        for name in self._configured_before.keys() - self._endpoints.keys():
            self._configured.pop(name, None)
            del self._configured_before[name]
        for name, endpoint in self._endpoints.items():
            link = self._interfaces.get(name)
            if link is None or not link.is_up:
                continue
            if self._configured.get(name) == _Configured(link.index, endpoint):
                continue
            try:
                self._sysctls.configure_workload(name)
                await self._set_neighbours(link, endpoint)
            except OSError as error:
                if error.errno not in (*_LINK_ERRORS, errno.ENOENT):
                    is_done = False
                    log.warning("interface not configured", interface=name, error=str(error))
                continue
            self._configured[name] = _Configured(link.index, endpoint)
            self._configured_before[name] = self._configured[name]
        return is_done

    async def _set_neighbours(self, link: Link, endpoint: Endpoint) -> None:
        """Raises KernelError (an OSError).

        Entries are written without reading first: the kernel lists all neighbours of a node or
        none, and there are as many as pods.
        """
        before = self._configured_before.get(endpoint.interface)
        if before is not None and before.index == link.index:
            for address in before.endpoint.addresses:
                if address not in endpoint.addresses:
                    await self._links.remove_neighbour(link.index, address)
        if endpoint.mac:
            for address in endpoint.addresses:
                await self._links.set_neighbour(link.index, address, endpoint.mac)
