"""A stored profile as rules. A profile that does not exist allows nothing."""

from __future__ import annotations

from cymric.model.policy import Profile
from cymric.model.resources import DEFAULT_ALLOW_PROFILE
from felix.calc.conversion import Converted, convert
from felix.calc.policies import PolicyRule, Verdict
from felix.calc.values import ProfileRules

_ALLOW = (PolicyRule(Verdict.ALLOW),)
DEFAULT_ALLOW = ProfileRules(DEFAULT_ALLOW_PROFILE, _ALLOW, _ALLOW)
"""Built in: it is never stored."""


def missing(name: str) -> ProfileRules:
    """What a profile means that does not exist: everything is dropped."""
    return ProfileRules(name, None, None)


def rules_of(profile: Profile) -> tuple[ProfileRules, str | None]:
    """The rules, and why they are not as written (None if they are)."""
    inbound = convert("ingress", profile.spec.ingress)
    outbound = convert("egress", profile.spec.egress)
    troubles = [
        f"{word} has rules with matches, so {word} drops everything"
        for word, found in (("ingress", inbound), ("egress", outbound))
        if _has_match(found)
    ]
    return (
        ProfileRules(
            profile.metadata.name,
            None if _has_match(inbound) else inbound.rules,
            None if _has_match(outbound) else outbound.rules,
        ),
        "; ".join(troubles) or None,
    )


def _has_match(found: Converted) -> bool:
    plain = (PolicyRule(rule.action, rule.ip_version) for rule in found.rules)
    return bool(found.troubles) or any(a != b for a, b in zip(plain, found.rules, strict=True))
