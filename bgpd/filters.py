"""BGPFilter rules at work: pure, compiled once, asked for every route.

    import: received path ▶ filters of the session ▶ default import policy ▶ decision
    export: chosen route  ▶ filters of the session ▶ default export policy ▶ peer

The filters of a session stand in the order its BGPPeer names them, and are one list of rules: the
first rule whose conditions all hold decides, whatever its filter; if none does, the default policy
speaks. Accept is final as well: such a route skips the default policy. What the rules cannot
override is listed at their callers (loops, next hops that are ourselves).

Conditions: `cidr` with `matchOperator` (In: inside; a `prefixLength` replaces the cidr by the set
of prefixes inside it with such lengths), `source` (received from a peer), `interface` (glob, and
the route must have an interface: only routes of local workloads do), `communities`,
`asPathPrefix`, `priority` (the preference that belongs to this metric), `peerType`.

A filter that does not exist rejects everything: a session that was meant to be filtered must not
leak because somebody deleted an object.

Source: Calico 3.32's compilation of BGPFilter into BIRD's filter language.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, TypeVar

from bgpd.announcement import AsPathSegment, PathAttributes, SegmentKind
from cymric.model.bgp_filter import (
    BGPFilter,
    FilterAction,
    FilterOperation,
    FilterRule,
    MatchOperator,
)
from cymric.model.net import Network, parse_network
from cymric.model.prefix import PrefixSet
from cymric.model.resources import parse_community

MOST_PREFERENCE = 2**31 - 1
"""LOCAL_PREF and kernel metric of a route add up to this."""

Direction = Literal["import", "export"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A route as rules see it. `local_pref` is the degree of preference in force."""

    prefix: Network
    attributes: PathAttributes
    local_pref: int
    is_learned: bool
    interface: str = ""


@dataclass(frozen=True, slots=True)
class Changes:
    """What an accepting rule does to a route."""

    communities: tuple[tuple[int, int], ...] = ()
    large_communities: tuple[tuple[int, int, int], ...] = ()
    prepend: tuple[int, ...] = ()
    local_pref: int | None = None

    def apply(self, attributes: PathAttributes) -> PathAttributes:
        """The attributes with communities and ASes added; LOCAL_PREF is the caller's."""
        return replace(
            attributes,
            as_path=prepended(attributes.as_path, self.prepend),
            communities=_with(attributes.communities, self.communities),
            large_communities=_with(attributes.large_communities, self.large_communities),
        )


NO_CHANGES = Changes()

Verdict = Changes | Literal["reject"] | None
"""Accepted with changes, rejected, or not mentioned."""

Condition = Callable[[Candidate], bool]


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one session, direction and family, in order, ready to be asked."""

    rules: tuple[tuple[tuple[Condition, ...], Changes | None], ...] = ()
    missing: str = ""

    def __bool__(self) -> bool:
        return bool(self.rules or self.missing)

    def judge(self, candidate: Candidate) -> Verdict:
        """What the first matching rule says."""
        if self.missing:
            return "reject"
        for conditions, changes in self.rules:
            if all(holds(candidate) for holds in conditions):
                return "reject" if changes is None else changes
        return None


NO_RULES = Rules()


def compile_rules(
    names: Sequence[str],
    filters: Mapping[str, BGPFilter],
    *,
    direction: Direction,
    version: int,
    is_ibgp: bool,
) -> Rules:
    """The rules of the named filters for a session of that kind."""
    compiled = []
    for name in names:
        found = filters.get(name)
        if found is None:
            return Rules(missing=name)
        for rule in _rules(found, direction, version):
            if rule.peer_type in ("", "iBGP" if is_ibgp else "eBGP"):
                compiled.append((_conditions(rule), _changes(rule)))
    return Rules(tuple(compiled))


def prepended(path: tuple[AsPathSegment, ...], asns: tuple[int, ...]) -> tuple[AsPathSegment, ...]:
    """The path with `asns` at its front; they join a sequence that is there (RFC 4271 §5.1.2)."""
    if not asns:
        return path
    if path and path[0].kind is SegmentKind.SEQUENCE and len(path[0].asns) + len(asns) < 256:
        return (AsPathSegment(SegmentKind.SEQUENCE, asns + path[0].asns), *path[1:])
    return (AsPathSegment(SegmentKind.SEQUENCE, asns), *path)


def _rules(one: BGPFilter, direction: Direction, version: int) -> tuple[FilterRule, ...]:
    spec = one.spec
    if direction == "import":
        return spec.import_v4 if version == 4 else spec.import_v6
    return spec.export_v4 if version == 4 else spec.export_v6


def _conditions(rule: FilterRule) -> tuple[Condition, ...]:
    conditions: list[Condition] = []
    if rule.cidr:
        conditions.append(_prefix_condition(rule))
    if rule.source:
        conditions.append(lambda route: route.is_learned)
    if rule.interface:
        glob = rule.interface.replace("[", "[[]").replace("?", "[?]")
        conditions.append(
            lambda route: bool(route.interface) and fnmatchcase(route.interface, glob)
        )
    if rule.communities is not None:
        community = parse_community(rule.communities.values[0])
        conditions.append(
            lambda route: (
                community in route.attributes.communities
                or community in route.attributes.large_communities
            )
        )
    if rule.as_path_prefix:
        start = rule.as_path_start
        conditions.append(lambda route: _starts_with(route.attributes.as_path, start))
    if rule.priority is not None:
        local_pref = MOST_PREFERENCE - rule.priority
        conditions.append(lambda route: route.local_pref == local_pref)
    return tuple(conditions)


def _prefix_condition(rule: FilterRule) -> Condition:
    network = parse_network(rule.cidr)
    is_meant = rule.match_operator in (MatchOperator.EQUAL, MatchOperator.IN)
    if rule.prefix_length is None and rule.match_operator in (
        MatchOperator.EQUAL,
        MatchOperator.NOT_EQUAL,
    ):
        return lambda route: (route.prefix == network) is is_meant
    bounds = rule.prefix_length
    low = network.prefixlen if bounds is None or bounds.min is None else bounds.min
    high = network.max_prefixlen if bounds is None or bounds.max is None else bounds.max
    around = PrefixSet.of([network])
    return lambda route: (
        (around.covers(route.prefix) and low <= route.prefix.prefixlen <= high) is is_meant
    )


def _starts_with(path: tuple[AsPathSegment, ...], start: tuple[int, ...]) -> bool:
    asns: list[int] = []
    for segment in path:
        if segment.kind is not SegmentKind.SEQUENCE:
            break
        asns += segment.asns
    return tuple(asns[: len(start)]) == start


def _changes(rule: FilterRule) -> Changes | None:
    """What the rule does to what it accepts; None if it rejects. Operations apply in order."""
    if rule.action is FilterAction.REJECT:
        return None
    changes = NO_CHANGES
    for operation in rule.operations:
        changes = _and_then(changes, operation)
    return changes


def _and_then(changes: Changes, operation: FilterOperation) -> Changes:
    if operation.add_community is not None:
        match parse_community(operation.add_community.value):
            case (high, low):
                return replace(changes, communities=(*changes.communities, (high, low)))
            case (one, two, three):
                large = (*changes.large_communities, (one, two, three))
                return replace(changes, large_communities=large)
    if operation.prepend_as_path is not None:
        return replace(changes, prepend=operation.prepend_as_path.asns + changes.prepend)
    assert operation.set_priority is not None
    return replace(changes, local_pref=MOST_PREFERENCE - operation.set_priority.value)


def _with(held: tuple[_T, ...], added: tuple[_T, ...]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys((*held, *added)))
