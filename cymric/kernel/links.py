"""The port to links and what hangs on them: addresses, neighbours, the routes of one link.

Values say what a namespace has; `Links` is one namespace as its user sees it. Adapters:
`netlink.Netlink` (the kernel) and `fake_links.FakeLinks` (memory); `tests/contract` runs the same
tests on both. Bulk work on routes is not here but in `routes.py`.

Errors are named by what was asked: a caller can tell a missing link from any other refusal.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cymric.model.net import Address, Interface, Network


class KernelError(OSError):
    """The kernel refused a request. The text says what was asked and why it was refused."""

    def __init__(self, code: int, request: str, reason: str) -> None:
        super().__init__(code, f"{request}: {reason}")
        self.request = request
        self.reason = reason


class NoSuchLink(KernelError):
    """The link is not there (any more)."""


class AlreadyThere(KernelError):
    """What should be created exists."""


class EventsLost(Exception):
    """The kernel dropped link events because they were read too slowly: list everything again."""


def kernel_error(code: int, request: str, reason: str) -> KernelError:
    """The error class for an errno."""
    if code in (errno.ENODEV, errno.ENXIO):
        return NoSuchLink(code, request, reason)
    if code == errno.EEXIST:
        return AlreadyThere(code, request, reason)
    return KernelError(code, request, reason)


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `is_up` is what was asked for, `is_running` whether it carries."""

    index: int
    name: str
    kind: str = ""
    mac: str = ""
    mtu: int = 0
    is_up: bool = False
    is_running: bool = False


@dataclass(frozen=True, slots=True)
class LinkChange:
    """The link with this index and name is now `link`; None means it is gone."""

    index: int
    name: str
    link: Link | None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """An entry of the neighbour table. Only permanent ones are ours to set."""

    address: Address
    mac: str
    is_permanent: bool = True


@dataclass(frozen=True, slots=True)
class LinkRoute:
    """A route of the main table over one link. Without a gateway its scope is link."""

    destination: Network
    index: int
    gateway: Address | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VethPair:
    """A veth pair to create: our end here, the peer in the namespace open at `peer_namespace`.

    `mtu` and `queues` 0 leave the kernel's defaults; an empty MAC leaves the kernel's random one.
    """

    name: str
    peer_name: str
    peer_namespace: int
    mac: str = ""
    peer_mac: str = ""
    mtu: int = 0
    queues: int = 0


@dataclass(frozen=True, slots=True)
class MadeVeth:
    """A pair as it was created: our end, and the index of the peer in its namespace."""

    link: Link
    peer_index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Equipment:
    """What a link gets in one go, in this order: neighbours, routes, addresses."""

    neighbours: tuple[Neighbour, ...] = ()
    routes: tuple[LinkRoute, ...] = ()
    addresses: tuple[Interface, ...] = ()


class LinkChanges(Protocol):
    """A subscription: iterate over it, and close it."""

    def __aiter__(self) -> AsyncIterator[LinkChange]:
        """The changes in order. Raises EventsLost: then subscribe and list again."""
        ...

    async def aclose(self) -> None:
        """End the subscription."""
        ...


class Links(Protocol):
    """The links of one network namespace."""

    async def all(self) -> tuple[Link, ...]:
        """Every link."""
        ...

    async def get(self, name: str) -> Link | None:
        """The link of that name, or None."""
        ...

    async def create_veth(self, pair: VethPair) -> MadeVeth:
        """Create the pair, both ends down. Raises AlreadyThere if either name is taken."""
        ...

    async def set_up(self, index: int) -> None:
        """Switch a link on. Raises NoSuchLink."""
        ...

    async def delete(self, index: int) -> None:
        """Remove a link and, of a veth, its peer. Raises NoSuchLink."""
        ...

    async def delete_all(self, indices: Sequence[int]) -> None:
        """Remove links and their peers in one step, which costs what one costs; missing is fine."""
        ...

    async def addresses(self, index: int) -> tuple[Interface, ...]:
        """The addresses of a link, both families."""
        ...

    async def add_address(self, index: int, address: Interface) -> None:
        """Give a link an address. Raises AlreadyThere, NoSuchLink."""
        ...

    async def routes(self, index: int, version: int = 4) -> tuple[LinkRoute, ...]:
        """The main table's routes of one family over a link."""
        ...

    async def add_route(self, route: LinkRoute) -> None:
        """Add a route. Raises AlreadyThere, NoSuchLink."""
        ...

    async def equip(self, index: int, equipment: Equipment) -> None:
        """Give a link all of it. Raises what the first refusal is; the rest may be done or not."""
        ...

    async def neighbours(self, index: int) -> tuple[Neighbour, ...]:
        """The neighbour entries of a link that have a MAC, learned ones too."""
        ...

    async def set_neighbour(self, index: int, address: Address, mac: str) -> None:
        """Make `address` permanently `mac` on a link, whatever was known before."""
        ...

    async def remove_neighbour(self, index: int, address: Address) -> None:
        """Forget an entry; a missing one is not an error."""
        ...

    async def watch(self) -> LinkChanges:
        """Every change of links from now on; list after this returns, and nothing is missed."""
        ...

    def close(self) -> None:
        """Let go of the socket."""
        ...
