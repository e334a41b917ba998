"""Policies as stored: what is read as written, and what is read in the strictest way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.model import codec
from cymric.model.keys import ResourceKey
from cymric.model.policy import GlobalNetworkPolicy, NetworkPolicy, StagedNetworkPolicy, Tier
from cymric.model.strictest import FIRST

ALLOW, DENY = {"action": "Allow"}, {"action": "Deny"}


def stored(kind: str, name: str, spec: object, **metadata: Any) -> tuple[str, bytes]:
    """Key and value of one object."""
    namespace, _, short = name.rpartition("/")
    key = ResourceKey(kind, short, namespace)
    tree = {
        "kind": kind,
        "apiVersion": "projectcalico.org/v3",
        "metadata": {"name": short, **({"namespace": namespace} if namespace else {}), **metadata},
        "spec": spec,
    }
    return str(key), json.dumps(tree, separators=(",", ":")).encode()


def read(kind: str, name: str, spec: object, **metadata: Any) -> Any:
    """The object behind what is stored."""
    decoded = codec.decode(*stored(kind, name, spec, **metadata))
    assert decoded is not None
    return decoded[1]


def damaged(kind: str, name: str, spec: object, value: bytes | None = None) -> Any:
    """What stands in for something that does not parse."""
    key, written = stored(kind, name, spec)
    with pytest.raises(codec.Malformed) as caught:
        codec.decode(key, written if value is None else value)
    assert caught.value.key == key
    assert key in str(caught.value)
    return caught.value.damaged.stand_in if caught.value.damaged else None


FULL_RULE = {
    "action": "Pass",
    "ipVersion": 4,
    "protocol": "TCP",
    "notProtocol": 17,
    "source": {
        "nets": ["10.0.0.0/8"],
        "selector": "a == 'b'",
        "namespaceSelector": "has(c)",
        "ports": [80, "1024:2048", "http"],
        "notNets": ["10.1.0.0/16"],
        "notSelector": "d in {'e'}",
        "notPorts": [22],
        "serviceAccounts": {"names": ["sa"], "selector": "f == 'g'"},
    },
    "destination": {"services": {"name": "dns", "namespace": "kube-system"}},
    "metadata": {"annotations": {"why": "because"}},
}


@pytest.mark.parametrize(
    ("kind", "name", "spec"),
    [
        (
            "NetworkPolicy",
            "prod/web",
            {"tier": "default", "order": 99.5, "ingress": [FULL_RULE], "types": ["Ingress"]},
        ),
        (
            "GlobalNetworkPolicy",
            "host",
            {
                "tier": "security",
                "order": 10,
                "egress": [{"action": "Log", "protocol": "ICMP", "icmp": {"type": 8, "code": 0}}],
                "selector": "has(role)",
                "types": ["Egress"],
                "doNotTrack": True,
                "applyOnForward": True,
                "serviceAccountSelector": "a == 'b'",
                "namespaceSelector": "all()",
                "performanceHints": ["AssumeNeededOnEveryNode"],
            },
        ),
        ("Profile", "kns.prod", {"ingress": [ALLOW], "labelsToApply": {"pcns.a": "b"}}),
        ("NetworkSet", "prod/nets", {"nets": ["10.0.0.0/8", "fd00::1"]}),
        ("GlobalNetworkSet", "bad", {"nets": ["0.0.0.0/0"]}),
        (
            "HostEndpoint",
            "node1-eth0",
            {
                "node": "node1",
                "interfaceName": "eth0",
                "expectedIPs": ["10.0.0.11"],
                "profiles": ["p"],
                "ports": [{"name": "ssh", "protocol": "TCP", "port": 22}],
            },
        ),
    ],
)
def test_every_field_survives_decoding_and_encoding(kind: str, name: str, spec: Any) -> None:
    """What Calico stored comes out of our hands as the same bytes."""
    key, value = stored(kind, name, spec)
    decoded = codec.decode(key, value)
    assert decoded is not None
    assert codec.encode(decoded[1]) == value


def test_a_tier_always_has_a_status() -> None:
    """As Go writes it."""
    tier = read("Tier", "security", {"order": 10, "defaultAction": "Pass"})
    assert isinstance(tier, Tier)
    assert tier.spec.passes
    assert not read("Tier", "other", {}).spec.passes
    assert codec.encode(tier).endswith(b'"spec":{"order":10,"defaultAction":"Pass"},"status":{}}')


@pytest.mark.parametrize(
    ("name", "tier", "hidden", "shown"),
    [
        pytest.param("default.web", "", None, "web", id="3.28"),
        pytest.param("default.web", "default", '{"name":"web"}', "web", id="3.31"),
        pytest.param("default.web", "default", '{"name":"default.web"}', "default.web", id="so"),
        pytest.param("web", "default", '{"name":"web"}', "web", id="3.32"),
        pytest.param("sec.web", "sec", None, "sec.web", id="another tier"),
        pytest.param("default.web", "sec", None, "default.web", id="not of tier default"),
        pytest.param("default.web", "", "{", "web", id="broken annotation"),
    ],
)
def test_names_of_all_versions(name: str, tier: str, hidden: str | None, shown: str) -> None:
    """The key decides who a policy is; what is shown is the name that the user gave."""
    annotations = {"projectcalico.org/metadata": hidden} if hidden else {}
    policy = read("NetworkPolicy", f"prod/{name}", {"tier": tier}, annotations=annotations)
    assert isinstance(policy, NetworkPolicy)
    assert policy.metadata.name == name
    assert policy.shown_name == shown
    assert policy.spec.tier_name == tier or (tier == "" and policy.spec.tier_name == "default")


def test_types_and_reevaluation() -> None:
    """No types means both directions; the annotation must say exactly true."""
    policy = read("GlobalNetworkPolicy", "a", {})
    assert (policy.spec.is_ingress, policy.spec.is_egress) == (True, True)
    policy = read("GlobalNetworkPolicy", "a", {"types": ["Egress"]})
    assert (policy.spec.is_ingress, policy.spec.is_egress) == (False, True)
    assert not policy.reevaluates_established
    annotations = {"cymric.io/reevaluate-established": "true"}
    assert read("GlobalNetworkPolicy", "a", {}, annotations=annotations).reevaluates_established


def test_staged_kinds_are_read() -> None:
    """They are shown, with what they would do."""
    staged = read("StagedNetworkPolicy", "prod/x", {"stagedAction": "Set", "ingress": [ALLOW]})
    assert isinstance(staged, StagedNetworkPolicy)
    assert staged.spec.staged_action == "Set"
    assert read("StagedKubernetesNetworkPolicy", "prod/x", {"podSelector": {}}).spec == {
        "podSelector": {}
    }


BAD_PARTS: list[dict[str, Any]] = [
    {"action": "Redirect"},
    {"ipVersion": 5},
    {"protocol": "IPX"},
    {"protocol": 256},
    {"notProtocol": -1},
    {"destination": {"ports": [80]}},
    {"protocol": "UDPLite", "destination": {"ports": [80]}},
    {"protocol": "TCP", "destination": {"ports": [65536]}},
    {"protocol": "TCP", "destination": {"ports": ["9:1"]}},
    {"protocol": "TCP", "destination": {"ports": ["a b"]}},
    {"source": {"nets": ["10.0.0.0/33"]}},
    {"source": {"selector": "a ="}},
    {"source": {"notSelector": "a ="}},
    {"source": {"namespaceSelector": "a ="}},
    {"source": {"serviceAccounts": {"selector": "a ="}}},
    {"source": {"domains": ["example.org"]}},
    {"destination": {"services": {}}},
    {"icmp": {"type": 8}},
    {"protocol": "TCP", "notICMP": {"type": 8}},
    {"protocol": "ICMP", "icmp": {"type": 255}},
    {"protocol": "ICMP", "icmp": {"code": 1}},
    {"protocol": "ICMP", "ipVersion": 6},
    {"protocol": "ICMPv6", "ipVersion": 4},
    {"newField": 1},
]


@pytest.mark.parametrize("part", BAD_PARTS, ids=json.dumps)
@pytest.mark.parametrize("action", ["Allow", "Deny", "Pass", "Log"])
def test_a_rule_that_is_not_understood_never_allows_more(part: Any, action: str) -> None:
    """What allows or logs is left out; in place of anything else everything is denied."""
    rule = {"action": action, **part}
    policy = damaged("NetworkPolicy", "prod/a", {"order": 7, "ingress": [ALLOW, rule, DENY]})
    assert isinstance(policy, NetworkPolicy)
    assert policy.spec.order == 7
    actions = [one.action for one in policy.spec.ingress]
    closes = rule["action"] not in ("Allow", "Log")
    assert actions == (["Allow", "Deny", "Deny"] if closes else ["Allow", "Deny"])
    assert all(not one.protocol and not one.source.nets for one in policy.spec.ingress)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param(
            {"selector": "a ==", "order": 5, "tier": "t", "ingress": [ALLOW], "types": ["Ingress"]},
            {"selector": "", "order": 5, "tier": "t", "types": ("Ingress",)},
            id="selector",
        ),
        pytest.param(
            {"selector": "a == 'b'", "order": "soon", "ingress": [ALLOW]},
            {"selector": "a == 'b'", "order": FIRST, "types": ("Ingress", "Egress")},
            id="order: first of all",
        ),
        pytest.param(
            {"selector": "a == 'b'", "types": ["Sideways"]},
            {"selector": "a == 'b'", "order": None, "types": ("Ingress", "Egress")},
            id="types",
        ),
        pytest.param({"tier": 7}, {"tier": "", "order": None}, id="tier"),
    ],
)
def test_a_policy_that_is_not_understood_denies(spec: Any, expected: dict[str, Any]) -> None:
    """Where its readable parts leave it, and nothing of it allows."""
    policy = damaged("NetworkPolicy", "prod/a", spec)
    assert {name: getattr(policy.spec, name) for name in expected} == expected
    for rules in (policy.spec.ingress, policy.spec.egress):
        assert [rule.action for rule in rules] == ["Deny"]


@pytest.mark.parametrize("value", [b"", b"{", b"[]", b"null", b'{"spec":[]}', b"\xff"])
def test_garbage_in_a_policys_place_denies(value: bytes) -> None:
    """All that is known is the key: its namespace, or the whole cluster, forwarded too."""
    policy = damaged("NetworkPolicy", "prod/a", {}, value)
    assert (policy.metadata.namespace, policy.metadata.name) == ("prod", "a")
    policy = damaged("GlobalNetworkPolicy", "a", {}, value)
    assert isinstance(policy, GlobalNetworkPolicy)
    assert policy.spec.order == FIRST
    assert policy.spec.apply_on_forward
    assert [rule.action for rule in policy.spec.ingress] == ["Deny"]


def test_a_policy_under_the_wrong_key_is_the_keys() -> None:
    """Two objects can never pretend to be one."""
    value = stored("GlobalNetworkPolicy", "a", {"ingress": [ALLOW]})[1]
    policy = damaged("GlobalNetworkPolicy", "b", {}, value)
    assert policy.metadata.name == "b"
    assert [rule.action for rule in policy.spec.ingress] == ["Allow"]


def test_what_other_kinds_keep() -> None:
    """All that is readable; staged kinds, which nobody enforces, are absent."""
    profile = damaged(
        "Profile", "p", {"ingress": [{"action": "?"}], "labelsToApply": {"a": "b", "c": 1}}
    )
    assert [rule.action for rule in profile.spec.ingress] == ["Deny"]
    assert profile.spec.labels_to_apply == {"a": "b"}
    tier = damaged("Tier", "t", {"order": 5, "defaultAction": "Perhaps"})
    assert (tier.spec.order, tier.spec.passes) == (5, False)
    assert damaged("Tier", "t", {"order": "soon"}) is None
    nets = damaged("GlobalNetworkSet", "s", {"nets": ["10.0.0.0/8", "nonsense", 7]})
    assert nets.spec.nets == ("10.0.0.0/8",)
    host = damaged(
        "HostEndpoint",
        "h",
        {
            "node": "n",
            "interfaceName": "eth0",
            "expectedIPs": ["10.0.0.1", "x"],
            "ports": [{"name": "a"}, {"name": "b", "protocol": "TCP", "port": 1}],
        },
    )
    assert host.spec.expected_ips == ("10.0.0.1",)
    assert [port.name for port in host.spec.ports] == ["b"]
    assert damaged("HostEndpoint", "h", {"interfaceName": "eth0"}) is None
    assert damaged("StagedNetworkPolicy", "prod/x", {"selector": "a ="}) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["action", "source", "nets", "order", "selector", "ingress", "types"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON, st.sampled_from(["NetworkPolicy", "GlobalNetworkPolicy", "Profile", "Tier"]))
def test_whatever_is_stored_decodes_or_has_a_stand_in(tree: Any, kind: str) -> None:
    """No JSON at all ends a daemon, and no policy vanishes."""
    key, value = stored(kind, "prod/a" if kind == "NetworkPolicy" else "a", tree)
    found: object = None
    try:
        found = codec.decode(key, value)
    except codec.Malformed as error:
        found = error.damaged
    assert found is not None or kind == "Tier"
