"""Stored rules to rules over IP sets, with what each of these sets shall hold.

    Rule (selectors, names of ports) ─▶ PolicyRule (ids of sets) + SetSpec per id

A set's id is made from what it means, never from who uses it: equal meaning, equal id, on every
node and after every restart. The sets themselves are filled elsewhere (`members`).
Source: Calico 3.32 felix/calc/rule_scanner.go and felix/rules, in our own words.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cymric.model.rules import (
    EntityRule,
    Icmp,
    Rule,
    parse_action,
    parse_net,
    parse_port,
    parse_protocol,
    protocol_number,
)
from cymric.model.selector import ALL, Selector
from felix.calc.policies import EntityMatch, IcmpMatch, PolicyRule, PortRange, SetKind, Verdict
from felix.calc.selection import of_entity

PORT_PROTOCOL_NAMES = {6: "tcp", 17: "udp", 132: "sctp"}
_ANY_PROTOCOL = "none"
_ICMP = 1


@dataclass(frozen=True, slots=True)
class SetSpec:
    """What one set shall hold: addresses that `selector` chooses, or their ports of a name.

    Without a selector it is a service's, whose endpoints nobody tells us of yet: it stays empty.
    """

    id: str
    kind: SetKind
    selector: Selector | None = None
    port_name: str = ""
    port_protocol: str = ""
    """Empty: any protocol."""


@dataclass(frozen=True, slots=True)
class Converted:
    """Rules of one direction, the sets they name, and what is not done as written."""

    rules: tuple[PolicyRule, ...]
    sets: tuple[SetSpec, ...]
    troubles: tuple[str, ...]


def convert(word: str, rules: Iterable[Rule], namespace: str = "") -> Converted:
    """The rules of one direction; `word` (ingress, egress) names it in troubles."""
    found: list[PolicyRule] = []
    sets: dict[str, SetSpec] = {}
    troubles: list[str] = []
    for number, rule in enumerate(rules, start=1):
        action = Verdict(parse_action(rule.action))
        if rule.http:
            # Nobody here looks into HTTP: what it allows is not allowed, what it denies is denied
            # whatever is asked for, and what would pass on is denied.
            if action in (Verdict.ALLOW, Verdict.LOG):
                troubles.append(f"{word} rule {number} matches on http: left out")
                continue
            troubles.append(f"{word} rule {number} matches on http: denies whatever is asked for")
            action = Verdict.DENY
        if service := rule.source.services or rule.destination.services:
            troubles.append(
                f"{word} rule {number} names the service {service.name}: it matches nothing"
            )
        found.append(_rule(rule, action, namespace, sets))
    return Converted(tuple(found), tuple(sets.values()), tuple(troubles))


def _rule(rule: Rule, action: Verdict, namespace: str, sets: dict[str, SetSpec]) -> PolicyRule:
    number = None if rule.protocol is None else protocol_number(rule.protocol)
    version = rule.ip_version
    if (rule.icmp or rule.not_icmp) and version is None:
        # A type of ICMP means nothing in the other family, and the kernel refuses it there.
        version = 4 if number == _ICMP else 6
    annotations = rule.metadata.annotations if rule.metadata else {}
    return PolicyRule(
        action=action,
        ip_version=version,
        protocol=None if rule.protocol is None else parse_protocol(rule.protocol),
        not_protocol=None if rule.not_protocol is None else parse_protocol(rule.not_protocol),
        icmp=_icmp(rule.icmp),
        not_icmp=_icmp(rule.not_icmp),
        source=_side(rule.source, namespace, number, sets, is_source=True),
        destination=_side(rule.destination, namespace, number, sets, is_source=False),
        annotations=tuple(sorted(annotations.items())),
    )


def _icmp(stored: Icmp | None) -> IcmpMatch | None:
    if stored is None or stored.type is None:
        return None
    return IcmpMatch(stored.type, stored.code)


def _side(
    entity: EntityRule,
    namespace: str,
    protocol: int | None,
    sets: dict[str, SetSpec],
    *,
    is_source: bool,
) -> EntityMatch:
    wanted, unwanted = of_entity(entity, namespace)
    ports, names = _ports(entity.ports)
    not_ports, not_names = _ports(entity.not_ports)

    def use(spec: SetSpec) -> str:
        sets.setdefault(spec.id, spec)
        return spec.id

    def named(names: Sequence[str]) -> tuple[str, ...]:
        # Names that must not match are looked up among the wanted endpoints, too.
        return tuple(use(port_set(wanted or ALL, protocol, name)) for name in names)

    # A set of named ports holds addresses of the wanted endpoints only; one set says it all.
    is_covered = bool(names) and not ports
    services: tuple[str, ...] = ()
    if entity.services:
        place = entity.services.namespace or namespace
        services = (use(service_set(place, entity.services.name, with_ports=not is_source)),)
    return EntityMatch(
        nets=tuple(map(parse_net, entity.nets)),
        not_nets=tuple(map(parse_net, entity.not_nets)),
        ports=ports,
        not_ports=not_ports,
        set_ids=() if wanted is None or is_covered else (use(selector_set(wanted)),),
        not_set_ids=() if unwanted is None else (use(selector_set(unwanted)),),
        port_set_ids=named(names),
        not_port_set_ids=named(not_names),
        service_set_ids=services,
    )


def _ports(written: Sequence[int | str]) -> tuple[tuple[PortRange, ...], tuple[str, ...]]:
    """By number, and by name."""
    parsed = [parse_port(port) for port in written]
    ranges = tuple(PortRange(*port) for port in parsed if not isinstance(port, str))
    return ranges, tuple(port for port in parsed if isinstance(port, str))


def selector_set(selector: Selector) -> SetSpec:
    """The set of all addresses that a selector chooses."""
    return SetSpec(selector.unique_id(), SetKind.NET, selector)


def port_set(selector: Selector, protocol: int | None, name: str) -> SetSpec:
    """The set of ports called `name`, of one protocol or any, of all that a selector chooses."""
    word = "" if protocol is None else PORT_PROTOCOL_NAMES.get(protocol, str(protocol))
    text = f"{selector.unique_id()},{word or _ANY_PROTOCOL},{name}"
    return SetSpec(_unique_id("n", text), SetKind.IP_PORT, selector, name, word)


def service_set(namespace: str, name: str, *, with_ports: bool) -> SetSpec:
    """The set of a service's endpoints."""
    prefix, kind = ("svc", SetKind.IP_PORT) if with_ports else ("svcnoport", SetKind.NET)
    return SetSpec(_unique_id(prefix, f"{namespace}/{name}"), kind)


def _unique_id(prefix: str, text: str) -> str:
    digest = hashlib.sha224(f"{prefix}:{text}".encode()).digest()
    return f"{prefix}:" + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
