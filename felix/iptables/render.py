"""Rules as iptables-restore text, and their hashes: pure.

A rule of ours carries the comment `cali:<hash>`. The hash of a rule covers the chain's name, all
rules before it and its own text, so one that reads back the hashes of a chain knows whether chain
and order are as wanted without understanding the kernel's spelling of any rule. Hashes are equal to
Calico's (3.32, felix/generictables) for equal rules.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from felix.iptables.saved import SavedRule
from felix.rules.rule import (
    Action,
    Chain,
    ClearMark,
    DestinationNAT,
    Goto,
    Jump,
    Log,
    Masquerade,
    NFLog,
    Rule,
    SetDSCP,
    SetMark,
    SourceNAT,
    Target,
    WriteMark,
)

HASH_LENGTH = 16
HASH_PREFIX = "cali:"
APPENDS_SUFFIX = "*appends*"
"""Rules appended to a kernel chain are hashed as if in a chain of this name."""
MAX_COMMENT = 256

_NOT_IN_COMMENTS = re.compile(r"[^A-Za-z0-9_ @%+=:,./-]")


@dataclass(frozen=True, slots=True)
class RenderedChain:
    """A chain as text: the hash and the words after `-A <chain>` of each rule, in order."""

    name: str
    hashes: tuple[str, ...]
    rules: tuple[str, ...]
    saved: tuple[SavedRule, ...]
    """As the table has it after it was written."""


def comment(text: str) -> str:
    """One comment match; what iptables would not print back as it was becomes `_`."""
    return f'-m comment --comment "{_NOT_IN_COMMENTS.sub("_", text)[:MAX_COMMENT]}"'


def action(wanted: Action | None) -> str:
    """The target of a rule; empty for none."""
    match wanted:
        case None:
            return ""
        case Jump(chain):
            return f"--jump {chain}"
        case Goto(chain):
            return f"--goto {chain}"
        case Target(name):
            return f"--jump {name}"
        case SetMark(bits):
            return f"--jump MARK --set-mark {bits:#x}/{bits:#x}"
        case ClearMark(bits):
            return f"--jump MARK --set-mark 0/{bits:#x}"
        case WriteMark(bits, mask):
            return f"--jump MARK --set-mark {bits:#x}/{mask:#x}"
        case Log(prefix):
            return f'--jump LOG --log-prefix "{prefix}" --log-level 5'
        case NFLog(prefix, group):
            return f'--jump NFLOG --nflog-group {group} --nflog-prefix "{prefix}"'
        case SetDSCP(value):
            return f"--jump DSCP --set-dscp {value:#04x}"
        case Masquerade(ports, random_fully):
            return "--jump MASQUERADE" + _ports(ports) + _random(random_fully)
        case DestinationNAT(address):
            return f"--jump DNAT --to-destination {address}"
        case SourceNAT(address, ports, random_fully):
            to = f"{address}:{ports}" if ports else address
            return f"--jump SNAT --to-source {to}" + _random(random_fully)


def _ports(ports: str) -> str:
    return f" --to-ports {ports}" if ports else ""


def _random(random_fully: bool) -> str:
    return " --random-fully" if random_fully else ""


def body(rule: Rule) -> str:
    """Comments, match and action of a rule, without its hash."""
    comments = [comment(text) for text in rule.comments]
    parts = (*comments, *rule.match.fragments, action(rule.action))
    return " ".join(part for part in parts if part)


def hash_chain(chain_name: str, bodies: Sequence[str]) -> tuple[str, ...]:
    """The hashes of rules that stand in this order in `chain_name`."""
    state = hashlib.sha224(chain_name.encode()).digest()
    hashes = []
    for text in bodies:
        line = " ".join(part for part in (f"-A {chain_name} HASH", text) if part)
        state = hashlib.sha224(state + line.encode()).digest()
        hashes.append(base64.urlsafe_b64encode(state)[:HASH_LENGTH].decode())
    return tuple(hashes)


def rules(hash_name: str, wanted: Sequence[Rule]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Hashes and texts of rules seeded with `hash_name`; a text starts with its hash comment."""
    bodies = [body(rule) for rule in wanted]
    hashes = hash_chain(hash_name, bodies)
    texts = tuple(
        " ".join(part for part in (comment(HASH_PREFIX + one), text) if part)
        for one, text in zip(hashes, bodies, strict=True)
    )
    return hashes, texts


def chain(wanted: Chain) -> RenderedChain:
    """A whole chain of ours."""
    hashes, texts = rules(wanted.name, wanted.rules)
    saved = tuple(map(ours, hashes, texts))
    return RenderedChain(wanted.name, hashes, texts, saved)


def ours(hash_text: str, text: str) -> SavedRule:
    """A rule of ours as the table has it."""
    return SavedRule(hash_text, text, is_ours=True)
