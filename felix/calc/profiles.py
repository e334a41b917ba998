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

MISSING = Converted((), (), ("missing, so it drops everything",))


def rules_of(name: str, stored: Profile | None) -> tuple[ProfileRules, tuple[Converted, ...]]:
    """The rules of a profile (None: there is none), and how each direction came about."""
    if name == DEFAULT_ALLOW_PROFILE:
        return DEFAULT_ALLOW, ()
    if stored is None:
        return ProfileRules(name, None, None), (MISSING,)
    inbound = convert("ingress", stored.spec.ingress)
    outbound = convert("egress", stored.spec.egress)
    return ProfileRules(name, inbound.rules, outbound.rules), (inbound, outbound)
