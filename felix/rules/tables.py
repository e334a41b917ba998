"""The whole wanted content of the four tables of one family, from the chains of each concern.

Everything that is as before stays the same object: a table nothing of which changed, and in the
filter table every endpoint, policy, profile and dispatch group that did not change. So a node with
hundreds of pods works out only what the pod that came touches, and who writes tables sees by
identity what is new. Which jump goes where: nat POSTROUTING is always appended, so that a service
proxy's masquerading runs first; the others follow chainInsertMode.

Chains of policies and profiles stand in every table that has a chain leading to them, and nowhere
else. IPv6: an endpoint without an IPv6 address has no chains there, and what its interface sends is
dropped as from an unknown one, save neighbour discovery.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from felix.calc.config import FelixConfig
from felix.calc.values import Desired, Endpoint
from felix.rules import actions, dispatch, dscp, endpoint, nat, spoofing, static
from felix.rules.host import HostChains
from felix.rules.marks import Marks, allocate
from felix.rules.policy import RuleChains
from felix.rules.rule import Chain, Rule, TableContent, chains_by_name

TABLES = ("raw", "mangle", "nat", "filter")

_HOOKS: Mapping[str, tuple[str, ...]] = {
    "raw": ("PREROUTING", "OUTPUT"),
    "mangle": ("PREROUTING", "POSTROUTING"),
    "nat": ("PREROUTING", "OUTPUT", "POSTROUTING"),
    "filter": ("INPUT", "FORWARD", "OUTPUT"),
}
_ALWAYS_APPENDED = frozenset({("nat", "POSTROUTING")})

_Chains = tuple[Chain, ...]


class _Made(NamedTuple):
    """What was made, and of what."""

    of: object
    chains: _Chains


class _MadeEndpoint(NamedTuple):
    """The chains of one endpoint, and the names that they lead to."""

    of: Endpoint
    chains: _Chains
    targets: frozenset[str]


class TableContents:
    """The tables of one family; remembers what it made."""

    def __init__(self, ip_version: int) -> None:
        self._ip_version = ip_version
        self._config: FelixConfig | None = None
        self._made: dict[str, _Made] = {}
        self._contents: dict[str, TableContent] = {}
        self._start_anew(FelixConfig())

    def _start_anew(self, config: FelixConfig) -> None:
        """Other parameters can change any chain."""
        self._config = config
        marks = self._marks = allocate(config.iptables_mark_mask)
        self._made.clear()
        self._contents.clear()
        self._endpoints: dict[str, _MadeEndpoint] = {}
        denied = {table: actions.deny(config, table) for table in ("raw", "mangle", "filter")}
        by_target = {
            target: RuleChains(config, marks, self._ip_version, target)
            for target in dict.fromkeys(denied.values())
        }
        self._rules = {table: by_target[target] for table, target in denied.items()}
        self._unknown = dispatch.unknown(denied["filter"])
        self._dispatch = (dispatch.from_workload(), dispatch.to_workload())
        self._host = {
            name: HostChains(name, config, marks, self._ip_version)
            for name in ("raw", "mangle", "filter")
        }
        self._hooks = {name: _hooks(name, config, marks) for name in TABLES}

    def contents(self, desired: Desired) -> Mapping[str, TableContent]:
        """The content of every table, by its name."""
        if desired.config is not self._config and desired.config != self._config:
            self._start_anew(desired.config)
        config, version = desired.config, self._ip_version
        is_masquerading = any(pool.version == version for pool in desired.masquerade_pools)
        special = tuple(one for one in desired.endpoints if one.spoofable or one.floating)
        for rules in self._rules.values():
            rules.update(desired.policies, desired.profiles)
        self._keep("raw", self._raw(special, desired))
        self._keep("mangle", self._mangle(desired))
        self._keep(
            "nat",
            self._once(
                "nat",
                (is_masquerading, special, desired.nat_exclusions),
                lambda: (
                    *static.nat_chains(),
                    *nat.floating_chains(special, version),
                    nat.outgoing_chain(
                        config,
                        is_wanted=is_masquerading,
                        ip_version=version,
                        exclusions=desired.nat_exclusions,
                    ),
                ),
            ),
        )
        self._keep("filter", self._filter(desired))
        return self._contents

    def _raw(self, special: tuple[Endpoint, ...], desired: Desired) -> _Chains:
        config, marks = desired.config, self._marks
        fixed = self._once(
            "static raw",
            special,
            lambda: (
                *static.raw_chains(config, marks),
                spoofing.skip_chain(special, self._ip_version),
            ),
        )
        return self._with_rules("raw", (*fixed, *self._host_chains("raw", desired)), ())

    def _mangle(self, desired: Desired) -> _Chains:
        config, marks = desired.config, self._marks
        wishes = dscp.wishes(desired.endpoints, self._ip_version)

        def make() -> _Chains:
            if not wishes:
                return static.mangle_chains(config, marks)
            way = (dscp.way(self._ip_version),)
            return (*static.mangle_chains(config, marks, way), dscp.chain(wishes))

        fixed = self._once("static mangle", wishes, make)
        return self._with_rules("mangle", (*fixed, *self._host_chains("mangle", desired)), ())

    def _filter(self, desired: Desired) -> _Chains:
        config, marks, version = desired.config, self._marks, self._ip_version
        fixed = self._once(
            "static filter",
            desired.service_cidrs,
            lambda: static.filter_chains(config, marks, desired.service_cidrs, version),
        )
        endpoints = [one for one in desired.endpoints if version in one.ip_versions]
        # Equality of what is the same object costs nothing, so this is cheap for many endpoints.
        workloads = self._once(
            "workloads",
            endpoints,
            lambda: (*self._dispatch_chains(endpoints), *self._endpoint_chains(endpoints)),
        )
        chains = (*fixed, *self._host_chains("filter", desired), *workloads)
        # What endpoints lead to is kept with them; a frozenset of strings keeps no order.
        targets = sorted({name for made in self._endpoints.values() for name in made.targets})
        return self._with_rules("filter", chains, targets)

    def _host_chains(self, table: str, desired: Desired) -> _Chains:
        of = desired.host_endpoints
        return self._once(
            f"host {table}", of, lambda: tuple(self._host[table].chains(desired.host_endpoints))
        )

    def _with_rules(self, table: str, chains: _Chains, targets: Sequence[str]) -> _Chains:
        """`chains`, and those of policies and profiles that host endpoints or `targets` name."""
        host = self._made[f"host {table}"].chains
        names = (*targets, *sorted({name for one in host for name in one.targets}))
        found = (*chains, *self._rules[table].needed(names))
        known = self._made.get(table)
        if known is None or not _are_same(known.chains, found):
            known = self._made[table] = _Made(None, found)
        return known.chains

    def _dispatch_chains(self, endpoints: Sequence[Endpoint]) -> list[Chain]:
        interfaces = [one.interface for one in endpoints]
        end = (self._unknown,)
        return [one for way in self._dispatch for one in way.chains(interfaces, end)]

    def _endpoint_chains(self, endpoints: Sequence[Endpoint]) -> list[Chain]:
        assert self._config is not None
        before, self._endpoints = self._endpoints, {}
        found: list[Chain] = []
        for one in endpoints:
            made = before.get(one.interface)
            if made is None or made.of is not one:
                chains = endpoint.chains(one, self._config, self._marks)
                targets = frozenset(name for chain in chains for name in chain.targets)
                made = _MadeEndpoint(one, chains, targets)
            self._endpoints[one.interface] = made
            found += made.chains
        return found

    def _once(self, name: str, of: object, make: Callable[[], _Chains]) -> _Chains:
        """What `make` makes, made anew only when it is made of something else."""
        known = self._made.get(name)
        if known is None or known.of != of:
            known = self._made[name] = _Made(of, make())
        return known.chains

    def _keep(self, name: str, chains: _Chains) -> None:
        """Make these the content of a table; the same content if they are the same chains."""
        if self._made.get(f"content {name}", _Made(None, ())).chains is not chains:
            self._made[f"content {name}"] = _Made(None, chains)
            inserts, appends = self._hooks[name]
            self._contents[name] = TableContent(name, chains_by_name(*chains), inserts, appends)


def contents(desired: Desired, ip_version: int = 4) -> Mapping[str, TableContent]:
    """The content of every table, made from nothing."""
    return TableContents(ip_version).contents(desired)


def _are_same(one: _Chains, other: _Chains) -> bool:
    """Whether these are the same objects in the same order."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


_HookRules = dict[str, tuple[Rule, ...]]


def _hooks(name: str, config: FelixConfig, marks: Marks) -> tuple[_HookRules, _HookRules]:
    """Our rules in the kernel's chains: inserted, and appended."""
    inserts: _HookRules = {}
    appends: _HookRules = {}
    for kernel_chain in _HOOKS[name]:
        is_last = (name, kernel_chain) in _ALWAYS_APPENDED
        place = appends if is_last or config.chain_insert_mode == "append" else inserts
        place[kernel_chain] = (static.hook(kernel_chain),)
    if name == "filter":
        appends["FORWARD"] = (*appends.get("FORWARD", ()), *static.forward_appends(config, marks))
    return inserts, appends
