"""The whole wanted content of the four tables of one family, from the chains of each concern.

Everything that is as before stays the same object: a table nothing of which changed, and in the
filter table every endpoint, profile and dispatch group that did not change. So a node with hundreds
of pods works out only what the pod that came touches, and who writes tables sees by identity what
is new. Which jump goes where: nat POSTROUTING is always appended, so that a service proxy's
masquerading runs first; the others follow chainInsertMode.

IPv6: an endpoint without an IPv6 address has no chains there, and what its interface sends is
dropped as from an unknown one, save neighbour discovery.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from felix.calc.config import FelixConfig
from felix.calc.values import Desired, Endpoint, ProfileRules
from felix.rules import dispatch, endpoint, nat, profile, spoofing, static
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

_Chains = tuple[Chain, ...]


class _Made(NamedTuple):
    """What was made, and of what."""

    of: object
    chains: _Chains


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
        self._marks = allocate(config.iptables_mark_mask)
        self._made.clear()
        self._contents.clear()
        self._endpoints: dict[str, _Made] = {}
        self._profiles: dict[str, _Made] = {}
        self._dispatch = (dispatch.from_workload(), dispatch.to_workload())
        self._hooks = {name: _hooks(name, config, self._marks) for name in TABLES}

    def contents(self, desired: Desired) -> Mapping[str, TableContent]:
        """The content of every table, by its name."""
        if desired.config is not self._config and desired.config != self._config:
            self._start_anew(desired.config)
        config, version = desired.config, self._ip_version
        is_masquerading = any(pool.version == version for pool in desired.masquerade_pools)
        special = tuple(one for one in desired.endpoints if one.spoofable or one.floating)
        self._keep("raw", self._raw(special))
        self._keep("mangle", self._once("mangle", None, lambda: static.mangle_chains(self._marks)))
        self._keep(
            "nat",
            self._once(
                "nat",
                (is_masquerading, special),
                lambda: (
                    *static.nat_chains(),
                    *nat.floating_chains(special, version),
                    nat.outgoing_chain(config, is_wanted=is_masquerading, ip_version=version),
                ),
            ),
        )
        self._keep("filter", self._filter(desired))
        return self._contents

    def _raw(self, special: tuple[Endpoint, ...]) -> _Chains:
        assert self._config is not None
        config, marks = self._config, self._marks
        return self._once(
            "raw",
            special,
            lambda: (
                *static.raw_chains(config, marks),
                spoofing.skip_chain(special, self._ip_version),
            ),
        )

    def _filter(self, desired: Desired) -> _Chains:
        config, marks, version = desired.config, self._marks, self._ip_version
        profiles = desired.profiles
        fixed = self._once(
            "static filter",
            desired.service_cidrs,
            lambda: static.filter_chains(config, marks, desired.service_cidrs, version),
        )
        endpoints = [one for one in desired.endpoints if version in one.ip_versions]
        # Equality of what is the same object costs nothing, so this is cheap for many endpoints.
        return self._once(
            "filter",
            (fixed, endpoints, profiles),
            lambda: (
                *fixed,
                *self._dispatch_chains(endpoints),
                *self._endpoint_chains(endpoints),
                *self._profile_chains(endpoints, profiles),
            ),
        )

    def _dispatch_chains(self, endpoints: Sequence[Endpoint]) -> list[Chain]:
        interfaces = [one.interface for one in endpoints]
        return [chain for direction in self._dispatch for chain in direction.chains(interfaces)]

    def _endpoint_chains(self, endpoints: Sequence[Endpoint]) -> list[Chain]:
        assert self._config is not None
        before, self._endpoints = self._endpoints, {}
        found: list[Chain] = []
        for one in endpoints:
            made = before.get(one.interface)
            if made is None or made.of is not one:
                made = _Made(one, endpoint.chains(one, self._config, self._marks))
            self._endpoints[one.interface] = made
            found += made.chains
        return found

    def _profile_chains(
        self, endpoints: Sequence[Endpoint], profiles: Mapping[str, ProfileRules]
    ) -> list[Chain]:
        assert self._config is not None
        before, self._profiles = self._profiles, {}
        found: list[Chain] = []
        for name in dict.fromkeys(name for one in endpoints for name in one.profiles):
            made = before.get(name)
            if made is None or made.of != profiles[name]:
                rules = profiles[name]
                prefix = self._config.log_prefix
                made = _Made(rules, profile.chains(rules, self._marks, prefix, self._ip_version))
            self._profiles[name] = made
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
        appends["FORWARD"] = (*appends.get("FORWARD", ()), *static.forward_appends(marks))
    return inserts, appends
