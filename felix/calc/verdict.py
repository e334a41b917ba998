"""What happens to one packet, worked out from the stored objects alone: slow, and plainly right.

This is the meaning of policy in code, written from its description and from nothing else: no
selectors are merged here, no sets are filled, nothing is kept from one question to the next. What
the graph and the rendered rules do is compared with it. It answers for the first packet of a
connection that reaches an endpoint (ingress) or comes from it (egress), with the policy and rule
that decided.

    tiers in order ─▶ policies in order ─▶ rules ─▶ allow, deny; pass: on with the next tier
    nothing decided ─▶ profiles in order ─▶ rules ─▶ allow, deny; nothing decided ─▶ deny

Source: the semantics of Calico 3.32 policy, in our own words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from cymric.model.endpoints import (
    LABEL_NAMESPACE,
    LABEL_ORCHESTRATOR,
    LABEL_SERVICE_ACCOUNT,
    HostEndpoint,
    WorkloadEndpoint,
)
from cymric.model.keys import ResourceKey
from cymric.model.net import Address, Network
from cymric.model.policy import (
    GlobalNetworkPolicy,
    GlobalNetworkSet,
    NetworkPolicy,
    NetworkSet,
    Profile,
    Tier,
)
from cymric.model.resources import DEFAULT_ALLOW_PROFILE
from cymric.model.rules import (
    EntityRule,
    Icmp,
    Rule,
    parse_action,
    parse_net,
    parse_port,
    protocol_number,
)
from cymric.model.selector import Everything, Node, Not, parse

Objects = Mapping[ResourceKey, object]
"""What is stored, by key."""

_PORT_PROTOCOLS = (6, 17, 132)
_ICMP_VERSIONS = {1: 4, 58: 6}


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a connection. Ports are 0 for protocols without; so are ICMP's fields."""

    source: Address
    destination: Address
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    icmp_type: int = 0
    icmp_code: int = 0

    @property
    def ip_version(self) -> int:
        """Its family."""
        return self.source.version


@dataclass(frozen=True, slots=True)
class Decision:
    """`allow` or `deny` (`none` where nothing was said), by what, and by which rule from 1."""

    action: str
    by: str
    rule: int = 0


@dataclass(frozen=True, slots=True)
class Hit:
    """A rule that matched on the way to a decision, those that only log and pass as well."""

    by: str
    direction: str
    number: int
    rule: Rule


Trail = list[Hit]
"""What matched, in order; given to be filled."""


def decide(
    objects: Objects,
    endpoint: ResourceKey,
    direction: str,
    packet: Packet,
    trail: Trail | None = None,
) -> Decision:
    """What normal policy of an endpoint says; `direction` is ingress or egress of the endpoint."""
    return _World(objects, trail).decide(endpoint, direction, packet)


def decide_forwarded(
    objects: Objects,
    endpoint: ResourceKey,
    direction: str,
    packet: Packet,
    trail: Trail | None = None,
) -> Decision:
    """What a host endpoint says of a packet that only passes through: allowed without policy."""
    world = _World(objects, trail)
    policies = [
        policy
        for policy in world.policies(endpoint, direction)
        if isinstance(policy, GlobalNetworkPolicy)
        and policy.spec.apply_on_forward
        and _kind_of(policy) == "normal"
    ]
    if not policies:
        return Decision("allow", "no policy for forwarded traffic")
    found = world.in_tiers(policies, direction, packet)
    # There are no profiles for it: what all tiers pass on is left to the host's own rules.
    return found or Decision("none", "passed on by every tier")


def decide_early(
    objects: Objects,
    endpoint: ResourceKey,
    direction: str,
    packet: Packet,
    kind: str,
    trail: Trail | None = None,
) -> Decision:
    """What untracked or pre-DNAT policy (`kind`) says, ahead of all else: `none` means go on."""
    world = _World(objects, trail)
    policies = [one for one in world.policies(endpoint, direction) if _kind_of(one) == kind]
    found = world.in_tiers(policies, direction, packet, always_passes=True)
    return found or Decision("none", f"no {kind} policy")


_Policy = NetworkPolicy | GlobalNetworkPolicy


class _World:
    def __init__(self, objects: Objects, trail: Trail | None = None) -> None:
        self._objects = objects
        self._trail: Trail = [] if trail is None else trail
        self._labels: dict[ResourceKey, dict[str, str]] = {}

    def _all(self) -> Iterator[tuple[ResourceKey, object]]:
        return iter(self._objects.items())

    def decide(self, endpoint: ResourceKey, direction: str, packet: Packet) -> Decision:
        policies = [one for one in self.policies(endpoint, direction) if _kind_of(one) == "normal"]
        if found := self.in_tiers(policies, direction, packet):
            return found
        stored = self._objects[endpoint]
        assert isinstance(stored, WorkloadEndpoint | HostEndpoint)
        for name in stored.spec.profiles:
            if found := self._in_profile(name, direction, packet):
                return found
        return Decision("deny", "no profile allowed it")

    # --- policies ---------------------------------------------------------------------------------

    def policies(self, endpoint: ResourceKey, direction: str) -> Iterator[_Policy]:
        """The policies that are about an endpoint and say something about a direction."""
        labels = self.labels(endpoint)
        for _, policy in self._all():
            if not isinstance(policy, NetworkPolicy | GlobalNetworkPolicy):
                continue
            if _kind_of(policy) != "normal" and endpoint.kind != "HostEndpoint":
                continue
            if _kind_of(policy) == "pre-DNAT" and direction == "egress":
                continue
            says = policy.spec.is_ingress if direction == "ingress" else policy.spec.is_egress
            if says and self._is_about(policy, labels):
                yield policy

    def _is_about(self, policy: _Policy, labels: Mapping[str, str]) -> bool:
        spec = policy.spec
        in_namespace = LABEL_NAMESPACE in labels
        all_means = True
        if isinstance(policy, NetworkPolicy):
            if labels.get(LABEL_NAMESPACE) != policy.metadata.namespace:
                return False
        elif policy.spec.namespace_selector.strip():
            if not _about_parent(policy.spec.namespace_selector, labels, "pcns.", in_namespace):
                return False
            # With a namespace selector "all" means all that are in a namespace, at any depth;
            # but a blank selector says nothing at all.
            all_means = in_namespace or not spec.selector.strip()
        if not _holds(parse(spec.selector).root, labels, all_means=all_means):
            return False
        accounts = spec.service_account_selector
        if not accounts.strip():
            return True
        # Only for policies of the cluster "all" asks for a service account at all.
        has_one = isinstance(policy, NetworkPolicy) or LABEL_SERVICE_ACCOUNT in labels
        return _about_parent(accounts, labels, "pcsa.", has_one)

    def in_tiers(
        self,
        policies: Iterable[_Policy],
        direction: str,
        packet: Packet,
        *,
        always_passes: bool = False,
    ) -> Decision | None:
        """The first verdict of the tiers that have one of these policies; None: they all passed."""
        by_tier: dict[str, list[_Policy]] = {}
        for policy in policies:
            by_tier.setdefault(policy.spec.tier_name, []).append(policy)
        for name in sorted(by_tier, key=self._tier_rank):
            verdict = self._in_tier(by_tier[name], direction, packet)
            if verdict is None:
                if not always_passes and not self._passes(name):
                    return Decision("deny", f"end of tier {name}")
            elif verdict.action != "pass":
                return verdict
        return None

    def _tier(self, name: str) -> Tier | None:
        stored = self._objects.get(ResourceKey("Tier", name))
        return stored if isinstance(stored, Tier) else None

    def _tier_rank(self, name: str) -> tuple[int, int, float, str]:
        tier = self._tier(name)
        if tier is None:
            return 1, 0, 0.0, name
        order = tier.spec.order
        return 0, order is None, float(order or 0), name

    def _passes(self, name: str) -> bool:
        tier = self._tier(name)
        return tier is not None and tier.spec.default_action == "Pass"

    def _in_tier(
        self, policies: Iterable[_Policy], direction: str, packet: Packet
    ) -> Decision | None:
        def rank(policy: _Policy) -> tuple[bool, float, str]:
            order, meta = policy.spec.order, policy.metadata
            text = f"{meta.name}/{meta.namespace}/{policy.kind}"
            return order is None, float(order or 0), text

        for policy in sorted(policies, key=rank):
            rules = policy.spec.ingress if direction == "ingress" else policy.spec.egress
            namespace = policy.metadata.namespace
            name = f"{policy.kind} {policy.metadata.full_name}"
            if found := self._first(rules, namespace, packet, name, direction):
                return found
        return None

    def _in_profile(self, name: str, direction: str, packet: Packet) -> Decision | None:
        if name == DEFAULT_ALLOW_PROFILE:
            return Decision("allow", f"Profile {name}", 1)
        stored = self._objects.get(ResourceKey("Profile", name))
        if not isinstance(stored, Profile):
            return Decision("deny", f"Profile {name} is missing")
        rules = stored.spec.ingress if direction == "ingress" else stored.spec.egress
        found = self._first(rules, "", packet, f"Profile {name}", direction)
        return None if found is None or found.action == "pass" else found

    # --- rules ------------------------------------------------------------------------------------

    def _first(
        self, rules: Iterable[Rule], namespace: str, packet: Packet, name: str, direction: str
    ) -> Decision | None:
        """The first rule that matches and does not merely log."""
        for number, rule in enumerate(rules, start=1):
            action = parse_action(rule.action)
            if rule.http:
                # Nobody here looks into HTTP; whatever the answer would be, nothing is allowed.
                if action in ("allow", "log"):
                    continue
                action = "deny"
            if self.rule_matches(rule, namespace, packet):
                self._trail.append(Hit(name, direction, number, rule))
                if action != "log":
                    return Decision(action, name, number)
        return None

    def rule_matches(self, rule: Rule, namespace: str, packet: Packet) -> bool:
        """Whether every part of a rule holds."""
        if rule.ip_version is not None and rule.ip_version != packet.ip_version:
            return False
        protocol = None if rule.protocol is None else protocol_number(rule.protocol)
        if protocol is not None and protocol != packet.protocol:
            return False
        if rule.not_protocol is not None and protocol_number(rule.not_protocol) == packet.protocol:
            return False
        if rule.icmp or rule.not_icmp:
            if _ICMP_VERSIONS.get(packet.protocol) != packet.ip_version:
                return False
            if rule.icmp and not _icmp_is(rule.icmp, packet):
                return False
            if rule.not_icmp and rule.not_icmp.type is not None and _icmp_is(rule.not_icmp, packet):
                return False
        return self._side_matches(
            rule.source, namespace, packet, packet.source, packet.source_port
        ) and self._side_matches(
            rule.destination, namespace, packet, packet.destination, packet.destination_port
        )

    def _side_matches(
        self, side: EntityRule, namespace: str, packet: Packet, address: Address, port: int
    ) -> bool:
        if side.services:
            return False  # nobody tells us of a service's endpoints
        if side.nets and not _in_one(address, side.nets):
            return False
        # Networks of the other family alone, also excluded ones, make a rule of that family.
        if side.not_nets and not _any_of_family(address, side.not_nets):
            return False
        if side.not_nets and _in_one(address, side.not_nets):
            return False
        owners = [key for key in self._owners(address) if self._is_wanted(key, side, namespace)]
        if self._has_positive(side, namespace) and not owners:
            return False
        if side.not_selector.strip() and not self._has_positive(side, namespace):
            unwanted = parse(side.not_selector)
            if any(unwanted.matches(self.labels(key)) for key in self._owners(address)):
                return False
        if side.ports and not self._port_in(side.ports, owners, packet, address, port):
            return False
        return not (side.not_ports and self._port_in(side.not_ports, owners, packet, address, port))

    def _has_positive(self, side: EntityRule, namespace: str) -> bool:
        """Whether an address must belong to something that is wanted.

        Then what is not wanted is said of that same thing.
        """
        return bool(
            side.selector.strip()
            or side.namespace_selector.strip()
            or _has_accounts(side)
            or (namespace and side.not_selector.strip())
        )

    def _is_wanted(self, key: ResourceKey, side: EntityRule, namespace: str) -> bool:
        labels = self.labels(key)
        in_namespace = LABEL_NAMESPACE in labels
        if side.namespace_selector.strip():
            if not _about_parent(
                side.namespace_selector, labels, "pcns.", in_namespace, not in_namespace
            ):
                return False
        elif (
            namespace
            and self._has_positive(side, namespace)
            and labels.get(LABEL_NAMESPACE) != namespace
        ):
            return False
        if accounts := side.service_accounts:
            if accounts.names and labels.get(LABEL_SERVICE_ACCOUNT) not in accounts.names:
                return False
            if accounts.selector.strip() and not _about_parent(
                accounts.selector, labels, "pcsa.", True
            ):
                return False
        if side.selector.strip() and not parse(side.selector).matches(labels):
            return False
        return not (
            side.not_selector.strip()
            and self._has_positive(side, namespace)
            and parse(side.not_selector).matches(labels)
        )

    def _port_in(
        self,
        ports: Iterable[int | str],
        owners: Iterable[ResourceKey],
        packet: Packet,
        address: Address,
        port: int,
    ) -> bool:
        """By number, or by name at one of those who own the address and are wanted."""
        if packet.protocol not in _PORT_PROTOCOLS:
            return False
        for one in ports:
            parsed = parse_port(one)
            if isinstance(parsed, str):
                if any(self._calls(key, parsed, packet.protocol, port) for key in owners):
                    return True
            elif parsed[0] <= port <= parsed[1]:
                return True
        return False

    def _calls(self, key: ResourceKey, name: str, protocol: int, port: int) -> bool:
        """Whether an endpoint calls this port by that name."""
        stored = self._objects[key]
        if not isinstance(stored, WorkloadEndpoint | HostEndpoint):
            return False
        return any(
            one.name == name and one.port == port and protocol_number(one.protocol) == protocol
            for one in stored.spec.ports
        )

    # --- who is who -------------------------------------------------------------------------------

    def _owners(self, address: Address) -> Iterator[ResourceKey]:
        """Everything that has an address."""
        for key, stored in self._all():
            match stored:
                case WorkloadEndpoint():
                    texts = stored.spec.ip_networks if stored.spec.interface_name else ()
                case HostEndpoint():
                    texts = stored.spec.expected_ips
                case NetworkSet() | GlobalNetworkSet():
                    texts = stored.spec.nets
                case _:
                    continue
            if _in_one(address, texts):
                yield key

    def labels(self, key: ResourceKey) -> dict[str, str]:
        """The labels that something goes by: its own, then those of its profiles."""
        if key not in self._labels:
            self._labels[key] = self._found_labels(key)
        return self._labels[key]

    def _found_labels(self, key: ResourceKey) -> dict[str, str]:
        stored = self._objects[key]
        parents: tuple[str, ...] = ()
        own: dict[str, str] = {}
        match stored:
            case WorkloadEndpoint():
                own = {
                    label: value
                    for label, value in stored.labels.items()
                    if not label.startswith(("pcns.", "pcsa."))
                }
                own[LABEL_NAMESPACE] = key.namespace
                own[LABEL_ORCHESTRATOR] = stored.spec.orchestrator
                if stored.spec.service_account_name:
                    own[LABEL_SERVICE_ACCOUNT] = stored.spec.service_account_name
                parents = stored.spec.profiles
            case HostEndpoint():
                own, parents = dict(stored.labels), stored.spec.profiles
            case NetworkSet():
                own = {**stored.labels, LABEL_NAMESPACE: key.namespace}
                parents = (f"kns.{key.namespace}",)
            case GlobalNetworkSet():
                own = dict(stored.labels)
        for name in parents:
            profile = self._objects.get(ResourceKey("Profile", name))
            if isinstance(profile, Profile):
                for label, value in profile.spec.labels_to_apply.items():
                    own.setdefault(label, value)
        return own


def _kind_of(policy: _Policy) -> str:
    if isinstance(policy, GlobalNetworkPolicy):
        if policy.spec.do_not_track:
            return "untracked"
        if policy.spec.pre_dnat:
            return "pre-DNAT"
    return "normal"


def _has_accounts(side: EntityRule) -> bool:
    accounts = side.service_accounts
    return accounts is not None and bool(accounts.names or accounts.selector.strip())


def _about_parent(
    text: str,
    labels: Mapping[str, str],
    prefix: str,
    all_means: bool,
    global_means: bool = True,
) -> bool:
    """Whether a selector of namespaces or service accounts holds of whoever lives there."""
    theirs = {
        label.removeprefix(prefix): value
        for label, value in labels.items()
        if label.startswith(prefix)
    }
    return _holds(parse(text).root, theirs, all_means=all_means, global_means=global_means)


def _holds(
    node: Node, labels: Mapping[str, str], *, all_means: bool, global_means: bool = True
) -> bool:
    """A selector with another meaning of all() and global()."""
    match node:
        case Everything(word):
            return all_means if word == "all" else global_means
        case Not(operand):
            return not _holds(operand, labels, all_means=all_means, global_means=global_means)
    if operands := getattr(node, "operands", None):
        held = [
            _holds(one, labels, all_means=all_means, global_means=global_means) for one in operands
        ]
        return all(held) if type(node).__name__ == "And" else any(held)
    return node.matches(labels)


def _icmp_is(icmp: Icmp, packet: Packet) -> bool:
    if icmp.type is None:
        return True
    return icmp.type == packet.icmp_type and icmp.code in (None, packet.icmp_code)


def _in_one(address: Address, texts: Iterable[str]) -> bool:
    return any(address in network for network in map(_network, texts))


def _any_of_family(address: Address, texts: Iterable[str]) -> bool:
    return any(network.version == address.version for network in map(_network, texts))


@cache
def _network(text: str) -> Network:
    return parse_net(text)
