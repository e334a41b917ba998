"""The veth pair between a pod and its node.

The node's end has Calico's name and the MAC ee:ee:ee:ee:ee:ee and answers ARP for everything; the
pod's end has single addresses and sends everything to 169.254.1.1, which nobody owns, and to the
link-local address that the node's end has by its MAC; it knows both by permanent neighbour entries.
Routes on the node's side are felix' business.

    begin   the pair, its switches, both ends up         while IPAM asks etcd
    finish  gateway, routes, at last the addresses       while etcd stores the endpoint

Order matters: sysctls of the node's end are set before it goes up, so that no packet is handled
under the defaults; the pod's address comes last, so that a pod with an address has its routes.
Removing a link stops the whole process for some 20 ms: all that wait for it go in one step.
Source: Calico's Linux data plane of its CNI plugin.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Protocol

import structlog

from cni import shaping
from cni.errors import CniError, Code
from cni.result import POD_GATEWAY_V6
from cymric.kernel import namespace
from cymric.kernel.links import (
    AlreadyThere,
    Equipment,
    Link,
    LinkRoute,
    Links,
    MadeVeth,
    Neighbour,
    VethPair,
)
from cymric.kernel.netlink import Netlink
from cymric.model.endpoints import HOST_MAC, POD_GATEWAY, QoSControls
from cymric.model.net import Address, Network, host_network

GATEWAYS: dict[int, Address] = {4: ip_address(POD_GATEWAY), 6: ip_address(POD_GATEWAY_V6)}
TO_GATEWAY = ip_network(f"{POD_GATEWAY}/32")
EVERYTHING: dict[int, Network] = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """A pair to make. `mac` is the pod's end's; `mtu`, `queues` 0 mean the kernel's defaults.

    `families` are those that the pod is expected to have addresses of. `is_forwarding`: the pod may
    forward packets that are not its own.
    """

    host_interface: str
    pod_interface: str
    netns: Path
    mac: str = ""
    mtu: int = 0
    queues: int = 0
    families: tuple[int, ...] = (4,)
    is_forwarding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What goes over a pair: the pod's addresses, what it reaches through it, and how fast.

    No destinations means everything, of each family that has an address.
    """

    addresses: tuple[Address, ...]
    destinations: tuple[Network, ...] = ()
    limits: QoSControls | None = None

    @property
    def families(self) -> tuple[int, ...]:
        """The families that have an address."""
        return tuple(sorted({address.version for address in self.addresses}))

    def routes(self, index: int) -> tuple[LinkRoute, ...]:
        """The pod's routes, in the order in which they can be made."""
        found = [LinkRoute(TO_GATEWAY, index)] if 4 in self.families else []
        for version in self.families:
            wanted = [net for net in self.destinations if net.version == version]
            found += [
                LinkRoute(net, index, GATEWAYS[version]) for net in wanted or (EVERYTHING[version],)
            ]
        return tuple(found)


class Pair(Protocol):
    """A pair that was begun. `mtu` is what it has."""

    @property
    def mtu(self) -> int:
        """The MTU of the pair."""
        ...

    async def finish(self, layout: Layout) -> None:
        """Give the pod its routes and addresses. Raises OSError."""
        ...

    def close(self) -> None:
        """Let go of the pod's namespace."""
        ...


class Wiring(Protocol):
    """What the daemon wants from the kernel."""

    async def begin(self, wire: Wire) -> Pair:
        """Make the pair; on failure nothing is left.

        Raises AlreadyThere if the node or the pod has a link of that name, CniError, OSError.
        """
        ...

    async def unwire_host(self, host_interface: str) -> None:
        """Remove the pair by the node's end, if it is there."""
        ...

    async def unwire_pod(self, netns: Path, pod_interface: str) -> None:
        """Remove the pair by the pod's end, if both it and the namespace are there."""
        ...

    async def is_there(self, host_interface: str) -> bool:
        """Whether the node has a link of that name."""
        ...

    async def look(self, host_interface: str) -> Look:
        """What the node has of a pair, to say what is missing."""
        ...

    async def faults(self, wire: Wire, layout: Layout) -> tuple[str, ...]:
        """What is not as it would be made; empty when all is well."""
        ...


@dataclass(frozen=True, slots=True)
class Look:
    """The node's end and the destinations that the node routes over it; None: no such link."""

    link: Link | None
    routed: frozenset[Network] = frozenset()


class LinuxWiring:
    """The kernel's pairs, seen from the namespace this process lives in."""

    def __init__(self) -> None:
        self._home: Links = Netlink()
        self._doomed: list[str] = []
        self._removal: asyncio.Task[None] | None = None

    async def begin(self, wire: Wire) -> Pair:
        """Make the pair; on failure nothing is left."""
        with ExitStack() as stack:
            there = _enter(stack, wire.netns)
            pod = Netlink(there)
            stack.callback(pod.close)
            made = await self._home.create_veth(
                VethPair(
                    name=wire.host_interface,
                    mac=HOST_MAC,
                    peer_name=wire.pod_interface,
                    peer_namespace=there,
                    peer_mac=wire.mac,
                    mtu=wire.mtu,
                    queues=wire.queues,
                )
            )
            try:
                _set_host_sysctls(wire.host_interface, wire.families)
                await self._home.set_up(made.link.index)
                with namespace.visiting(there):
                    _set_pod_sysctls(wire, wire.families)
                await pod.set_up(made.peer_index)
            except BaseException:
                await self.unwire_host(wire.host_interface)
                raise
            return _Begun(wire, self._home, made, pod, there, stack.pop_all())

    async def unwire_host(self, host_interface: str) -> None:
        """Remove the pair by the node's end, if it is there."""
        if await self._home.get(host_interface) is None:
            return
        self._doomed.append(host_interface)
        # Whoever comes while a removal runs waits for the next one, and shares it with others.
        while host_interface in self._doomed:
            if self._removal is None or self._removal.done():
                self._removal = asyncio.create_task(self._remove_doomed(), name="remove links")
            await asyncio.shield(self._removal)

    async def _remove_doomed(self) -> None:
        await asyncio.sleep(0)  # those that are ready to run may still join
        names, self._doomed = self._doomed, []
        links = [await self._home.get(name) for name in dict.fromkeys(names)]
        await self._home.delete_all([link.index for link in links if link is not None])

    async def unwire_pod(self, netns: Path, pod_interface: str) -> None:
        """Remove the pair by the pod's end, if both it and the namespace are there."""
        with ExitStack() as stack:
            try:
                there = stack.enter_context(namespace.opened(netns))
                if namespace.identity(there) == namespace.identity():
                    return  # the node's own links are not ours to remove
                pod = Netlink(there)
            except OSError as error:
                # A path without a namespace behind it: removing that took the pair along.
                if error.errno in (errno.ENOENT, errno.EINVAL, errno.ENOTDIR):
                    return
                raise
            stack.callback(pod.close)
            link = await pod.get(pod_interface)
            if link is not None:
                await pod.delete_all([link.index])

    async def is_there(self, host_interface: str) -> bool:
        """Whether the node has a link of that name."""
        return await self._home.get(host_interface) is not None

    async def look(self, host_interface: str) -> Look:
        """What the node has of a pair, to say what is missing."""
        link = await self._home.get(host_interface)
        if link is None:
            return Look(None)
        routes = [*await self._home.routes(link.index), *await self._home.routes(link.index, 6)]
        return Look(link, frozenset(route.destination for route in routes))

    async def faults(self, wire: Wire, layout: Layout) -> tuple[str, ...]:
        """What is not as it would be made; empty when all is well."""
        found = []
        ours = await self._home.get(wire.host_interface)
        if ours is None or not ours.is_up:
            state = "missing" if ours is None else "down"
            found.append(f"{wire.host_interface} on the node is {state}")
        with ExitStack() as stack:
            try:
                there = _enter(stack, wire.netns)
            except CniError as error:
                return (*found, str(error))
            pod = Netlink(there)
            stack.callback(pod.close)
            return (*found, *await _faults_in_pod(pod, wire, layout))


class _Begun:
    """A pair of the kernel that was begun."""

    def __init__(
        self,
        wire: Wire,
        home: Links,
        made: MadeVeth,
        pod: Links,
        there: int,
        stack: ExitStack,
    ) -> None:
        self._wire, self._home, self._made = wire, home, made
        self._pod, self._there, self._stack = pod, there, stack

    @property
    def mtu(self) -> int:
        """The MTU of the pair."""
        return self._made.link.mtu

    async def finish(self, layout: Layout) -> None:
        """Give the pod its routes and addresses. Raises OSError."""
        index = self._made.peer_index
        if late := tuple(set(layout.families) - set(self._wire.families)):
            _set_host_sysctls(self._wire.host_interface, late)
            with namespace.visiting(self._there):
                _set_pod_sysctls(self._wire, late)
        if 6 in layout.families:
            # The kernel gives a link that goes up that very address, but in its own time.
            with suppress(AlreadyThere):
                link_local = ip_interface(f"{GATEWAYS[6]}/64")
                await self._home.add_address(self._made.link.index, link_local)
        # The node answers for the gateway by proxy, but only while it has a route towards it.
        # With a permanent entry pods do not depend on that, nor wait for the answer.
        neighbours = tuple(Neighbour(GATEWAYS[version], HOST_MAC) for version in layout.families)
        addresses = tuple(ip_interface(str(host_network(a))) for a in layout.addresses)
        routes = layout.routes(index)
        equipment = Equipment(neighbours=neighbours, routes=routes, addresses=addresses)
        if layout.limits is not None:
            ends = shaping.Ends(self._made.link.index, index, self._there, self.mtu)
            shaping.limit(ends, layout.limits)
        await self._pod.equip(index, equipment)

    def close(self) -> None:
        """Let go of the pod's namespace."""
        self._stack.close()


def random_mac() -> str:
    """A locally administered unicast MAC, as the kernel itself would draw one."""
    raw = bytearray(os.urandom(6))
    raw[0] = raw[0] & 0xFE | 0x02
    return raw.hex(":")


async def _faults_in_pod(pod: Links, wire: Wire, layout: Layout) -> Sequence[str]:
    found = []
    name = wire.pod_interface
    link = await pod.get(name)
    if link is None:
        return [f"{name} in the container is missing"]
    if not link.is_up:
        found.append(f"{name} in the container is down")
    if wire.mac and link.mac != wire.mac:
        found.append(f"{name} has MAC {link.mac}, not {wire.mac}")
    addresses = await pod.addresses(link.index)
    for address in layout.addresses:
        if ip_interface(str(host_network(address))) not in addresses:
            found.append(f"{name} does not have address {address}")
    routes = {route for v in layout.families for route in await pod.routes(link.index, v)}
    for route in layout.routes(link.index):
        if route not in routes:
            found.append(f"{name} has no route to {route.destination}")
    return found


def _enter(stack: ExitStack, netns: Path) -> int:
    try:
        there = stack.enter_context(namespace.opened(netns))
        with namespace.visiting(there):
            pass
    except OSError as error:
        raise CniError(
            Code.INVALID_ENVIRONMENT,
            f"CNI_NETNS {netns} is no network namespace",
            error.strerror or str(error),
        ) from None
    if namespace.identity(there) == namespace.identity():
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS {netns} is the node's own namespace")
    return there


def _set_host_sysctls(name: str, families: Sequence[int]) -> None:
    settings = []
    if 4 in families:
        settings += [
            (f"net/ipv4/conf/{name}/route_localnet", "1"),
            (f"net/ipv4/neigh/{name}/proxy_delay", "0"),
            (f"net/ipv4/conf/{name}/proxy_arp", "1"),
            (f"net/ipv4/conf/{name}/forwarding", "1"),
        ]
    if 6 in families:
        settings += [
            (f"net/ipv6/conf/{name}/accept_dad", "0"),
            (f"net/ipv6/conf/{name}/disable_ipv6", "0"),
            (f"net/ipv6/conf/{name}/proxy_ndp", "1"),
            (f"net/ipv6/conf/{name}/forwarding", "1"),
        ]
    for setting, value in settings:
        namespace.write_sysctl(setting, value)
    _try_sysctl(f"net/ipv6/conf/{name}/accept_ra", "0")


def _set_pod_sysctls(wire: Wire, families: Sequence[int]) -> None:
    """To be called inside the pod's namespace."""
    is_forwarding = "1" if wire.is_forwarding else "0"
    namespace.write_sysctl("net/ipv4/ip_forward", is_forwarding)
    if 6 in families:
        for name in ("all", "default", "lo"):
            namespace.write_sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "0")
        namespace.write_sysctl(f"net/ipv6/conf/{wire.pod_interface}/accept_dad", "0")
        namespace.write_sysctl("net/ipv6/conf/all/forwarding", is_forwarding)


def _try_sysctl(setting: str, value: str) -> None:
    try:
        namespace.write_sysctl(setting, value)
    except OSError as error:  # a kernel without IPv6 has nothing to switch off
        log.debug("not set", setting=setting, why=str(error))
