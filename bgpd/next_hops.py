"""Recursive next hops: through which neighbours a BGP next hop is reached. Pure.

    underlay routes (cymric.kernel.underlay) ▶ Resolver ─┬▶ import policy: unreachable, not used
    next hop of a path ──────────────────────────────────┴▶ fib: the gateways for the kernel

A next hop need not be on-link: a reflector passes on the owner's address, which may be in another
rack, behind a router. It is looked up as the kernel would (longest match, then lowest metric) among
the main table's routes that are not ours, and a gateway found there likewise, until an address is
on-link. Several gateways of one route share the traffic evenly.

Invariants
- Our own BGP routes take no part, so no route can depend on itself or on another of ours, and the
  result does not depend on what was chosen before. Only the static routes to peers
  (`reachableBy`), which are ours too, are told (`restrict`) and come before all others.
- What leads out of an ignored interface (`ignoredInterfaces`) is not looked at.
- One look-up for each next hop, not for each route; the answer is kept until the underlay changes.

Source: RFC 4271 §5.1.3, §9.1.2.1; what Calico's BIRD does with `gateway recursive`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from cymric.kernel.api import NextHop
from cymric.kernel.underlay import Change, OtherRoute, Out
from cymric.model.net import Address, Network, host_network
from cymric.model.prefix import PrefixMap

MOST_STEPS = 4
"""How many routes are followed to an on-link gateway; the kernel takes gateways that are on-link
itself, so two is what happens."""
MOST_HOPS = 16
REMEMBERED = 10_000
"""Next hops whose answer is kept; a cluster has one for each node."""


@dataclass(frozen=True, slots=True)
class Resolution:
    """How a next hop is reached: `hops` as the kernel takes them; none, and then `reason` says why.

    `interface` is that of the first. `asked` and `devices` are what the answer depends on:
    addresses looked up, interfaces used.
    """

    hops: tuple[NextHop, ...] = ()
    reason: str = ""
    interface: str = ""
    asked: frozenset[Address] = field(default=frozenset(), compare=False)
    devices: frozenset[int] = field(default=frozenset(), compare=False)


class Resolver:
    """Answers for next hops. Before it knows the underlay, everything counts as on-link."""

    def __init__(self, routes: Iterable[OtherRoute] | None = None) -> None:
        self._routes: PrefixMap[OtherRoute] | None = None
        self._seen: tuple[OtherRoute, ...] = ()
        self._ignored: tuple[str, ...] = ()
        self._gateways: Mapping[Address, Address] = {}
        self._known: dict[Address, Resolution] = {}
        self._asked: set[Address] = set()
        self._devices: set[int] = set()
        if routes is not None:
            self.replace(routes)

    def resolve(self, hop: Address) -> Resolution:
        """How `hop` is reached."""
        if self._routes is None:
            return Resolution((NextHop(self._gateways.get(hop, hop)),))
        known = self._known.get(hop)
        if known is None:
            if len(self._known) >= REMEMBERED:
                self._forget()
            known = self._known[hop] = self._resolve(hop, self._routes)
            self._asked |= known.asked
            self._devices |= known.devices
        return known

    def replace(
        self, routes: Iterable[OtherRoute], used: Collection[Address] = ()
    ) -> frozenset[Address]:
        """The underlay as it is now; those of the `used` next hops that are reached differently."""
        self._seen = tuple(routes)
        self._routes = self._usable()
        before = self._forget()
        return frozenset(hop for hop in used if self.resolve(hop) != before.get(hop))

    def restrict(
        self,
        *,
        ignored: Collection[str],
        gateways: Mapping[Address, Address],
        used: Collection[Address] = (),
    ) -> frozenset[Address]:
        """Look at no interface whose name fits a pattern of `ignored`, and reach the addresses in
        `gateways` through the gateway given there; the `used` next hops reached differently.
        """
        if (tuple(ignored), gateways) == (self._ignored, self._gateways):
            return frozenset()
        before = {hop: self.resolve(hop) for hop in used}
        self._ignored, self._gateways = tuple(ignored), dict(gateways)
        self._forget()
        if self._routes is not None:
            self._routes = self._usable()
        return frozenset(hop for hop in used if self.resolve(hop) != before[hop])

    def _usable(self) -> PrefixMap[OtherRoute]:
        best: PrefixMap[OtherRoute] = PrefixMap()
        for route in filter(None, map(self._without_ignored, self._seen)):
            other = best.get(route.prefix)
            if other is None or route.metric < other.metric:
                best[route.prefix] = route
        for address, gateway in self._gateways.items():
            prefix = host_network(address)
            best[prefix] = OtherRoute(prefix, (Out(gateway, "", 0),))
        return best

    def _without_ignored(self, route: OtherRoute) -> OtherRoute | None:
        if not self._ignored or not route.outs:
            return route
        outs = tuple(
            out for out in route.outs if not any(fnmatchcase(out.device, p) for p in self._ignored)
        )
        if len(outs) == len(route.outs):
            return route
        return replace(route, outs=outs) if outs else None

    def _forget(self) -> dict[Address, Resolution]:
        before, self._known = self._known, {}
        self._asked, self._devices = set(), set()
        return before

    def concerns(self, change: Change) -> bool:
        """Whether the change can matter to any known next hop."""
        if change.prefix is not None:
            return _covers_any(change.prefix, self._asked)
        return change.device is None or change.device in self._devices

    def _resolve(self, hop: Address, routes: PrefixMap[OtherRoute]) -> Resolution:
        if hop.is_link_local:
            return Resolution((NextHop(hop),))
        asked: set[Address] = set()
        devices: set[int] = set()
        found = _follow(routes, hop, MOST_STEPS, asked, devices)
        depends_on = (frozenset(asked), frozenset(devices))
        if isinstance(found, str):
            return Resolution((), found, "", *depends_on)
        gateways = tuple(dict.fromkeys(one for one, _ in found))[:MOST_HOPS]
        return Resolution(gateways, "", found[0][1], *depends_on)


def _follow(
    routes: PrefixMap[OtherRoute],
    hop: Address,
    steps: int,
    asked: set[Address],
    devices: set[int],
) -> list[tuple[NextHop, str]] | str:
    """The gateways on the way to `hop`, each with its device, or why there are none."""
    asked.add(hop)
    held = routes.holding(host_network(hop))
    if held is None:
        return f"there is no route to {hop}"
    route = held[1]
    if not route.outs:
        return f"{hop} is reached by a route that drops, {route.prefix}"
    found: list[tuple[NextHop, str]] = []
    reason = ""
    for out in route.outs:
        devices.add(out.index)
        gateway = out.gateway
        if gateway is None:
            found.append((NextHop(hop), out.device))
        elif gateway.is_link_local:  # means something on that device alone
            found.append((NextHop(gateway, out.device), out.device))
        elif steps <= 1 or gateway in asked:
            reason = reason or f"its gateway {gateway} is not on-link"
        else:
            further = _follow(routes, gateway, steps - 1, asked, devices)
            if isinstance(further, str):
                reason = reason or further
            else:
                found += further
    return found or reason


def _covers_any(prefix: Network, addresses: Collection[Address]) -> bool:
    if prefix.prefixlen == prefix.max_prefixlen:
        return prefix.network_address in addresses
    bits = prefix.max_prefixlen - prefix.prefixlen
    number = int(prefix.network_address) >> bits
    return any(
        address.version == prefix.version and int(address) >> bits == number
        for address in addresses
    )


ON_LINK = Resolver()
"""For where nothing is known of the underlay: every next hop is taken to be on-link."""
