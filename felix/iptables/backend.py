"""Which of the two iptables to use: the one that the rest of the host uses.

The nft and the legacy variant keep separate tables in the kernel, both of which see every packet;
rules split over both cannot be understood by anybody. Order of evidence: the hint chains that
kubelet leaves, the variant with more rules, what plain `iptables` is on this host.
Source: Calico 3.32, felix/environment; the last step is ours (Calico takes legacy on a tie).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cymric.kernel.command import CommandFailed, Commands
from felix.iptables.saved import SavedTable, Unreadable, is_our_chain, parse

Variant = Literal["nft", "legacy"]

HINT_CHAINS = frozenset({"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"})

Tables = Mapping[str, SavedTable]


@dataclass(frozen=True, slots=True)
class Backend:
    """The programs of one variant for one family."""

    variant: Variant
    ip_version: int = 4

    def save(self, table: str | None = None) -> tuple[str, ...]:
        """Print one table, or all that exist."""
        program = f"{self._prefix}-{self.variant}-save"
        return (program, "-t", table) if table else (program,)

    def restore(self) -> tuple[str, ...]:
        """Read a transaction and add it to what is there."""
        return (f"{self._prefix}-{self.variant}-restore", "--noflush", "--wait", "10")

    @property
    def other(self) -> Backend:
        """The same of the other variant."""
        return Backend("legacy" if self.variant == "nft" else "nft", self.ip_version)

    def of(self, ip_version: int) -> Backend:
        """The same of that family."""
        return Backend(self.variant, ip_version)

    @property
    def _prefix(self) -> str:
        return "iptables" if self.ip_version == 4 else "ip6tables"


@dataclass(frozen=True, slots=True)
class Found:
    """The backend to use, and why."""

    backend: Backend
    reason: str


def choose(nft: Tables, legacy: Tables, version: str) -> tuple[Variant, str]:
    """The variant and the evidence for it; `version` is what `iptables --version` printed."""
    for variant, tables in (("nft", nft), ("legacy", legacy)):
        mangle = tables.get("mangle", SavedTable())
        if HINT_CHAINS & mangle.chains.keys():
            return ("nft" if variant == "nft" else "legacy"), "kubelet left its hint there"
    nft_count = sum(table.rule_count for table in nft.values())
    legacy_count = sum(table.rule_count for table in legacy.values())
    if nft_count != legacy_count:
        more: Variant = "nft" if nft_count > legacy_count else "legacy"
        return more, f"it holds more rules ({nft_count} nft, {legacy_count} legacy)"
    usual: Variant = "nft" if "nf_tables" in version else "legacy"
    return usual, f"it is what this host calls iptables ({version.strip() or 'unknown'})"


async def find(commands: Commands, configured: str) -> Found:
    """The backend to use; `configured` is `auto`, `nft` or `legacy`. Raises CommandFailed."""
    saved: dict[Variant, Tables] = {}
    variants: tuple[Variant, Variant] = ("nft", "legacy")
    errors = []
    for variant in variants:
        try:
            done = (await commands.run(Backend(variant).save())).checked()
            saved[variant] = parse(done.stdout)
        except (CommandFailed, Unreadable) as error:
            errors.append(str(error))
    if not saved:
        raise CommandFailed(Backend("nft").save(), "; ".join(errors))
    chosen: Variant
    if configured != "auto":
        chosen, reason = _as_variant(configured), "configured"
    elif len(saved) == 1:
        chosen, reason = next(iter(saved)), f"the other does not work: {errors[0]}"
    else:
        version = await commands.run(("iptables", "--version"))
        chosen, reason = choose(saved["nft"], saved["legacy"], version.stdout)
    return Found(Backend(chosen), reason)


async def leftover_tables(commands: Commands, backend: Backend) -> tuple[str, ...]:
    """The tables of a backend that is not used, in which an earlier run left rules of ours."""
    try:
        tables = parse((await commands.run(backend.save())).checked().stdout)
    except (CommandFailed, Unreadable):
        return ()  # what cannot be read cannot be ours to clean
    return tuple(sorted(name for name in tables if _has_ours(tables[name])))


def _as_variant(text: str) -> Variant:
    return "nft" if text == "nft" else "legacy"


def _has_ours(table: SavedTable) -> bool:
    return any(
        is_our_chain(name) or any(rule.is_ours for rule in rules)
        for name, rules in table.chains.items()
    )
