"""What policies are once worked out: rules over addresses, ports and sets, by tier and endpoint.

Everything here is a frozen value without reference to stored objects: selectors have become ids of
IP sets, names of ports sets of addresses and ports. A rule matches when all of its parts match; an
empty part matches everything. What is not written for one family is left to whoever renders: a
rule may hold prefixes of both. Source: Calico 3.32, felix/proto and felix/calc, in our own words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from cymric.model.net import Network


class Verdict(StrEnum):
    """What a rule says of the packets that it matches; LOG goes on to the next rule."""

    ALLOW = "allow"
    DENY = "deny"
    PASS = "pass"  # noqa: S105 - a verdict
    LOG = "log"


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """Ports `first` to `last`, both included."""

    first: int
    last: int


@dataclass(frozen=True, slots=True)
class IcmpMatch:
    """A type of ICMP (ICMPv6 for IPv6), and a code of it; None matches any."""

    type: int | None = None
    code: int | None = None


@dataclass(frozen=True, slots=True)
class EntityMatch:
    """One side of a rule. All that is given must hold; within a tuple see each field.

    Ports match when one of `ports` or one of `port_set_ids` does: they are one list as written.
    Sets are looked up by this side's address (and port), source or destination.
    """

    nets: tuple[Network, ...] = ()
    """One of them contains the address. Prefixes of the other family only: the rule is void."""
    not_nets: tuple[Network, ...] = ()
    """None of them contains the address. Prefixes of the other family only: void as well."""
    ports: tuple[PortRange, ...] = ()
    not_ports: tuple[PortRange, ...] = ()
    set_ids: tuple[str, ...] = ()
    """Every one of these sets contains the address."""
    not_set_ids: tuple[str, ...] = ()
    """None of these sets contains the address."""
    port_set_ids: tuple[str, ...] = ()
    """Named ports, sets of address and port: one of them (or of `ports`) matches."""
    not_port_set_ids: tuple[str, ...] = ()
    """None of these contains the address with the port."""
    service_set_ids: tuple[str, ...] = ()
    """Services: address and port for a destination, addresses only for a source."""

    @property
    def set_ids_in_use(self) -> tuple[str, ...]:
        """Every set that is named."""
        return (
            *self.set_ids,
            *self.not_set_ids,
            *self.port_set_ids,
            *self.not_port_set_ids,
            *self.service_set_ids,
        )


ANYTHING = EntityMatch()
"""A side that matches every address and port."""


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """One rule. Protocols are IANA numbers or iptables' lower case names (`tcp`, `icmpv6`)."""

    action: Verdict
    ip_version: int | None = None
    """4 or 6; None: both."""
    protocol: str | int | None = None
    not_protocol: str | int | None = None
    icmp: IcmpMatch | None = None
    not_icmp: IcmpMatch | None = None
    source: EntityMatch = ANYTHING
    destination: EntityMatch = ANYTHING
    annotations: tuple[tuple[str, str], ...] = ()
    """The rule's own metadata, by name, shown as comments."""

    @property
    def set_ids_in_use(self) -> tuple[str, ...]:
        """Every IP set that is named on either side."""
        return (*self.source.set_ids_in_use, *self.destination.set_ids_in_use)


@dataclass(frozen=True, slots=True, order=True)
class PolicyId:
    """Names a policy: `np/prod/allow-web`, `gnp/deny-all`."""

    kind: str
    """The short kind: np, gnp, knp."""
    namespace: str
    """Empty for policies of the cluster."""
    name: str

    def __str__(self) -> str:
        place = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{self.kind}/{place}"


@dataclass(frozen=True, slots=True)
class Policy:
    """The rules of one policy that applies to a local endpoint.

    `inbound` is what the endpoint receives, `outbound` what it sends.
    """

    id: PolicyId
    tier: str
    inbound: tuple[PolicyRule, ...] = ()
    outbound: tuple[PolicyRule, ...] = ()
    reevaluate_established: bool = False
    """Connections that the rules deny now are to be forgotten, not only new ones refused."""


@dataclass(frozen=True, slots=True)
class TierPolicies:
    """The policies of one tier that apply to one endpoint, in the order of evaluation.

    `default_action` (DENY or PASS) is what happens, in a direction with at least one policy, to
    packets that no rule decided. A direction without policy is as if the tier did not exist.
    """

    name: str
    default_action: Verdict = Verdict.DENY
    inbound: tuple[PolicyId, ...] = ()
    outbound: tuple[PolicyId, ...] = ()


@dataclass(frozen=True, slots=True)
class HostEndpoint:
    """One interface of the host under policy; `interface` is `*` for all that have no own one.

    `tiers` and then `profiles` decide about the host's own traffic, `forward_tiers` about what
    passes through, `untracked_tiers` and `pre_dnat_tiers` about everything, ahead of the others.
    """

    id: str
    """The HostEndpoint's name."""
    interface: str
    profiles: tuple[str, ...] = ()
    tiers: tuple[TierPolicies, ...] = ()
    forward_tiers: tuple[TierPolicies, ...] = ()
    untracked_tiers: tuple[TierPolicies, ...] = ()
    pre_dnat_tiers: tuple[TierPolicies, ...] = ()


WILDCARD_INTERFACE = "*"
"""The interface of a host endpoint that stands for every interface without one of its own."""


class SetKind(StrEnum):
    """What a set holds: prefixes, or addresses each with protocol and port."""

    NET = "hash:net"
    IP_PORT = "hash:ip,port"


@dataclass(frozen=True, slots=True)
class IPSet:
    """An IP set that rules in use name. Members are in ipset's own text, per family.

    `10.0.0.1` (never with /32), `10.1.0.0/16`; `10.0.0.1,tcp:80` in sets with ports.
    """

    id: str
    kind: SetKind
    members_v4: frozenset[str] = field(default=frozenset(), repr=False)
    members_v6: frozenset[str] = field(default=frozenset(), repr=False)

    def members(self, ip_version: int) -> frozenset[str]:
        """The members of one family."""
        return self.members_v4 if ip_version == 4 else self.members_v6
