"""The set driver does the same on the fake and on the kernel."""

from __future__ import annotations

import secrets
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cymric.kernel.command import Commands
from cymric.model.net import parse_network
from felix.ipset.sets import IPSet, IPSets, SavedSet, parse, plan, texts
from tests.contract.test_iptables import CountingCommands
from tests.support.fake_iptables import FakeIpset


class FakeHost:
    """In memory."""

    def __init__(self) -> None:
        self.ipset = FakeIpset()
        self.commands: Commands = self.ipset.commands()

    def others(self, *words: str) -> None:
        match words:
            case ["create", name, kind]:
                self.ipset.sets[name] = (kind, 65536, set())
            case [verb, name, member]:
                members = self.ipset.sets[name][2]
                members.add(member) if verb == "add" else members.discard(member)

    def use(self, name: str) -> None:
        self.ipset.in_use.add(name)

    def release(self, name: str) -> None:
        self.ipset.in_use.discard(name)

    def sets(self) -> dict[str, SavedSet]:
        return parse(self.ipset.run(("ipset", "save"), "").stdout)


class RealHost:
    """A network namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self.commands: Commands = CountingCommands(namespace)

    def others(self, *words: str) -> None:
        self._run("ipset", *words)

    def use(self, name: str) -> None:
        self._rule("-A", name)

    def release(self, name: str) -> None:
        self._rule("-D", name)

    def sets(self) -> dict[str, SavedSet]:
        return parse(self._run("ipset", "save"))

    def _rule(self, verb: str, name: str) -> None:
        match = ("-m", "set", "--match-set", name, "src", "-j", "DROP")
        self._run("iptables-nft", verb, "FORWARD", *match)

    def _run(self, *words: str) -> str:
        command = ["ip", "netns", "exec", self._namespace, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


Host = FakeHost | RealHost


@pytest.fixture(params=["fake", pytest.param("kernel", marks=pytest.mark.root)])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """The fake, and a namespace."""
    if request.param == "fake":
        yield FakeHost()
        return
    namespace = f"cyflx-s-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        yield RealHost(namespace)
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)


def driver(host: Host) -> IPSets:
    """A driver without memory, as a fresh process has it."""
    return IPSets(host.commands, clock=time.monotonic, release_s=0.0)


def pools(*members: str) -> IPSet:
    """A set of prefixes."""
    return IPSet("pools", networks(*members))


def networks(*cidrs: str) -> frozenset[str]:
    """Members."""
    return texts(map(parse_network, cidrs))


async def test_sets_are_created_with_their_members(host: Host) -> None:
    """Prefixes are kept as ipset prints them; /0, which ipset refuses, as two halves."""
    sets = driver(host)
    sets.want([pools("198.19.16.0/21", "192.0.2.1/32"), IPSet("all", networks("0.0.0.0/0"))])
    assert await sets.write() is True
    found = host.sets()
    assert found["cali40pools"].members == {"198.19.16.0/21", "192.0.2.1"}
    assert found["cali40pools"].type == "hash:net"
    assert found["cali40all"].members == {"0.0.0.0/1", "128.0.0.0/1"}


async def test_fresh_driver_writes_nothing_when_nothing_differs(host: Host) -> None:
    """What is read back compares equal to what was written."""
    wanted = [
        pools("198.19.16.0/21", "192.0.2.1"),
        IPSet("me", networks("192.0.2.1"), "hash:ip"),
    ]
    first = driver(host)
    first.want(wanted)
    await first.write()
    again = driver(host)
    again.want(wanted)
    assert await again.write() is False


async def test_members_are_changed_in_place(host: Host) -> None:
    """A small difference is added and deleted."""
    sets = driver(host)
    sets.want([pools("198.19.16.0/21", "198.19.24.0/21", "192.0.2.1")])
    await sets.write()
    sets.want([pools("198.19.16.0/21", "198.19.24.0/21", "192.0.2.2")])
    await sets.write()
    assert host.sets()["cali40pools"].members == {"198.19.16.0/21", "198.19.24.0/21", "192.0.2.2"}


async def test_large_difference_and_wrong_type_are_swapped_in(host: Host) -> None:
    """A set that a rule uses is rewritten under it; no temporary set stays."""
    host.others("create", "cali40pools", "hash:net")
    host.others("add", "cali40pools", "203.0.113.0/24")
    host.use("cali40pools")
    sets = driver(host)
    sets.want([pools("198.19.16.0/21")])
    await sets.write()
    found = host.sets()
    assert found["cali40pools"].members == {"198.19.16.0/21"}
    assert set(found) == {"cali40pools"}
    host.release("cali40pools")


async def test_unwanted_sets_of_ours_go_and_others_stay(host: Host) -> None:
    """Also a temporary set that an interrupted swap left behind."""
    for name in ("cali40old", "cali4t7", "theirs"):
        host.others("create", name, "hash:net")
    sets = driver(host)
    sets.want([pools("198.19.16.0/21")])
    await sets.write()
    await sets.delete_unwanted()
    assert set(host.sets()) == {"cali40pools", "theirs"}


async def test_a_set_in_use_is_removed_when_it_no_longer_is(host: Host) -> None:
    """A rule of somebody else may keep a set alive; that is no failure."""
    host.others("create", "cali40old", "hash:net")
    host.use("cali40old")
    sets = driver(host)
    sets.want([])
    await sets.write()
    await sets.delete_unwanted()
    assert "cali40old" in host.sets()
    host.release("cali40old")
    await sets.delete_unwanted()
    assert "cali40old" not in host.sets()


async def test_check_repairs_what_others_changed(host: Host) -> None:
    """Members added or removed behind our back are corrected."""
    sets = driver(host)
    sets.want([pools("198.19.16.0/21", "198.19.24.0/21")])
    await sets.write()
    host.others("add", "cali40pools", "203.0.113.0/24")
    host.others("del", "cali40pools", "198.19.24.0/21")
    assert await sets.check() is True
    assert host.sets()["cali40pools"].members == {"198.19.16.0/21", "198.19.24.0/21"}
    assert await sets.check() is False


async def test_ipv6_sets_stand_beside_those_of_ipv4(host: Host) -> None:
    """Under names of their own; a swap, a removal and a fresh driver know the family."""
    wanted = [
        pools("198.19.16.0/21"),
        IPSet("pools", networks("fd00:19::/48", "fd00::2/128"), ip_version=6),
    ]
    host.others("create", "cali6t3", "hash:net")
    sets = driver(host)
    sets.want(wanted)
    await sets.write()
    await sets.delete_unwanted()
    assert set(host.sets()) == {"cali40pools", "cali60pools"}
    assert host.sets()["cali60pools"].members == {"fd00:19::/48", "fd00::2"}
    assert host.sets()["cali60pools"].ip_version == 6
    again = driver(host)
    again.want([pools("198.19.16.0/21"), IPSet("pools", networks("fd00:20::/48"), ip_version=6)])
    assert await again.write() is True
    assert host.sets()["cali60pools"].members == {"fd00:20::/48"}


async def test_copies_have_the_wanted_members_and_their_family(host: Host) -> None:
    """A copy is made beside what rules use, under a free name of its family, and goes again."""
    sets = driver(host)
    old, new = frozenset({"192.0.2.1"}), frozenset({"192.0.2.2"})
    one = IPSet("s:one", old, is_policy=True)
    other = IPSet("s:other", frozenset({"fd00::1"}), ip_version=6, is_policy=True)
    sets.want([one, other])
    assert await sets.create() == ()
    sets.want([replace(one, members=new), replace(other, members=frozenset({"fd00::2"}))])
    changes = await sets.create()
    assert {(change.name, *change.gained, *change.lost) for change in changes} == {
        ("cali40s:one", "192.0.2.2", "192.0.2.1"),
        ("cali60s:other", "fd00::2", "fd00::1"),
    }
    assert await sets.copy(change.name for change in changes) == {
        "cali40s:one": "cali4t0",
        "cali60s:other": "cali6t0",
    }
    saved = host.sets()
    assert saved["cali4t0"].members == new
    assert saved["cali6t0"].ip_version == 6
    assert saved["cali40s:one"].members == old
    await sets.write()
    await sets.delete_unwanted()
    saved = host.sets()
    assert saved["cali40s:one"].members == new
    assert not [name for name in saved if name.startswith(("cali4t", "cali6t"))]


async def test_change_at_once_is_a_swap(host: Host) -> None:
    """A set that may not be seen half changed is swapped; a single member is not worth that."""
    sets = driver(host)
    many = frozenset(f"192.0.2.{number}" for number in range(1, 9))
    sets.want([IPSet("s:one", many, is_policy=True)])
    await sets.write()
    for members, is_swapped in (
        (many | {"192.0.2.9"}, False),
        (many | {"192.0.2.10", "192.0.2.11"}, True),
    ):
        lines = plan(
            {"cali40s:one": SavedSet("hash:net", 1048576, many)},
            {"cali40s:one": SavedSet("hash:net", 1048576, members)},
            at_once={"cali40s:one"},
        )
        assert any(line.startswith("swap ") for line in lines) is is_swapped


async def test_a_set_is_removed_a_while_after_it_was_wanted_last() -> None:
    """The kernel may still hold on to a set that no rule names any more: it is given time."""
    ipset, now_s = FakeIpset(), [0.0]
    driver = IPSets(ipset.commands(), clock=lambda: now_s[0], release_s=0.5)
    driver.want([IPSet("a", frozenset({"10.0.0.1"}))])
    await driver.write()
    driver.want([])
    await driver.delete_unwanted()
    assert ipset.sets
    assert driver.delete_due_s == 0.5
    now_s[0] = 0.5
    await driver.delete_unwanted()
    assert not ipset.sets
    assert driver.delete_due_s == float("inf")
