"""The table driver does the same on the fake, on iptables-nft and on iptables-legacy."""

from __future__ import annotations

import secrets
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import pytest

from cymric.kernel.command import Commands, FakeCommands, Finished, HostCommands
from felix.iptables.backend import Backend, Variant
from felix.iptables.table import Table, TableFailed
from felix.rules.rule import ACCEPT, DROP, Chain, Goto, Jump, Match, Rule, TableContent
from felix.rules.rule import chains_by_name as chains
from tests.support.fake_iptables import FakeIptables

HOOK = Rule(action=Jump("cali-FORWARD"))
LAST = Rule(action=ACCEPT, comments=("the end",))


class Host(Protocol):
    """A machine with one iptables."""

    variant: Variant

    @property
    def commands(self) -> Commands:
        """Its programs."""

    def others(self, *words: str) -> None:
        """Somebody else runs iptables on the filter table."""

    def rules(self, chain: str) -> list[str]:
        """The rules of a chain of the filter table, in order."""

    def chains(self) -> set[str]:
        """All chains of the filter table."""

    def writes(self) -> int:
        """How many transactions were sent."""


@dataclass
class FakeHost:
    """In memory."""

    variant: Variant = "nft"

    def __post_init__(self) -> None:
        self.iptables = FakeIptables()
        self.commands = self.iptables.commands()

    def others(self, *words: str) -> None:
        table = self.iptables.tables["filter"]
        match words:
            case ["-N", chain]:
                table[chain] = []
            case ["-A", chain, *rule]:
                table[chain].append(" ".join(rule))
            case ["-I", chain, *rule]:
                table[chain].insert(0, " ".join(rule))
            case ["-F", chain]:
                table[chain] = []

    def rules(self, chain: str) -> list[str]:
        return self.iptables.tables["filter"].get(chain, [])

    def chains(self) -> set[str]:
        return set(self.iptables.tables["filter"])

    def writes(self) -> int:
        return len(self.iptables.restores)


class CountingCommands(HostCommands):
    """Real programs, run in a namespace of our own; restores are counted."""

    def __init__(self, namespace: str) -> None:
        super().__init__()
        self.restores = 0
        self._prefix = ("ip", "netns", "exec", namespace)

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        timeout_s: float = 30.0,
        env: object = None,
    ) -> Finished:
        self.restores += "restore" in argv[0]
        return await super().run((*self._prefix, *argv), stdin=stdin, timeout_s=timeout_s)

    async def feed(self, argv: Sequence[str], text: str, *, timeout_s: float = 30.0) -> None:
        self.restores += "restore" in argv[0]
        await super().feed((*self._prefix, *argv), text, timeout_s=timeout_s)


@dataclass
class RealHost:
    """A network namespace."""

    variant: Variant
    namespace: str

    def __post_init__(self) -> None:
        self.commands = CountingCommands(self.namespace)

    def others(self, *words: str) -> None:
        self._run(f"iptables-{self.variant}", *words)

    def rules(self, chain: str) -> list[str]:
        start = f"-A {chain} "
        return [line[len(start) :] for line in self._save() if line.startswith(start)]

    def chains(self) -> set[str]:
        return {line[1:].split()[0] for line in self._save() if line.startswith(":")}

    def writes(self) -> int:
        return self.commands.restores

    def _save(self) -> list[str]:
        return self._run(f"iptables-{self.variant}-save", "-t", "filter").splitlines()

    def _run(self, *words: str) -> str:
        command = ["ip", "netns", "exec", self.namespace, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(
    params=[
        "fake",
        pytest.param("nft", marks=pytest.mark.root),
        pytest.param("legacy", marks=pytest.mark.root),
    ]
)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """The fake, and one namespace for each variant."""
    if request.param == "fake":
        yield FakeHost()
        return
    namespace = f"cyflx-c-{secrets.token_hex(3)}"
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        real = RealHost(request.param, namespace)
        yield real
        real.commands.close()
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)


def driver(host: Host) -> Table:
    """A driver without memory, as a fresh process has it."""
    return Table("filter", Backend(host.variant), host.commands, clock=time.monotonic)


def content(*more: Chain, last: bool = True) -> TableContent:
    """A hooked chain with one rule per further chain."""
    root = Chain("cali-FORWARD", tuple(Rule(action=Jump(chain.name)) for chain in more))
    return TableContent(
        "filter",
        chains(root, *more),
        inserts={"FORWARD": (HOOK,)},
        appends={"FORWARD": (LAST,)} if last else {},
    )


def drops(name: str, count: int = 1) -> Chain:
    """A chain of ours."""
    rules = (Rule(Match().source(f"192.0.2.{number}/32"), DROP) for number in range(count))
    return Chain(name, tuple(rules))


async def applied(host: Host, wanted: TableContent) -> Table:
    """A fresh driver that wrote `wanted`."""
    table = driver(host)
    table.want(wanted)
    await table.apply()
    return table


async def test_wanted_chains_and_hooks_appear(host: Host) -> None:
    """Reached chains are written, hooks inserted first and appended last."""
    host.others("-A", "FORWARD", "-s", "192.0.2.9/32", "-j", "DROP")
    await applied(host, content(drops("cali-x", 2)))
    assert {"cali-FORWARD", "cali-x"} <= host.chains()
    first, theirs, last = host.rules("FORWARD")
    assert "cali-FORWARD" in first
    assert theirs == "-s 192.0.2.9/32 -j DROP"
    assert "the end" in last
    assert len(host.rules("cali-x")) == 2


async def test_fresh_driver_writes_nothing_when_nothing_differs(host: Host) -> None:
    """A restarted process recognises its rules by their hashes."""
    wanted = content(drops("cali-x", 3), Chain("cali-empty"))
    await applied(host, wanted)
    writes = host.writes()
    table = driver(host)
    table.want(wanted)
    assert await table.apply() is False
    assert host.writes() == writes


async def test_only_changed_chains_are_in_the_transaction(host: Host) -> None:
    """A changed chain is written; unchanged ones keep their rules (and counters)."""
    table = await applied(host, content(drops("cali-x", 2), drops("cali-y", 2)))
    table.want(content(drops("cali-x", 2), drops("cali-y", 3)))
    assert await table.apply() is True
    assert len(host.rules("cali-y")) == 3
    if isinstance(host, FakeHost):
        assert "cali-x" not in host.iptables.restores[-1]


async def test_unwanted_chains_and_rules_of_ours_go(host: Host) -> None:
    """Chains by prefix, rules by hash or by where they jump; others' stay."""
    host.others("-N", "cali-old")
    host.others("-N", "OTHERS")
    host.others("-A", "cali-old", "-j", "DROP")
    host.others("-A", "INPUT", "-j", "cali-old")
    host.others("-A", "INPUT", "-j", "OTHERS")
    await applied(host, content())
    assert "cali-old" not in host.chains()
    assert "OTHERS" in host.chains()
    assert host.rules("INPUT") == ["-j OTHERS"]


async def test_chains_that_refer_to_each_other_go_together(host: Host) -> None:
    """A tree of chains is removed in one transaction."""
    tree = content(Chain("cali-a", (Rule(action=Goto("cali-b")),)))
    with_leaf = TableContent("filter", {**tree.chains, **chains(drops("cali-b"))}, tree.inserts)
    table = await applied(host, with_leaf)
    assert {"cali-a", "cali-b"} <= host.chains()
    table.want(TableContent("filter"))
    await table.apply()
    assert not any(name.startswith("cali-") for name in host.chains())
    assert host.rules("FORWARD") == []


async def test_check_puts_a_displaced_hook_back(host: Host) -> None:
    """A foreign rule above our jump moves below it at the next check; it is not lost."""
    table = await applied(host, content())
    host.others("-I", "FORWARD", "-s", "192.0.2.9/32", "-j", "DROP")
    host.others("-A", "FORWARD", "-s", "192.0.2.8/32", "-j", "DROP")
    assert await table.check() is True
    rules = host.rules("FORWARD")
    assert "cali-FORWARD" in rules[0]
    assert [rule.split()[1] for rule in rules[1:3]] == ["192.0.2.9/32", "192.0.2.8/32"]
    assert "the end" in rules[3]
    assert await table.check() is False


async def test_check_repairs_a_flushed_chain(host: Host) -> None:
    """Rules removed behind our back come back."""
    table = await applied(host, content(drops("cali-x", 2)))
    host.others("-F", "cali-x")
    assert await table.check() is True
    assert len(host.rules("cali-x")) == 2


async def test_stale_memory_costs_a_retry_only(host: Host) -> None:
    """A write that fails because others changed our rules is repeated after reading."""
    table = await applied(host, content())
    host.others("-F", "FORWARD")
    table.want(content(last=False))
    assert await table.apply() is True
    assert len(host.rules("FORWARD")) == 1


async def test_refused_rules_raise_and_change_nothing(host: Host) -> None:
    """When a transaction can never land, TableFailed is raised and the table is as before."""
    table = await applied(host, content(drops("cali-x")))
    broken = Chain("cali-x", (Rule(action=Jump("cali-no")),))
    if isinstance(host, FakeHost):
        host.iptables.fail_next = 100
        table.want(content(drops("cali-x", 2)))
    else:
        bad = Chain(broken.name, (Rule(Match().source("not-an-address"), DROP),))
        table.want(content(bad))
    with pytest.raises(TableFailed):
        await table.apply()
    assert len(host.rules("cali-x")) == 1


async def test_missing_program_is_an_error() -> None:
    """A host without iptables is told apart from an empty table."""
    table = Table("filter", Backend("nft"), FakeCommands({}), clock=time.monotonic)
    table.want(content())
    with pytest.raises(TableFailed, match="no such program"):
        await table.apply()
