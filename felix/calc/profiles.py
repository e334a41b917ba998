"""A stored profile's rules as verdicts.

Only rules that match every packet can be rendered so far. One rule with a match closes its whole
direction: leaving the rule out, or reading it without its match, could allow what was not meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cymric.model.resources import DEFAULT_ALLOW_PROFILE, Profile
from felix.calc.values import PolicyRule, ProfileRules, Verdict

MATCH_FIELDS = (
    "protocol",
    "notProtocol",
    "icmp",
    "notICMP",
    "source",
    "destination",
    "http",
)

_VERDICT_BY_ACTION = {
    "": Verdict.ALLOW,
    "allow": Verdict.ALLOW,
    "deny": Verdict.DENY,
    "pass": Verdict.PASS,
    "next-tier": Verdict.PASS,
    "log": Verdict.LOG,
}

_ALLOW = (PolicyRule(Verdict.ALLOW),)
DEFAULT_ALLOW = ProfileRules(DEFAULT_ALLOW_PROFILE, _ALLOW, _ALLOW)
"""Built in: it is never stored."""


def missing(name: str) -> ProfileRules:
    """What a profile means that does not exist: nothing is allowed."""
    return ProfileRules(name, None, None)


def convert(profile: Profile) -> tuple[ProfileRules, str | None]:
    """The rules, and why they are not as written (None if they are)."""
    name = profile.metadata.name
    inbound, in_trouble = _direction("ingress", profile.spec.ingress)
    outbound, out_trouble = _direction("egress", profile.spec.egress)
    troubles = "; ".join(text for text in (in_trouble, out_trouble) if text)
    return ProfileRules(name, inbound, outbound), troubles or None


def _direction(
    word: str, rules: Sequence[Mapping[str, Any]]
) -> tuple[tuple[PolicyRule, ...] | None, str | None]:
    found: list[PolicyRule] = []
    for number, rule in enumerate(rules, start=1):
        used = [name for name in MATCH_FIELDS if rule.get(name)]
        version = rule.get("ipVersion")
        verdict = _VERDICT_BY_ACTION.get(str(rule.get("action") or "").lower())
        if used or version not in (None, 4, 6) or verdict is None:
            what = f"matches on {', '.join(used)}" if used else "cannot be read"
            return None, f"{word} rule {number} {what}, so {word} drops everything"
        found.append(PolicyRule(verdict, version))
    return tuple(found), None
