"""The endpoint manager: switches, neighbour entries, routes and status of local endpoints.

An endpoint is complete when its link carries, its interface is configured, all of its routes are in
the kernel and its policy was written (the caller says that by calling `report`). Interfaces are
configured when they come up, since going down makes the kernel forget neighbours and routes. Only
what changed since the last round is looked at; `check_soon` looks at everything.

Routes: /32 or /128, straight out of the interface, on every interface with a workload prefix; those
are all ours. One that nobody wants is removed, but only when its interface has been known for
`GRACE_S`: a plugin may have put it there before its endpoint reached us.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from cymric.kernel.api import Route, Routes, on_link
from cymric.kernel.links import Link, Links
from cymric.model.net import Address, Network, parse_address
from cymric.model.prefix import prefix_at
from felix import metrics
from felix.calc.config import FelixConfig
from felix.calc.values import Desired, Endpoint
from felix.dataplane.claims import Claims
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

    def holds(self, link: Link, endpoint: Endpoint) -> bool:
        """Whether nothing is left to do."""
        return self.index == link.index and (self.endpoint is endpoint or self.endpoint == endpoint)


class RouteOwnership:
    """Which routes of our protocol number are ours to remove: see the chapter."""

    def __init__(self, interfaces: Interfaces, config: FelixConfig) -> None:
        self._interfaces = interfaces
        self._config = config
        self.wanted: Mapping[Network, Route] = {}

    def __call__(self, prefix: Network, route: Route) -> bool:
        """Whether the route may be replaced and removed."""
        devices = [hop.device or "" for hop in route.next_hops]
        if not devices or not all(map(self._config.is_workload_interface, devices)):
            return False
        if prefix in self.wanted:
            return True
        # Multicast and link-local routes are the kernel's and those of others.
        if prefix.prefixlen != prefix.max_prefixlen:
            return False
        return all(self._interfaces.age_s(device) >= GRACE_S for device in devices)


class EndpointManager:
    """See the chapter. `on_up` is told of every endpoint that becomes complete."""

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
        on_up: Callable[[Endpoint], None] = lambda _: None,
    ) -> None:
        self._config = config
        self._links = links
        self._interfaces = interfaces
        self._routes = routes
        self._ownership = ownership
        self._sysctls = sysctls
        self._status = status
        self._on_up = on_up
        self._endpoints: dict[str, Endpoint] | None = None
        self._configured: dict[str, _Configured] = {}
        self._configured_before: dict[str, _Configured] = {}
        self._to_configure: set[str] = set()
        self._to_check: set[str] = set()
        self._to_report: set[str] = set()
        self._addresses = Claims[Address]()
        self._prefixes = Claims[Network]()
        self._wanted: dict[Network, Route] = {}
        self._ownership.wanted = self._wanted
        self._refused: frozenset[Network] = frozenset()
        self._is_applied = False

    def want(self, desired: Desired) -> None:
        """State the endpoints; those that went or changed are no longer complete at once."""
        before, endpoints = self._endpoints, {one.interface: one for one in desired.endpoints}
        if before is None:
            self._status.keep_only({one.id: one for one in desired.endpoints})
            before = {}
        self._endpoints = endpoints
        changed = [name for name, one in endpoints.items() if before.get(name) is not one]
        gone = [name for name in before if name not in endpoints]
        for name in (*gone, *changed):
            if old := before.get(name):
                self._status.forget(old, endpoints.get(name))
        for name in gone:
            self._addresses.set(name, ())
        for name in changed:
            self._addresses.set(name, endpoints[name].routed)
        self._look_at((*gone, *changed))
        metrics.LOCAL_ENDPOINTS.set(len(endpoints))

    def on_link(self, name: str, before: Link | None, link: Link | None) -> bool:
        """Note a changed interface; whether that concerns us."""
        if not self._config.is_workload_interface(name):
            return False
        is_same = before is not None and link is not None and before.index == link.index
        if before is not None and before.is_up and not (is_same and link and link.is_up):
            # The kernel removed its routes and neighbours without a word.
            self._configured.pop(name, None)
            self._routes.invalidate()
        self._look_at((name,))
        return True

    def take_moved(self) -> dict[Address, tuple[str | None, str | None]]:
        """Addresses that came, went or changed their interface since this was asked last."""
        return self._addresses.take_changes()

    async def apply(self) -> bool:
        """Configure interfaces and write routes; False if something must be tried again soon."""
        self._is_applied = False
        is_done = await self._configure()
        applied = await self._routes.apply(self._wanted)
        before, self._refused = self._refused, frozenset(applied.refused)
        for prefix in before | self._refused:
            if owner := self._prefixes.owner_by_value.get(prefix):
                self._to_report.add(owner)
        for prefix, refusal in applied.refused.items():
            if refusal.errno in _LINK_ERRORS:
                continue
            is_done = False
            log.warning("route refused", prefix=str(prefix), reason=refusal.reason)
        metrics.ROUTES.labels("254").set(len(self._wanted) - len(applied.refused))
        self._is_applied = is_done and not applied.refused
        return is_done

    @property
    def is_pending(self) -> bool:
        """Whether `apply` has anything to do."""
        return not self._is_applied

    def report(self) -> None:
        """Write and remove status files of what changed; call when policy is in the kernel."""
        names, self._to_report = self._to_report, set()
        endpoints = self._endpoints or {}
        for name in sorted(names & endpoints.keys()):
            endpoint = endpoints[name]
            if self._is_complete(name, endpoint):
                if self._status.set_up(endpoint):
                    self._on_up(endpoint)
                    log.info("endpoint is up", endpoint=str(endpoint.id), interface=name)
            elif self._status.set_down(endpoint.id):
                log.info("endpoint is down", endpoint=str(endpoint.id), interface=name)

    def report_all(self) -> None:
        """The same for all, should somebody have removed a file."""
        self._to_report.update(self._endpoints or ())
        self.report()

    def check_soon(self) -> None:
        """Read routes and configure all interfaces anew at the next `apply`.

        Until then they count as they are: a look is no reason to call an endpoint incomplete.
        """
        self._routes.invalidate()
        names = tuple(self._endpoints or ())
        self._to_check.update(names)
        self._look_at(names)

    def _look_at(self, names: tuple[str, ...]) -> None:
        self._is_applied = False
        self._to_configure.update(names)
        self._to_report.update(names)

    def is_complete(self, endpoint: Endpoint) -> bool:
        """Whether an endpoint is as it should be, as far as is known."""
        return self._status.is_up(endpoint.id)

    def _is_complete(self, name: str, endpoint: Endpoint) -> bool:
        link, configured = self._interfaces.get(name), self._configured.get(name)
        return (
            link is not None
            and link.is_running
            and configured is not None
            and configured.holds(link, endpoint)
            and not (self._refused and self._refused.intersection(map(_prefix, endpoint.routed)))
        )

    async def _configure(self) -> bool:
        is_done = True
        names, self._to_configure = self._to_configure, set()
        for name in sorted(names):
            endpoint, link = (self._endpoints or {}).get(name), self._interfaces.get(name)
            if endpoint is None:
                self._configured.pop(name, None)
                self._configured_before.pop(name, None)
            if endpoint is None or link is None or not link.is_up:
                self._prefixes.set(name, ())
                continue
            self._prefixes.set(name, tuple(map(_prefix, endpoint.routed)))
            configured = self._configured.get(name)
            is_checked = name not in self._to_check
            self._to_check.discard(name)
            if not (is_checked and configured and configured.holds(link, endpoint)):
                is_done = await self._configure_one(link, endpoint) and is_done
        for prefix, (_, owner) in self._prefixes.take_changes().items():
            if owner is None:
                del self._wanted[prefix]
            else:
                metric = self._config.route_priority(prefix.version)
                source = self._config.route_source(prefix.version)
                self._wanted[prefix] = on_link(
                    owner, metric=metric, source=parse_address(source) if source else None
                )
        return is_done

    async def _configure_one(self, link: Link, endpoint: Endpoint) -> bool:
        name = link.name
        try:
            self._sysctls.configure_workload(endpoint)
            await self._set_neighbours(link, endpoint)
        except OSError as error:
            if error.errno in (*_LINK_ERRORS, errno.ENOENT):
                return True
            log.warning("interface not configured", interface=name, error=str(error))
            self._to_configure.add(name)
            return False
        self._configured[name] = self._configured_before[name] = _Configured(link.index, endpoint)
        self._to_report.add(name)
        return True

    async def _set_neighbours(self, link: Link, endpoint: Endpoint) -> None:
        """Raises KernelError (an OSError).

        Entries are written without reading first: the kernel lists all neighbours of a node or
        none, and there are as many as pods. IPv6 pods are found by neighbour discovery.
        """
        before = self._configured_before.get(endpoint.interface)
        if before is not None and before.index == link.index:
            for address in before.endpoint.addresses:
                if address not in endpoint.addresses and address.version == 4:
                    await self._links.remove_neighbour(link.index, address)
        if endpoint.mac:
            for address in endpoint.addresses:
                if address.version == 4:
                    await self._links.set_neighbour(link.index, address, endpoint.mac)


def _prefix(address: Address) -> Network:
    return prefix_at(address.version, int(address), address.max_prefixlen)
