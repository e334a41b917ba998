"""All that the calculation may say to the data plane: one frozen picture of what is wanted.

The picture is whole: who applies it needs no earlier one, and equal pictures mean equal kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cymric.model.net import Address, Network
from felix.calc.config import FelixConfig
from felix.calc.policies import (
    ANYTHING,
    WILDCARD_INTERFACE,
    EntityMatch,
    HostEndpoint,
    IcmpMatch,
    IPSet,
    Policy,
    PolicyId,
    PolicyRule,
    PortRange,
    SetKind,
    TierPolicies,
    Verdict,
)

__all__ = [
    "ANYTHING",
    "WILDCARD_INTERFACE",
    "Desired",
    "Endpoint",
    "EndpointId",
    "EntityMatch",
    "FloatingAddress",
    "HostEndpoint",
    "IPSet",
    "IcmpMatch",
    "NatExclusion",
    "Policy",
    "PolicyId",
    "PolicyRule",
    "PortRange",
    "Problem",
    "ProfileRules",
    "SetKind",
    "TierPolicies",
    "Verdict",
]


@dataclass(frozen=True, slots=True, order=True)
class EndpointId:
    """Names a workload endpoint as status files do; ordered by text."""

    orchestrator: str
    workload: str
    """`<namespace>/<pod or container>`."""
    endpoint: str

    def __str__(self) -> str:
        return f"{self.orchestrator}/{self.workload}/{self.endpoint}"


@dataclass(frozen=True, slots=True, order=True)
class FloatingAddress:
    """What is sent to `external` goes to `internal`, an address of the same endpoint."""

    external: Address
    internal: Address


@dataclass(frozen=True, slots=True)
class NatExclusion:
    """What goes from a pool to `destination` keeps its source, although the pool is masqueraded."""

    pool: Network
    destination: Network

    def __str__(self) -> str:
        return f"{self.pool} {self.destination}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One local workload endpoint; `mac` is the pod's side.

    Only what is switched on is in it: addresses of families in use, `spoofable` prefixes (sources
    it may use beside its addresses) and `floating` addresses where the parameters allow them.
    """

    id: EndpointId
    interface: str
    mac: str
    addresses: tuple[Address, ...]
    profiles: tuple[str, ...]
    spoofable: tuple[Network, ...] = ()
    floating: tuple[FloatingAddress, ...] = ()
    tiers: tuple[TierPolicies, ...] = ()
    """The policies that apply, ahead of the profiles."""
    dscp: int | None = None
    """What is written into packets that leave the cluster; None leaves them as they are."""
    ip_versions: frozenset[int] = field(init=False, compare=False, repr=False)
    """The families it has addresses of."""

    def __post_init__(self) -> None:
        versions = frozenset(address.version for address in self.addresses)
        object.__setattr__(self, "ip_versions", versions)

    @property
    def routed(self) -> tuple[Address, ...]:
        """Every address that leads to it."""
        return (*self.addresses, *(pair.external for pair in self.floating))


@dataclass(frozen=True, slots=True)
class ProfileRules:
    """A profile's rules per direction, of both families.

    None stands for "drop everything": missing, or not to be rendered.
    """

    name: str
    inbound: tuple[PolicyRule, ...] | None
    outbound: tuple[PolicyRule, ...] | None


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Something in the datastore that is not done as written, for people to read."""

    subject: str
    reason: str


@dataclass(frozen=True, slots=True)
class Desired:
    """Everything one node should enforce."""

    config: FelixConfig = field(default_factory=FelixConfig)
    is_ready: bool = True
    """False: the datastore is locked, leave the kernel as it is."""
    endpoints: tuple[Endpoint, ...] = ()
    """By interface name, one per interface."""
    profiles: Mapping[str, ProfileRules] = field(default_factory=dict)
    """Every profile that an endpoint names, of this node or of its interfaces."""
    policies: Mapping[PolicyId, Policy] = field(default_factory=dict)
    """Every policy that applies to an endpoint here."""
    host_endpoints: tuple[HostEndpoint, ...] = ()
    """By interface name, one per interface."""
    host_names: frozenset[str] = frozenset()
    """The HostEndpoints of this node, whether or not they have an interface."""
    ip_sets: Mapping[str, IPSet] = field(default_factory=dict)
    """Every set that a rule of `policies` or `profiles` names."""
    pools: frozenset[Network] = frozenset()
    masquerade_pools: frozenset[Network] = frozenset()
    nat_exclusions: tuple[NatExclusion, ...] = ()
    hosts: frozenset[Network] = frozenset()
    service_cidrs: tuple[Network, ...] = ()
    problems: tuple[Problem, ...] = ()
    notes: tuple[Problem, ...] = ()
    """What is set and has no effect here; nothing is enforced less for it."""
    count_by_kind: Mapping[str, int] = field(default_factory=dict)
    """How many objects of each kind the cluster has."""
