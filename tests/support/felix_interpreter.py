"""What a packet meets when a picture (`Desired`) is enforced exactly as it stands.

Endpoint tiers, policy rules and IP sets are looked up one by one, as the kernel would; nothing of
the stored objects is known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_network

from cymric.model.net import Address
from cymric.model.rules import PROTOCOL_NAMES
from felix.calc.policies import EntityMatch, IcmpMatch, PolicyRule, PortRange, TierPolicies, Verdict
from felix.calc.values import Desired
from felix.calc.verdict import Packet

_PROTOCOL_WORDS = {6: "tcp", 17: "udp", 132: "sctp"}


class Interpreter:
    """One picture."""

    def __init__(self, desired: Desired) -> None:
        self._desired = desired

    def decide(
        self,
        tiers: Sequence[TierPolicies],
        profiles: Sequence[str],
        direction: str,
        packet: Packet,
    ) -> str:
        """`allow` or `deny`: what tiers and then profiles say."""
        decided = self.tiers(tiers, direction, packet)
        if decided != "none":
            return decided
        for name in profiles:
            profile = self._desired.profiles[name]
            rules = profile.inbound if direction == "ingress" else profile.outbound
            if rules is None:
                return "deny"
            verdict = self._first(rules, packet)
            if verdict in (Verdict.ALLOW, Verdict.DENY):
                return verdict.value
        return "deny"

    def tiers(self, tiers: Sequence[TierPolicies], direction: str, packet: Packet) -> str:
        """`allow`, `deny`, or `none` if every tier passed."""
        for tier in tiers:
            ids = tier.inbound if direction == "ingress" else tier.outbound
            verdict: Verdict | None = None
            for id_ in ids:
                policy = self._desired.policies[id_]
                rules = policy.inbound if direction == "ingress" else policy.outbound
                if verdict := self._first(rules, packet):
                    break
            if ids and verdict is None:
                verdict = tier.default_action
            if verdict in (Verdict.ALLOW, Verdict.DENY):
                return verdict.value
        return "none"

    def _first(self, rules: Iterable[PolicyRule], packet: Packet) -> Verdict | None:
        for rule in rules:
            if rule.action is not Verdict.LOG and self._matches(rule, packet):
                return rule.action
        return None

    def _matches(self, rule: PolicyRule, packet: Packet) -> bool:
        return (
            rule.ip_version in (None, packet.ip_version)
            and (rule.protocol is None or _number(rule.protocol) == packet.protocol)
            and (rule.not_protocol is None or _number(rule.not_protocol) != packet.protocol)
            and (rule.icmp is None or _is_icmp(rule.icmp, packet))
            and (rule.not_icmp is None or not _is_icmp(rule.not_icmp, packet))
            and self._side(rule.source, packet, packet.source, packet.source_port)
            and self._side(rule.destination, packet, packet.destination, packet.destination_port)
        )

    def _side(self, match: EntityMatch, packet: Packet, address: Address, port: int) -> bool:
        word, version = _PROTOCOL_WORDS.get(packet.protocol), packet.ip_version

        def holds(set_id: str) -> bool:
            members = self._desired.ip_sets[set_id].members(packet.ip_version)
            return any(address in ip_network(member) for member in members)

        def holds_port(set_id: str) -> bool:
            members = self._desired.ip_sets[set_id].members(packet.ip_version)
            return f"{address},{word}:{port}" in members

        def in_ranges(ranges: Iterable[PortRange]) -> bool:
            return any(one.first <= port <= one.last for one in ranges)

        ports_given = bool(match.ports or match.port_set_ids)
        return (
            (not match.nets or any(address in net for net in match.nets))
            and (not match.not_nets or any(net.version == version for net in match.not_nets))
            and not any(address in net for net in match.not_nets)
            and all(map(holds, match.set_ids))
            and not any(map(holds, match.not_set_ids))
            and (
                not ports_given
                or in_ranges(match.ports)
                or any(map(holds_port, match.port_set_ids))
            )
            and not in_ranges(match.not_ports)
            and not any(map(holds_port, match.not_port_set_ids))
            and not match.service_set_ids
        )


def _number(protocol: str | int) -> int:
    return PROTOCOL_NAMES[protocol] if isinstance(protocol, str) else protocol


def _is_icmp(match: IcmpMatch, packet: Packet) -> bool:
    return match.type == packet.icmp_type and match.code in (None, packet.icmp_code)
