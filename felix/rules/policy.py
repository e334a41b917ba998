"""The chains of policies and profiles: what their rules say of one direction.

A policy's chain (`cali-pi-` for what endpoints receive, `cali-po-` for what they send) marks the
packet and returns; the endpoint's chain acts on the mark. Only a denied packet ends in here. A
direction that is not known (`None`, a profile that is missing) drops everything, as does a chain
that an endpoint names and nobody told of. Source: Calico 3.32, felix/rules/policy.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from felix.calc.config import FelixConfig
from felix.calc.policies import Policy, PolicyId, PolicyRule, Verdict
from felix.calc.values import ProfileRules
from felix.rules import policy_rule
from felix.rules.marks import Marks
from felix.rules.names import (
    POLICY_INBOUND,
    POLICY_OUTBOUND,
    PROFILE_INBOUND,
    PROFILE_OUTBOUND,
    limited,
)
from felix.rules.rule import DROP, RETURN, Chain, Log, LogAction, NFLog, Rule, Target

_KIND_BY_SHORT = {
    "np": "NetworkPolicy",
    "gnp": "GlobalNetworkPolicy",
    "knp": "KubernetesNetworkPolicy",
    "kcnp": "KubernetesClusterNetworkPolicy",
    "snp": "StagedNetworkPolicy",
    "sgnp": "StagedGlobalNetworkPolicy",
    "sknp": "StagedKubernetesNetworkPolicy",
}
PREFIXES = (POLICY_INBOUND, POLICY_OUTBOUND, PROFILE_INBOUND, PROFILE_OUTBOUND)
"""How the names of the chains made here begin; no others name sets of policies."""
MOST_LOG_PREFIX = 27
"""The kernel takes 29 characters; a colon and a blank end ours."""
MOST_NFLOG_PREFIX = 61
"""The same for NFLOG, which takes 63."""


@dataclass(frozen=True, slots=True)
class _Source:
    """What a chain is rendered of. `of` is the policy or profile, to see that it is the same."""

    of: Policy | ProfileRules
    rules: tuple[PolicyRule, ...] | None
    comment: str
    log: LogAction


@dataclass(frozen=True, slots=True)
class CountedChain:
    """A chain, and for each rule of the policy which of its rules acts (None: none does)."""

    policy: str
    tier: str
    direction: str
    chain: Chain
    rules: tuple[tuple[int | None, str], ...]
    """Index in the chain, and what the rule does."""


_Sources = Iterable[tuple[str, _Source]]
"""By the names of their chains."""


class RuleChains:
    """The chains of all policies and profiles of one family, rendered when first asked for."""

    def __init__(
        self, config: FelixConfig, marks: Marks, ip_version: int, denied: Target = DROP
    ) -> None:
        self._denied = denied
        self._config = config
        self._marks = marks
        self._ip_version = ip_version
        self._policies: Mapping[PolicyId, Policy] | None = None
        self._profiles: Mapping[str, ProfileRules] | None = None
        self._sources: dict[str, _Source] = {}
        self._chains: dict[str, Chain] = {}

    def update(
        self, policies: Mapping[PolicyId, Policy], profiles: Mapping[str, ProfileRules]
    ) -> None:
        """State what there is; who is the same object as before keeps its chains."""
        if policies is self._policies and profiles is self._profiles:
            return
        gone, new = _difference(self._profiles or {}, profiles)
        for profile in gone:
            self._drop(self._of_profile(profile))
        gone_policies, new_policies = _difference(self._policies or {}, policies)
        for one in gone_policies:
            self._drop(self._of_policy(one))
        for profile in new:
            self._keep(self._of_profile(profile))
        for one in new_policies:
            self._keep(self._of_policy(one))
        self._policies, self._profiles = policies, profiles

    def needed(self, targets: Iterable[str]) -> list[Chain]:
        """The chains of policies and profiles among these names, each once, in that order."""
        return [self._chain(name) for name in dict.fromkeys(targets) if name.startswith(PREFIXES)]

    def counted(self) -> Iterator[CountedChain]:
        """Every policy's and profile's chains, with what each rule in them is of."""
        for name, source in self._sources.items():
            policy, _, direction = source.comment.rpartition(" ")
            if source.rules:
                yield CountedChain(
                    policy=policy,
                    tier=source.of.tier if isinstance(source.of, Policy) else "",
                    direction=direction,
                    chain=self._chain(name),
                    rules=_acting(source.rules, self._how(source)),
                )

    def _chain(self, name: str) -> Chain:
        if chain := self._chains.get(name):
            return chain
        source = self._sources.get(name)
        if source is None:
            return Chain(name, (Rule(action=self._denied),))
        chain = self._chains[name] = _chain(name, source, self._how(source))
        return chain

    def _how(self, source: _Source) -> policy_rule.Rendering:
        config = self._config
        return policy_rule.Rendering(
            self._marks,
            self._ip_version,
            source.log,
            denied=self._denied,
            log_limit=(config.log_rate_limit, config.log_rate_limit_burst),
            is_profile=isinstance(source.of, ProfileRules),
        )

    def _of_policy(self, one: Policy) -> _Sources:
        kind = _KIND_BY_SHORT.get(one.id.kind, one.id.kind)
        place = f"{one.id.namespace}/{one.id.name}" if one.id.namespace else one.id.name
        logged = self._log(kind, one.tier, one.id.name, place)
        for start, word, rules in (
            (POLICY_INBOUND, "ingress", one.inbound),
            (POLICY_OUTBOUND, "egress", one.outbound),
        ):
            name = limited(start, str(one.id))
            yield name, _Source(one, rules, f"{kind} {place} {word}", logged)

    def _of_profile(self, one: ProfileRules) -> _Sources:
        logged = self._log("Profile", "", one.name, one.name)
        for start, word, rules in (
            (PROFILE_INBOUND, "ingress", one.inbound),
            (PROFILE_OUTBOUND, "egress", one.outbound),
        ):
            yield (
                limited(start, one.name),
                _Source(one, rules, f"Profile {one.name} {word}", logged),
            )

    def _keep(self, sources: _Sources) -> None:
        for name, source in sources:
            known = self._sources.get(name)
            if known != source:
                self._sources[name] = source
                self._chains.pop(name, None)

    def _drop(self, sources: _Sources) -> None:
        for name, _ in sources:
            self._sources.pop(name, None)
            self._chains.pop(name, None)

    def _log(self, kind: str, tier: str, name: str, place: str) -> LogAction:
        text = self._config.log_prefix
        target, _, group = self._config.log_action.partition(":")
        if target == "nflog" and "%" not in text:
            text = "%k %p"  # who listens to the group wants to know whose packets they are
        for mark, value in (("%t", tier), ("%k", kind), ("%n", name), ("%p", place)):
            text = text.replace(mark, value)
        if target == "nflog":
            return NFLog(f"{text[:MOST_NFLOG_PREFIX]}: ", int(group))
        return Log(f"{text[:MOST_LOG_PREFIX]}: ")


K = TypeVar("K")
V = TypeVar("V")


def _difference(before: Mapping[K, V], after: Mapping[K, V]) -> tuple[list[V], list[V]]:
    """What is gone, and what is another object than before; asked by identity, for speed."""
    if before is after:
        return [], []
    gone = [one for key, one in before.items() if key not in after]
    return gone, [one for key, one in after.items() if before.get(key) is not one]


def _acting(
    rules: Iterable[PolicyRule], how: policy_rule.Rendering
) -> tuple[tuple[int | None, str], ...]:
    """Of each rule the index of the one that acts: the last, or the one before what it leads to."""
    found: list[tuple[int | None, str]] = []
    start = 0
    for rule in rules:
        made = policy_rule.rules(rule, how)
        is_one = rule.action is Verdict.LOG or (how.is_profile and rule.action is Verdict.PASS)
        last = start + len(made) - (1 if is_one else 2)
        found.append((last if made else None, str(rule.action)))
        start += len(made)
    return tuple(found)


def _chain(name: str, source: _Source, how: policy_rule.Rendering) -> Chain:
    if source.rules is None:
        rules = [Rule(action=how.denied)]
    else:
        rules = [one for rule in source.rules for one in policy_rule.rules(rule, how)]
        while rules and rules[-1].action == RETURN:
            rules.pop()  # the end of a chain returns
        if not rules:
            rules = [Rule()]
    rules[0] = replace(rules[0], comments=(*rules[0].comments, source.comment))
    return Chain(name, tuple(rules))
