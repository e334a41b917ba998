"""From the table that is to the table that is wanted: one restore transaction, pure.

Only chains that differ are in it. A changed chain of ours is declared anew, which empties it, and
written whole: the kernel commits the transaction at once, so no packet meets half a chain, and no
rule is ever addressed by a number that somebody else's change could have shifted. In chains of the
kernel our rules are deleted by their text and inserted at the top or appended at the end; rules of
others are never named. Chains nobody wants are emptied first and deleted last, when nothing refers
to them any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from felix.iptables import render
from felix.iptables.render import RenderedChain
from felix.iptables.saved import SavedRule, SavedTable, is_our_chain
from felix.rules.rule import Chain, Rule, TableContent


@dataclass(frozen=True, slots=True)
class HookRules:
    """Our rules in one kernel chain, rendered."""

    inserts: tuple[SavedRule, ...] = ()
    appends: tuple[SavedRule, ...] = ()

    @property
    def hashes(self) -> list[str]:
        """In the order in which they stand."""
        return [rule.hash for rule in (*self.inserts, *self.appends)]


@dataclass(frozen=True, slots=True)
class RenderedTable:
    """A wanted table as text."""

    name: str
    chains: Mapping[str, RenderedChain] = field(default_factory=dict)
    hooks: Mapping[str, HookRules] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """A restore transaction, and what the table is after it. `lines` is empty if all is well."""

    lines: tuple[str, ...]
    after: SavedTable

    def text(self, table: str) -> str:
        """The input of iptables-restore."""
        return "\n".join((f"*{table}", *self.lines, "COMMIT", ""))


RenderChain = Callable[[Chain], RenderedChain]


def render_table(content: TableContent, render_chain: RenderChain = render.chain) -> RenderedTable:
    """The wanted table as text."""
    chains = {name: render_chain(chain) for name, chain in content.chains.items()}
    return RenderedTable(content.name, chains, render_hooks(content))


def render_again(
    content: TableContent, before: TableContent, rendered: RenderedTable
) -> RenderedTable:
    """The wanted table as text, where `before` was `rendered`: chains that are the same are kept.

    Whoever makes contents keeps what did not change, so sameness is asked, not equality.
    """
    chains = dict(rendered.chains)
    for name in before.chains.keys() - content.chains.keys():
        del chains[name]
    known = before.chains
    for name, chain in content.chains.items():
        if known.get(name) is not chain:
            chains[name] = render.chain(chain)
    is_hooked_alike = content.inserts is before.inserts and content.appends is before.appends
    hooks = rendered.hooks if is_hooked_alike else render_hooks(content)
    return RenderedTable(content.name, chains, hooks)


def render_hooks(content: TableContent) -> Mapping[str, HookRules]:
    """Our rules in the kernel's chains as text."""
    return {
        name: HookRules(
            _hook_rules(name, content.inserts.get(name, ())),
            _hook_rules(name + render.APPENDS_SUFFIX, content.appends.get(name, ())),
        )
        for name in (*content.inserts, *content.appends)
    }


def _hook_rules(hash_name: str, rules: tuple[Rule, ...]) -> tuple[SavedRule, ...]:
    hashes, texts = render.rules(hash_name, rules)
    return tuple(map(render.ours, hashes, texts))


def plan(actual: SavedTable, wanted: RenderedTable) -> Plan:
    """The transaction that turns `actual` into `wanted`."""
    after = dict(actual.chains)
    declared: list[str] = []
    written: list[str] = []
    for name, chain in wanted.chains.items():
        rules = actual.chains.get(name)
        if rules is chain.saved:  # as we wrote it: nearly always
            continue
        if rules is not None and tuple(rule.hash for rule in rules) == chain.hashes:
            after[name] = chain.saved
            continue
        declared.append(f":{name} - -")
        written += (f"-A {name} {text}" for text in chain.rules)
        after[name] = chain.saved
    hooked: list[str] = []
    for name in _kernel_chains(actual, wanted):
        lines, after[name] = _hook(name, actual.chains.get(name, ()), wanted.hooks.get(name))
        hooked += lines
    doomed = [name for name in actual.chains if name not in wanted.chains and is_our_chain(name)]
    for name in doomed:
        del after[name]
    declared += (f":{name} - -" for name in doomed)
    deleted = [f"--delete-chain {name}" for name in doomed]
    return Plan((*declared, *written, *hooked, *deleted), SavedTable(after))


def _kernel_chains(actual: SavedTable, wanted: RenderedTable) -> Iterable[str]:
    touched = [
        name
        for name, rules in actual.chains.items()
        if name not in wanted.chains
        and not is_our_chain(name)
        and any(rule.is_ours for rule in rules)
    ]
    return dict.fromkeys((*wanted.hooks, *touched))


def _hook(
    name: str, rules: tuple[SavedRule, ...], wanted: HookRules | None
) -> tuple[list[str], tuple[SavedRule, ...]]:
    wanted = wanted or HookRules()
    ours = [rule for rule in rules if rule.is_ours]
    others = tuple(rule for rule in rules if not rule.is_ours)
    after = (*wanted.inserts, *others, *wanted.appends)
    if [rule.hash for rule in rules] == [rule.hash for rule in after]:
        return [], after
    lines = [f"-D {name} {rule.text}" for rule in ours]
    lines += (
        f"-I {name} {position} {rule.text}" for position, rule in enumerate(wanted.inserts, start=1)
    )
    lines += (f"-A {name} {rule.text}" for rule in wanted.appends)
    return lines, after
