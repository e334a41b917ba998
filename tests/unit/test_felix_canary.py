"""The packet that shows whether packets pass felix' chains; on counters in memory, and for real."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import pytest

from cymric.kernel.command import FakeCommands, Finished, HostCommands
from cymric.kernel.namespace import opened, visiting
from cymric.runtime.health import Health
from felix.canary import PASSED, Canary
from felix.iptables.backend import Backend
from tests.support.cni_node import output

RULE = '-m comment --comment "cali:abcdefghijklmnop" -j'


class Counters:
    """A filter table that counts what is sent, in the chains that packets meet."""

    def __init__(self) -> None:
        self.packets = {"OUTPUT": 5, "INPUT": 7}
        self.met = {"OUTPUT", "INPUT"}
        self.there = {"OUTPUT", "INPUT"}
        self.is_broken = False

    def send(self) -> None:
        for chain in self.met:
            self.packets[chain] += 1

    def save(self, argv: Sequence[str], stdin: str) -> Finished:
        if self.is_broken:
            return Finished(tuple(argv), 1, "", "another program holds the lock")
        lines = [f"[{self.packets[c]}:0] -A {c} {RULE} cali-{c}" for c in sorted(self.there)]
        return Finished(tuple(argv), 0, "\n".join(["*filter", *lines, "COMMIT", ""]), "")


async def look(counters: Counters, health: Health, canary: Canary | None = None) -> Canary:
    if canary is None:
        programs = FakeCommands({"iptables-nft-save": counters.save})
        canary = Canary(programs, Backend("nft"), health, counters.send)
    await canary.look()
    return canary


def is_missing(health: Health) -> bool:
    return PASSED in health.missing


async def test_packets_that_pass() -> None:
    """Both counters moved: ready."""
    counters, health = Counters(), Health()
    health.expect(PASSED)
    await look(counters, health)
    assert not is_missing(health)


@pytest.mark.parametrize("chain", ["OUTPUT", "INPUT"])
async def test_packets_that_do_not_pass(chain: str) -> None:
    """A counter that stands still, or no rule of ours at all: not ready, until they pass again."""
    counters, health = Counters(), Health()
    counters.met = counters.met - {chain}
    canary = await look(counters, health)
    assert is_missing(health)
    counters.met = {"OUTPUT", "INPUT"}
    await look(counters, health, canary)
    assert not is_missing(health)
    counters.there = counters.there - {chain}
    await look(counters, health, canary)
    assert is_missing(health)


async def test_counters_that_cannot_be_read() -> None:
    """It is not known then, and what was seen last counts."""
    counters, health = Counters(), Health()
    counters.is_broken = True
    canary = await look(counters, health)
    assert not is_missing(health)
    counters.is_broken, counters.met = False, set()
    await look(counters, health, canary)
    counters.is_broken = True
    await look(counters, health, canary)
    assert is_missing(health)


@pytest.fixture(params=["nft", "legacy"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """A namespace whose OUTPUT and INPUT begin with a rule that carries our mark."""
    name = f"cycan-{os.getpid()}"
    output("ip", "netns", "add", name)
    try:
        with opened(f"/run/netns/{name}") as descriptor, visiting(descriptor):
            output("ip", "link", "set", "lo", "up")
            for chain in ("OUTPUT", "INPUT"):
                rule = (f"iptables-{request.param}", "-A", chain, "-m", "comment", "--comment")
                output(*rule, "cali:abcdefghijklmnop", "-j", "ACCEPT")
            yield Backend(request.param)
    finally:
        output("ip", "netns", "del", name)


@pytest.mark.root
async def test_on_a_real_kernel(backend: Backend) -> None:
    """The datagram is counted; behind somebody else's rule that accepts all first, it is not."""
    health = Health()
    canary = Canary(HostCommands(), backend, health)
    await canary.look()
    assert not is_missing(health)
    output(f"iptables-{backend.variant}", "-I", "INPUT", "-j", "ACCEPT")
    await canary.look()
    assert is_missing(health)
    output(f"iptables-{backend.variant}", "-D", "INPUT", "1")
    await canary.look()
    assert not is_missing(health)
