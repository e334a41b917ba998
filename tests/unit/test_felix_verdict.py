"""The picture means what the stored objects mean, however it came about."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cymric.model.keys import ResourceKey
from cymric.model.net import parse_address
from felix.calc.policies import HostEndpoint
from felix.calc.state import Calculation
from felix.calc.values import Desired
from felix.calc.verdict import Decision, Packet, decide, decide_early, decide_forwarded
from tests.support.felix_interpreter import Interpreter
from tests.support.felix_objects import OBJECTS, an_object, cluster, packets
from tests.support.felix_policy import NODE, Stored, calculate, hep, update, wep

ALLOW, DENY, PASS = {"action": "Allow"}, {"action": "Deny"}, {"action": "Pass"}
DIRECTIONS = ("ingress", "egress")
EXAMPLES = int(os.environ.get("CYMRIC_POLICY_EXAMPLES", "50"))
"""Of each property; more of them where there is time."""
PACKETS = 20
"""Packets that each of the clusters is asked about."""
SEEDS = st.integers(0, 2**40)


def objects_of(stored: Stored) -> dict[ResourceKey, object]:
    """As the evaluator reads them."""
    found: dict[ResourceKey, object] = {}
    for name, spec in stored.items():
        key, value = update(name, spec)
        assert isinstance(key, ResourceKey)
        found[key] = value
    return found


def key_of(name: str) -> ResourceKey:
    """The key behind `Kind [namespace/]name`."""
    kind, _, full = name.partition(" ")
    namespace, _, short = full.rpartition("/")
    return ResourceKey(kind, short, namespace)


POD = "WorkloadEndpoint prod/node1-k8s-a-eth0"
WEB = Packet(parse_address("198.19.17.1"), parse_address("198.19.16.2"), 6, 40000, 80)


def pod_with(policies: Stored, **spec: Any) -> Stored:
    """A pod, and these policies."""
    return {POD: wep("a", **spec), **policies}


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        pytest.param(pod_with({}), Decision("allow", "Profile projectcalico-default-allow", 1),
                     id="no policy: profiles"),
        pytest.param(pod_with({}, profiles=[]), Decision("deny", "no profile allowed it"),
                     id="no profiles"),
        pytest.param(pod_with({}, profiles=["x"]), Decision("deny", "Profile x is missing"),
                     id="missing profile"),
        pytest.param(
            pod_with({"Profile x": {"ingress": [PASS, ALLOW]}},
                     profiles=["x", "projectcalico-default-allow"]),
            Decision("allow", "Profile projectcalico-default-allow", 1),
            id="pass in a profile is no verdict",
        ),
        pytest.param(pod_with({"NetworkPolicy prod/p": {}}),
                     Decision("deny", "end of tier default"), id="a policy without rules"),
        pytest.param(pod_with({"NetworkPolicy other/p": {}}),
                     Decision("allow", "Profile projectcalico-default-allow", 1),
                     id="another namespace's policy"),
        pytest.param(
            pod_with({"NetworkPolicy prod/p": {"ingress": [{"action": "Log"}, ALLOW]}}),
            Decision("allow", "NetworkPolicy prod/p", 2),
            id="log goes on",
        ),
        pytest.param(
            pod_with({
                "Tier first": {"order": 1},
                "GlobalNetworkPolicy p": {"tier": "first", "ingress": [PASS]},
                "GlobalNetworkPolicy q": {"tier": "first", "order": 1, "ingress": []},
                "NetworkPolicy prod/p": {"ingress": [DENY]},
            }),
            Decision("deny", "NetworkPolicy prod/p", 1),
            id="pass leaves the tier",
        ),
        pytest.param(
            pod_with({
                "Tier first": {"order": 1, "defaultAction": "Pass"},
                "GlobalNetworkPolicy p": {"tier": "first", "ingress": []},
            }),
            Decision("allow", "Profile projectcalico-default-allow", 1),
            id="a tier that passes at its end",
        ),
        pytest.param(
            pod_with({
                "GlobalNetworkPolicy p": {"tier": "gone", "ingress": [ALLOW]},
                "Tier default": {"order": 1000000},
                "NetworkPolicy prod/p": {"ingress": [DENY], "types": ["Egress"]},
            }),
            Decision("allow", "GlobalNetworkPolicy p", 1),
            id="a missing tier, and a policy for the other direction",
        ),
        pytest.param(
            pod_with({"NetworkPolicy prod/p": {
                "ingress": [{**ALLOW, "protocol": "TCP", "destination": {"ports": ["http"]}}]}},
                ports=[{"name": "http", "protocol": "TCP", "port": 80}]),
            Decision("allow", "NetworkPolicy prod/p", 1),
            id="a port by name",
        ),
    ],
)  # fmt: skip
def test_what_decides(stored: Stored, expected: Decision) -> None:
    """The evaluator names who decided, and the picture says the same."""
    key = key_of(POD)
    assert decide(objects_of(stored), key, "ingress", WEB) == expected
    desired = calculate(stored)
    (pod,) = desired.endpoints
    found = Interpreter(desired).decide(pod.tiers, pod.profiles, "ingress", WEB)
    assert found == expected.action


def test_forwarded_and_early_traffic() -> None:
    """Only policy that asks for it counts for forwarded traffic; without any it is allowed."""
    key = key_of("HostEndpoint h")
    stored: Stored = {
        "HostEndpoint h": hep(interfaceName="eth0"),
        "GlobalNetworkPolicy p": {"ingress": [DENY]},
    }
    allowed = decide_forwarded(objects_of(stored), key, "ingress", WEB)
    assert allowed.action == "allow"
    assert decide_early(objects_of(stored), key, "ingress", WEB, "untracked").action == "none"
    stored["GlobalNetworkPolicy f"] = {"applyOnForward": True, "ingress": []}
    denied = decide_forwarded(objects_of(stored), key, "ingress", WEB)
    assert denied == Decision("deny", "end of tier default")
    stored["GlobalNetworkPolicy u"] = {
        "applyOnForward": True,
        "doNotTrack": True,
        "ingress": [DENY],
    }
    early = decide_early(objects_of(stored), key, "ingress", WEB, "untracked")
    assert early == Decision("deny", "GlobalNetworkPolicy u", 1)


def answers(desired: Desired, stored: Stored, packet: Packet) -> list[tuple[str, str, str]]:
    """Every question about a packet: what it is, by the picture, by the evaluator."""
    objects, interpreter = objects_of(stored), Interpreter(desired)
    found: list[tuple[str, str, str]] = []
    for pod in desired.endpoints:
        namespace = pod.id.workload.partition("/")[0]
        key = ResourceKey("WorkloadEndpoint", f"{NODE}-k8s-{pod.interface[4:]}-eth0", namespace)
        for way in DIRECTIONS:
            actual = interpreter.decide(pod.tiers, pod.profiles, way, packet)
            found.append((f"{pod.id} {way}", actual, decide(objects, key, way, packet).action))
    for host in desired.host_endpoints:
        found += _host_answers(interpreter, objects, host, packet)
    return found


def _host_answers(
    interpreter: Interpreter,
    objects: dict[ResourceKey, object],
    host: HostEndpoint,
    packet: Packet,
) -> list[tuple[str, str, str]]:
    key = ResourceKey("HostEndpoint", host.id)
    found: list[tuple[str, str, str]] = []
    for way in DIRECTIONS:
        actual = interpreter.decide(host.tiers, host.profiles, way, packet)
        found.append((f"{host.id} {way}", actual, decide(objects, key, way, packet).action))
        applies = any(
            one.inbound if way == "ingress" else one.outbound for one in host.forward_tiers
        )
        actual = interpreter.tiers(host.forward_tiers, way, packet) if applies else "allow"
        expected = decide_forwarded(objects, key, way, packet).action
        found.append((f"{host.id} forwarded {way}", actual, expected))
        early = [("pre-DNAT", host.pre_dnat_tiers), ("untracked", host.untracked_tiers)]
        for kind, tiers in early if host.interface != "*" else early[:1]:
            actual = interpreter.tiers(tiers, way, packet)
            expected = decide_early(objects, key, way, packet, kind).action
            found.append((f"{host.id} {kind} {way}", actual, expected))
    return found


@settings(
    deadline=None, max_examples=EXAMPLES, phases=(Phase.explicit, Phase.reuse, Phase.generate)
)
@given(SEEDS)
def test_the_picture_means_what_is_stored(seed: int) -> None:
    """For every endpoint, direction and packet the picture and the evaluator agree."""
    disagreement = first_disagreement(seed, frozenset())
    if disagreement is None:
        return
    # Which objects it takes: leave out one after the other while it stays wrong.
    without: frozenset[str] = frozenset()
    for name in OBJECTS:
        if first_disagreement(seed, without | {name}):
            without |= {name}
    stored = {name: cluster(seed)[name] for name in OBJECTS.keys() - without}
    pytest.fail(f"{first_disagreement(seed, without)} with {stored}")


def first_disagreement(seed: int, without: frozenset[str]) -> str | None:
    """About a cluster without some objects; None if there is none."""
    stored = cluster(seed, without)
    desired = calculate(stored)
    for packet in packets(Random(seed), PACKETS):
        for what, actual, expected in answers(desired, stored, packet):
            if actual != expected:
                return f"{what}: {actual}, not {expected}, for {packet}"
    return None


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(OBJECTS)), st.none() | st.integers(0, 3), st.booleans()),
    min_size=3,
    max_size=30,
)
"""An object's next version (None: it goes), and whether there is time to work before the next."""


def without_counts(desired: Desired) -> dict[str, object]:
    """Counts of other nodes' endpoints alone make no new picture."""
    return {
        name: getattr(desired, name)
        for name in Desired.__dataclass_fields__
        if name != "count_by_kind"
    }


@settings(deadline=None, max_examples=4 * EXAMPLES)
@given(SEEDS, STEPS)
def test_history_leaves_no_trace(seed: int, steps: list[tuple[str, int | None, bool]]) -> None:
    """Any order, change, deletion and split ends in the picture of what is stored at the end.

    And when everything is deleted again, in any order, nothing of policy is left.
    """
    calculation = Calculation(NODE, {})
    last: Stored = {}
    for name, version, has_time in steps:
        if version is None:
            calculation.on_update(key_of(name), None)
            last.pop(name, None)
        else:
            last[name] = an_object(f"{seed} {version}", name)
            calculation.on_update(*update(name, last[name]))
        if has_time:
            calculation.desired()
    assert without_counts(calculation.desired()) == without_counts(calculate(last))
    again = calculation.desired()
    for name, spec in last.items():
        calculation.on_update(*update(name, spec))
    assert calculation.desired() is again, "repetition changes nothing"
    names, chance = sorted(last), Random(seed)
    chance.shuffle(names)
    for name in names:
        calculation.on_update(key_of(name), None)
        if chance.random() < 0.5:
            calculation.desired()
    empty = calculation.desired()
    assert (empty.policies, empty.ip_sets, empty.profiles) == ({}, {}, {})
    assert (empty.endpoints, empty.host_endpoints, empty.problems) == ((), (), ())
