"""Policies, tiers, profiles and sets of networks, as stored.

Names: up to Calico 3.31 a policy of tier `default` is stored as `default.<name>`, since 3.32 under
its plain name; both are read. What identifies a policy here is always the name in its key, so that
two of them can never hide each other; `shown_name` is the one that the user gave.
Staged kinds are read and shown; nothing enforces them.
Source: Calico 3.32 api/pkg/apis/projectcalico/v3, as facts; each field keeps its name there.
"""

from __future__ import annotations

from typing import Any

import msgspec

from cymric.model.net import Network
from cymric.model.resources import Resource, Spec
from cymric.model.rules import Rule, parse_net
from cymric.model.selector import parse as parse_selector

DEFAULT_TIER = "default"
NAME_ANNOTATION = "projectcalico.org/metadata"
"""Holds `{"name": "<what the user called it>"}`."""
ANNOTATION_REEVALUATE = "cymric.io/reevaluate-established"
"""On a policy, `true`: connections that its new rules deny are ended, not only new ones refused."""

INGRESS, EGRESS = "Ingress", "Egress"


class Rules(Spec, frozen=True, kw_only=True):
    """What all policies' specs begin with. A lower `order` comes first, none comes last."""

    tier: str = ""
    order: int | float | None = None
    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()
    selector: str = ""
    types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_selector(self.selector)
        if unknown := set(self.types) - {INGRESS, EGRESS}:
            raise ValueError(f"types: {min(unknown)!r} is neither Ingress nor Egress")

    @property
    def tier_name(self) -> str:
        """The tier it is in."""
        return self.tier or DEFAULT_TIER

    @property
    def is_ingress(self) -> bool:
        """Whether it says something about what endpoints receive; no types means both."""
        return not self.types or INGRESS in self.types

    @property
    def is_egress(self) -> bool:
        """Whether it says something about what endpoints send."""
        return not self.types or EGRESS in self.types


class NetworkPolicySpec(Rules, frozen=True, kw_only=True):
    """A policy for endpoints of its own namespace."""

    service_account_selector: str = ""
    performance_hints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_selector(self.service_account_selector)


class GlobalNetworkPolicySpec(Rules, frozen=True, kw_only=True):
    """A policy for endpoints of all namespaces, and for host endpoints."""

    do_not_track: bool = False
    pre_dnat: bool = msgspec.field(default=False, name="preDNAT")
    apply_on_forward: bool = False
    service_account_selector: str = ""
    namespace_selector: str = ""
    performance_hints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_selector(self.service_account_selector)
        parse_selector(self.namespace_selector)
        if self.do_not_track and self.pre_dnat:
            raise ValueError("doNotTrack and preDNAT exclude each other")


class _Named(Resource, frozen=True, kw_only=True):
    """What policies have in common beside their spec."""

    @property
    def reevaluates_established(self) -> bool:
        """Whether established connections are judged again when the rules change."""
        return self.annotations.get(ANNOTATION_REEVALUATE) == "true"

    @property
    def shown_name(self) -> str:
        """The name that the user gave, whichever version stored it."""
        try:
            hidden = msgspec.json.decode(self.annotations.get(NAME_ANNOTATION, "null"))
        except msgspec.DecodeError:
            hidden = None
        if isinstance(hidden, dict) and isinstance(name := hidden.get("name"), str) and name:
            return name
        tier = getattr(getattr(self, "spec", None), "tier", "")
        if tier in ("", DEFAULT_TIER):
            return self.metadata.name.removeprefix(f"{DEFAULT_TIER}.")
        return self.metadata.name


class NetworkPolicy(_Named, frozen=True, kw_only=True):
    """See Calico's NetworkPolicy resource."""

    kind: str = "NetworkPolicy"
    spec: NetworkPolicySpec = NetworkPolicySpec()


class GlobalNetworkPolicy(_Named, frozen=True, kw_only=True):
    """See Calico's GlobalNetworkPolicy resource."""

    kind: str = "GlobalNetworkPolicy"
    spec: GlobalNetworkPolicySpec = GlobalNetworkPolicySpec()


class StagedNetworkPolicySpec(NetworkPolicySpec, frozen=True, kw_only=True):
    """What a NetworkPolicy might become: `staged_action` is Set, Delete, Learn or Ignore."""

    staged_action: str = ""


class StagedNetworkPolicy(_Named, frozen=True, kw_only=True):
    """A NetworkPolicy on trial."""

    kind: str = "StagedNetworkPolicy"
    spec: StagedNetworkPolicySpec = StagedNetworkPolicySpec()


class StagedGlobalNetworkPolicySpec(GlobalNetworkPolicySpec, frozen=True, kw_only=True):
    """See StagedNetworkPolicySpec."""

    staged_action: str = ""


class StagedGlobalNetworkPolicy(_Named, frozen=True, kw_only=True):
    """A GlobalNetworkPolicy on trial."""

    kind: str = "StagedGlobalNetworkPolicy"
    spec: StagedGlobalNetworkPolicySpec = StagedGlobalNetworkPolicySpec()


class StagedKubernetesNetworkPolicy(_Named, frozen=True, kw_only=True):
    """A policy of Kubernetes on trial, in Kubernetes' own shape."""

    kind: str = "StagedKubernetesNetworkPolicy"
    spec: dict[str, Any] = msgspec.field(default_factory=dict)


class TierSpec(Spec, frozen=True, kw_only=True):
    """Where the tier stands, and what happens to what none of its policies decides."""

    order: int | float | None = None
    default_action: str = ""

    def __post_init__(self) -> None:
        if self.default_action not in ("", "Deny", "Pass"):
            raise ValueError(f"defaultAction {self.default_action!r} is neither Deny nor Pass")

    @property
    def passes(self) -> bool:
        """Whether undecided packets go on to the next tier; else they are denied."""
        return self.default_action == "Pass"


class Tier(Resource, frozen=True, kw_only=True):
    """See Calico's Tier resource."""

    kind: str = "Tier"
    spec: TierSpec = TierSpec()
    status: dict[str, Any] = msgspec.field(default_factory=dict)


class ProfileSpec(Spec, frozen=True, kw_only=True):
    """Rules for what no policy decides, and labels for the endpoints that name the profile."""

    ingress: tuple[Rule, ...] = ()
    egress: tuple[Rule, ...] = ()
    labels_to_apply: dict[str, str] = msgspec.field(default_factory=dict)


class Profile(Resource, frozen=True, kw_only=True):
    """See Calico's Profile resource."""

    kind: str = "Profile"
    spec: ProfileSpec = ProfileSpec()


class NetworkSetSpec(Spec, frozen=True, kw_only=True):
    """Prefixes and addresses."""

    nets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for net in self.nets:
            parse_net(net)

    @property
    def networks(self) -> tuple[Network, ...]:
        """The prefixes."""
        return tuple(map(parse_net, self.nets))


class NetworkSet(Resource, frozen=True, kw_only=True):
    """Networks with labels, for rules of its own namespace's policies to select."""

    kind: str = "NetworkSet"
    spec: NetworkSetSpec = NetworkSetSpec()


class GlobalNetworkSet(Resource, frozen=True, kw_only=True):
    """Networks with labels, for the rules of any policy to select."""

    kind: str = "GlobalNetworkSet"
    spec: NetworkSetSpec = NetworkSetSpec()
