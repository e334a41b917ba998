"""From an interface to its endpoint's chains in few steps, however many endpoints there are.

Interface names are grouped by the character after their common prefix; a group of one is matched
in the root, a larger one in a child chain of its own, so that a packet meets about as many rules
as the square root of all. Whatever matches nothing is dropped: an interface nobody knows must not
talk. Source: Calico 3.32, felix/rules/dispatch.go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from felix.rules.names import FROM_WORKLOAD, TO_WORKLOAD, limited
from felix.rules.rule import DROP, Chain, Goto, Match, Rule
from felix.rules.static import FROM_WORKLOAD_DISPATCH, TO_WORKLOAD_DISPATCH

UNKNOWN = Rule(action=DROP, comments=("Unknown interface",))

_MatchInterface = Callable[[str], Match]


def from_workload(interfaces: Sequence[str]) -> tuple[Chain, ...]:
    """Dispatch of what workloads send."""
    return _chains(FROM_WORKLOAD_DISPATCH, interfaces, Match().in_interface, FROM_WORKLOAD)


def to_workload(interfaces: Sequence[str]) -> tuple[Chain, ...]:
    """Dispatch of what workloads are sent."""
    return _chains(TO_WORKLOAD_DISPATCH, interfaces, Match().out_interface, TO_WORKLOAD)


def _chains(
    root: str, interfaces: Sequence[str], match: _MatchInterface, endpoint_prefix: str
) -> tuple[Chain, ...]:
    names = sorted(set(interfaces))
    prefix = _common_prefix(names)
    rules: list[Rule] = []
    children: list[Chain] = []

    def to_endpoint(name: str) -> Rule:
        return Rule(match(name), Goto(limited(endpoint_prefix, name)))

    for character, group in groupby(names, key=lambda name: name[len(prefix) : len(prefix) + 1]):
        members = list(group)
        if len(members) == 1:
            rules.append(to_endpoint(members[0]))
            continue
        child = limited(f"{root}-", character)
        rules.append(Rule(match(f"{prefix}{character}+"), Goto(child)))
        children.append(Chain(child, (*map(to_endpoint, members), UNKNOWN)))
    return (Chain(root, (*rules, UNKNOWN)), *children)


def _common_prefix(ordered: Sequence[str]) -> str:
    """The start that all names share; `ordered` is sorted, so first and last differ the most."""
    if not ordered:
        return ""
    first, last = ordered[0], ordered[-1]
    length = 0
    while length < min(len(first), len(last)) and first[length] == last[length]:
        length += 1
    return first[:length]
