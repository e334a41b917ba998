"""What iptables-save -c counted, and which rule of which policy each count is of: pure.

A chain of a policy counts only while it is as rendered: its hashes say so. Rules that the kernel
counted for one rule of a policy are one, the rule that acts; the others only prepare it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from felix.iptables import render
from felix.iptables.saved import parse_rule
from felix.rules.policy import CountedChain

_LINE = re.compile(r"\[(\d+):(\d+)\] -A (\S+) ?(.*)")
_ENDS = re.compile(r'--comment "(End of tier \S+?)\. Drop|--comment "(Drop if no profiles) matched')


@dataclass(frozen=True, slots=True)
class Count:
    """How often a rule matched, and how much that was in bytes."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.packets + other.packets, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class CountedRule:
    """One rule in the kernel with its count."""

    hash: str
    text: str
    count: Count


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One rule of a policy or profile, counted from 1; 0 is the end of a tier or of profiles."""

    tier: str
    policy: str
    direction: str
    rule: int
    action: str


Counted = Mapping[str, Sequence[CountedRule]]


def parse_counted(text: str) -> dict[str, list[CountedRule]]:
    """The rules of each chain in the output of iptables-save -c for one table."""
    chains: dict[str, list[CountedRule]] = {}
    for line in text.splitlines():
        if found := _LINE.match(line):
            rule = parse_rule(found[4])
            count = Count(int(found[1]), int(found[2]))
            chains.setdefault(found[3], []).append(CountedRule(rule.hash, rule.text, count))
    return chains


def of_policies(wanted: Iterable[CountedChain], counted: Counted) -> dict[Place, Count]:
    """The counts of every rule in chains that are in the kernel as they should be."""
    found: dict[Place, Count] = {}
    for one in wanted:
        rules = counted.get(one.chain.name, ())
        hashes = render.chain(one.chain).hashes
        if tuple(rule.hash for rule in rules) != hashes:
            continue  # it is not in this table, or is being written just now
        for number, (index, action) in enumerate(one.rules, start=1):
            place = Place(one.tier, one.policy, one.direction, number, action)
            is_there = index is not None and index < len(rules)  # a last return is left out
            count = rules[index].count if index is not None and is_there else Count()
            found[place] = found.get(place, Count()) + count
    return found


def of_ends(counted: Counted, directions: Mapping[str, str]) -> dict[Place, Count]:
    """What met the end of a tier, or of all profiles; `directions` by start of a chain's name."""
    found: dict[Place, Count] = {}
    for name, rules in counted.items():
        direction = next((way for start, way in directions.items() if name.startswith(start)), "")
        if not direction:
            continue
        for rule in rules:
            if end := _ENDS.search(rule.text):
                tier = end[1].removeprefix("End of tier ") if end[1] else ""
                place = Place(tier, end[1] or "no profile", direction, 0, "deny")
                found[place] = found.get(place, Count()) + rule.count
    return found
