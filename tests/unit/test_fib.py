"""Loc-RIB to kernel routes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from bgpd.announcement import PathAttributes
from bgpd.decision import Choice, Path, Peer
from bgpd.fib import Fib, Wanted, desired_routes, own_routes
from cymric.kernel.api import Route, RoutesApplied, blackhole, via
from cymric.kernel.fake_routes import FakeRoutes, FakeRoutingTable
from cymric.model.net import Network, parse_address, parse_network
from tests.support.eventually import eventually

OTHER = parse_address("198.19.0.3")
OWN, A, B = map(parse_network, ("198.19.16.0/26", "198.19.16.64/26", "198.19.16.128/26"))


def choice(prefix: Network) -> Choice:
    """A path through OTHER."""
    peer = Peer(address=OTHER, asn=1, local_asn=1)
    return Choice(Path(OTHER, PathAttributes(), peer), "only path")


def test_desired_routes() -> None:
    """Every choice is a route through its next hop; own blocks drop, whatever a peer says."""
    assert desired_routes({A: choice(A), OWN: choice(OWN)}, own_routes([OWN], {})) == {
        A: via(OTHER, metric=1024),
        OWN: blackhole(metric=1024),
    }


@dataclass
class Machine:
    """A FIB over a fake kernel; `wanted` is what a test sets."""

    table: FakeRoutingTable = field(
        default_factory=lambda: FakeRoutingTable({"up0": (parse_network("198.19.0.0/24"),)})
    )
    wanted: Wanted | None = None
    applied: int = 0

    @asynccontextmanager
    async def running(self, *, resync_s: float = 60) -> AsyncIterator[Fib]:
        """A FIB that was just started."""
        routes = FakeRoutes(self.table)
        fib = Fib(routes, lambda: self.wanted, on_applied=self._count, resync_s=resync_s)
        task = asyncio.create_task(fib.run())
        fib.kick()
        try:
            yield fib
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    def _count(self) -> None:
        self.applied += 1

    @property
    def prefixes(self) -> set[Network]:
        """What is in the kernel."""
        return {prefix for prefix, _ in self.table.entries}


async def test_nothing_is_written_before_something_is_known() -> None:
    """Before the datastore is in sync even the routes of an earlier process are left alone."""
    machine = Machine()
    machine.table.entries[A, 1024] = (179, via(OTHER))
    async with machine.running() as fib:
        await asyncio.sleep(0.01)
        assert machine.applied == 0
        machine.wanted = Wanted({OWN: blackhole()})
        fib.kick()
        await eventually(lambda: machine.applied == 1)
        assert machine.prefixes == {OWN, A}


async def test_what_an_earlier_process_left_goes_when_the_start_is_over() -> None:
    """Until then it stays; but a route this process once wanted goes when it is withdrawn."""
    machine = Machine(wanted=Wanted({A: via(OTHER)}))
    machine.table.entries[A, 1024] = machine.table.entries[B, 1024] = (179, via(OTHER))
    async with machine.running() as fib:
        await eventually(lambda: machine.applied == 1)
        assert machine.table.writes == 0
        machine.wanted = Wanted({})
        fib.kick()
        await eventually(lambda: machine.prefixes == {B})
        machine.wanted = Wanted({}, keep_inherited=False)
        fib.kick()
        await eventually(lambda: machine.prefixes == set())


async def test_a_refused_route_is_tried_again() -> None:
    """A next hop that cannot be reached yet is reported, and used when it can be."""
    machine = Machine(wanted=Wanted({A: via(OTHER), OWN: blackhole()}, keep_inherited=False))
    networks = machine.table.networks_by_device.pop("up0")
    async with machine.running() as fib:
        await eventually(lambda: fib.refused.keys() == {A})
        assert fib.refused[A].errno == errno.ENETUNREACH
        assert (machine.prefixes, fib.installed) == ({OWN}, 1)
        machine.table.networks_by_device["up0"] = networks
        await eventually(lambda: machine.prefixes == {OWN, A})
        await eventually(lambda: not fib.refused)


async def test_a_route_that_somebody_deletes_comes_back() -> None:
    """The kernel is read back from time to time without any news."""
    machine = Machine(wanted=Wanted({A: via(OTHER)}, keep_inherited=False))
    async with machine.running(resync_s=0.05):
        await eventually(lambda: machine.prefixes == {A})
        machine.table.entries.clear()
        await eventually(lambda: machine.prefixes == {A})


async def test_a_broken_netlink_socket_is_not_the_end() -> None:
    """An error of the driver itself is waited out."""

    class Broken(FakeRoutes):
        failures = 2

        async def apply(self, desired: Mapping[Network, Route]) -> RoutesApplied:
            if self.failures:
                self.failures -= 1
                raise OSError(errno.ENOBUFS, "no buffer space")
            return await super().apply(desired)

    machine = Machine(wanted=Wanted({A: via(OTHER)}))
    fib = Fib(Broken(machine.table), lambda: machine.wanted)
    task = asyncio.create_task(fib.run())
    fib.kick()
    await eventually(lambda: machine.prefixes == {A})
    task.cancel()
