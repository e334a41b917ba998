"""The kernel ports: links, addresses and routes as values, and what may be asked of them.

Adapters: `netlink.py`, `routes.py` and `command.py`; `fake.py` keeps the same state in memory and
refuses what the kernel refuses. `tests/contract` runs the same tests on both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from cymric.model.net import Address, Network


class RouteKind(StrEnum):
    """What the kernel does with a packet that matches the route."""

    UNICAST = "unicast"
    BLACKHOLE = "blackhole"


@dataclass(frozen=True, slots=True)
class NextHop:
    """One way out: a gateway, a device, or both. A device alone means the address is on-link."""

    gateway: Address | None = None
    device: str | None = None
    weight: int = 1

    def __post_init__(self) -> None:
        if self.gateway is None and not self.device:
            raise ValueError("a next hop needs a gateway or a device")
        if not 1 <= self.weight <= 256:
            raise ValueError(f"next hop weight must be 1 to 256, not {self.weight}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What to do for one prefix. Several next hops share the traffic by weight (ECMP).

    `metric` is the kernel's priority: of two routes to a prefix the lower wins. `source` is the
    address the host itself uses towards the prefix.
    """

    kind: RouteKind = RouteKind.UNICAST
    next_hops: tuple[NextHop, ...] = ()
    metric: int = 1024
    source: Address | None = None

    def __post_init__(self) -> None:
        if (self.kind is RouteKind.UNICAST) != bool(self.next_hops):
            raise ValueError("a unicast route needs next hops, a blackhole has none")
        if not 1 <= self.metric <= 0xFFFFFFFF:
            raise ValueError(f"route metric must be 1 to 4294967295, not {self.metric}")

    def is_met_by(self, actual: Route) -> bool:
        """Whether a route read back is this one. The kernel adds the device to a gateway."""
        return (
            self.kind is actual.kind
            and self.metric == actual.metric
            and self.source == actual.source
            and len(self.next_hops) == len(actual.next_hops)
            and all(
                want.gateway == have.gateway
                and want.weight == have.weight
                and want.device in (None, have.device)
                for want, have in zip(self.next_hops, actual.next_hops, strict=True)
            )
        )


def via(gateway: Address, *, metric: int = 1024) -> Route:
    """A route through one gateway; the kernel finds the device."""
    return Route(next_hops=(NextHop(gateway),), metric=metric)


def blackhole(*, metric: int = 1024) -> Route:
    """A route that drops."""
    return Route(kind=RouteKind.BLACKHOLE, metric=metric)


def on_link(device: str, *, metric: int = 1024, source: Address | None = None) -> Route:
    """A route straight out of a device, link scope."""
    return Route(next_hops=(NextHop(device=device),), metric=metric, source=source)


Owns = Callable[[Network, Route], bool]
"""Which routes of our protocol number are ours, where the number alone does not say."""


@dataclass(frozen=True, slots=True)
class RouteRefused:
    """Why the kernel did not take (or give up) one route: errno and its words."""

    errno: int
    reason: str


@dataclass(frozen=True, slots=True)
class RoutesApplied:
    """What one `apply` did. Prefixes in `refused` are not as wanted; ask again later."""

    added: int = 0
    replaced: int = 0
    deleted: int = 0
    refused: Mapping[Network, RouteRefused] = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """Routes written or removed."""
        return self.added + self.replaced + self.deleted


class Routes(Protocol):
    """The routes of one owner in one table: desired state in, the difference written.

    Ours is what carries our protocol number and satisfies `owns`. Nothing else is ever replaced or
    deleted: where somebody else's route holds prefix and metric, ours is refused with EEXIST.
    """

    async def list(self) -> Mapping[Network, Route]:
        """Read our routes back from the kernel; later changes are worked out against this."""

    async def apply(self, desired: Mapping[Network, Route]) -> RoutesApplied:
        """Make our routes exactly `desired`. A changed route is replaced, never absent between."""

    async def change(self, changes: Mapping[Network, Route | None]) -> RoutesApplied:
        """Make our routes to these prefixes so (None: gone), and leave all others as they are."""

    def invalidate(self) -> None:
        """Forget what was read: the next `apply` reads the kernel first (something changed it)."""
