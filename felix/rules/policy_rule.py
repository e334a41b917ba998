"""One rule of a policy or profile as iptables rules, exactly as written.

One iptables rule can hold one prefix and 15 ports a side; what does not fit is worked out
beforehand, block by block, in two scratch bits of the packet mark: `scratch0` says that every block
so far matched, `scratch1` that the present one does. The main rule then asks for `scratch0`.

    set scratch0 and scratch1 to 0 (scratch0 to 1 if there are only negated blocks)
    first block      each alternative:  set scratch0
    later block      clear scratch1 (from the third on); each alternative: set scratch1;
                     scratch1 clear: clear scratch0
    negated block    each prefix: clear scratch0
    main rule        the rest, and scratch0 set: act

Text and order are Calico's (3.32, felix/rules/policy.go), so that hashes agree, but for one thing:
there `scratch1` is not cleared before the third block, which then matches whatever the packet is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from cymric.model.net import Network
from felix.calc.policies import EntityMatch, IcmpMatch, PolicyRule, PortRange, Verdict
from felix.rules.marks import Marks
from felix.rules.names import set_name
from felix.rules.rule import (
    DROP,
    RETURN,
    ClearMark,
    LogAction,
    Match,
    Rule,
    SetMark,
    Side,
    Target,
    WriteMark,
)

MOST_PORT_SLOTS = 15
"""What one multiport match holds; a range takes two."""

_NUMBER_BY_PROTOCOL = {
    "icmp": 1,
    "tcp": 6,
    "udp": 17,
    "icmpv6": 58,
    "ipv6-icmp": 58,
    "sctp": 132,
    "udplite": 136,
}
_ICMP_BY_VERSION = {4: "icmp", 6: "icmpv6"}
_ADDRESS: dict[Side, str] = {"source": "src", "destination": "dst"}


@dataclass(frozen=True, slots=True)
class Rendering:
    """What rules are rendered with."""

    marks: Marks
    ip_version: int
    log: LogAction
    """What a rule that logs does."""
    denied: Target = DROP
    log_limit: tuple[str, int] = ("", 0)
    """How often at most, as `10/minute`, and how many at once; empty is always."""
    is_profile: bool = False
    """Profiles know no tiers: a rule that passes only ends its profile."""


def rules(rule: PolicyRule, how: Rendering) -> tuple[Rule, ...]:
    """The iptables rules of one rule; none if no packet of the family can match it."""
    narrowed = of_family(rule, how.ip_version)
    if narrowed is None:
        return ()
    left, blocks = _Blocks(narrowed, how).taken()
    match = _match(left, how.ip_version)
    if blocks:
        match = match.mark_set(how.marks.scratch0)
    found = (*blocks, *_acting(rule.action, match, how))
    if not rule.annotations:
        return found
    comments = tuple(f"{name}={text}" for name, text in rule.annotations)
    return tuple(replace(one, comments=comments) for one in found)


def of_family(rule: PolicyRule, ip_version: int) -> PolicyRule | None:
    """What the rule says of one family; None if it says nothing.

    A list of prefixes none of which is of the family makes the rule one of the other family,
    negated lists as well. iptables takes one protocol and ICMP types of the family's ICMP only.
    """
    if rule.ip_version not in (None, ip_version):
        return None
    sides = (_side_of_family(one, ip_version) for one in (rule.source, rule.destination))
    source, destination = sides
    if source is None or destination is None:
        return None
    protocol, not_protocol = rule.protocol, rule.not_protocol
    if rule.icmp is not None or rule.not_icmp is not None:
        icmp = _ICMP_BY_VERSION[ip_version]
        if protocol is not None and protocol_number(protocol) != protocol_number(icmp):
            return None
        if rule.not_icmp is not None and rule.not_icmp.type is None:
            return None  # ICMP that is no ICMP
        protocol = icmp if protocol is None else protocol
    # To iptables protocol 0 is all of them. No packet is of it (RFC 8200 makes it a header).
    if protocol is not None and protocol_number(protocol) == 0:
        return None
    if not_protocol is not None and protocol_number(not_protocol) == 0:
        not_protocol = None
    if protocol is not None and not_protocol is not None:
        if protocol_number(protocol) == protocol_number(not_protocol):
            return None
        not_protocol = None
    return replace(
        rule,
        protocol=protocol,
        not_protocol=not_protocol,
        source=source,
        destination=destination,
    )


def _side_of_family(side: EntityMatch, ip_version: int) -> EntityMatch | None:
    nets, not_nets = (
        tuple(net for net in found if net.version == ip_version)
        for found in (side.nets, side.not_nets)
    )
    if (side.nets and not nets) or (side.not_nets and not not_nets):
        return None
    if any(net.prefixlen == 0 for net in not_nets):
        return None  # nothing is outside of everything
    return replace(side, nets=nets, not_nets=not_nets)


def split_ports(ports: Iterable[PortRange]) -> list[str]:
    """The ports as multiport lists of at most 15 slots each."""
    lists: list[str] = []
    words: list[str] = []
    slots = 0
    for ports_of_one in ports:
        is_range = ports_of_one.first != ports_of_one.last
        needed = 2 if is_range else 1
        if slots + needed > MOST_PORT_SLOTS:
            lists.append(",".join(words))
            words, slots = [], 0
        first, last = ports_of_one.first, ports_of_one.last
        words.append(f"{first}:{last}" if is_range else str(first))
        slots += needed
    if words:
        lists.append(",".join(words))
    return lists


class _Blocks:
    """Takes out of a rule what does not fit into one iptables rule."""

    def __init__(self, rule: PolicyRule, how: Rendering) -> None:
        self._rule = rule
        self._how = how
        self._marks = how.marks
        self._rules: list[Rule] = []
        self._positive = 0

    def taken(self) -> tuple[PolicyRule, Sequence[Rule]]:
        """What is left for the main rule, and the rules before it."""
        sides: tuple[Side, Side] = ("source", "destination")
        for side in sides:
            entity = self._entity(side)
            lists = split_ports(entity.ports)
            if len(lists) + len(entity.port_set_ids) > 1:
                self._any_of(self._port_matches(side, lists, entity.port_set_ids))
                self._leave(side, replace(entity, ports=(), port_set_ids=()))
        for side in sides:
            entity = self._entity(side)
            if len(entity.nets) > 1:
                self._any_of(Match().net(side, str(net)) for net in entity.nets)
                self._leave(side, replace(entity, nets=()))
        for side in sides:
            entity = self._entity(side)
            if entity.not_nets and len(entity.nets) + len(entity.not_nets) > 1:
                self._none_of(side, entity.not_nets)
                self._leave(side, replace(entity, not_nets=()))
        return self._rule, self._rules

    def _entity(self, side: Side) -> EntityMatch:
        return self._rule.source if side == "source" else self._rule.destination

    def _leave(self, side: Side, entity: EntityMatch) -> None:
        if side == "source":
            self._rule = replace(self._rule, source=entity)
        else:
            self._rule = replace(self._rule, destination=entity)

    def _port_matches(
        self, side: Side, lists: Sequence[str], set_ids: Sequence[str]
    ) -> Iterator[Match]:
        start = Match()
        if self._rule.protocol is not None:
            start = start.protocol(_text(self._rule.protocol))
        for ports in lists:
            yield start.ports(side, ports)
        address = _ADDRESS[side]
        for set_id in set_ids:
            name = set_name(set_id, self._how.ip_version)
            yield Match().in_set(name, f"{address},{address}")

    def _start(self, *, matches: bool) -> None:
        """The first rule of the first block."""
        if not self._rules:
            scratch0, scratch1 = self._marks.scratch0, self._marks.scratch1
            bits = scratch0 if matches else 0
            self._rules.append(Rule(action=WriteMark(bits, scratch0 | scratch1)))

    def _any_of(self, alternatives: Iterable[Match]) -> None:
        scratch0, scratch1 = self._marks.scratch0, self._marks.scratch1
        self._start(matches=False)
        self._positive += 1
        if self._positive > 2:
            self._rules.append(Rule(action=ClearMark(scratch1)))
        bit = scratch0 if self._positive == 1 else scratch1
        self._rules += (Rule(match, SetMark(bit)) for match in alternatives)
        if self._positive > 1:
            self._rules.append(Rule(Match().mark_clear(scratch1), ClearMark(scratch0)))

    def _none_of(self, side: Side, nets: Iterable[Network]) -> None:
        self._start(matches=True)
        clear = ClearMark(self._marks.scratch0)
        self._rules += (Rule(Match().net(side, str(net)), clear) for net in nets)


def _match(rule: PolicyRule, ip_version: int) -> Match:
    match = Match()
    if rule.protocol is not None:
        match = match.protocol(_text(rule.protocol))
    match = _positive_side(match, "source", rule.source, ip_version)
    match = _positive_side(match, "destination", rule.destination, ip_version)
    if rule.icmp is not None and (text := _icmp_text(rule.icmp)):
        match = match.icmp(ip_version, text)
    if rule.not_protocol is not None:
        match = match.not_protocol(_text(rule.not_protocol))
    match = _negative_side(match, "source", rule.source, ip_version)
    match = _negative_side(match, "destination", rule.destination, ip_version)
    if rule.not_icmp is not None and (text := _icmp_text(rule.not_icmp)):
        match = match.icmp(ip_version, text, negated=True)
    return match


def _positive_side(match: Match, side: Side, entity: EntityMatch, ip_version: int) -> Match:
    address = _ADDRESS[side]
    with_port = f"{address},{address}"
    for net in entity.nets:
        match = match.net(side, str(net))
    for set_id in entity.set_ids:
        match = match.in_set(set_name(set_id, ip_version), address)
    # A source's services are known by address only, a destination's by address and port.
    for set_id in entity.service_set_ids:
        directions = address if side == "source" else with_port
        match = match.in_set(set_name(set_id, ip_version), directions)
    for ports in split_ports(entity.ports):
        match = match.ports(side, ports)
    for set_id in entity.port_set_ids:
        match = match.in_set(set_name(set_id, ip_version), with_port)
    return match


def _negative_side(match: Match, side: Side, entity: EntityMatch, ip_version: int) -> Match:
    address = _ADDRESS[side]
    for net in entity.not_nets:
        match = match.not_net(side, str(net))
    for set_id in entity.not_set_ids:
        match = match.not_in_set(set_name(set_id, ip_version), address)
    for ports in split_ports(entity.not_ports):
        match = match.not_ports(side, ports)
    for set_id in entity.not_port_set_ids:
        match = match.not_in_set(set_name(set_id, ip_version), f"{address},{address}")
    return match


def _acting(action: Verdict, match: Match, how: Rendering) -> tuple[Rule, ...]:
    match action:
        case Verdict.LOG:
            rate, burst = how.log_limit
            return (Rule(match.limit(rate, burst) if rate else match, how.log),)
        case Verdict.ALLOW:
            bit, then = how.marks.accept, RETURN
        case Verdict.PASS if how.is_profile:
            # The mark is a tier's, and may be set since: looking at it would end any profile.
            return (Rule(match, RETURN),)
        case Verdict.PASS:
            bit, then = how.marks.passed, RETURN
        case Verdict.DENY:
            bit, then = how.marks.drop, how.denied
    return (Rule(match, SetMark(bit)), Rule(Match().mark_set(bit), then))


def _icmp_text(icmp: IcmpMatch) -> str:
    if icmp.type is None:
        return ""
    return str(icmp.type) if icmp.code is None else f"{icmp.type}/{icmp.code}"


def _text(protocol: str | int) -> str:
    return str(protocol).lower()


def protocol_number(protocol: str | int) -> int | str:
    """A protocol as number; its name if nobody knows that."""
    text = _text(protocol)
    return int(text) if text.isdecimal() else _NUMBER_BY_PROTOCOL.get(text, text)
