"""Forgetting connections: what the kernel does and what the fake says it does."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest

from cymric.kernel.conntrack import Connections, FakeConnections, KernelConnections
from cymric.kernel.namespace import opened, visiting
from cymric.model.net import Address
from tests.support.cni_node import output

ONE, TWO, FAR = map(ip_address, ("198.19.16.1", "198.19.16.2", "127.0.0.1"))
SIX, FAR_SIX = ip_address("fd00:16::1"), ip_address("::1")
PAIRS = [(ONE, FAR), (FAR, ONE), (TWO, FAR), (FAR, TWO), (SIX, FAR_SIX), (FAR_SIX, SIX)]

Pairs = set[tuple[Address, Address]]


@pytest.fixture(params=["kernel", "fake"])
def table(request: pytest.FixtureRequest) -> Iterator[tuple[Connections, Callable[[], Pairs]]]:
    """A table with one connection for each of PAIRS, and a way to see what is in it."""
    if request.param == "fake":
        fake = FakeConnections()
        fake.pairs = set(PAIRS)
        yield fake, lambda: fake.pairs
        return
    name = f"cyct-{os.getpid()}"
    output("ip", "netns", "add", name)
    try:
        with opened(f"/run/netns/{name}") as descriptor, visiting(descriptor):
            _begin_all()
            connections = KernelConnections()
            yield connections, _tracked
            connections.close()
    finally:
        output("ip", "netns", "del", name)


def _begin_all() -> None:
    output("ip", "link", "set", "lo", "up")
    for address in (ONE, TWO):
        output("ip", "address", "add", f"{address}/32", "dev", "lo")
    output("ip", "address", "add", f"{SIX}/128", "dev", "lo", "nodad")
    for program in ("iptables", "ip6tables"):  # a rule that asks is what begins the tracking
        output(program, "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW", "-j", "ACCEPT")
    for source, destination in PAIRS:
        family = socket.AF_INET if source.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as sender:
            sender.bind((str(source), 0))
            sender.sendto(b"x", (str(destination), 9999))


def _tracked() -> Pairs:
    text = output("conntrack", "-L", "-f", "ipv4") + output("conntrack", "-L", "-f", "ipv6")
    found = re.findall(r"src=(\S+) dst=(\S+) sport=\d+ dport=9999", text)
    return {(ip_address(source), ip_address(destination)) for source, destination in found}


def test_forgets_both_directions(table: tuple[Connections, Callable[[], Pairs]]) -> None:
    """What an address began and what it answered is gone; what others have stays."""
    connections, tracked = table
    assert tracked() == set(PAIRS)
    connections.forget([ONE])
    assert tracked() == {pair for pair in PAIRS if ONE not in pair}
    connections.forget([SIX, ip_address("198.19.16.77")])
    assert tracked() == {(TWO, FAR), (FAR, TWO)}


def test_forgets_nothing_twice(table: tuple[Connections, Callable[[], Pairs]]) -> None:
    """An address without connections is no error."""
    connections, tracked = table
    connections.forget([ONE])
    connections.forget([ONE])
    connections.forget([])
    assert (TWO, FAR) in tracked()
