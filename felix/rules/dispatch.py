"""From an interface to its endpoint's chains in few steps, however many endpoints there are.

Interface names are grouped by the character after their common prefix; a group of one is matched
in the root, a larger one in a child chain of its own, so that a packet meets about as many rules
as the square root of all. What matches nothing meets the end: for workloads a drop, for an
interface nobody knows must not talk; for the host nothing, or the endpoint that stands for all
interfaces. A group that is as before keeps its chain, so one more pod costs its own group.
Source: Calico 3.32, felix/rules/dispatch.go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from felix.rules.names import FROM_WORKLOAD, TO_WORKLOAD, limited
from felix.rules.rule import DROP, Chain, Goto, Match, Rule, Target
from felix.rules.static import FROM_WORKLOAD_DISPATCH, TO_WORKLOAD_DISPATCH


def unknown(denied: Target = DROP) -> Rule:
    """What the packets of an interface meet that nobody knows."""
    return Rule(action=denied, comments=("Unknown interface",))


UNKNOWN = unknown()

_MatchInterface = Callable[[str], Match]
_Of = tuple[tuple[str, ...], tuple[Rule, ...]]


class Dispatch:
    """The chains of one direction; remembers the last ones."""

    def __init__(self, root: str, match: _MatchInterface, endpoint_prefix: str) -> None:
        self._root = root
        self._match = match
        self._endpoint_prefix = endpoint_prefix
        self._known: dict[str, tuple[_Of, Chain]] = {}

    def chains(
        self, ordered: Sequence[str], end: tuple[Rule, ...] = (UNKNOWN,)
    ) -> tuple[Chain, ...]:
        """The root chain first; `ordered` are interface names, each once, sorted."""
        prefix = _common_prefix(ordered)
        place = len(prefix)
        roots: list[str] = []
        children: dict[str, tuple[str, ...]] = {}
        for character, group in groupby(ordered, key=lambda name: name[place : place + 1]):
            members = tuple(group)
            if len(members) == 1:
                roots.append(members[0])
                continue
            child = limited(f"{self._root}-", character)
            children[child] = members
            # The last `+` cannot be part of a name; what follows it tells where to go.
            roots.append(f"{prefix}{character}+{child}")
        found = {self._root: self._chain(self._root, (tuple(roots), end))}
        for child, members in children.items():
            found[child] = self._chain(child, (members, end))
        self._known = {name: self._known[name] for name in found}
        return tuple(found.values())

    def _chain(self, name: str, of: _Of) -> Chain:
        known = self._known.get(name)
        if known is None or known[0] != of:
            members, end = of
            known = (of, Chain(name, (*map(self._rule, members), *end)))
            self._known[name] = known
        return known[1]

    def _rule(self, member: str) -> Rule:
        start, is_group, child = member.partition("+")
        if is_group:
            return Rule(self._match(f"{start}+"), Goto(child))
        return Rule(self._match(member), Goto(limited(self._endpoint_prefix, member)))


def from_workload() -> Dispatch:
    """Dispatch of what workloads send."""
    return Dispatch(FROM_WORKLOAD_DISPATCH, Match().in_interface, FROM_WORKLOAD)


def to_workload() -> Dispatch:
    """Dispatch of what workloads are sent."""
    return Dispatch(TO_WORKLOAD_DISPATCH, Match().out_interface, TO_WORKLOAD)


def _common_prefix(ordered: Sequence[str]) -> str:
    """The start that all names share; `ordered` is sorted, so first and last differ the most."""
    if not ordered:
        return ""
    first, last = ordered[0], ordered[-1]
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length]
