"""Between an old and a new policy there is no moment at which a packet meets anything else."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from felix.calc.policies import (
    EntityMatch,
    HostEndpoint,
    IPSet,
    Policy,
    PolicyId,
    PolicyRule,
    SetKind,
    TierPolicies,
    Verdict,
)
from felix.calc.values import Desired
from felix.dataplane.ordering import Order, way, with_other_sets
from felix.ipset.sets import SetChange
from felix.iptables.plan import render_table
from felix.rules.names import set_name
from felix.rules.tables import contents
from tests.support.eventually import eventually
from tests.support.felix_node import Node, pod, wanting
from tests.support.rule_interpreter import Interpreter, Packet, as_text

PLACES = {"198.19.16.2": "calia", "198.19.16.3": "calib", "198.19.16.9": "up0"}
SET_IDS = ("s:one", "s:two", "s:three")
PACKETS = tuple(
    Packet(source, destination, in_interface=PLACES[source], out_interface=PLACES[destination])
    for source, destination in product(PLACES, PLACES)
    if PLACES[source] != PLACES[destination]
)

# Most packets should be decided by sets, and many be let through, or nothing would be seen.
actions = st.sampled_from((Verdict.ALLOW, Verdict.ALLOW, Verdict.ALLOW, Verdict.DENY, Verdict.PASS))
one_set = st.sampled_from(SET_IDS).map(lambda name: (name,))
some_sides = st.one_of(
    st.builds(EntityMatch, set_ids=one_set),
    st.builds(EntityMatch, set_ids=one_set),
    st.builds(EntityMatch, not_set_ids=one_set),
)
rules = st.one_of(
    st.builds(PolicyRule, actions, source=some_sides),
    st.builds(PolicyRule, actions, destination=some_sides),
    st.builds(PolicyRule, actions, source=some_sides, destination=some_sides),
)
rule_lists = st.lists(rules, min_size=1, max_size=2).map(tuple)
all_allowed = st.just((PolicyRule(Verdict.ALLOW),))
members = st.frozensets(st.sampled_from(tuple(PLACES)), min_size=1, max_size=2)


@st.composite
def pictures(draw: st.DrawFn) -> Desired:
    """Mostly two pods, one or two tiers of a policy each, three sets."""
    names = draw(st.sampled_from((("x",), ("x",), ("x", "y"))))
    policies = {
        PolicyId("gnp", "", name): Policy(
            PolicyId("gnp", "", name),
            name,
            draw(rule_lists),
            draw(st.one_of(all_allowed, rule_lists)),
        )
        for name in names
    }
    end = st.sampled_from((Verdict.DENY, Verdict.PASS))
    tiers = tuple(TierPolicies(one.name, draw(end), (one,), (one,)) for one in policies)
    found = [pod("a", "198.19.16.2"), pod("b", "198.19.16.3")]
    there = draw(st.sampled_from(((0, 1), (0, 1), (0, 1), (0,), (1,))))
    return replace(
        wanting(*(replace(found[place], tiers=tiers) for place in there)),
        policies=policies,
        ip_sets=sets_of({name: draw(members) for name in SET_IDS}),
    )


def sets_of(found: Mapping[str, frozenset[str]]) -> dict[str, IPSet]:
    """Sets of prefixes."""
    return {name: IPSet(name, SetKind.NET, of) for name, of in found.items()}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Desired, Desired]:
    """An old and a new picture; often only some of it is new."""
    old, new = draw(pictures()), draw(pictures())
    if draw(st.booleans()):
        new = replace(new, policies=old.policies, endpoints=old.endpoints)
    if draw(st.booleans()):
        name = draw(st.sampled_from(SET_IDS))
        new = replace(new, ip_sets={**new.ip_sets, name: old.ip_sets[name]})
    return old, new


class Watched:
    """A node whose kernel is looked at before and after every step that changes it."""

    def __init__(self, directory: Path) -> None:
        self.node = Node(directory)
        self.seen: list[list[str]] = []
        set_line, table_run = self.node.ipset._line, self.node.iptables._run

        def line(words: Sequence[str]) -> str:
            self.look()
            problem = set_line(words)
            self.look()
            return problem

        def run(tables: dict[str, dict[str, list[str]]], lines: Sequence[str]) -> None:
            self.look()
            table_run(tables, lines)

        self.node.ipset._line = line  # type: ignore[method-assign]
        self.node.iptables._run = run  # type: ignore[method-assign]

    def look(self) -> None:
        """Judge all packets by the kernel as it is."""
        self.seen.append(self.verdicts())

    def verdicts(self) -> list[str]:
        """What happens to each packet."""
        sets = {name: found for name, (_, _, found) in self.node.ipset.sets.items()}
        kernel = Interpreter(self.node.iptables.tables, sets)
        return [kernel.at_hook("filter", "FORWARD", packet).verdict for packet in PACKETS]

    def is_settled(self, wanted: Desired) -> bool:
        """Whether the kernel has all of it and nothing else."""
        rendered = render_table(contents(wanted)["filter"]).chains
        chains = self.node.iptables.tables["filter"]
        sets = self.node.ipset.sets
        return (
            {name: list(chain.rules) for name, chain in rendered.items()}
            == {name: found for name, found in chains.items() if name.startswith("cali-")}
            and all(
                sets.get(set_name(one.id), ("", 0, set()))[2] == one.members_v4
                for one in wanted.ip_sets.values()
            )
            and not any(name.startswith("cali4t") for name in sets)
        )


def by_definition(wanted: Desired) -> list[str]:
    """What should happen to each packet."""
    sets = {set_name(one.id): one.members_v4 for one in wanted.ip_sets.values()}
    kernel = Interpreter({"filter": as_text(contents(wanted)["filter"])}, sets)
    return [kernel.at_hook("filter", "FORWARD", packet).verdict for packet in PACKETS]


async def change(directory: Path, old: Desired, new: Desired) -> None:
    """From old to new, looking at every step."""
    watched = Watched(directory)
    watched.node.desired = old
    async with watched.node.running():
        await eventually(lambda: watched.is_settled(old))
        before, after = watched.verdicts(), by_definition(new)
        assert before == by_definition(old)
        watched.seen.clear()
        watched.node.want(new)
        await eventually(lambda: watched.is_settled(new))
    for seen in (*watched.seen, watched.verdicts()):
        for packet, then, now, later in zip(PACKETS, before, seen, after, strict=True):
            assert now in (then, later), f"{packet}: {then}, then {now}, then {later}"


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_no_packet_meets_a_mixture(pair: tuple[Desired, Desired]) -> None:
    """Whatever changes, each packet is judged by the old policy or by the new one, always."""
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(change(Path(directory), *pair))


# Which way is taken: the cheap ones where they are enough.

TIER = (TierPolicies("t", inbound=(PolicyId("gnp", "", "x"),)),)
POD_A, POD_B = (replace(pod(name), tiers=TIER) for name in "ab")


def picture(*written: PolicyRule, pods: Sequence[object] = (POD_A,)) -> Desired:
    """One policy on some pods."""
    policy = Policy(PolicyId("gnp", "", "x"), "t", written)
    return replace(wanting(*pods), policies={policy.id: policy})  # type: ignore[arg-type]


def in_sets(action: Verdict, *set_ids: str, negated: bool = False) -> PolicyRule:
    """A rule about sources."""
    side = EntityMatch(not_set_ids=set_ids) if negated else EntityMatch(set_ids=set_ids)
    return PolicyRule(action, source=side)


def changed(set_id: str, gained: str = "", lost: str = "", version: int = 4) -> SetChange:
    """A set gains and loses members."""
    name = set_name(set_id, version)
    return SetChange(name, set_id, version, frozenset(gained.split()), frozenset(lost.split()))


ALLOWING = picture(in_sets(Verdict.ALLOW, "a"), in_sets(Verdict.DENY, "b", negated=True))
DENYING = picture(in_sets(Verdict.DENY, "a"), in_sets(Verdict.ALLOW, "b"))
EITHER = picture(in_sets(Verdict.ALLOW, "a"), in_sets(Verdict.ALLOW, "b"))
BOTH = picture(in_sets(Verdict.ALLOW, "a", "b"))
GUARDED = replace(EITHER, host_endpoints=(HostEndpoint("h", "eth0"),))
PASSING = picture(in_sets(Verdict.PASS, "a"), in_sets(Verdict.ALLOW, "b"))
CAME = replace(ALLOWING, endpoints=(POD_A, POD_B))


@pytest.mark.parametrize(
    ("before", "after", "changes", "order"),
    [
        pytest.param(None, ALLOWING, [], Order.SETS_FIRST, id="nothing but rules"),
        pytest.param(None, ALLOWING, [changed("a", "x")], Order.STAGED, id="before is unknown"),
        pytest.param(DENYING, ALLOWING, [], Order.SETS_FIRST, id="rules alone"),
        pytest.param(
            DENYING, ALLOWING, [changed("a", "x")], Order.STAGED, id="rules and a set"
        ),
        pytest.param(
            ALLOWING, ALLOWING, [changed("a", "x", "y")], Order.SETS_FIRST, id="one set"
        ),
        pytest.param(
            ALLOWING, ALLOWING, [changed("a", "x"), changed("a", "z", "y", 6)], Order.SETS_FIRST,
            id="one set of each family",
        ),
        pytest.param(
            ALLOWING, ALLOWING, [changed("a", "x y"), changed("b", "x")], Order.SETS_FIRST,
            id="all of it opens",
        ),
        pytest.param(
            ALLOWING, ALLOWING, [changed("a", "", "x"), changed("b", "", "x")], Order.SETS_FIRST,
            id="all of it closes",
        ),
        pytest.param(
            ALLOWING, ALLOWING, [changed("a", "x"), changed("b", "", "x")], Order.STAGED,
            id="one opens, one closes",
        ),
        pytest.param(
            EITHER, EITHER, [changed("a", "x"), changed("b", "", "x")], Order.SETS_FIRST,
            id="from one set that allows to another",
        ),
        pytest.param(
            BOTH, BOTH, [changed("a", "x"), changed("b", "", "x")], Order.STAGED,
            id="a rule asks for both sets",
        ),
        pytest.param(
            GUARDED, GUARDED, [changed("a", "x"), changed("b", "", "x")], Order.STAGED,
            id="more than one policy may judge a packet",
        ),
        pytest.param(
            DENYING, DENYING, [changed("a", "x"), changed("b", "x")], Order.STAGED,
            id="a set that denies and one that allows",
        ),
        pytest.param(
            PASSING, PASSING, [changed("a", "x"), changed("b", "x")], Order.STAGED,
            id="a set that passes on",
        ),
        pytest.param(
            ALLOWING, CAME, [changed("a", "x"), changed("b", "x")], Order.SETS_FIRST,
            id="with a pod that comes",
        ),
        pytest.param(
            CAME, ALLOWING, [changed("a", "", "x"), changed("b", "", "x")], Order.TABLES_FIRST,
            id="with a pod that goes",
        ),
        pytest.param(
            CAME, replace(CAME, endpoints=(POD_A, replace(POD_B, tiers=()))), [changed("a", "x")],
            Order.STAGED, id="with other policies on a pod",
        ),
    ],
)  # fmt: skip
def test_way(
    before: Desired | None, after: Desired, changes: list[SetChange], order: Order
) -> None:
    """Copies are made only where nothing cheaper is exact."""
    assert way(before, after, changes).order is order


def test_unchanged_chains_stay_when_sets_are_renamed() -> None:
    """Only chains that look at a renamed set are other ones."""
    content = contents(ALLOWING)["filter"]
    renamed = with_other_sets(content, {"cali40a": "cali4t0"})
    differ = [name for name in content.chains if renamed.chains[name] is not content.chains[name]]
    assert differ == ["cali-pi-gnp/x"]
    assert "--match-set cali4t0 src" in as_text(renamed)["cali-pi-gnp/x"][0]
    assert with_other_sets(content, {"cali40other": "cali4t0"}) is content
