"""Policies as a node enforces them: what is active, in which order, with which sets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from cymric.model.net import parse_address
from felix.calc.policies import (
    EntityMatch,
    HostEndpoint,
    IcmpMatch,
    IPSet,
    Policy,
    PolicyRule,
    PortRange,
    SetKind,
    TierPolicies,
    Verdict,
)
from felix.calc.selection import of_entity, of_policy
from felix.calc.state import Calculation
from felix.calc.values import Desired
from tests.support.felix_policy import NODE, Stored, calculate, hep, update, wep

ALLOW = {"action": "Allow"}


def policies_of(desired: Desired, interface: str = "calia") -> list[tuple[str, str, list[str]]]:
    """Tier, default action and policies (inbound) of one endpoint."""
    (endpoint,) = [one for one in desired.endpoints if one.interface == interface]
    return [
        (tier.name, tier.default_action.value, [str(id_) for id_ in tier.inbound])
        for tier in endpoint.tiers
    ]


def rule_of(entity: dict[str, Any], namespace: str = "prod", **rule: Any) -> PolicyRule:
    """The one rule of a policy that has `entity` as source."""
    kind = f"NetworkPolicy {namespace}/p" if namespace else "GlobalNetworkPolicy p"
    desired = calculate(
        {
            "WorkloadEndpoint prod/node1-k8s-a-eth0": wep("a"),
            kind: {"ingress": [{**ALLOW, "source": entity, **rule}], "types": ["Ingress"]},
        }
    )
    (policy,) = desired.policies.values()
    (found,) = policy.inbound
    return found


@pytest.mark.parametrize(
    ("namespace", "entity", "positive", "negative"),
    [
        ("prod", {}, None, None),
        (
            "prod",
            {"selector": "app == 'lb'"},
            '(projectcalico.org/namespace == "prod" && app == "lb")',
            None,
        ),
        ("", {"selector": "app == 'lb'"}, 'app == "lb"', None),
        (
            "prod",
            {"selector": "a == 'b' && has(c)"},
            '(projectcalico.org/namespace == "prod" && (a == "b" && has(c)))',
            None,
        ),
        (
            "prod",
            {"notSelector": "a == 'b'"},
            '(projectcalico.org/namespace == "prod" && !a == "b")',
            None,
        ),
        ("", {"notSelector": "a == 'b'"}, None, 'a == "b"'),
        (
            "",
            {"selector": "has(c)", "notSelector": "a == 'b' || has(d)"},
            '(has(c) && !(a == "b" || has(d)))',
            None,
        ),
        (
            "prod",
            {"namespaceSelector": "env == 'x'"},
            'pcns.env == "x"',
            None,
        ),
        (
            "prod",
            {"namespaceSelector": "env in {'y', 'x'}", "selector": "all()"},
            '(pcns.env in {"x", "y"} && all())',
            None,
        ),
        ("prod", {"namespaceSelector": "all()"}, "has(projectcalico.org/namespace)", None),
        ("prod", {"namespaceSelector": "global()"}, "!has(projectcalico.org/namespace)", None),
        (
            "prod",
            {"serviceAccounts": {"names": ["b", "a"]}},
            '(projectcalico.org/namespace == "prod" && '
            'projectcalico.org/serviceaccount in {"a", "b"})',
            None,
        ),
        (
            "",
            {"serviceAccounts": {"names": ["a"], "selector": "r == 's'"}, "selector": "has(t)"},
            '((projectcalico.org/serviceaccount in {"a"} && pcsa.r == "s") && has(t))',
            None,
        ),
    ],
)
def test_which_endpoints_one_side_of_a_rule_means(
    namespace: str, entity: dict[str, Any], positive: str | None, negative: str | None
) -> None:
    """The canonical text of the selector, by which sets are named."""
    name = f"NetworkPolicy {namespace}/p" if namespace else "GlobalNetworkPolicy p"
    stored: Any = update(name, {"ingress": [{**ALLOW, "source": entity}]})[1]
    wanted, unwanted = of_entity(stored.spec.ingress[0].source, namespace)
    assert (str(wanted) if wanted else None) == positive
    assert (str(unwanted) if unwanted else None) == negative


@pytest.mark.parametrize(
    ("name", "spec", "expected"),
    [
        ("NetworkPolicy prod/p", {}, 'projectcalico.org/namespace == "prod"'),
        (
            "NetworkPolicy prod/p",
            {"selector": "a == 'b'"},
            '(a == "b" && projectcalico.org/namespace == "prod")',
        ),
        (
            "NetworkPolicy prod/p",
            {"serviceAccountSelector": "r == 's' || t == 'u'"},
            '(projectcalico.org/namespace == "prod" && (pcsa.r == "s" || pcsa.t == "u"))',
        ),
        ("GlobalNetworkPolicy p", {}, "all()"),
        ("GlobalNetworkPolicy p", {"selector": "all()"}, "all()"),
        ("GlobalNetworkPolicy p", {"namespaceSelector": "all()"},
         "has(projectcalico.org/namespace)"),
        (
            "GlobalNetworkPolicy p",
            {"selector": "all()", "namespaceSelector": "env == 'x'"},
            '(has(projectcalico.org/namespace) && pcns.env == "x")',
        ),
        (
            "GlobalNetworkPolicy p",
            {"selector": "has(a)", "serviceAccountSelector": "all()"},
            "(has(a) && has(projectcalico.org/serviceaccount))",
        ),
    ],
)  # fmt: skip
def test_which_endpoints_a_policy_is_about(name: str, spec: dict[str, Any], expected: str) -> None:
    """The policy's own selector, in its namespace or in those it selects."""
    stored: Any = update(name, spec)[1]
    assert str(of_policy(stored)) == expected


def test_ids_are_calicos() -> None:
    """Of the worked example of Calico 3.32: a restarted node, or Calico, finds the same set."""
    rule = rule_of({"selector": "app == 'lb'"}, protocol="TCP")
    assert rule.source.set_ids == ("s:SKAWfwYhGs-kFLTCZp1Bzv8Eko5HdcRpat-s4g",)
    assert rule.protocol == "tcp"


def test_every_field_of_a_rule() -> None:
    """Numbers, ranges and names of ports; nets; negations; ICMP by type and code."""
    rule = rule_of(
        {
            "nets": ["10.0.0.1", "10.1.2.3/16", "fd00::/64"],
            "notNets": ["10.9.0.0/16"],
            "ports": [80, "1024:2048"],
            "notPorts": [22],
        },
        namespace="",
        protocol=6,
        notProtocol="UDP",
        ipVersion=4,
        metadata={"annotations": {"b": "2", "a": "1"}},
    )
    assert list(map(str, rule.source.nets)) == ["10.0.0.1/32", "10.1.0.0/16", "fd00::/64"]
    assert list(map(str, rule.source.not_nets)) == ["10.9.0.0/16"]
    assert rule.source.ports == (PortRange(80, 80), PortRange(1024, 2048))
    assert rule.source.not_ports == (PortRange(22, 22),)
    assert (rule.protocol, rule.not_protocol, rule.ip_version) == (6, "udp", 4)
    assert rule.annotations == (("a", "1"), ("b", "2"))
    rule = rule_of({}, protocol="ICMPv6", icmp={"type": 128}, notICMP={"type": 3, "code": 4})
    assert (rule.icmp, rule.not_icmp) == (IcmpMatch(128), IcmpMatch(3, 4))
    assert rule.ip_version == 6, "its types mean nothing in IPv4"
    assert rule_of({}, protocol="ICMP") == PolicyRule(Verdict.ALLOW, protocol="icmp")


def test_named_ports() -> None:
    """A set of addresses and ports of what the positive selector chooses, or of everything."""
    rule = rule_of({"selector": "has(x)", "ports": ["http"]}, namespace="", protocol="TCP")
    assert rule.source.set_ids == (), "the set of ports says it already"
    assert len(rule.source.port_set_ids) == 1
    mixed = rule_of({"selector": "has(x)", "ports": ["http", 80]}, namespace="", protocol="TCP")
    assert len(mixed.source.set_ids) == 1
    assert mixed.source.port_set_ids == rule.source.port_set_ids
    negated = rule_of({"selector": "has(x)", "notPorts": ["http"]}, namespace="", protocol="TCP")
    assert negated.source.not_port_set_ids == rule.source.port_set_ids
    assert len(negated.source.set_ids) == 1
    others = [
        rule_of({"selector": "has(x)", "ports": ["http"]}, namespace="", protocol="UDP"),
        rule_of({"selector": "has(x)", "ports": ["http"]}, namespace=""),
        rule_of({"ports": ["http"]}, namespace="", protocol="TCP"),
    ]
    ids = [one.source.port_set_ids for one in (rule, *others)]
    assert len(set(ids)) == 4


PORTS = [
    {"name": "http", "protocol": "TCP", "port": 80},
    {"name": "http", "protocol": "TCP", "port": 8080},
    {"name": "dns", "protocol": "UDP", "port": 53},
    {"name": "dns", "protocol": "TCP", "port": 53},
]
MEMBERS: Stored = {
    "WorkloadEndpoint prod/node1-k8s-a-eth0": wep("a", ports=PORTS),
    "WorkloadEndpoint prod/node2-k8s-b-eth0": wep(
        "b", node="node2", ipNetworks=["198.19.16.3/32", "fd00::3/128"], ports=PORTS[:1]
    ),
    "HostEndpoint h": hep(node="node2", expectedIPs=["198.19.0.2"], ports=PORTS[2:3]),
    "NetworkSet prod/s": {"nets": ["10.0.0.0/8", "10.0.0.7", "fd00:9::/64"]},
    "GlobalNetworkSet all": {"nets": ["0.0.0.0/0", "::/0"]},
}


@pytest.mark.parametrize(
    ("side", "v4", "v6"),
    [
        (
            {"selector": "all()"},
            {"198.19.16.2", "198.19.16.3", "10.0.0.0/8", "10.0.0.7"},
            {"fd00::3", "fd00:9::/64"},
        ),
        (
            {"namespaceSelector": "global()"},
            {"198.19.0.2", "0.0.0.0/1", "128.0.0.0/1"},
            {"::/1", "8000::/1"},
        ),
        (
            {"ports": ["http"]},
            {"198.19.16.2,tcp:80", "198.19.16.2,tcp:8080", "198.19.16.3,tcp:80"},
            {"fd00::3,tcp:80"},
        ),
        (
            {"ports": ["dns"]},
            {"198.19.16.2,udp:53", "198.19.16.2,tcp:53", "198.19.0.2,udp:53"},
            set(),
        ),
        ({"ports": ["nobody"]}, set(), set()),
    ],
)
def test_members(side: dict[str, Any], v4: set[str], v6: set[str]) -> None:
    """Endpoints of all nodes, host endpoints' expected addresses, sets of networks; both families.

    Prefixes of length 0, which no set can hold, are two halves.
    """
    policy = {"ingress": [{**ALLOW, "source": side}], "types": ["Ingress"]}
    desired = calculate({**MEMBERS, "NetworkPolicy prod/p": policy})
    (found,) = desired.ip_sets.values()
    assert (set(found.members_v4), set(found.members_v6)) == (v4, v6)
    assert found.kind == (SetKind.IP_PORT if "ports" in side else SetKind.NET)


def test_an_address_stays_until_its_last_owner_goes() -> None:
    """Two endpoints with one address count twice."""
    calculation = Calculation(NODE, {})
    first, second = "WorkloadEndpoint prod/node1-k8s-a-eth0", "WorkloadEndpoint prod/n-k8s-b-eth0"
    rule = {**ALLOW, "source": {"selector": "all()"}}
    for name, spec in {
        first: wep("a"),
        second: wep("b", node="n"),
        "NetworkPolicy prod/p": {"ingress": [rule]},
    }.items():
        calculation.on_update(*update(name, spec))

    def members() -> list[set[str]]:
        return [set(one.members_v4) for one in calculation.desired().ip_sets.values()]

    assert members() == [{"198.19.16.2"}]
    calculation.on_update(update(second, wep("b", node="n"))[0], None)
    assert members() == [{"198.19.16.2"}]
    moved = wep("a", ipNetworks=["198.19.16.9/32"])
    calculation.on_update(*update(first, moved))
    assert members() == [{"198.19.16.9"}]
    calculation.on_update(update(first, moved)[0], None)
    assert members() == [], "nothing here needs the set any more"


def test_labels_are_inherited_from_profiles_in_their_order() -> None:
    """Own labels first, then each profile's for keys not set yet; namespaced labels not forged."""
    labels = {"own": "mine", "pcns.env": "forged"}
    stored: Stored = {
        "WorkloadEndpoint prod/node1-k8s-a-eth0": wep("a", profiles=["one", "two"], labels=labels),
        "Profile one": {"labelsToApply": {"own": "one", "pcns.env": "prod"}},
        "Profile two": {"labelsToApply": {"pcns.env": "test", "two": "2"}},
    }
    for selector, is_active in {
        "own == 'mine'": True,
        "two == '2'": True,
        "pcns.env == 'prod'": True,
        "pcns.env in {'test', 'forged'}": False,
        "projectcalico.org/orchestrator == 'k8s'": True,
        "projectcalico.org/namespace == 'prod'": True,
    }.items():
        desired = calculate({**stored, "GlobalNetworkPolicy p": {"selector": selector}})
        assert bool(desired.policies) is is_active, selector
    by_namespace = {"namespaceSelector": "env == 'prod'"}
    assert calculate({**stored, "GlobalNetworkPolicy p": by_namespace}).policies


def test_only_what_acts_here_is_active() -> None:
    """Policies for others, staged policies, and sets that nobody names do not appear."""
    rule = {**ALLOW, "source": {"selector": "has(x)"}}
    desired = calculate(
        {
            "WorkloadEndpoint prod/node1-k8s-a-eth0": wep("a"),
            "WorkloadEndpoint other/node2-k8s-b-eth0": wep("b", node="node2"),
            "NetworkPolicy other/p": {"ingress": [rule]},
            "StagedNetworkPolicy prod/p": {"ingress": [rule]},
            "StagedGlobalNetworkPolicy p": {"egress": [rule]},
            "StagedKubernetesNetworkPolicy prod/p": {},
            "GlobalNetworkPolicy untracked": {"doNotTrack": True, "applyOnForward": True},
            "GlobalNetworkPolicy prednat": {"preDNAT": True, "applyOnForward": True},
        }
    )
    assert desired.policies == {}
    assert desired.ip_sets == {}
    assert desired.endpoints[0].tiers == ()


def test_order_of_tiers_and_policies() -> None:
    """Tiers by order, then name, missing ones last; policies by order, then by name."""
    desired = calculate(
        {
            "WorkloadEndpoint prod/node1-k8s-a-eth0": wep("a"),
            "Tier default": {"order": 1000000, "defaultAction": "Deny"},
            "Tier late": {"defaultAction": "Pass"},
            "Tier a": {"order": 5},
            "Tier b": {"order": 5, "defaultAction": "Pass"},
            "Tier empty": {"order": 1},
            "GlobalNetworkPolicy p1": {"tier": "late"},
            "GlobalNetworkPolicy p2": {"tier": "gone"},
            "GlobalNetworkPolicy p3": {"tier": "b"},
            "GlobalNetworkPolicy p4": {"tier": "a"},
            "NetworkPolicy prod/none": {},
            "NetworkPolicy prod/also-none": {"tier": "default"},
            "GlobalNetworkPolicy none": {},
            "GlobalNetworkPolicy ten": {"order": 10},
            "NetworkPolicy prod/half": {"order": 9.5},
            "NetworkPolicy prod/negative": {"order": -1},
        }
    )
    assert policies_of(desired) == [
        ("a", "deny", ["gnp/p4"]),
        ("b", "pass", ["gnp/p3"]),
        (
            "default",
            "deny",
            ["np/prod/negative", "np/prod/half", "gnp/ten", "np/prod/also-none", "gnp/none",
             "np/prod/none"],
        ),
        ("late", "pass", ["gnp/p1"]),
        ("gone", "deny", ["gnp/p2"]),
    ]  # fmt: skip
    (problem,) = desired.problems
    assert (problem.subject, "does not exist" in problem.reason) == ("policy gnp/p2", True)


def test_directions() -> None:
    """A policy is in a tier only for its types; none means both."""
    desired = calculate(
        {
            "WorkloadEndpoint prod/node1-k8s-a-eth0": wep("a"),
            "GlobalNetworkPolicy in": {"types": ["Ingress"], "egress": [ALLOW]},
            "GlobalNetworkPolicy out": {"types": ["Egress"], "ingress": [ALLOW], "egress": [ALLOW]},
            "GlobalNetworkPolicy both": {},
        }
    )
    (tier,) = desired.endpoints[0].tiers
    assert [one.name for one in tier.inbound] == ["both", "in"]
    assert [one.name for one in tier.outbound] == ["both", "out"]
    by_name = {id_.name: policy for id_, policy in desired.policies.items()}
    assert (by_name["in"].outbound, by_name["out"].inbound) == ((), ())
    assert by_name["out"].outbound == (PolicyRule(Verdict.ALLOW),)


def test_host_endpoints_have_four_classes_of_tiers() -> None:
    """Untracked before pre-DNAT before the rest; forwarded traffic only where it is asked for."""
    desired = calculate(
        {
            "HostEndpoint h": hep(interfaceName="eth0", profiles=["p"]),
            "GlobalNetworkPolicy normal": {},
            "GlobalNetworkPolicy forward": {"applyOnForward": True},
            "GlobalNetworkPolicy untracked": {"doNotTrack": True, "applyOnForward": True},
            "GlobalNetworkPolicy prednat": {"preDNAT": True, "applyOnForward": True},
            "NetworkPolicy prod/other": {},
        }
    )
    (host,) = desired.host_endpoints
    assert (host.id, host.interface, host.profiles) == ("h", "eth0", ("p",))

    def names(tiers: tuple[TierPolicies, ...]) -> list[tuple[str, list[str], list[str]]]:
        return [
            (
                tier.default_action.value,
                [one.name for one in tier.inbound],
                [one.name for one in tier.outbound],
            )
            for tier in tiers
        ]

    assert names(host.tiers) == [("deny", ["forward", "normal"], ["forward", "normal"])]
    assert names(host.forward_tiers) == [("deny", ["forward"], ["forward"])]
    assert names(host.untracked_tiers) == [("pass", ["untracked"], ["untracked"])]
    assert names(host.pre_dnat_tiers) == [("pass", ["prednat"], [])]
    assert desired.profiles["p"].inbound is None, "missing"
    wildcard = calculate(
        {
            "HostEndpoint h": hep(interfaceName="*"),
            "GlobalNetworkPolicy untracked": {"doNotTrack": True, "applyOnForward": True},
            "GlobalNetworkPolicy prednat": {"preDNAT": True, "applyOnForward": True},
        }
    )
    (host,) = wildcard.host_endpoints
    assert host.untracked_tiers == ()
    assert names(host.pre_dnat_tiers) == [("pass", ["prednat"], [])]


def test_whose_interface_it_is() -> None:
    """By name before by address, the first name wins, workload interfaces belong to none."""
    stored: Stored = {
        "HostEndpoint b-by-name": hep(interfaceName="eth0"),
        "HostEndpoint c-by-name": hep(interfaceName="eth0"),
        "HostEndpoint a-by-address": hep(expectedIPs=["198.19.0.1"]),
        "HostEndpoint d-by-address": hep(expectedIPs=["198.19.0.2", "fd00::2"]),
        "HostEndpoint e-by-address": hep(expectedIPs=["198.19.0.2"]),
        "HostEndpoint f-not-there": hep(expectedIPs=["198.19.0.99"]),
        "HostEndpoint w-all": hep(interfaceName="*"),
        "HostEndpoint x-pod": hep(interfaceName="cali123"),
        "HostEndpoint y-other-node": hep(node="node2", interfaceName="eth7"),
        "HostEndpoint z-odd": hep(interfaceName="a b"),
    }
    calculation = Calculation(NODE, {})
    for name, spec in stored.items():
        calculation.on_update(*update(name, spec))

    def owners() -> dict[str, str]:
        return {one.interface: one.id for one in calculation.desired().host_endpoints}

    assert owners() == {"eth0": "b-by-name", "*": "w-all"}, "no interfaces known yet"
    one, two = (
        frozenset({address}) for address in map(parse_address, ("198.19.0.1", "198.19.0.2"))
    )
    calculation.on_host_interfaces({"eth0": one, "eth1": two, "eth2": two, "cali9": two})
    assert owners() == {
        "eth0": "b-by-name",
        "eth1": "d-by-address",
        "eth2": "d-by-address",
        "*": "w-all",
    }
    before = calculation.desired()
    calculation.on_host_interfaces({"eth0": one, "eth1": two, "eth2": two, "cali9": two})
    assert calculation.desired() is before
    subjects = {problem.subject.split()[1] for problem in before.problems}
    assert subjects == {"c-by-name", "e-by-address", "f-not-there", "x-pod", "z-odd"}
    calculation.on_host_interfaces({"eth0": one, "eth1": one})
    assert owners() == {"eth0": "b-by-name", "eth1": "a-by-address", "*": "w-all"}


def test_services_match_nothing_and_are_named() -> None:
    """Nobody tells us of their endpoints yet: sets that stay empty, one kind per side."""
    desired = calculate(
        {
            "WorkloadEndpoint prod/node1-k8s-a-eth0": wep("a"),
            "NetworkPolicy prod/p": {
                "ingress": [{**ALLOW, "source": {"services": {"name": "s"}}}],
                "egress": [{**ALLOW, "destination": {"services": {"name": "s"}}}],
            },
        }
    )
    (policy,) = desired.policies.values()
    (inbound,), (outbound,) = policy.inbound, policy.outbound
    (source,), (destination,) = (
        inbound.source.service_set_ids,
        outbound.destination.service_set_ids,
    )
    assert desired.ip_sets[source] == IPSet(source, SetKind.NET)
    assert desired.ip_sets[destination] == IPSet(destination, SetKind.IP_PORT)
    assert source.startswith("svcnoport:")
    assert destination.startswith("svc:")
    assert {problem.subject for problem in desired.problems} == {"policy np/prod/p"}


@pytest.mark.parametrize(
    ("action", "expected"), [("Allow", []), ("Log", []), ("Deny", ["deny"]), ("Pass", ["deny"])]
)
def test_http_never_allows_more(action: str, expected: list[str]) -> None:
    """Nobody looks into HTTP here."""
    rule = {"action": action, "protocol": "TCP", "http": {"methods": ["GET"]}}
    desired = calculate(
        {
            "WorkloadEndpoint prod/node1-k8s-a-eth0": wep("a"),
            "NetworkPolicy prod/p": {"ingress": [rule]},
        }
    )
    (policy,) = desired.policies.values()
    assert [one.action.value for one in policy.inbound] == expected
    assert "http" in desired.problems[0].reason


def test_profiles_have_rules_with_matches_too() -> None:
    """And their sets live as long as an endpoint names them."""
    name = "WorkloadEndpoint prod/node1-k8s-a-eth0"
    calculation = Calculation(NODE, {})
    rule = {**ALLOW, "source": {"selector": "has(x)"}}
    calculation.on_update(*update("Profile p", {"ingress": [rule]}))
    calculation.on_update(*update(name, wep("a", profiles=["p"])))
    desired = calculation.desired()
    (set_id,) = desired.ip_sets
    assert desired.profiles["p"].inbound == (
        PolicyRule(Verdict.ALLOW, source=EntityMatch(set_ids=(set_id,))),
    )
    calculation.on_update(*update(name, wep("a", profiles=["q"])))
    assert calculation.desired().ip_sets == {}
    assert set(calculation.desired().profiles) == {"q"}


def test_what_is_unchanged_is_the_same_object() -> None:
    """So that who applies it finds by identity what is new."""
    calculation = Calculation(NODE, {})
    stored: Stored = {
        "WorkloadEndpoint prod/node1-k8s-a-eth0": wep("a"),
        "WorkloadEndpoint prod/node1-k8s-b-eth0": wep("b", ipNetworks=["198.19.16.3/32"]),
        "HostEndpoint h": hep(interfaceName="eth0"),
        "GlobalNetworkPolicy p": {"ingress": [{**ALLOW, "source": {"selector": "has(x)"}}]},
        "NetworkPolicy prod/q": {"egress": [{**ALLOW, "destination": {"selector": "has(y)"}}]},
    }
    for name, spec in stored.items():
        calculation.on_update(*update(name, spec))
    before = calculation.desired()
    other = wep("c", node="node2", ipNetworks=["198.19.17.1/32"], labels={"x": ""})
    calculation.on_update(*update("WorkloadEndpoint prod/node2-k8s-c-eth0", other))
    after = calculation.desired()
    assert after.endpoints is before.endpoints
    assert after.policies is before.policies
    assert after.host_endpoints[0] is before.host_endpoints[0]
    changed = [one for id_, one in after.ip_sets.items() if one is not before.ip_sets[id_]]
    assert [one.members_v4 for one in changed] == [{"198.19.17.1"}]
    calculation.on_update(*update("NetworkPolicy prod/q", {"egress": [{"action": "Deny"}]}))
    last = calculation.desired()
    assert [
        str(id_) for id_, one in last.policies.items() if one is not after.policies.get(id_)
    ] == ["np/prod/q"]
    assert all(a is b for a, b in zip(last.endpoints, after.endpoints, strict=True))
    assert all(one is after.ip_sets[id_] for id_, one in last.ip_sets.items())


def test_names_that_could_break_a_rule_are_replaced() -> None:
    """They come from the datastore, where anybody may have written anything."""
    odd = 'x" -j ACCEPT'
    desired = calculate(
        {
            "HostEndpoint h": hep(interfaceName="eth0", profiles=[odd]),
            f"GlobalNetworkPolicy {odd}": {},
        }
    )
    (policy,) = desired.policies
    assert policy.name.startswith("unusable-")
    (profile,) = desired.host_endpoints[0].profiles
    assert profile.startswith("unusable-")
    assert desired.profiles[profile].inbound is None


def test_reevaluation_is_handed_on() -> None:
    """The annotation reaches the value."""
    annotations = {"cymric.io/reevaluate-established": "true"}
    calculation = Calculation(NODE, {})
    calculation.on_update(*update("WorkloadEndpoint prod/node1-k8s-a-eth0", wep("a")))
    calculation.on_update(*update("NetworkPolicy prod/p", {"annotations": annotations}))
    (policy,) = calculation.desired().policies.values()
    assert isinstance(policy, Policy)
    assert policy.reevaluate_established


def test_a_damaged_policy_is_enforced_in_the_strictest_way_and_named() -> None:
    """A rule that cannot be read denies; the policy heals when it is written anew."""
    calculation = Calculation(NODE, {})
    calculation.on_update(*update("WorkloadEndpoint prod/node1-k8s-a-eth0", wep("a")))
    broken = {"ingress": [ALLOW, {"action": "Redirect"}], "types": ["Ingress"]}
    calculation.on_update(*update("NetworkPolicy prod/p", broken))
    desired = calculation.desired()
    (policy,) = desired.policies.values()
    assert policy.inbound == (PolicyRule(Verdict.ALLOW), PolicyRule(Verdict.DENY))
    (problem,) = desired.problems
    assert problem.subject == "NetworkPolicy prod/p"
    assert "Redirect" in problem.reason
    calculation.on_update(*update("NetworkPolicy prod/p", {"ingress": [ALLOW]}))
    assert calculation.desired().problems == ()


def test_set_ids_do_not_depend_on_who_uses_them() -> None:
    """Equal selectors in two policies, however they are spelled, are one set."""
    specs = ("app == 'a'", '( app=="a" )')
    ids = {
        set_id
        for selector in specs
        for set_id in rule_of({"selector": selector}, namespace="").source.set_ids
    }
    assert len(ids) == 1
    assert all(
        first != second
        for first, second in itertools.pairwise(
            rule_of({"selector": text}, namespace="").source.set_ids
            for text in ("a=='b'", "a!='b'")
        )
    )


def test_host_endpoint_value_is_whole() -> None:
    """Without policy it has none, which is not the same as being absent."""
    desired = calculate({"HostEndpoint h": hep(interfaceName="eth0")})
    assert desired.host_endpoints == (HostEndpoint("h", "eth0"),)
