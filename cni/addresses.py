"""Where a container's addresses come from, and where they go back to.

our IPAM      `ipam.type` cymric-cni-ipam or calico-ipam: by handle, from blocks of this node
delegated     any other type: that plugin is called (`delegate.py`)
unmanaged     named by the container (`ipAddrsNoIpam`): nobody keeps a book of them
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Protocol

from cni import delegate, endpoint
from cni.journal import Entry
from cni.netconf import NetConf, bad_config
from cni.request import Call, Command
from cni.wiring import EVERYTHING
from cymric.kernel.command import Commands
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.net import Address, Network, host_network
from ipam.affinity import go_time
from ipam.asking import Ask, Assignment, Release


class Allocating(Protocol):
    """Our IPAM, as far as it is needed here: `ipam.allocator.Allocator`."""

    async def assign(self, ask: Ask) -> tuple[Assignment, ...]:
        """All that is asked for, or nothing."""
        ...

    async def release_handle(self, handle: str) -> tuple[Address, ...]:
        """Free everything a handle holds."""
        ...

    async def release(self, releases: Sequence[Release]) -> tuple[Address, ...]:
        """Free addresses."""
        ...

    async def held_by(self, handle: str) -> tuple[Address, ...]:
        """What a handle holds."""
        ...


@dataclass(frozen=True, slots=True)
class Given:
    """Addresses for a container. `blocks` beside them when they are from our IPAM."""

    addresses: tuple[Address, ...]
    blocks: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True)
class Addresses:
    """Gives addresses to calls and takes them back. `clock` gives nanoseconds since 1970."""

    node: str
    ipam: Allocating
    commands: Commands
    clock: Callable[[], int] = time.time_ns

    async def give(self, call: Call) -> Given:
        """Addresses for the call. Raises CniError, IPAMError, DatastoreError."""
        wishes = call.wishes
        if wishes.unmanaged:
            return Given(wishes.unmanaged)
        if is_delegated(call):
            if wishes.addresses and not call.config.runtime.ips:
                raise bad_config("addresses by name need our IPAM", call.config.ipam.type)
            asked = delegate.delegate_of(call.config.ipam.type, call.request)
            given = await delegate.add(self.commands, asked)
            return Given(given.addresses)
        families = () if wishes.addresses else wishes.families
        ask = Ask(
            handle=call.handle,
            attributes=endpoint.attributes(call, self.node, go_time(self.clock())),
            ipv4=families.count(4),
            ipv6=families.count(6),
            ipv4_pools=wishes.ipv4_pools,
            ipv6_pools=wishes.ipv6_pools,
            addresses=wishes.addresses,
        )
        assigned = await self.ipam.assign(ask)
        return Given(tuple(a.address for a in assigned), tuple(a.block for a in assigned))

    async def take_back(self, entry: Entry, kept: set[Address]) -> None:
        """Free what an attachment had, but for `kept`, which other interfaces of it have."""
        if entry.delegate is not None:
            await delegate.run(self.commands, entry.delegate, Command.DEL)
        elif not kept:
            await self.ipam.release_handle(entry.handle)
        else:
            held = [a for a in await self.ipam.held_by(entry.handle) if a not in kept]
            if held:
                await self.ipam.release([Release(address, entry.handle) for address in held])

    async def missing(self, call: Call, wanted: set[Address]) -> set[Address]:
        """Which of `wanted` the container does not hold. Raises CniError."""
        if is_delegated(call):
            asked = delegate.delegate_of(call.config.ipam.type, call.request)
            await delegate.run(self.commands, asked, Command.CHECK)
            return set()
        return wanted - set(await self.ipam.held_by(call.handle))

    async def still_held(self, call: Call, stored: WorkloadEndpoint) -> tuple[Address, ...]:
        """The addresses of a stored endpoint of the same container, if it still has them all."""
        addresses = stored.spec.addresses
        if endpoint.is_foreign(stored):
            return addresses
        held = await self.ipam.held_by(call.handle)
        return addresses if addresses and set(addresses) <= set(held) else ()


def is_delegated(call: Call) -> bool:
    """Whether another plugin gives the addresses."""
    return not (call.is_ipam_only or call.config.ipam.is_own)


def is_foreign(call: Call) -> bool:
    """Whether the addresses are not in our IPAM's books."""
    return is_delegated(call) or bool(call.wishes.unmanaged)


def destinations(config: NetConf) -> tuple[Network, ...]:
    """What a pod reaches through its pair; empty means everything.

    Routes that are configured for a delegated IPAM plugin replace the default ones.
    """
    if config.ipam.is_own or not config.ipam.routes:
        return ()
    try:
        wanted = [ip_network(route.dst) for route in config.ipam.routes]
    except ValueError as error:
        raise bad_config("ipam.routes cannot be read", str(error)) from None
    if config.include_default_routes:
        wanted += EVERYTHING.values()
    return tuple(dict.fromkeys(wanted))


def result_routes(config: NetConf, addresses: Sequence[Address]) -> tuple[Network, ...]:
    """What the result says of routes: our IPAM's one for each address, or the configured ones."""
    if config.ipam.is_own:
        return tuple(host_network(address) for address in addresses)
    return destinations(config)
