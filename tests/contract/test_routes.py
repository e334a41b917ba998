"""The route port behaves the same on a real kernel and on the fake."""

from __future__ import annotations

import errno
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import pytest

from cymric.kernel.api import NextHop, Owns, Route, Routes, blackhole, on_link, via
from cymric.kernel.fake_routes import FakeRoutes, FakeRoutingTable
from cymric.kernel.namespace import opened, visiting
from cymric.kernel.routes import RouteTable
from cymric.model.net import Address, Network, parse_address, parse_network

ONE, OTHER = parse_address("198.19.0.2"), parse_address("198.19.0.3")
NOWHERE = parse_address("192.0.2.1")
BLOCK, SECOND = parse_network("198.19.16.0/26"), parse_network("198.19.16.64/26")
HOST = parse_network("198.19.16.7/32")
V6_BLOCK, V6_ONE = parse_network("fd00:16::/122"), parse_address("fd00:1::2")
V6_OTHER, V6_THIRD = parse_address("fd00:1::3"), parse_address("fd00:1::4")
OWN, V6_OWN = parse_address("198.19.0.1"), parse_address("fd00:1::1")


class Kernel(Protocol):
    """A network with device `up0` (198.19.0.1/24, fd00:1::1/64) and `up1`, and whoever else."""

    def routes(self, protocol: int = 179, owns: Owns | None = None) -> Routes:
        """A fresh driver, as a restarted process has it."""

    def add_foreign(self, prefix: Network, *, protocol: int, gateway: Address) -> None:
        """Somebody else adds a route of metric 1024."""

    def remove(self, prefix: Network) -> None:
        """Somebody else removes the route of metric 1024."""

    def remove_device(self, name: str) -> None:
        """A device goes."""

    def protocols(self, prefix: Network) -> list[int]:
        """The protocol numbers of all routes to exactly this prefix."""


@dataclass
class RealKernel:
    """A network namespace of our own."""

    namespace: str

    def ip(self, *words: str) -> str:
        command = ["ip", "-n", self.namespace, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def routes(self, protocol: int = 179, owns: Owns | None = None) -> Routes:
        with opened(f"/run/netns/{self.namespace}") as namespace, visiting(namespace):
            return RouteTable(protocol=protocol, owns=owns)

    def add_foreign(self, prefix: Network, *, protocol: int, gateway: Address) -> None:
        words = ["via", str(gateway), "proto", str(protocol), "metric", "1024"]
        self.ip("route", "add", str(prefix), *words)

    def remove(self, prefix: Network) -> None:
        self.ip(f"-{prefix.version}", "route", "del", str(prefix), "metric", "1024")

    def remove_device(self, name: str) -> None:
        self.ip("link", "del", name)

    def protocols(self, prefix: Network) -> list[int]:
        lines = self.ip("-d", "-N", f"-{prefix.version}", "route", "show", "exact", str(prefix))
        words = [line.split() for line in lines.splitlines() if "proto" in line]
        return [int(line[line.index("proto") + 1]) for line in words]


class FakeKernel:
    """The same network in memory."""

    def __init__(self) -> None:
        self.table = FakeRoutingTable(
            {
                "up0": (parse_network("198.19.0.0/24"), parse_network("fd00:1::/64")),
                "up1": (),
            }
        )

    def routes(self, protocol: int = 179, owns: Owns | None = None) -> Routes:
        return FakeRoutes(self.table, protocol=protocol, owns=owns)

    def add_foreign(self, prefix: Network, *, protocol: int, gateway: Address) -> None:
        self.table.entries[prefix, 1024] = (protocol, via(gateway))

    def remove(self, prefix: Network) -> None:
        del self.table.entries[prefix, 1024]

    def remove_device(self, name: str) -> None:
        self.table.remove_device(name)

    def protocols(self, prefix: Network) -> list[int]:
        return [held[0] for (place, _), held in self.table.entries.items() if place == prefix]


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.root)])
def kernel(request: pytest.FixtureRequest) -> Iterator[Kernel]:
    if request.param == "fake":
        yield FakeKernel()
        return
    namespace = f"cyrib-{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        real = RealKernel(namespace)
        real.ip("link", "add", "up0", "type", "veth", "peer", "name", "far0")
        real.ip("link", "add", "up1", "type", "veth", "peer", "name", "far1")
        for device in ("lo", "up0", "far0", "up1", "far1"):
            real.ip("link", "set", device, "up")
        real.ip("address", "add", "198.19.0.1/24", "dev", "up0")
        real.ip("-6", "address", "add", "fd00:1::1/64", "dev", "up0", "nodad")
        yield real
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)


async def test_routes_are_written_and_read_back(kernel: Kernel) -> None:
    """Routes through gateways, to devices and into the void are read back as they were wanted."""
    wanted = {BLOCK: via(ONE), SECOND: blackhole(), HOST: on_link("up1"), V6_BLOCK: via(V6_ONE)}
    applied = await kernel.routes().apply(wanted)
    assert (applied.added, applied.refused) == (4, {})
    actual = await kernel.routes().list()
    assert actual.keys() == wanted.keys()
    assert all(wanted[prefix].is_met_by(route) for prefix, route in actual.items())
    assert actual[BLOCK].next_hops == (NextHop(ONE, "up0"),)


async def test_several_next_hops(kernel: Kernel) -> None:
    """A route with several next hops keeps their order and weights."""
    shared = Route(next_hops=(NextHop(ONE), NextHop(OTHER, weight=3)))
    assert not (await kernel.routes().apply({BLOCK: shared})).refused
    actual = (await kernel.routes().list())[BLOCK]
    assert [(hop.gateway, hop.weight) for hop in actual.next_hops] == [(ONE, 1), (OTHER, 3)]


async def test_several_next_hops_in_ipv6(kernel: Kernel) -> None:
    """IPv6 routes share traffic likewise; more and fewer next hops are one replace."""
    routes = kernel.routes()
    for gateways in ((V6_ONE, V6_OTHER), (V6_OTHER, V6_ONE, V6_THIRD), (V6_ONE,)):
        wanted = Route(next_hops=tuple(map(NextHop, gateways)))
        applied = await routes.apply({V6_BLOCK: wanted})
        assert (applied.added + applied.replaced, applied.refused) == (1, {})
        actual = (await kernel.routes().list())[V6_BLOCK]
        assert tuple(hop.gateway for hop in actual.next_hops) == gateways
        assert kernel.protocols(V6_BLOCK) == [179]
        assert (await kernel.routes().apply({V6_BLOCK: wanted})).changed == 0


async def test_metric_and_source(kernel: Kernel) -> None:
    """The metric and the address that the host itself uses are kept, in both families."""
    wanted = {
        BLOCK: Route(next_hops=(NextHop(ONE),), metric=512, source=OWN),
        V6_BLOCK: Route(next_hops=(NextHop(V6_ONE),), metric=2048, source=V6_OWN),
    }
    assert not (await kernel.routes().apply(wanted)).refused
    actual = await kernel.routes().list()
    assert all(wanted[prefix].is_met_by(route) for prefix, route in actual.items())
    assert actual.keys() == wanted.keys()
    moved = {BLOCK: Route(next_hops=(NextHop(ONE),), metric=512)}
    assert (await kernel.routes().apply(moved)).replaced == 1
    assert (await kernel.routes().list())[BLOCK].source is None


async def test_changes_leave_all_other_routes(kernel: Kernel) -> None:
    """A change adds, replaces and deletes what it names, whoever it was read from, and no more."""
    routes = kernel.routes()
    await routes.apply({BLOCK: via(ONE), SECOND: via(ONE), V6_BLOCK: via(V6_ONE)})
    for driver in (routes, kernel.routes()):
        applied = await driver.change({BLOCK: via(OTHER), SECOND: None, HOST: via(ONE)})
        assert (applied.added, applied.replaced, applied.deleted) == (1, 1, 1)
        assert (await kernel.routes().list()).keys() == {BLOCK, HOST, V6_BLOCK}
        assert kernel.protocols(BLOCK) == [179]
        undone = await driver.change({BLOCK: via(ONE), SECOND: via(ONE), HOST: None})
        assert (undone.changed, undone.refused) == (3, {})
    assert (await routes.change({BLOCK: via(ONE, metric=512)})).changed == 2
    assert (await kernel.routes().list())[BLOCK].metric == 512
    assert (await routes.change({BLOCK: None, HOST: None})).deleted == 1
    assert kernel.protocols(BLOCK) == []


async def test_a_refused_change_is_named(kernel: Kernel) -> None:
    """Somebody else's route stays, and what cannot be reached is told, each by itself."""
    kernel.add_foreign(BLOCK, protocol=4, gateway=OTHER)
    routes = kernel.routes()
    await routes.list()
    applied = await routes.change({BLOCK: via(ONE), SECOND: via(NOWHERE), HOST: via(ONE)})
    assert applied.added == 1
    assert applied.refused.keys() == {BLOCK, SECOND}
    assert kernel.protocols(BLOCK) == [4]
    assert (await kernel.routes().list()).keys() == {HOST}


async def test_a_second_metric_left_behind_goes(kernel: Kernel) -> None:
    """Of two routes of ours to one prefix the unwanted one is removed, and only that."""
    await kernel.routes().apply({BLOCK: via(ONE, metric=512)})
    await kernel.routes(protocol=4).apply({})
    kernel.add_foreign(BLOCK, protocol=179, gateway=OTHER)
    applied = await kernel.routes().apply({BLOCK: via(ONE, metric=512)})
    assert (applied.deleted, applied.added, applied.replaced) == (1, 0, 0)
    assert kernel.protocols(BLOCK) == [179]
    assert (await kernel.routes().list())[BLOCK].metric == 512


async def test_applying_the_same_again_writes_nothing(kernel: Kernel) -> None:
    """A restarted process that wants what is there changes nothing."""
    wanted = {BLOCK: via(ONE), SECOND: blackhole(), V6_BLOCK: blackhole(), HOST: on_link("up1")}
    await kernel.routes().apply(wanted)
    assert (await kernel.routes().apply(wanted)).changed == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(via(ONE), via(OTHER), id="other gateway"),
        pytest.param(blackhole(), via(ONE), id="blackhole to gateway"),
        pytest.param(via(ONE), blackhole(), id="gateway to blackhole"),
        pytest.param(via(ONE), on_link("up1"), id="gateway to device"),
        pytest.param(on_link("up1"), via(ONE), id="device to gateway"),
        pytest.param(
            via(ONE), Route(next_hops=(NextHop(ONE), NextHop(OTHER))), id="one to several"
        ),
    ],
)
async def test_a_changed_route_is_one_replace(kernel: Kernel, first: Route, second: Route) -> None:
    """Whatever changes at equal metric is one replace and leaves one route behind."""
    routes = kernel.routes()
    await routes.apply({BLOCK: first})
    applied = await routes.apply({BLOCK: second})
    assert (applied.replaced, applied.added, applied.deleted, applied.refused) == (1, 0, 0, {})
    assert second.is_met_by((await kernel.routes().list())[BLOCK])
    assert kernel.protocols(BLOCK) == [179]


async def test_a_changed_kind_is_one_replace_in_ipv6(kernel: Kernel) -> None:
    """IPv6 keeps routes of one prefix in a list; a blackhole must not stay behind its successor."""
    routes = kernel.routes()
    await routes.apply({V6_BLOCK: blackhole()})
    assert (await routes.apply({V6_BLOCK: via(V6_ONE)})).replaced == 1
    assert kernel.protocols(V6_BLOCK) == [179]


async def test_a_changed_metric_leaves_one_route(kernel: Kernel) -> None:
    """Another metric is another route to the kernel: the old one goes after the new one came."""
    routes = kernel.routes()
    await routes.apply({BLOCK: via(ONE, metric=512)})
    applied = await routes.apply({BLOCK: via(ONE, metric=1024)})
    assert (applied.added, applied.deleted) == (1, 1)
    assert kernel.protocols(BLOCK) == [179]
    assert (await kernel.routes().list())[BLOCK].metric == 1024


async def test_unwanted_routes_of_ours_go(kernel: Kernel) -> None:
    """A fresh process removes what an earlier one left and nobody wants."""
    await kernel.routes().apply({BLOCK: via(ONE), SECOND: blackhole(), V6_BLOCK: via(V6_ONE)})
    applied = await kernel.routes().apply({SECOND: blackhole()})
    assert applied.deleted == 2
    assert (await kernel.routes().list()).keys() == {SECOND}


async def test_routes_of_others_are_never_touched(kernel: Kernel) -> None:
    """Another protocol's route of equal prefix and metric is kept, and ours is refused by name."""
    kernel.add_foreign(BLOCK, protocol=4, gateway=OTHER)
    kernel.add_foreign(SECOND, protocol=4, gateway=OTHER)
    routes = kernel.routes()
    applied = await routes.apply({BLOCK: via(ONE), HOST: via(ONE)})
    assert {prefix: why.errno for prefix, why in applied.refused.items()} == {BLOCK: errno.EEXIST}
    await routes.apply({})
    assert kernel.protocols(BLOCK) == kernel.protocols(SECOND) == [4]


async def test_a_refused_route_costs_only_itself(kernel: Kernel) -> None:
    """A gateway that cannot be reached is an error for its prefix; all others are installed."""
    prefixes = [parse_network(f"198.19.17.{number}/32") for number in range(100)]
    wanted = {
        prefix: via(NOWHERE if number % 20 == 0 else ONE) for number, prefix in enumerate(prefixes)
    }
    applied = await kernel.routes().apply(wanted)
    assert applied.added == 95
    assert applied.refused.keys() == {prefixes[number] for number in range(0, 100, 20)}
    assert {why.errno for why in applied.refused.values()} == {errno.ENETUNREACH}
    assert all(why.reason for why in applied.refused.values())


async def test_the_last_route_of_a_batch_may_be_the_refused_one(kernel: Kernel) -> None:
    """The answer that ends a batch may itself be an error."""
    applied = await kernel.routes().apply({BLOCK: via(ONE), SECOND: via(NOWHERE)})
    assert applied.refused.keys() == {SECOND}
    assert applied.added == 1


async def test_a_refused_change_keeps_the_old_route(kernel: Kernel) -> None:
    """When the new next hop is refused the old one stays, also across a change of metric."""
    routes = kernel.routes()
    await routes.apply({BLOCK: via(ONE), SECOND: via(ONE, metric=512)})
    applied = await routes.apply({BLOCK: via(NOWHERE), SECOND: via(NOWHERE)})
    assert applied.refused.keys() == {BLOCK, SECOND}
    actual = await kernel.routes().list()
    assert [actual[prefix].next_hops[0].gateway for prefix in (BLOCK, SECOND)] == [ONE, ONE]


async def test_a_missing_device_is_named(kernel: Kernel) -> None:
    """A route to a device that is not there is refused with its name; the rest is written."""
    applied = await kernel.routes().apply({HOST: on_link("cali0"), BLOCK: via(ONE)})
    assert applied.added == 1
    assert applied.refused[HOST].errno == errno.ENODEV
    assert "cali0" in applied.refused[HOST].reason


async def test_a_route_removed_by_another_hand_comes_back_after_invalidate(kernel: Kernel) -> None:
    """The driver trusts what it read until told that it may be wrong."""
    routes = kernel.routes()
    wanted = {BLOCK: via(ONE), SECOND: blackhole()}
    await routes.apply(wanted)
    kernel.remove(BLOCK)
    assert (await routes.apply(wanted)).changed == 0
    routes.invalidate()
    assert (await routes.apply(wanted)).added == 1


async def test_deleting_what_is_gone_is_no_error(kernel: Kernel) -> None:
    """A route that vanished with its device is as deleted as we wanted it."""
    routes = kernel.routes()
    await routes.apply({HOST: on_link("up1"), BLOCK: via(ONE)})
    kernel.remove_device("up1")
    applied = await routes.apply({BLOCK: via(ONE)})
    assert applied.refused == {}
    assert (await routes.list()).keys() == {BLOCK}


async def test_a_shared_protocol_number_is_divided_by_a_predicate(kernel: Kernel) -> None:
    """Felix shares protocol 3 with `ip route add`: only routes on its own devices are its own."""
    kernel.add_foreign(BLOCK, protocol=3, gateway=ONE)

    def is_local(_: Network, route: Route) -> bool:
        return any((hop.device or "").startswith("up1") for hop in route.next_hops)

    await kernel.routes(3, is_local).apply({HOST: on_link("up1")})
    fresh = kernel.routes(3, is_local)
    assert (await fresh.list()).keys() == {HOST}
    assert (await fresh.apply({})).deleted == 1
    assert kernel.protocols(BLOCK) == [3]


async def test_many_routes_in_batches(kernel: Kernel) -> None:
    """More routes than one batch holds all arrive, and all leave."""
    wanted = {parse_network(f"10.{n >> 8}.{n & 255}.0/26"): via(ONE) for n in range(3000)}
    routes = kernel.routes()
    assert (await routes.apply(wanted)).added == 3000
    assert len(await kernel.routes().list()) == 3000
    assert (await kernel.routes().apply({})).deleted == 3000
