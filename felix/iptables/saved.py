"""What iptables-save printed, as far as it concerns us: pure.

Of our own rules only the hash counts (render.py says why); the text is kept to delete by. A rule
is ours if it carries a hash comment, or jumps to a chain of ours as those of early versions do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

OUR_CHAIN_PREFIXES = (
    "cali-",
    "califw-",
    "calitw-",
    "califh-",
    "calith-",
    "calipi-",
    "calipo-",
    "felix-",
)
"""Chains that are ours by name: today's, and those of early versions."""

_HASH = re.compile(r'--comment "?cali:([A-Za-z0-9_-]{16})"?(?:\s|$)')
_JUMP = re.compile(r"(?:^|\s)(?:-j|-g|--jump|--goto) (\S+)")
_INCOMPATIBLE = re.compile(r"# Table `([^']+)' is incompatible")


class Unreadable(ValueError):
    """The table holds what this iptables cannot print, so it cannot be compared."""


@dataclass(frozen=True, slots=True)
class SavedRule:
    """A rule in the kernel: its hash (empty if it has none) and the words after `-A <chain>`."""

    hash: str
    text: str
    is_ours: bool


@dataclass(frozen=True, slots=True)
class SavedTable:
    """Every chain of a table with its rules, in order."""

    chains: Mapping[str, tuple[SavedRule, ...]] = field(default_factory=dict)

    @property
    def rule_count(self) -> int:
        """All rules, whosever they are."""
        return sum(map(len, self.chains.values()))


def is_our_chain(name: str) -> bool:
    """Whether a chain of that name is ours."""
    return name.startswith(OUR_CHAIN_PREFIXES)


def parse(text: str) -> dict[str, SavedTable]:
    """The tables in the output of iptables-save. Raises Unreadable."""
    tables: dict[str, dict[str, list[SavedRule]]] = {}
    chains: dict[str, list[SavedRule]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            chains = tables.setdefault(line[1:].strip(), {})
        elif line.startswith(":"):
            chains.setdefault(line[1:].split(" ", 1)[0], [])
        elif line.startswith("-A "):
            _, chain, *rest = line.split(" ", 2)
            chains.setdefault(chain, []).append(parse_rule(rest[0] if rest else ""))
        elif found := _INCOMPATIBLE.match(line):
            raise Unreadable(f"table {found[1]} was changed by nft and cannot be read by iptables")
    return {
        name: SavedTable({chain: tuple(rules) for chain, rules in found.items()})
        for name, found in tables.items()
    }


def parse_rule(text: str) -> SavedRule:
    """One rule from the words after `-A <chain>`."""
    found = _HASH.search(text)
    if found:
        return SavedRule(found[1], text, is_ours=True)
    jump = _JUMP.search(text)
    return SavedRule("", text, is_ours=bool(jump and is_our_chain(jump[1])))
