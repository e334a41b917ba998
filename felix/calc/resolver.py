"""In which order policies apply to one endpoint: by class, tier and order.

    policies that match it ─▶ class (normal, forward, untracked, pre-DNAT) ─▶ tiers ─▶ policies

Tiers come by order, then name; one without order after all with, one that does not exist after
all that do, with Deny at its end. Policies of a tier come by order (none last), then name,
namespace and kind. Source: Calico 3.32 felix/calc/policy_sorter.go and policy_resolver.go, in our
own words.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from cymric.model.policy import GlobalNetworkPolicy, NetworkPolicy, Tier
from felix.calc.policies import PolicyId, TierPolicies, Verdict


class PolicyClass(StrEnum):
    """Where a policy acts."""

    NORMAL = "normal"
    UNTRACKED = "untracked"
    PRE_DNAT = "pre-DNAT"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one policy stands among all: what matters for order, apart from its rules."""

    id: PolicyId
    kind: str
    tier: str
    order: float
    policy_class: PolicyClass
    on_forward: bool
    is_ingress: bool
    is_egress: bool

    @property
    def sort_key(self) -> tuple[float, str]:
        """Within the tier."""
        return self.order, f"{self.id.name}/{self.id.namespace}/{self.kind}"


def place_of(policy_id: PolicyId, stored: NetworkPolicy | GlobalNetworkPolicy) -> Place:
    """Where a stored policy stands."""
    spec = stored.spec
    policy_class, on_forward = PolicyClass.NORMAL, False
    if isinstance(stored, GlobalNetworkPolicy):
        if stored.spec.do_not_track:
            policy_class = PolicyClass.UNTRACKED
        elif stored.spec.pre_dnat:
            policy_class = PolicyClass.PRE_DNAT
        else:
            on_forward = stored.spec.apply_on_forward
    return Place(
        id=policy_id,
        kind=stored.kind,
        tier=spec.tier_name,
        order=inf if spec.order is None else float(spec.order),
        policy_class=policy_class,
        on_forward=on_forward,
        is_ingress=spec.is_ingress,
        is_egress=spec.is_egress and policy_class is not PolicyClass.PRE_DNAT,
    )


@dataclass(frozen=True, slots=True)
class EndpointTiers:
    """The tiers of one endpoint, by class."""

    normal: tuple[TierPolicies, ...] = ()
    forward: tuple[TierPolicies, ...] = ()
    untracked: tuple[TierPolicies, ...] = ()
    pre_dnat: tuple[TierPolicies, ...] = ()


class TierOrder:
    """The tiers that exist."""

    def __init__(self) -> None:
        self._tiers: dict[str, Tier] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tiers

    def put(self, name: str, tier: Tier | None) -> bool:
        """Note one, or that there is none; whether anything changed."""
        before = self._tiers.get(name)
        if tier is None:
            self._tiers.pop(name, None)
        else:
            self._tiers[name] = tier
        return (before and before.spec) != (tier and tier.spec)

    def sort_key(self, name: str) -> tuple[bool, float, str]:
        """Where a tier stands."""
        tier = self._tiers.get(name)
        order = None if tier is None else tier.spec.order
        return tier is None, inf if order is None else float(order), name

    def default_action(self, name: str) -> Verdict:
        """What is done at its end."""
        tier = self._tiers.get(name)
        return Verdict.PASS if tier is not None and tier.spec.passes else Verdict.DENY


def resolve(places: Iterable[Place], tiers: TierOrder, *, is_host: bool) -> EndpointTiers:
    """The tiers of an endpoint that these policies match. Workloads have normal policies only."""
    ordered = sorted(places, key=lambda place: (tiers.sort_key(place.tier), place.sort_key))
    normal = [place for place in ordered if place.policy_class is PolicyClass.NORMAL]
    if not is_host:
        return EndpointTiers(_grouped(normal, tiers))
    return EndpointTiers(
        _grouped(normal, tiers),
        _grouped([place for place in normal if place.on_forward], tiers),
        _grouped([one for one in ordered if one.policy_class is PolicyClass.UNTRACKED]),
        _grouped([one for one in ordered if one.policy_class is PolicyClass.PRE_DNAT]),
    )


def _grouped(ordered: Iterable[Place], tiers: TierOrder | None = None) -> tuple[TierPolicies, ...]:
    """By tier; without `tiers` every tier passes at its end."""
    groups: dict[str, list[Place]] = {}
    for place in ordered:
        groups.setdefault(place.tier, []).append(place)
    return tuple(
        TierPolicies(
            name,
            Verdict.PASS if tiers is None else tiers.default_action(name),
            tuple(place.id for place in group if place.is_ingress),
            tuple(place.id for place in group if place.is_egress),
        )
        for name, group in groups.items()
        if any(place.is_ingress or place.is_egress for place in group)
    )
