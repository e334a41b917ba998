"""One contract for links: the kernel's and the fake's behave alike."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network

import pytest

from cymric.kernel.fake_links import FakeNetwork
from cymric.kernel.host_routes import HostRoutes
from cymric.kernel.links import (
    AlreadyThere,
    Link,
    LinkRoute,
    Links,
    Neighbour,
    NoSuchLink,
    VethPair,
)
from cymric.kernel.namespace import identity, opened, read_sysctl, visiting, write_sysctl
from cymric.kernel.netlink import Netlink

HOST_MAC = "ee:ee:ee:ee:ee:ee"


@dataclass(frozen=True)
class Machine:
    """Two namespaces of the same machine."""

    here: Links
    there: Links
    there_descriptor: int


@pytest.fixture
def namespaces() -> Iterator[tuple[int, int]]:
    names = [f"cycni-{os.getpid()}-{side}" for side in ("a", "b")]
    for name in names:
        subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with opened(f"/run/netns/{names[0]}") as here, opened(f"/run/netns/{names[1]}") as there:
            yield here, there
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture(params=["fake", pytest.param("kernel", marks=pytest.mark.root)])
async def machine(request: pytest.FixtureRequest) -> AsyncIterator[Machine]:
    if request.param == "fake":
        network = FakeNetwork()
        yield Machine(network.add(3), network.add(4), 4)
        return
    here, there = request.getfixturevalue("namespaces")
    links = Netlink(here), Netlink(there)
    yield Machine(links[0], links[1], there)
    for one in links:
        one.close()


async def _pair(machine: Machine, name: str = "cali1") -> tuple[Link, Link]:
    pair = VethPair(
        name=name,
        peer_name="eth0",
        peer_namespace=machine.there_descriptor,
        mac=HOST_MAC,
        mtu=1400,
    )
    await machine.here.create_veth(pair)
    ours, theirs = await machine.here.get(name), await machine.there.get("eth0")
    assert ours is not None
    assert theirs is not None
    return ours, theirs


async def test_veth_spans_namespaces(machine: Machine) -> None:
    """A pair has one end in each namespace, with the MAC and MTU asked for, both down."""
    ours, theirs = await _pair(machine)
    assert (ours.kind, ours.mac, ours.mtu, ours.is_up) == ("veth", HOST_MAC, 1400, False)
    assert (theirs.kind, theirs.mtu, theirs.is_up) == ("veth", 1400, False)
    assert theirs.mac not in ("", HOST_MAC)
    assert ours in await machine.here.all()
    assert await machine.there.get("cali1") is None


async def test_pair_carries_when_both_ends_are_up(machine: Machine) -> None:
    """A link that is up runs only once its peer is up as well."""
    ours, theirs = await _pair(machine)
    await machine.here.set_up(ours.index)
    alone = await machine.here.get("cali1")
    assert alone is not None
    assert (alone.is_up, alone.is_running) == (True, False)
    await machine.there.set_up(theirs.index)
    both = await machine.here.get("cali1")
    assert both is not None
    assert both.is_running


async def test_taken_names_are_refused(machine: Machine) -> None:
    """A name in use on either side is an error of its own, and nothing is made."""
    await _pair(machine)
    with pytest.raises(AlreadyThere, match="create veth cali1"):
        await _pair(machine)
    with pytest.raises(AlreadyThere):
        await _pair(machine, "cali2")
    assert await machine.here.get("cali2") is None


async def test_removing_one_end_removes_both(machine: Machine) -> None:
    """Deleting our end deletes the pod's end; a second time there is no such link."""
    ours, _ = await _pair(machine)
    await machine.here.delete(ours.index)
    assert await machine.here.get("cali1") is None
    assert await machine.there.get("eth0") is None
    with pytest.raises(NoSuchLink, match=f"remove link {ours.index}"):
        await machine.here.delete(ours.index)


async def test_addresses_and_routes(machine: Machine) -> None:
    """A pod gets a link route to the gateway, a default route through it and a /32 address."""
    ours, theirs = await _pair(machine)
    await machine.here.set_up(ours.index)
    await machine.there.set_up(theirs.index)
    gateway = ip_address("169.254.1.1")
    to_gateway = LinkRoute(ip_network("169.254.1.1/32"), theirs.index)
    default = LinkRoute(ip_network("0.0.0.0/0"), theirs.index, gateway)
    await machine.there.add_route(to_gateway)
    await machine.there.add_route(default)
    await machine.there.add_address(theirs.index, ip_interface("198.19.16.5/32"))
    assert set(await machine.there.routes(theirs.index)) == {to_gateway, default}
    assert ip_interface("198.19.16.5/32") in await machine.there.addresses(theirs.index)
    with pytest.raises(AlreadyThere):
        await machine.there.add_route(default)
    with pytest.raises(AlreadyThere):
        await machine.there.add_address(theirs.index, ip_interface("198.19.16.5/32"))


async def test_a_route_needs_its_gateway(machine: Machine) -> None:
    """A gateway that no link route reaches is refused, and the error says so."""
    ours, theirs = await _pair(machine)
    await machine.here.set_up(ours.index)
    await machine.there.set_up(theirs.index)
    route = LinkRoute(ip_network("0.0.0.0/0"), theirs.index, ip_address("169.254.1.1"))
    with pytest.raises(OSError, match="invalid gateway"):
        await machine.there.add_route(route)


async def test_neighbours(machine: Machine) -> None:
    """A permanent neighbour is set, replaced and removed; removing it twice is fine."""
    ours, _ = await _pair(machine)
    await machine.here.set_up(ours.index)
    address = ip_address("198.19.16.5")
    for mac in ("02:00:00:00:00:05", "02:00:00:00:00:06"):
        await machine.here.set_neighbour(ours.index, address, mac)
        assert Neighbour(address, mac) in await machine.here.neighbours(ours.index)
    await machine.here.remove_neighbour(ours.index, address)
    await machine.here.remove_neighbour(ours.index, address)
    assert address not in [n.address for n in await machine.here.neighbours(ours.index)]


async def test_changes_are_told(machine: Machine) -> None:
    """A watcher hears of links that come, change and go, in that order."""
    changes = await machine.here.watch()
    ours, _ = await _pair(machine)
    await machine.here.set_up(ours.index)
    await machine.here.delete(ours.index)
    seen: list[Link | None] = []
    async with asyncio.timeout(5):
        async for change in changes:
            if change.name == "cali1":
                seen.append(change.link)
                if change.link is None:
                    break
    await changes.aclose()
    assert seen[0] is not None
    assert not seen[0].is_up
    assert any(link is not None and link.is_up for link in seen)


@pytest.mark.root
def test_visiting_a_namespace_returns_home(namespaces: tuple[int, int]) -> None:
    """What is done while visiting happens there; afterwards we are where we were."""
    home, here = identity(), namespaces[0]
    before = read_sysctl("net/ipv4/ip_forward")
    with visiting(here):
        assert identity() == identity(here)
        other = "0" if read_sysctl("net/ipv4/ip_forward") == "1" else "1"
        write_sysctl("net/ipv4/ip_forward", other)
    with pytest.raises(RuntimeError, match="on purpose"), visiting(here):
        raise RuntimeError("on purpose")
    assert identity() == home
    assert read_sysctl("net/ipv4/ip_forward") == before
    with visiting(here):
        assert read_sysctl("net/ipv4/ip_forward") == other


@pytest.mark.root
def test_whom_the_kernel_sends_an_address_to(namespaces: tuple[int, int]) -> None:
    """A route for one address to a link counts, as does our own address; nothing wider does."""
    here, _ = namespaces
    with visiting(here):
        routes = HostRoutes()
    for command in (
        "link set lo up",
        "link add cali1 type bridge",
        "link set cali1 up",
        "addr add 198.19.0.1/24 dev cali1",
        "route add 198.19.16.5 dev cali1",
        "route add 198.19.16.6 via 198.19.0.9",
        "route add blackhole 198.19.16.64/26",
        "route add 198.19.17.0/24 dev cali1",
        "-6 route add fd00:198::5 dev cali1",
        "-6 route add fd00:198:1::/64 dev cali1",
    ):
        subprocess.run(
            ["nsenter", f"--net=/proc/{os.getpid()}/fd/{here}", "ip", *command.split()],
            check=True,
            pass_fds=[here],
        )
    expected = {
        "198.19.16.5": True,
        "198.19.0.1": True,
        "fd00:198::5": True,
        "198.19.16.6": False,
        "198.19.16.7": False,
        "198.19.16.65": False,
        "198.19.17.1": False,
        "fd00:198:1::1": False,
        "fd00:198::6": False,
    }
    found = {text: routes.leads_to_link(ip_address(text)) for text in expected}
    routes.close()
    assert found == expected


async def test_listings_may_overlap(machine: Machine) -> None:
    """Whoever lists while others do gets all of it, and nobody is refused."""
    for number in range(20):
        await machine.here.create_veth(
            VethPair(name=f"cali{number}", peer_name=f"eth{number}",
                     peer_namespace=machine.there_descriptor)
        )  # fmt: skip
    listed = await asyncio.gather(
        *(machine.here.all() for _ in range(20)),
        *(machine.here.addresses(1) for _ in range(20)),
        *(machine.here.routes(1) for _ in range(20)),
    )
    assert {len(links) for links in listed[:20]} == {21}
