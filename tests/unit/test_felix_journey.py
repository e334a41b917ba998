"""What the rendered tables do with a packet is what the stored objects say, on its whole way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import Phase, given, settings

from cymric.model.net import parse_address
from cymric.model.resources import DEFAULT_ALLOW_PROFILE
from cymric.model.rules import parse_action
from felix.calc.journey import judge
from felix.calc.verdict import Decision, Packet, Trail
from tests.support.felix_generate import (
    FIELDS,
    TCP,
    Question,
    cluster,
    clusters,
    packets,
    questions,
    shrunk,
)
from tests.support.felix_places import EAST, HOST, INTERFACES, NODE, PODS, UP0, WEST, Place
from tests.support.felix_policy import Spec, Stored, hep, wep
from tests.support.felix_walk import ENVIRONMENT, RenderedNode, node_of

PACKETS = 30
"""About each cluster."""


def disagreements(stored: Stored, asked: list[Question]) -> Iterator[str]:
    """Where the tables decide otherwise than the objects say."""
    node, rendered = node_of(stored), RenderedNode(stored, INTERFACES, **ENVIRONMENT)
    for question in asked:
        said = judge(node, question.way, question.packet)
        done = rendered.decides(question.way, question.packet)
        if done != said[-1].action:
            yield f"{question}: {done}, not {said}"


def report(stored: Stored, asked: list[Question]) -> str:
    """A disagreement, cut down to what it takes; empty if there is none."""
    for question in asked:
        if next(disagreements(stored, [question]), None):

            def is_wrong(less: Stored, one: Question = question) -> bool:
                return next(disagreements(less, [one]), None) is not None

            smallest = shrunk(stored, is_wrong)
            return f"{next(disagreements(smallest, [question]))} with {smallest}"
    return ""


def agreed(stored: Stored, source: Place, destination: Place, packet: Packet) -> str:
    """What tables and evaluator both say."""
    question = Question(source, destination, packet)
    assert list(disagreements(stored, [question])) == []
    return judge(node_of(stored), question.way, packet)[-1].action


def between(source: str, destination: str) -> Packet:
    """TCP to port 80."""
    return Packet(parse_address(source), parse_address(destination), TCP, 40000, 80)


@pytest.mark.parametrize(
    ("excluded", "allowed4", "allowed6"),
    [
        pytest.param(["198.19.99.0/24"], "allow", "deny", id="only of IPv4"),
        pytest.param(["fd00:9::/64"], "deny", "allow", id="only of IPv6"),
        pytest.param(["198.19.99.0/24", "fd00:9::/64"], "allow", "allow", id="of both"),
    ],
)
def test_excluded_networks_of_one_family(excluded: list[str], allowed4: str, allowed6: str) -> None:
    """A rule whose networks, excluded ones too, are all of one family does not match the other."""
    a, b = PODS[:2]
    stored = {
        f"WorkloadEndpoint prod/{NODE}-k8s-a-eth0": wep(
            "a", ipNetworks=[f"{a.addresses[0]}/32", f"{a.addresses[1]}/128"],
            interfaceName=a.interface,
        ),
        "GlobalNetworkPolicy p": {"ingress": [{"source": {"notNets": excluded}}]},
    }  # fmt: skip
    found = [agreed(stored, HOST, a, between(UP0[0], a.addresses[0]))]
    for version in range(2):
        packet = between(EAST.addresses[3 * version], a.addresses[version])
        found.append(agreed(stored, EAST, a, packet))
    assert found == ["allow", allowed4, allowed6]
    # Nobody reaches a pod that has no endpoint.
    assert agreed(stored, EAST, b, between(EAST.addresses[0], b.addresses[0])) == "deny"


def test_one_for_all_interfaces_spares_those_that_have_their_own() -> None:
    """Early policy of the host endpoint for all interfaces is not for one with its own endpoint."""
    early = {"preDNAT": True, "applyOnForward": True, "selector": "for == 'all'"}
    stored: Stored = {
        "HostEndpoint all": hep(interfaceName="*", labels={"for": "all"}),
        "GlobalNetworkPolicy early": {**early, "ingress": [{"action": "Deny"}]},
    }
    packet = between(EAST.addresses[0], WEST.addresses[0])
    assert agreed(stored, EAST, WEST, packet) == "deny"
    stored["HostEndpoint up0"] = hep(interfaceName="up0")
    assert agreed(stored, EAST, WEST, packet) == "allow"
    back = between(WEST.addresses[0], EAST.addresses[0])
    assert agreed(stored, WEST, EAST, back) == "deny"


def test_a_profile_does_not_mind_who_passed_before() -> None:
    """A rule of a profile that passes ends that profile when it matches, and only then, whatever
    was passed by a tier or by another profile.
    """
    a, b = PODS[:2]
    elsewhere = {"source": {"nets": ["198.19.99.0/24"]}}
    stored = {
        f"WorkloadEndpoint prod/{NODE}-k8s-{pod.name}-eth0": wep(
            pod.name, ipNetworks=[f"{pod.addresses[0]}/32"], interfaceName=pod.interface,
            profiles=["first", "second"] if pod is a else [DEFAULT_ALLOW_PROFILE],
        )
        for pod in (a, b)
    }  # fmt: skip
    deny = {"ingress": [{"action": "Deny"}]}
    allow = {"ingress": [{"action": "Pass", **elsewhere}, {"action": "Allow"}]}
    stored |= {"Profile first": allow, "Profile second": deny}
    packet = between(b.addresses[0], a.addresses[0])
    assert agreed(stored, b, a, packet) == "allow"
    stored["GlobalNetworkPolicy p"] = {"types": ["Ingress"], "ingress": [{"action": "Pass"}]}
    assert agreed(stored, b, a, packet) == "allow"
    stored |= {"Profile first": {"ingress": [{"action": "Pass"}]}, "Profile second": allow}
    assert agreed(stored, b, a, packet) == "allow"
    stored["Profile second"] = deny
    assert agreed(stored, b, a, packet) == "deny"


@pytest.mark.timeout(3600)
@settings(
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # `shrunk` makes it smaller
    max_examples=settings().max_examples * 2,
)
@given(clusters(), questions(PACKETS))
def test_rendered_tables_do_what_the_objects_say(stored: Stored, asked: list[Question]) -> None:
    """Raw, mangle and filter of both families, from anywhere to anywhere, against the evaluator."""
    if next(disagreements(stored, asked), None):
        pytest.fail(report(stored, asked))


def test_generated_packets_meet_every_action_and_field() -> None:
    """The comparison would prove little if all packets met the same: a good part is allowed, a good
    part denied, on every way, and every field of rules decides somewhere.
    """
    verdicts: Counter[str] = Counter()
    ways: Counter[tuple[str, str]] = Counter()
    met: Counter[str] = Counter()
    for seed in range(CLUSTERS):
        node = node_of(cluster(seed))
        for question in packets(seed, PACKETS):
            trail: Trail = []
            found = judge(node, question.way, question.packet, trail)
            verdicts[found[-1].action] += 1
            ways[question.direction, found[-1].action] += 1
            met.update(_word(decision) for decision in found)
            for hit in trail:
                met.update(_fields(msgspec.to_builtins(hit.rule)))
    print(f"{verdicts}\n{ways}\n{met}")
    assert "services" not in met, "nobody knows the endpoints of a service"
    assert min(verdicts.values()) >= 0.2 * verdicts.total()
    missing = {(direction, word) for direction in DIRECTIONS for word in ("allow", "deny")}
    assert missing - ways.keys() == {("host-pod", "deny")}, "which no policy is about"
    assert set(WORDS) - met.keys() == {"services"}


CLUSTERS = 120
DIRECTIONS = (
    "pod-pod", "pod-host", "pod-outside", "host-pod", "host-outside", "outside-pod",
    "outside-host", "forwarded",
)  # fmt: skip
ACTIONS = ("Allow", "Deny", "Pass", "Log")
WORDS = (
    *ACTIONS, *FIELDS, "end of tier", "unknown interface", "tunnels from workloads",
    "no profile allowed", "no policy for", "failsafe port", "passed on by", "NetworkPolicy",
    "GlobalNetworkPolicy", "Profile", "Profile none",
)  # fmt: skip


def _word(decision: Decision) -> str:
    """What kind of decision it is."""
    by = decision.by
    return next((word for word in WORDS[::-1] if by.startswith(word)), by)


def _fields(rule: Spec) -> Iterator[str]:
    """The action and the fields that say something."""
    yield parse_action(rule.get("action", "")).capitalize()
    for tree in (rule, rule.get("source", {}), rule.get("destination", {})):
        yield from (name for name in FIELDS if tree.get(name))
