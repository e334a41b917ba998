"""Policies by the command line: what is stored, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from cymric.cli import checks, defaults
from cymric.cli.kinds import KINDS, find, row
from cymric.cli.rules import NOWHERE
from cymric.cli.schema import conform
from cymric.cli.session import Session
from cymric.datastore.memory import MemoryDatastore
from cymric.model import codec
from tests.support.cymric_cli import RESOURCES, Cymric, InMemory

# ruff: noqa: E501 - stored values are one line
EXAMPLES = {
    "networkpolicies/prod/allow-web": '{"kind":"NetworkPolicy","apiVersion":"projectcalico.org/v3","metadata":{"name":"allow-web","namespace":"prod","labels":{"projectcalico.org/tier":"default"},"annotations":{"projectcalico.org/metadata":"{\\"name\\":\\"allow-web\\"}"}},"spec":{"tier":"default","order":100,"ingress":[{"action":"Allow","protocol":"TCP","source":{"selector":"app == \'lb\'"},"destination":{"ports":[80,"8000:8080","metrics"]}}],"selector":"app == \'web\'","types":["Ingress"]}}',
    "globalnetworkpolicies/first": '{"kind":"GlobalNetworkPolicy","apiVersion":"projectcalico.org/v3","metadata":{"name":"first","labels":{"projectcalico.org/tier":"default"},"annotations":{"projectcalico.org/metadata":"{\\"name\\":\\"first\\"}"}},"spec":{"tier":"default","order":0,"egress":[{"action":"Deny"}],"types":["Egress"]}}',
    "tiers/security": '{"kind":"Tier","apiVersion":"projectcalico.org/v3","metadata":{"name":"security"},"spec":{"order":99.5,"defaultAction":"Pass"},"status":{}}',
    "globalnetworksets/bad-nets": '{"kind":"GlobalNetworkSet","apiVersion":"projectcalico.org/v3","metadata":{"name":"bad-nets","labels":{"feed":"bad"}},"spec":{"nets":["198.51.100.0/24","203.0.113.7/32"]}}',
    "hostendpoints/node-a-eth0": '{"kind":"HostEndpoint","apiVersion":"projectcalico.org/v3","metadata":{"name":"node-a-eth0","labels":{"role":"host"}},"spec":{"node":"node-a","interfaceName":"eth0","expectedIPs":["10.0.0.11"],"profiles":["projectcalico-default-allow"],"ports":[{"name":"ssh","protocol":"TCP","port":22}]}}',
    "stagednetworkpolicies/prod/trial": '{"kind":"StagedNetworkPolicy","apiVersion":"projectcalico.org/v3","metadata":{"name":"trial","namespace":"prod","labels":{"projectcalico.org/tier":"default"},"annotations":{"projectcalico.org/metadata":"{\\"name\\":\\"trial\\"}"}},"spec":{"stagedAction":"Set","tier":"default","ingress":[{"action":"Allow"}],"types":["Ingress"]}}',
}


@pytest.fixture
def memory() -> Cymric:
    """The command line on a datastore in memory."""
    store = MemoryDatastore()
    return Cymric(InMemory(store), Session(store=store, environ={}))


@pytest.mark.parametrize("place", EXAMPLES)
def test_stored_bytes_are_calicos(memory: Cymric, place: str) -> None:
    """What apply stores is Calico's value; tier, types, label and name are filled in."""
    tree = json.loads(EXAMPLES[place])
    written = json.loads(EXAMPLES[place])
    for word in ("annotations", "labels"):
        if "Policy" in tree["kind"]:
            del written["metadata"][word]
    for word in ("tier", "types", "status"):
        written["spec"].pop(word, None)
    memory.ok("apply", "-f", "-", stdin=yaml.safe_dump(written))
    stored = memory.stored(f"{RESOURCES}/{place}")
    for word in ("uid", "creationTimestamp"):
        del stored["metadata"][word]
    assert codec.encode_tree(stored).decode() == codec.encode_tree(tree).decode()


def test_get_and_delete(memory: Cymric) -> None:
    """Calico's columns; an object goes by any alias of its kind."""
    memory.ok("apply", "-f", "-", stdin=EXAMPLES["networkpolicies/prod/allow-web"])
    shown = memory.ok("get", "np", "-n", "prod", "-o", "wide")
    assert [line.split() for line in shown.strip().splitlines()] == [
        ["NAME", "TIER", "ORDER", "SELECTOR"],
        ["allow-web", "default", "100", "app", "==", "'web'"],
    ]
    memory.ok("delete", "policy", "allow-web", "-n", "prod")
    assert memory.raw.get(f"{RESOURCES}/networkpolicies/prod/allow-web") is None


def test_no_two_kinds_share_a_word() -> None:
    """An alias names one kind."""
    words = [alias for kind in KINDS for alias in kind.aliases]
    assert len(words) == len(set(words))
    assert row(find("hep"), {"metadata": {"name": "a"}, "spec": {"node": "n"}}) == ("a", "n")


def problems(kind_name: str, spec: dict[str, Any], name: str = "p", **metadata: Any) -> str:
    """What is wrong with an object, a line each."""
    kind = find(kind_name)
    tree = defaults.empty_resource(kind.name, name, spec)
    tree["metadata"] |= metadata
    if kind.is_namespaced:
        tree["metadata"].setdefault("namespace", "prod")
    done = conform(tree, kind.fields)
    done.tree.setdefault("spec", {})
    defaults.fill(done.tree, None)
    filled = conform({"spec": {}, **done.tree}, kind.fields).tree
    filled.setdefault("spec", {})
    return "\n".join(map(str, [*done.problems, *checks.check(kind, filled, None, NOWHERE)]))


def ingress(**rule: Any) -> dict[str, Any]:
    """The spec of a policy with one rule."""
    return {"ingress": [{"action": "Allow", **rule}]}


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        ("np", {"types": ["Ingress", "Ingress"]}, "spec.types: names a direction twice"),
        ("np", {"types": ["Sideways"]}, "neither Ingress nor Egress"),
        ("np", {"selector": "a ="}, "at character"),
        ("np", {"order": "first"}, "spec.order: expected a number"),
        ("gnp", {"doNotTrack": True, "preDNAT": True, "applyOnForward": True}, "not together"),
        ("gnp", {"doNotTrack": True}, "spec.applyOnForward: must be true with doNotTrack"),
        ("gnp", {"preDNAT": True, "applyOnForward": True, "types": ["Egress"]}, "ingress only"),
        ("np", {"ingress": [{"action": "allow"}]}, "spec.ingress[0].action: 'allow' is not"),
        (
            "np",
            ingress(protocol="TCP", http={"methods": ["GET"]})
            | {"egress": [{"action": "Deny", "http": {"methods": ["GET"]}}]},
            "spec.egress[0].http",
        ),
        ("np", ingress(source={"selector": "global()"}), "source.selector: global() is for"),
        ("np", ingress(source={"namespaceSelector": "global() || has(a)"}), "stands alone"),
        ("np", ingress(source={"notNets": ["0.0.0.0/0"]}), "would exclude everything"),
        ("np", ingress(source={"ports": [80]}), "numbers of ports need protocol"),
        ("np", ingress(destination={"services": {"name": "s"}}), "only where egress goes to"),
        (
            "np",
            ingress(source={"services": {"name": "s"}, "selector": "all()"}),
            "not together with selector",
        ),
        ("gnp", ingress(source={"services": {"name": "s"}}), "services.namespace: is required"),
        ("np", ingress(protocol="ICMP", icmp={"code": 1}), "an ICMP code needs a type"),
        ("np", ingress(ipVersion=5), "ipVersion 5"),
        ("snp", {"stagedAction": "Try"}, "spec.stagedAction: 'Try' is not"),
        ("tier", {"defaultAction": "Allow"}, "neither Deny nor Pass"),
        ("networkset", {"nets": ["10.0.0.0/99"]}, "10.0.0.0/99"),
        ("hep", {"node": "n"}, "interfaceName and expectedIPs"),
        ("hep", {"interfaceName": "eth0"}, "node"),
        ("profile", {"egress": [{"action": "Deny", "protocol": "IPX"}]}, "no protocol"),
    ],
)
def test_refused(kind: str, spec: dict[str, Any], said: str) -> None:
    """Objects that break a rule are refused, in words."""
    assert said in problems(kind, spec)


@pytest.mark.parametrize(
    ("kind", "spec", "name", "metadata", "said"),
    [
        ("tier", {}, "a.b", {}, "no single label"),
        ("tier", {"defaultAction": "Pass"}, "default", {}, "of tier default is Deny"),
        ("networkset", {}, "n", {"labels": {"projectcalico.org/namespace": "x"}}, "cannot be set"),
    ],
)
def test_refused_names(kind: str, spec: Any, name: str, metadata: Any, said: str) -> None:
    """What the metadata may be."""
    assert said in problems(kind, spec, name, **metadata)


def test_accepted() -> None:
    """Everything at once, where it is allowed."""
    side = {"nets": ["10.0.0.0/8"], "selector": "all()", "namespaceSelector": "global()"}
    rule = {"protocol": "TCP", "source": {**side, "ports": [80, "1:2", "http"]}}
    assert problems("gnp", {**ingress(**rule), "doNotTrack": True, "applyOnForward": True}) == ""
    assert problems("tier", {"order": 1}, "default") == ""
    assert problems("sknp", {"podSelector": {}, "policyTypes": ["Ingress"]}) == ""
