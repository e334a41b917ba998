"""The two chains of a profile: `cali-pri-` for what its endpoints get, `cali-pro-` for the rest.

A verdict sets a mark bit and returns; the endpoint's chain acts on it. A direction that cannot be
rendered as written drops everything. Source: Calico 3.32, felix/rules/policy.go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from felix.calc.values import PolicyRule, ProfileRules, Verdict
from felix.rules.marks import Marks
from felix.rules.names import PROFILE_INBOUND, PROFILE_OUTBOUND, limited
from felix.rules.rule import DROP, RETURN, Chain, Log, Match, Rule, SetMark


def chains(
    profile: ProfileRules, marks: Marks, log_prefix: str, ip_version: int = 4
) -> tuple[Chain, Chain]:
    """Inbound and outbound."""
    name = profile.name
    inbound = _verdicts(profile.inbound, ip_version)
    outbound = _verdicts(profile.outbound, ip_version)
    return (
        _chain(PROFILE_INBOUND, name, "ingress", inbound, marks, log_prefix),
        _chain(PROFILE_OUTBOUND, name, "egress", outbound, marks, log_prefix),
    )


def _verdicts(rules: Sequence[PolicyRule] | None, ip_version: int) -> Sequence[Verdict] | None:
    if rules is None:
        return None
    return [rule.action for rule in rules if rule.ip_version in (None, ip_version)]


def _chain(
    prefix: str,
    name: str,
    word: str,
    verdicts: Sequence[Verdict] | None,
    marks: Marks,
    log_prefix: str,
) -> Chain:
    if verdicts is None:
        rules = [Rule(action=DROP)]
    else:
        rules = [rule for verdict in verdicts for rule in _rules(verdict, marks, log_prefix)]
        while rules and rules[-1].action == RETURN:
            rules.pop()
        if not rules:
            rules = [Rule()]
    rules[0] = replace(rules[0], comments=(f"Profile {name} {word}",))
    return Chain(limited(prefix, name), tuple(rules))


def _rules(verdict: Verdict, marks: Marks, log_prefix: str) -> tuple[Rule, ...]:
    match verdict:
        case Verdict.LOG:
            return (Rule(action=Log(f"{log_prefix}: ")),)
        case Verdict.ALLOW:
            bit, then = marks.accept, RETURN
        case Verdict.PASS:
            bit, then = marks.passed, RETURN
        case Verdict.DENY:
            bit, then = marks.drop, DROP
    return (Rule(action=SetMark(bit)), Rule(Match().mark_set(bit), then))
