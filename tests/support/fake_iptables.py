"""iptables and ipset in memory: they keep tables and sets, and refuse what the real ones refuse.

Only what Cymric's drivers use is understood; anything else is an error, so that a driver cannot
come to depend on a leniency of the fake.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from cymric.kernel.command import FakeCommands, Finished

KERNEL_CHAINS = {
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
    "nat": ("PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"),
    "mangle": ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"),
    "raw": ("PREROUTING", "OUTPUT"),
}
_TARGET = re.compile(r"(?:^|\s)(?:-j|-g|--jump|--goto) (\S+)")
_BUILT_IN = {"ACCEPT", "DROP", "RETURN", "REJECT", "MARK", "LOG", "MASQUERADE", "SNAT", "DNAT"}


class Refused(Exception):
    """The program ends with an error and nothing was changed."""


@dataclass
class FakeIptables:
    """One variant's tables: rules by chain by table."""

    tables: dict[str, dict[str, list[str]]] = field(
        default_factory=lambda: {
            table: {chain: [] for chain in chains} for table, chains in KERNEL_CHAINS.items()
        }
    )
    restores: list[str] = field(default_factory=list)
    saves: int = 0
    fail_next: int = 0

    def commands(self, variant: str = "nft") -> FakeCommands:
        """The programs of one variant, reading and writing these tables."""
        return FakeCommands(
            {
                f"iptables-{variant}-save": self.save,
                f"iptables-{variant}-restore": self.restore,
            }
        )

    def save(self, argv: Sequence[str], stdin: str) -> Finished:
        """`iptables-save [-t table]`."""
        self.saves += 1
        names = [argv[2]] if "-t" in argv else list(self.tables)
        lines = []
        for name in names:
            lines.append(f"*{name}")
            kernel = KERNEL_CHAINS[name]
            chains = self.tables[name]
            lines += [f":{chain} {'ACCEPT' if chain in kernel else '-'} [0:0]" for chain in chains]
            lines += [f"-A {chain} {rule}" for chain, rules in chains.items() for rule in rules]
            lines.append("COMMIT")
        return Finished(tuple(argv), 0, "\n".join((*lines, "")), "")

    def restore(self, argv: Sequence[str], stdin: str) -> Finished:
        """`iptables-restore --noflush`: all or nothing."""
        self.restores.append(stdin)
        try:
            if self.fail_next:
                self.fail_next -= 1
                raise Refused("Another app is currently holding the xtables lock")
            tables = copy.deepcopy(self.tables)
            self._run(tables, stdin.splitlines())
        except Refused as error:
            return Finished(tuple(argv), 1, "", f"iptables-restore: {error}")
        self.tables = tables
        return Finished(tuple(argv), 0, "", "")

    def _run(self, tables: dict[str, dict[str, list[str]]], lines: Sequence[str]) -> None:
        if not lines or not lines[0].startswith("*") or lines[-1] != "COMMIT":
            raise Refused("not one whole transaction")
        name = lines[0][1:]
        chains = tables[name]
        for line in lines[1:-1]:
            self._line(chains, KERNEL_CHAINS[name], line)
        for rules in chains.values():
            for rule in rules:
                target = _TARGET.search(rule)
                if target and target[1] not in _BUILT_IN and target[1] not in chains:
                    raise Refused(f"chain {target[1]} does not exist")

    @staticmethod
    def _line(chains: dict[str, list[str]], kernel: Sequence[str], line: str) -> None:
        word, chain, *rest = line.split(" ", 2)
        text = rest[0] if rest else ""
        if word.startswith(":"):
            if len(word) > 29 or word[1:] in kernel:
                raise Refused(f"cannot declare {word[1:]}")
            chains[word[1:]] = []
            return
        if chain not in chains:
            raise Refused(f"no chain {chain}")
        match word:
            case "-A":
                chains[chain].append(text)
            case "-I":
                number, _, text = text.partition(" ")
                chains[chain].insert(int(number) - 1, text)
            case "-D":
                if text not in chains[chain]:
                    raise Refused("does a matching rule exist in that chain?")
                chains[chain].remove(text)
            case "--delete-chain":
                if chains.pop(chain):
                    raise Refused(f"chain {chain} is not empty")
            case _:
                raise Refused(f"bad line {line}")


@dataclass
class FakeIpset:
    """Sets by name: type, size, members."""

    sets: dict[str, tuple[str, int, set[str]]] = field(default_factory=dict)
    in_use: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)

    def commands(self) -> FakeCommands:
        """The program `ipset`."""
        return FakeCommands({"ipset": self.run})

    def run(self, argv: Sequence[str], stdin: str) -> Finished:
        """`ipset save`; `ipset restore`, which stops at the first error and keeps the rest."""
        if argv[1] == "save":
            lines = []
            for name, (kind, size, members) in self.sets.items():
                family = "inet6" if name.startswith(("cali60", "cali6t")) else "inet"
                lines.append(f"create {name} {kind} family {family} hashsize 1024 maxelem {size}")
                lines += [f"add {name} {member}" for member in sorted(members)]
            return Finished(tuple(argv), 0, "\n".join(lines), "")
        for line in stdin.splitlines():
            if line != "COMMIT":
                self.lines.append(line)
            if problem := self._line(line.split()):
                return Finished(tuple(argv), 1, "", f"ipset: {problem}")
        return Finished(tuple(argv), 0, "", "")

    def _line(self, words: Sequence[str]) -> str:
        match words:
            case ["COMMIT"]:
                return ""
            case ["create", name, kind, "family", "inet" | "inet6", "maxelem", size]:
                if name in self.sets:
                    return "set with the same name already exists"
                self.sets[name] = (kind, int(size), set())
                return ""
            case [_, name, *_] if name not in self.sets:
                return f"the set {name} does not exist"
            case ["add", name, member]:
                self.sets[name][2].add(member)
            case ["del", name, member]:
                self.sets[name][2].discard(member)
            case ["swap", one, other]:
                if self.sets[one][0] != self.sets[other][0]:
                    return "the sets cannot be swapped: their type does not match"
                self.sets[one], self.sets[other] = self.sets[other], self.sets[one]
            case ["destroy", name]:
                if name in self.in_use:
                    return "set cannot be destroyed: it is in use by a kernel component"
                del self.sets[name]
            case _:
                return f"unknown line {' '.join(words)}"
        return ""
