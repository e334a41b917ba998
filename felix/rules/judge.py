"""What the rules of workloads say of one connection, without the kernel: pure.

The same meaning as the rendered chains have, worked out from the values that those are made of. A
connection between two workloads of the node must please both: policy of the sender for what it
sends, of the receiver for what it is sent. An address that is no workload's here has no say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network

from cymric.model.net import Address
from felix.calc.policies import EntityMatch, IcmpMatch, PolicyRule, Verdict
from felix.calc.values import Desired, Endpoint
from felix.rules.policy_rule import of_family, protocol_number

PROTOCOLS_WITH_PORTS = {6: "tcp", 17: "udp", 132: "sctp", 136: "udplite"}


@dataclass(frozen=True, slots=True)
class Flow:
    """A connection in the direction in which it began, after translation of its destination."""

    source: Address
    destination: Address
    protocol: int
    source_port: int = 0
    destination_port: int = 0
    icmp: tuple[int, int] = (0, 0)


class Judge:
    """Judges flows by one picture."""

    def __init__(self, desired: Desired) -> None:
        self._desired = desired
        self._endpoint_by_address: Mapping[Address, Endpoint] = {
            address: one for one in reversed(desired.endpoints) for address in one.addresses
        }

    def allows(self, flow: Flow) -> bool:
        """Whether a new connection like this would be let through."""
        sender = self._endpoint_by_address.get(flow.source)
        receiver = self._endpoint_by_address.get(flow.destination)
        return (sender is None or self._decides(sender, flow, is_inbound=False)) and (
            receiver is None or self._decides(receiver, flow, is_inbound=True)
        )

    def _decides(self, endpoint: Endpoint, flow: Flow, *, is_inbound: bool) -> bool:
        for tier in endpoint.tiers:
            ids = tier.inbound if is_inbound else tier.outbound
            if not ids:
                continue
            verdict = tier.default_action
            for policy_id in ids:
                policy = self._desired.policies.get(policy_id)
                if policy is None:
                    return False
                rules = policy.inbound if is_inbound else policy.outbound
                if found := self._first(rules, flow):
                    verdict = found
                    break
            if verdict is not Verdict.PASS:
                return verdict is Verdict.ALLOW
        for name in endpoint.profiles:
            profile = self._desired.profiles.get(name)
            if profile is None:
                return False
            written = profile.inbound if is_inbound else profile.outbound
            if written is None:
                return False
            found = self._first(written, flow)
            if found in (Verdict.ALLOW, Verdict.DENY):
                return found is Verdict.ALLOW
        return False

    def _first(self, rules: Sequence[PolicyRule], flow: Flow) -> Verdict | None:
        """What the first rule that decides says."""
        for rule in rules:
            if rule.action is not Verdict.LOG and self.matches(rule, flow):
                return rule.action
        return None

    def matches(self, rule: PolicyRule, flow: Flow) -> bool:
        """Whether a rule is about this flow."""
        narrowed = of_family(rule, flow.source.version)
        if narrowed is None:
            return False
        if narrowed.protocol is not None and protocol_number(narrowed.protocol) != flow.protocol:
            return False
        if (
            narrowed.not_protocol is not None
            and protocol_number(narrowed.not_protocol) == flow.protocol
        ):
            return False
        if narrowed.icmp is not None and not _is_icmp(narrowed.icmp, flow):
            return False
        if narrowed.not_icmp is not None and _is_icmp(narrowed.not_icmp, flow):
            return False
        return self._side(
            narrowed.source, flow.source, flow.source_port, flow, is_source=True
        ) and self._side(
            narrowed.destination, flow.destination, flow.destination_port, flow, is_source=False
        )

    def _side(
        self, side: EntityMatch, address: Address, port: int, flow: Flow, *, is_source: bool
    ) -> bool:
        name = PROTOCOLS_WITH_PORTS.get(flow.protocol)
        with_port = f"{address},{name}:{port}"
        if side.nets and not any(address in net for net in side.nets):
            return False
        if any(address in net for net in side.not_nets):
            return False
        if not all(self._holds(set_id, address) for set_id in side.set_ids):
            return False
        if any(self._holds(set_id, address) for set_id in side.not_set_ids):
            return False
        for set_id in side.service_set_ids:
            if is_source and not self._holds(set_id, address):
                return False
            if not is_source and not self._has(set_id, address, with_port):
                return False
        if side.ports or side.port_set_ids:
            by_number = any(one.first <= port <= one.last for one in side.ports)
            by_name = any(self._has(one, address, with_port) for one in side.port_set_ids)
            if not (by_number or by_name):
                return False
        if any(one.first <= port <= one.last for one in side.not_ports):
            return False
        return not any(self._has(one, address, with_port) for one in side.not_port_set_ids)

    def _has(self, set_id: str, address: Address, member: str) -> bool:
        found = self._desired.ip_sets.get(set_id)
        return found is not None and member in found.members(address.version)

    def _holds(self, set_id: str, address: Address) -> bool:
        found = self._desired.ip_sets.get(set_id)
        if found is None:
            return False
        members = found.members(address.version)
        if str(address) in members:
            return True
        return any("/" in member and address in ip_network(member) for member in members)


def _is_icmp(wanted: IcmpMatch, flow: Flow) -> bool:
    kind, code = flow.icmp
    return wanted.type in (None, kind) and wanted.code in (None, code)
