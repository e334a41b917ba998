"""The chains of one endpoint: what is established passes, then policy by tiers, then profiles.

    workload    filter   cali-tw- to it, cali-fw- from it
    host        filter   cali-th-, cali-fh- its own traffic; cali-thfw-, cali-fhfw- forwarded
                mangle   cali-fh- before address translation; cali-th- what the host sends after it
                raw      cali-th-, cali-fh- what is not tracked

"To" a workload is inbound for its policy; "to" an interface of the host leaves, so it is outbound.
A tier whose policies say nothing ends in a drop unless it is to pass; then the profiles in order,
the first verdict counts; no verdict is a drop. Chains of forwarded traffic without policy allow,
those of untracked and early policy end without a verdict: later tables go on.
Source: Calico 3.32, felix/rules/endpoints.go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from felix.calc.config import FelixConfig
from felix.calc.policies import PolicyId, TierPolicies, Verdict
from felix.calc.values import Endpoint
from felix.rules.actions import allow, deny
from felix.rules.marks import Marks
from felix.rules.names import (
    FROM_WORKLOAD,
    POLICY_INBOUND,
    POLICY_OUTBOUND,
    PROFILE_INBOUND,
    PROFILE_OUTBOUND,
    TO_WORKLOAD,
    limited,
)
from felix.rules.rule import (
    ACCEPT,
    DROP,
    NOTRACK,
    RETURN,
    Chain,
    ClearMark,
    Jump,
    Match,
    Rule,
    SetMark,
    Target,
)

_UDP, _IPIP = "17", "4"


class Traffic(Enum):
    """Which of an endpoint's traffic a chain decides about."""

    NORMAL = auto()
    FORWARDED = auto()
    UNTRACKED = auto()
    PRE_DNAT = auto()


class Direction(Enum):
    """Which rules of policies and profiles count: prefix of policy and of profile chains."""

    INBOUND = (POLICY_INBOUND, PROFILE_INBOUND)
    OUTBOUND = (POLICY_OUTBOUND, PROFILE_OUTBOUND)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What one chain of an endpoint is made of."""

    traffic: Traffic
    direction: Direction
    tiers: Sequence[TierPolicies]
    profiles: Sequence[str] = ()
    accept: Target = ACCEPT
    """What established connections meet; other than ACCEPT where others have a say as well."""
    deny: Target = DROP
    """What denied packets meet."""
    failsafe: str = ""
    """The chain of ports that are always open, none for workloads and forwarded traffic."""
    first: tuple[Rule, ...] = ()
    """Rules ahead of all policy."""


def chains(endpoint: Endpoint, config: FelixConfig, marks: Marks) -> tuple[Chain, Chain]:
    """To and from a workload."""
    accept, denied = allow(config, "filter"), deny(config, "filter")
    to_it = Layout(
        accept=accept,
        deny=denied,
        traffic=Traffic.NORMAL,
        direction=Direction.INBOUND,
        tiers=endpoint.tiers,
        profiles=endpoint.profiles,
    )
    from_it = Layout(
        accept=accept,
        deny=denied,
        traffic=Traffic.NORMAL,
        direction=Direction.OUTBOUND,
        tiers=endpoint.tiers,
        profiles=endpoint.profiles,
        first=_no_tunnels(config, denied),
    )
    return (
        chain(limited(TO_WORKLOAD, endpoint.interface), to_it, config, marks),
        chain(limited(FROM_WORKLOAD, endpoint.interface), from_it, config, marks),
    )


def chain(name: str, layout: Layout, config: FelixConfig, marks: Marks) -> Chain:
    """One chain of an endpoint."""
    rules: list[Rule] = []
    if layout.traffic is not Traffic.UNTRACKED:
        rules += _tracked(layout, config, marks)
    if layout.failsafe:
        rules.append(Rule(action=Jump(layout.failsafe)))
    rules.append(Rule(action=ClearMark(marks.accept | marks.passed)))
    rules += layout.first
    has_policy = False
    for tier in layout.tiers:
        if policies := _of_direction(tier, layout.direction):
            has_policy = True
            rules += _tier(tier, policies, layout, marks)
    if layout.traffic is Traffic.FORWARDED and not has_policy:
        rules.append(Rule(action=SetMark(marks.accept), comments=(_FORWARDED,)))
        rules.append(Rule(action=RETURN, comments=("Return for accepted forward traffic",)))
    if layout.traffic is Traffic.NORMAL:
        rules += _profiles(layout, marks)
    return Chain(name, tuple(rules))


_FORWARDED = "Allow forwarded traffic by default"


def _of_direction(tier: TierPolicies, direction: Direction) -> tuple[PolicyId, ...]:
    return tier.inbound if direction is Direction.INBOUND else tier.outbound


def _tracked(layout: Layout, config: FelixConfig, marks: Marks) -> list[Rule]:
    established = Match().conntrack_state("RELATED,ESTABLISHED")
    rules = [Rule(established, layout.accept)]
    if layout.accept != ACCEPT:
        rules.insert(0, Rule(established, SetMark(marks.accept)))
    if not config.disable_conntrack_invalid_check:
        rules.append(Rule(Match().conntrack_state("INVALID"), layout.deny))
    return rules


def _no_tunnels(config: FelixConfig, denied: Target) -> tuple[Rule, ...]:
    rules = []
    if not config.allow_vxlan_from_workloads:
        rules.append(
            Rule(
                Match().protocol(_UDP).destination_ports(str(config.vxlan_port)),
                denied,
                ("Drop VXLAN encapped packets originating in workloads",),
            )
        )
    if not config.allow_ipip_from_workloads:
        rules.append(
            Rule(
                Match().protocol(_IPIP),
                denied,
                ("Drop IPinIP encapped packets originating in workloads",),
            )
        )
    return tuple(rules)


def _tier(
    tier: TierPolicies, policies: Sequence[PolicyId], layout: Layout, marks: Marks
) -> list[Rule]:
    not_passed = Match().mark_clear(marks.passed)
    accepted = Match().mark_set(marks.accept)
    rules = [Rule(action=ClearMark(marks.passed), comments=(f"Start of tier {tier.name}",))]
    prefix, _ = layout.direction.value
    for policy in policies:
        rules.append(Rule(not_passed, Jump(limited(prefix, str(policy)))))
        if layout.traffic is Traffic.UNTRACKED:
            rules.append(Rule(accepted, NOTRACK))
        rules.append(Rule(accepted, RETURN, ("Return if policy accepted",)))
    ends = layout.traffic in (Traffic.NORMAL, Traffic.FORWARDED)
    if ends and tier.default_action is not Verdict.PASS:
        comment = f"End of tier {tier.name}. Drop if no policies passed packet"
        rules.append(Rule(not_passed, layout.deny, (comment,)))
    return rules


def _profiles(layout: Layout, marks: Marks) -> list[Rule]:
    _, prefix = layout.direction.value
    accepted = Rule(Match().mark_set(marks.accept), RETURN, ("Return if profile accepted",))
    steps = [
        rule
        for name in layout.profiles
        for rule in (Rule(action=Jump(limited(prefix, name))), accepted)
    ]
    return [*steps, Rule(action=layout.deny, comments=("Drop if no profiles matched",))]
