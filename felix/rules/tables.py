"""The whole wanted content of the four tables, put together from the chains of each concern.

Endpoint chains are remembered by what they are made of: a node with hundreds of pods works out
only those of the pod that came. Which jump goes where: nat POSTROUTING is always appended, so that
a service proxy's masquerading runs first; the others follow chainInsertMode.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from felix.calc.config import FelixConfig
from felix.calc.values import Desired, Endpoint
from felix.rules import dispatch, endpoint, nat, profile, static
from felix.rules.marks import Marks, allocate
from felix.rules.rule import Chain, Rule, TableContent, chains_by_name

TABLES = ("raw", "mangle", "nat", "filter")

_HOOKS: Mapping[str, tuple[str, ...]] = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "POSTROUTING"),
    "nat": ("PREROUTING", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}
_ALWAYS_APPENDED = frozenset({("nat", "POSTROUTING")})


@lru_cache(maxsize=8192)
def _endpoint_chains(one: Endpoint, config: FelixConfig, marks: Marks) -> tuple[Chain, Chain]:
    return endpoint.chains(one, config, marks)


def contents(desired: Desired) -> dict[str, TableContent]:
    """The content of every table, by its name."""
    config, marks = desired.config, allocate(desired.config.iptables_mark_mask)
    chains = {
        "raw": static.raw_chains(config, marks),
        "mangle": static.mangle_chains(marks),
        "nat": (
            *static.nat_chains(),
            nat.outgoing_chain(config, is_wanted=bool(desired.masquerade_pools)),
        ),
        "filter": (
            *static.filter_chains(config, marks, desired.service_cidrs),
            *_workload_chains(desired, marks),
        ),
    }
    return {name: _content(name, chains[name], config, marks) for name in TABLES}


def _workload_chains(desired: Desired, marks: Marks) -> list[Chain]:
    config = desired.config
    interfaces = [one.interface for one in desired.endpoints]
    chains = [*dispatch.from_workload(interfaces), *dispatch.to_workload(interfaces)]
    for one in desired.endpoints:
        chains += _endpoint_chains(one, config, marks)
    for rules in desired.profiles.values():
        chains += profile.chains(rules, marks, config.log_prefix)
    return chains


def _content(
    name: str, chains: tuple[Chain, ...], config: FelixConfig, marks: Marks
) -> TableContent:
    inserts: dict[str, tuple[Rule, ...]] = {}
    appends: dict[str, tuple[Rule, ...]] = {}
    for kernel_chain in _HOOKS[name]:
        is_last = (name, kernel_chain) in _ALWAYS_APPENDED
        place = appends if is_last or config.chain_insert_mode == "append" else inserts
        place[kernel_chain] = (static.hook(kernel_chain),)
    if name == "filter":
        appends["FORWARD"] = (*appends.get("FORWARD", ()), *static.forward_appends(marks))
    return TableContent(name, chains_by_name(*chains), inserts, appends)
