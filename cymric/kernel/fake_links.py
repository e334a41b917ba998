"""Links in memory, for tests: keeps state and refuses what the kernel refuses.

`FakeNetwork` is a machine with several namespaces; a veth pair spans two of them, and removing
either end removes both.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from cymric.kernel.links import (
    Equipment,
    KernelError,
    Link,
    LinkChange,
    LinkChanges,
    LinkRoute,
    MadeVeth,
    Neighbour,
    VethPair,
    kernel_error,
)
from cymric.model.net import Address, Interface


@dataclass
class FakeNetwork:
    """Namespaces by descriptor; `add` makes one."""

    namespaces: dict[int, FakeLinks] = field(default_factory=dict)

    def add(self, descriptor: int) -> FakeLinks:
        """A new, empty namespace with its loopback link."""
        links = FakeLinks(self)
        self.namespaces[descriptor] = links
        return links


@dataclass
class _State:
    link: Link
    peer: tuple[FakeLinks, int] | None = None
    addresses: list[Interface] = field(default_factory=list)
    routes: list[LinkRoute] = field(default_factory=list)
    neighbours: dict[Address, Neighbour] = field(default_factory=dict)


class FakeLinks:
    """One namespace; see `cymric.kernel.links.Links`."""

    def __init__(self, network: FakeNetwork | None = None) -> None:
        self._network = network or FakeNetwork()
        self._indices = itertools.count(1)
        self._watchers: list[asyncio.Queue[LinkChange]] = []
        self._states: dict[int, _State] = {}
        self._add(Link(next(self._indices), "lo", mtu=65536, mac="00:00:00:00:00:00"), None)

    def close(self) -> None:
        """Let go of the socket."""

    def add(self, name: str, *, kind: str = "", mac: str = "", mtu: int = 1500) -> Link:
        """Put a link there, as another program would."""
        self._refuse_taken(name, f"create link {name}")
        return self._add(Link(next(self._indices), name, kind=kind, mac=mac, mtu=mtu), None)

    async def all(self) -> tuple[Link, ...]:
        """Every link."""
        return tuple(state.link for state in self._states.values())

    async def get(self, name: str) -> Link | None:
        """The link of that name, or None."""
        return next((s.link for s in self._states.values() if s.link.name == name), None)

    async def create_veth(self, pair: VethPair) -> MadeVeth:
        """Create the pair, both ends down. Raises AlreadyThere if either name is taken."""
        request = f"create veth {pair.name} with peer {pair.peer_name}"
        there = self._network.namespaces.get(pair.peer_namespace)
        if there is None:
            raise KernelError(errno.EBADF, request, "no such namespace")
        self._refuse_taken(pair.name, request)
        there._refuse_taken(pair.peer_name, request)
        mtu = pair.mtu or 1500
        here_index, there_index = next(self._indices), next(there._indices)
        mac = pair.mac or f"02:00:00:00:00:{here_index:02x}"
        peer_mac = pair.peer_mac or f"02:00:00:00:01:{there_index:02x}"
        ours = self._add(Link(here_index, pair.name, "veth", mac, mtu), (there, there_index))
        there._add(Link(there_index, pair.peer_name, "veth", peer_mac, mtu), (self, here_index))
        return MadeVeth(ours, there_index)

    async def set_up(self, index: int) -> None:
        """Switch a link on. Raises NoSuchLink."""
        state = self._state(index, f"switch on link {index}")
        self._change(index, replace(state.link, is_up=True, is_running=state.peer is None))
        if state.peer is not None:
            there, there_index = state.peer
            peer = there._states[there_index].link
            if peer.is_up:  # a veth carries when both ends are up
                self._change(index, replace(self._states[index].link, is_running=True))
                there._change(there_index, replace(peer, is_running=True))

    async def delete(self, index: int) -> None:
        """Remove a link and, of a veth, its peer. Raises NoSuchLink."""
        state = self._state(index, f"remove link {index}")
        self._remove(index)
        if state.peer is not None:
            there, there_index = state.peer
            there._remove(there_index)

    async def delete_all(self, indices: Sequence[int]) -> None:
        """Remove links and their peers in one step, which costs what one costs; missing is fine."""
        for index in indices:
            if index in self._states:
                await self.delete(index)

    async def addresses(self, index: int) -> tuple[Interface, ...]:
        """The addresses of a link, both families."""
        state = self._states.get(index)
        return tuple(state.addresses) if state else ()

    async def add_address(self, index: int, address: Interface) -> None:
        """Give a link an address. Raises AlreadyThere, NoSuchLink."""
        request = f"add address {address} to link {index}"
        addresses = self._state(index, request).addresses
        if address in addresses:
            raise kernel_error(errno.EEXIST, request, "File exists")
        addresses.append(address)

    async def routes(self, index: int, version: int = 4) -> tuple[LinkRoute, ...]:
        """The main table's routes of one family over a link."""
        state = self._states.get(index)
        routes = state.routes if state else ()
        return tuple(route for route in routes if route.destination.version == version)

    async def add_route(self, route: LinkRoute) -> None:
        """Add a route. Raises AlreadyThere, NoSuchLink."""
        request = f"add route {route.destination} over link {route.index}"
        state = self._state(route.index, request)
        if not state.link.is_up:
            raise KernelError(errno.ENETDOWN, request, "Network is down")
        reachable = [r.destination for r in state.routes if r.gateway is None]
        gateway = route.gateway
        if gateway is not None and gateway.version == 6 and gateway.is_link_local:
            reachable.append(route.destination.supernet(new_prefix=0))
        if gateway is not None and not any(gateway in net for net in reachable):
            raise KernelError(errno.ENETUNREACH, request, "Nexthop has invalid gateway")
        taken = [r.destination for s in self._states.values() for r in s.routes]
        if route.destination in taken:
            raise kernel_error(errno.EEXIST, request, "File exists")
        state.routes.append(route)

    async def equip(self, index: int, equipment: Equipment) -> None:
        """Give a link all of it. Raises what the first refusal is; the rest may be done or not."""
        for neighbour in equipment.neighbours:
            await self.set_neighbour(index, neighbour.address, neighbour.mac)
        for route in equipment.routes:
            await self.add_route(route)
        for address in equipment.addresses:
            await self.add_address(index, address)

    async def neighbours(self, index: int) -> tuple[Neighbour, ...]:
        """The neighbour entries of a link that have a MAC, learned ones too."""
        state = self._states.get(index)
        return tuple(state.neighbours.values()) if state else ()

    async def set_neighbour(self, index: int, address: Address, mac: str) -> None:
        """Make `address` permanently `mac` on a link, whatever was known before."""
        state = self._state(index, f"set neighbour {address} to {mac} on link {index}")
        state.neighbours[address] = Neighbour(address, mac)

    async def remove_neighbour(self, index: int, address: Address) -> None:
        """Forget an entry; a missing one is not an error."""
        if index in self._states:
            self._states[index].neighbours.pop(address, None)

    async def watch(self) -> LinkChanges:
        """Every change of links from now on; list after this returns, and nothing is missed."""
        return _Changes(self._watchers)

    def _state(self, index: int, request: str) -> _State:
        if index not in self._states:
            raise kernel_error(errno.ENODEV, request, "No such device")
        return self._states[index]

    def _refuse_taken(self, name: str, request: str) -> None:
        if any(state.link.name == name for state in self._states.values()):
            raise kernel_error(errno.EEXIST, request, "File exists")

    def _add(self, link: Link, peer: tuple[FakeLinks, int] | None) -> Link:
        self._states[link.index] = _State(link, peer)
        self._tell(LinkChange(link.index, link.name, link))
        return link

    def _change(self, index: int, link: Link) -> None:
        self._states[index].link = link
        self._tell(LinkChange(index, link.name, link))

    def _remove(self, index: int) -> None:
        state = self._states.pop(index, None)
        if state is not None:
            self._tell(LinkChange(index, state.link.name, None))

    def _tell(self, change: LinkChange) -> None:
        for queue in self._watchers:
            queue.put_nowait(change)


class _Changes:
    """A subscription to a fake's changes."""

    def __init__(self, watchers: list[asyncio.Queue[LinkChange]]) -> None:
        self._watchers = watchers
        self._queue: asyncio.Queue[LinkChange] = asyncio.Queue()
        watchers.append(self._queue)

    async def __aiter__(self) -> AsyncIterator[LinkChange]:
        while True:
            yield await self._queue.get()

    async def aclose(self) -> None:
        self._watchers.remove(self._queue)
