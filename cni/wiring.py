"""The veth pair between a pod and its node.

The node's end has Calico's name and the MAC ee:ee:ee:ee:ee:ee and answers ARP for everything; the
pod's end has one /32 address and sends everything to 169.254.1.1, which nobody owns and which it
knows by a permanent neighbour entry. Routes on the node's side are felix' business. `wire` either
finishes or leaves nothing.

Order matters: sysctls of the node's end are set before it goes up, so that no packet is handled
under the defaults; the pod's address comes last, so that a pod with an address has its routes.
Source: Calico's Linux data plane of its CNI plugin.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Protocol

import structlog

from cni.errors import CniError, Code
from cymric.kernel import namespace
from cymric.kernel.links import Link, LinkRoute, Links, NoSuchLink, VethPair
from cymric.kernel.netlink import Netlink
from cymric.model.endpoints import HOST_MAC, POD_GATEWAY
from cymric.model.net import Address

GATEWAY = ip_address(POD_GATEWAY)
TO_GATEWAY = ip_network(f"{POD_GATEWAY}/32")
EVERYTHING = ip_network("0.0.0.0/0")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """A pair to make or to check. `mac` is the pod's end's; `mtu` 0 means the kernel's default."""

    host_interface: str
    pod_interface: str
    netns: Path
    address: Address
    mac: str = ""
    mtu: int = 0


class Wiring(Protocol):
    """What the daemon wants from the kernel."""

    async def wire(self, wire: Wire) -> None:
        """Make the pair, replacing an old one of that name. Raises CniError, OSError."""
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

    async def faults(self, wire: Wire) -> tuple[str, ...]:
        """What is not as `wire` would make it; empty when all is well."""
        ...


class LinuxWiring:
    """The kernel's pairs, seen from the namespace this process lives in."""

    def __init__(self) -> None:
        self._home: Links = Netlink()

    async def wire(self, wire: Wire) -> None:
        """Make the pair, replacing an old one of that name. Raises CniError, OSError."""
        with ExitStack() as stack:
            there = _enter(stack, wire.netns)
            pod = Netlink(there)
            stack.callback(pod.close)
            await self.unwire_host(wire.host_interface)
            await self._home.create_veth(
                VethPair(
                    name=wire.host_interface,
                    mac=HOST_MAC,
                    peer_name=wire.pod_interface,
                    peer_namespace=there,
                    peer_mac=wire.mac,
                    mtu=wire.mtu,
                )
            )
            try:
                await self._finish(wire, pod, there)
            except BaseException:
                await self.unwire_host(wire.host_interface)
                raise

    async def _finish(self, wire: Wire, pod: Links, there: int) -> None:
        _set_host_sysctls(wire.host_interface)
        ours = await _existing(self._home, wire.host_interface)
        await self._home.set_up(ours.index)
        with namespace.visiting(there):
            namespace.write_sysctl("net/ipv4/ip_forward", "0")
        theirs = await _existing(pod, wire.pod_interface)
        await pod.set_up(theirs.index)
        # The node answers ARP for the gateway by proxy, but only while it has a route towards it.
        # With a permanent entry pods do not depend on that, nor wait for the answer.
        await pod.set_neighbour(theirs.index, GATEWAY, HOST_MAC)
        await pod.add_route(LinkRoute(TO_GATEWAY, theirs.index))
        await pod.add_route(LinkRoute(EVERYTHING, theirs.index, GATEWAY))
        await pod.add_address(theirs.index, ip_interface(f"{wire.address}/32"))

    async def unwire_host(self, host_interface: str) -> None:
        """Remove the pair by the node's end, if it is there."""
        await _remove(self._home, host_interface)

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
            await _remove(pod, pod_interface)

    async def is_there(self, host_interface: str) -> bool:
        """Whether the node has a link of that name."""
        return await self._home.get(host_interface) is not None

    async def faults(self, wire: Wire) -> tuple[str, ...]:
        """What is not as `wire` would make it; empty when all is well."""
        found = []
        ours = await self._home.get(wire.host_interface)
        if ours is None or not ours.is_up:
            found.append(
                f"{wire.host_interface} on the node is {'missing' if not ours else 'down'}"
            )
        with ExitStack() as stack:
            try:
                there = _enter(stack, wire.netns)
            except CniError as error:
                return (*found, str(error))
            pod = Netlink(there)
            stack.callback(pod.close)
            theirs = await pod.get(wire.pod_interface)
            if theirs is None:
                return (*found, f"{wire.pod_interface} in the container is missing")
            if not theirs.is_up:
                found.append(f"{wire.pod_interface} in the container is down")
            if wire.mac and theirs.mac != wire.mac:
                found.append(f"{wire.pod_interface} has MAC {theirs.mac}, not {wire.mac}")
            if ip_interface(f"{wire.address}/32") not in await pod.addresses(theirs.index):
                found.append(f"{wire.pod_interface} does not have address {wire.address}")
            routes = await pod.routes(theirs.index)
            for route in (
                LinkRoute(TO_GATEWAY, theirs.index),
                LinkRoute(EVERYTHING, theirs.index, GATEWAY),
            ):
                if route not in routes:
                    found.append(f"{wire.pod_interface} has no route to {route.destination}")
        return tuple(found)


def random_mac() -> str:
    """A locally administered unicast MAC, as the kernel itself would draw one."""
    raw = bytearray(os.urandom(6))
    raw[0] = raw[0] & 0xFE | 0x02
    return raw.hex(":")


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


async def _existing(links: Links, name: str) -> Link:
    link = await links.get(name)
    if link is None:
        raise NoSuchLink(errno.ENODEV, f"look up link {name}", "it vanished")
    return link


async def _remove(links: Links, name: str) -> None:
    link = await links.get(name)
    if link is None:
        return
    with suppress(NoSuchLink):  # the other end may have taken it along in between
        await links.delete(link.index)


def _set_host_sysctls(name: str) -> None:
    for setting, value in (
        (f"net/ipv4/conf/{name}/route_localnet", "1"),
        (f"net/ipv4/neigh/{name}/proxy_delay", "0"),
        (f"net/ipv4/conf/{name}/proxy_arp", "1"),
        (f"net/ipv4/conf/{name}/forwarding", "1"),
    ):
        namespace.write_sysctl(setting, value)
    try:
        namespace.write_sysctl(f"net/ipv6/conf/{name}/accept_ra", "0")
    except OSError as error:  # a kernel without IPv6 has nothing to switch off
        log.debug("accept_ra not set", why=str(error))
