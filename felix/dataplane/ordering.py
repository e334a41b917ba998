"""In which order sets and tables change, so that no packet meets a mixture of old and new: pure.

docs/design/felix.md has the argument. In short: a table changes at once, and so does one member of
a set; what is more than one such step is only harmless if it goes one way (all of it opens, or all
of it closes), or if no packet can tell. Everything else is staged: rules that name copies of the
sets switch both together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto

from felix.calc.policies import EntityMatch, PolicyRule, Verdict
from felix.calc.values import Desired, Endpoint
from felix.ipset.sets import SetChange
from felix.rules.policy import PREFIXES as RULES
from felix.rules.rule import Chain, Match, Rule, TableContent


class Order(Enum):
    """What goes first."""

    SETS_FIRST = auto()
    TABLES_FIRST = auto()
    STAGED = auto()


@dataclass(frozen=True, slots=True)
class Way:
    """How to go from one picture to the next; `at_once` names sets to be changed in one step.

    `in_place`: the other sets gain members before any of them loses one.
    """

    order: Order
    at_once: frozenset[str] = frozenset()
    in_place: bool = False


class _Sign(Enum):
    """What one more member of a set can do to verdicts."""

    NOTHING = auto()
    OPENS = auto()
    CLOSES = auto()
    UNKNOWN = auto()


_OPPOSITE = {_Sign.OPENS: _Sign.CLOSES, _Sign.CLOSES: _Sign.OPENS}


def way(before: Desired | None, after: Desired, changes: Collection[SetChange]) -> Way:
    """The way from `before` (None: unknown) to `after`, when these sets change."""
    if not changes:
        return Way(Order.SETS_FIRST)
    staged = Way(Order.STAGED)
    if before is None or not _only_endpoints_differ(before, after):
        return staged
    come, go = _endpoints_that_differ(before, after)
    if come and go:
        return staged
    order = Order.TABLES_FIRST if go else Order.SETS_FIRST
    at_once: set[str] = set()
    in_place = False
    for version in {change.ip_version for change in changes}:
        of_family = [change for change in changes if change.ip_version == version]
        if len(of_family) == 1:
            at_once.add(of_family[0].name)
        elif not _one_way(of_family, _signs(after, {change.id for change in of_family})):
            if not _are_alternatives(after, of_family):
                return staged
            in_place = True
    return Way(order, frozenset(at_once), in_place)


def _only_endpoints_differ(before: Desired, after: Desired) -> bool:
    """Whether rules are the same but for those of workloads that come and go."""
    if (before.config, before.policies, before.profiles, before.host_endpoints) != (
        after.config,
        after.policies,
        after.profiles,
        after.host_endpoints,
    ):
        return False
    known = {one.interface: one for one in before.endpoints}
    return all(
        known.get(one.interface, one) is one or _judged(known[one.interface]) == _judged(one)
        for one in after.endpoints
    )


def _judged(one: Endpoint) -> tuple[object, ...]:
    """What an endpoint's rules are made of."""
    return (one.tiers, one.profiles, one.ip_versions, one.spoofable, one.floating)


def _endpoints_that_differ(before: Desired, after: Desired) -> tuple[bool, bool]:
    """Whether any come, and whether any go."""
    if before.endpoints is after.endpoints:
        return False, False
    old, new = ({one.interface for one in known.endpoints} for known in (before, after))
    return bool(new - old), bool(old - new)


def _one_way(changes: Iterable[SetChange], signs: Mapping[str, _Sign]) -> bool:
    directions: set[_Sign] = set()
    for change in changes:
        sign = signs[change.id]
        if sign is _Sign.NOTHING:
            continue
        if change.gained:
            directions.add(sign)
        if change.lost:
            directions.add(_OPPOSITE.get(sign, _Sign.UNKNOWN))
    return len(directions) <= 1 and _Sign.UNKNOWN not in directions


def _are_alternatives(desired: Desired, changes: Collection[SetChange]) -> bool:
    """Whether each of these sets only adds to what others allow, so that none needs another.

    Then additions before deletions are as good as all at once: a packet that is let through in
    between has one of the sets to thank, as it was or as it will be; and whatever set allowed it
    before does so until the one that allows it afterwards is there. That needs one verdict a
    packet, of rules that look at the same side of it, and no rule that asks for two of the sets.
    """
    changed = {change.id for change in changes}
    if desired.host_endpoints:
        return False
    places: set[bool] = set()
    for rules, is_inbound in _rules_by_direction(desired):
        for rule in rules:
            side = rule.source if is_inbound else rule.destination
            used = [set_id for set_id in rule.set_ids_in_use if set_id in changed]
            if not used or rule.action is Verdict.LOG:
                continue
            wanted = (*side.set_ids, *side.port_set_ids, *side.service_set_ids)
            if rule.action is not Verdict.ALLOW or len(used) > 1 or used[0] not in wanted:
                return False
            places.add(is_inbound)
    return len(places) <= 1


def _signs(desired: Desired, set_ids: Collection[str]) -> Mapping[str, _Sign]:
    """What these sets do in the rules."""
    found: dict[str, _Sign] = dict.fromkeys(set_ids, _Sign.NOTHING)
    for rule in _rules(desired):
        for side in (rule.source, rule.destination):
            for ids, is_positive in _uses(side):
                for set_id in ids:
                    if set_id in found:
                        sign = _sign(rule.action, is_positive=is_positive)
                        found[set_id] = _both(found[set_id], sign)
    return found


def _rules(desired: Desired) -> Iterable[PolicyRule]:
    for rules, _ in _rules_by_direction(desired):
        yield from rules


def _rules_by_direction(desired: Desired) -> Iterable[tuple[Sequence[PolicyRule], bool]]:
    """The rules of each policy and profile, and whether they are about what endpoints receive."""
    for policy in desired.policies.values():
        yield policy.inbound, True
        yield policy.outbound, False
    for profile in desired.profiles.values():
        yield profile.inbound or (), True
        yield profile.outbound or (), False


def _uses(side: EntityMatch) -> Iterable[tuple[tuple[str, ...], bool]]:
    yield side.set_ids, True
    yield side.port_set_ids, True
    yield side.service_set_ids, True
    yield side.not_set_ids, False
    yield side.not_port_set_ids, False


def _sign(action: Verdict, *, is_positive: bool) -> _Sign:
    match action:
        case Verdict.ALLOW:
            return _Sign.OPENS if is_positive else _Sign.CLOSES
        case Verdict.DENY:
            return _Sign.CLOSES if is_positive else _Sign.OPENS
        case Verdict.LOG:
            return _Sign.NOTHING
        case Verdict.PASS:
            return _Sign.UNKNOWN


def _both(one: _Sign, other: _Sign) -> _Sign:
    if one is _Sign.NOTHING or one is other:
        return other
    return one if other is _Sign.NOTHING else _Sign.UNKNOWN


def with_other_sets(content: TableContent, new_by_old: Mapping[str, str]) -> TableContent:
    """The same table with other names of policies' sets; other chains stay the same."""
    chains = {
        name: _chain_with_other_sets(chain, new_by_old) if name.startswith(RULES) else chain
        for name, chain in content.chains.items()
    }
    if all(chains[name] is chain for name, chain in content.chains.items()):
        return content
    return replace(content, chains=chains)


def _chain_with_other_sets(chain: Chain, new_by_old: Mapping[str, str]) -> Chain:
    rules = tuple(_rule_with_other_sets(rule, new_by_old) for rule in chain.rules)
    return chain if rules == chain.rules else replace(chain, rules=rules)


def _rule_with_other_sets(rule: Rule, new_by_old: Mapping[str, str]) -> Rule:
    before = rule.match.fragments
    after = tuple(_renamed(text, new_by_old) for text in before)
    return rule if after == before else replace(rule, match=Match(after))


def _renamed(fragment: str, new_by_old: Mapping[str, str]) -> str:
    if "--match-set" not in fragment:
        return fragment
    start, option, rest = fragment.partition(" --match-set ")
    name, _, directions = rest.partition(" ")
    if not option or name not in new_by_old:
        return fragment
    return f"{start}{option}{new_by_old[name]} {directions}"
