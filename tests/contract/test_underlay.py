"""The underlay as the kernel tells it: routes of others, and what changes about them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

import pytest

from cymric.kernel.namespace import opened, visiting
from cymric.kernel.underlay import Change, KernelUnderlay, OtherRoute, Out
from cymric.model.net import parse_address, parse_network
from tests.support.eventually import eventually
from tests.support.underlay import run

pytestmark = pytest.mark.root


@dataclass
class Machine:
    """A namespace with two devices, of which `up0` has addresses."""

    namespace: str

    def ip(self, *words: str) -> str:
        return run("ip", "-n", self.namespace, *words)

    def underlay(self) -> KernelUnderlay:
        with opened(f"/run/netns/{self.namespace}") as descriptor, visiting(descriptor):
            return KernelUnderlay()

    def index(self, device: str) -> int:
        return int(self.ip("-o", "link", "show", device).partition(":")[0])


@pytest.fixture
def machine() -> Iterator[Machine]:
    name = f"cyb2-{secrets.token_hex(4)}"
    run("ip", "netns", "add", name)
    try:
        made = Machine(name)
        made.ip("link", "add", "up0", "type", "veth", "peer", "name", "up1")
        for device in ("up0", "up1"):
            made.ip("link", "set", device, "up")
        made.ip("address", "add", "198.19.0.1/24", "dev", "up0")
        made.ip("address", "add", "fd00:1::1/64", "dev", "up0", "nodad")
        yield made
    finally:
        run("ip", "netns", "delete", name)


async def test_others_routes_are_read(machine: Machine) -> None:
    """Routes out of devices, through gateways, several of them, and into the void; not bgpd's."""
    machine.ip("route", "add", "default", "via", "198.19.0.254", "metric", "20")
    machine.ip("route", "add", "198.19.4.0/22", "nexthop", "via", "198.19.0.2",
               "nexthop", "via", "198.19.0.3")  # fmt: skip
    machine.ip("route", "add", "unreachable", "198.19.9.0/24")
    machine.ip("-6", "route", "add", "default", "via", "fe80::1", "dev", "up0", "metric", "30")
    machine.ip("route", "add", "198.19.16.0/26", "via", "198.19.0.2", "proto", "179")
    up0 = machine.index("up0")

    def route(prefix: str, *gateways: str, metric: int = 0) -> OtherRoute:
        outs = tuple(Out(parse_address(one) if one else None, "up0", up0) for one in gateways)
        return OtherRoute(parse_network(prefix), outs, metric)

    with closing(machine.underlay()) as underlay:
        found = set(await underlay.read())
    assert found >= {
        route("198.19.0.0/24", ""),
        route("0.0.0.0/0", "198.19.0.254", metric=20),
        route("198.19.4.0/22", "198.19.0.2", "198.19.0.3"),
        route("198.19.9.0/24"),
        route("fd00:1::/64", "", metric=256),
        route("::/0", "fe80::1", metric=30),
    }
    assert parse_network("198.19.16.0/26") not in {one.prefix for one in found}


async def test_changes_are_told(machine: Machine) -> None:
    """Routes that come and go, devices that go down, addresses that go; nothing of bgpd's routes,
    however many.
    """
    with closing(machine.underlay()) as underlay:
        heard: list[Change] = []

        async def listen() -> None:
            async for change in underlay.changes():
                heard.append(change)

        listening = asyncio.create_task(listen())
        prefix = parse_network("198.19.4.0/22")
        machine.ip("route", "add", "198.19.16.0/26", "via", "198.19.0.2", "proto", "179")
        machine.ip("route", "add", str(prefix), "via", "198.19.0.2")
        await eventually(lambda: heard == [Change(prefix=prefix)])
        machine.ip("route", "del", "198.19.16.0/26", "proto", "179")
        machine.ip("route", "del", str(prefix))
        await eventually(lambda: heard == [Change(prefix=prefix)] * 2)
        machine.ip("address", "del", "fd00:1::1/64", "dev", "up0")
        device = Change(device=machine.index("up0"))
        await eventually(lambda: device in heard)
        heard.clear()
        machine.ip("link", "set", "up0", "down")
        await eventually(lambda: device in heard)
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
