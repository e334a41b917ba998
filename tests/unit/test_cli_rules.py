"""The rules objects must satisfy, one refused object a line."""

from __future__ import annotations

from typing import Any

import pytest

from cymric.cli import checks, defaults
from cymric.cli.kinds import find
from cymric.cli.rules import Surroundings
from cymric.cli.schema import conform
from cymric.model.net import parse_network

NOWHERE = Surroundings(pools={}, blocks=(), filters=frozenset())
PEER = {"peerIP": "10.0.0.1", "asNumber": 64512}
POOL = {"cidr": "10.244.0.0/16"}
ENDPOINT = {"orchestrator": "k8s", "node": "n", "pod": "p", "endpoint": "eth0"}


def problems(
    kind_name: str,
    spec: dict[str, Any],
    name: str = "default",
    around: Surroundings = NOWHERE,
    **metadata: Any,
) -> str:
    """What is wrong with an object, a line each; empty if nothing."""
    kind = find(kind_name)
    if kind.name == "WorkloadEndpoint":
        name = defaults.workload_endpoint_name(spec)
    tree = defaults.empty_resource(kind.name, name, spec)
    tree["metadata"] |= metadata
    done = conform(tree, kind.fields)
    done.tree.setdefault("spec", {})
    defaults.fill(done.tree, None)
    filled = conform({"spec": {}, **done.tree}, kind.fields).tree
    filled.setdefault("spec", {})
    found = [*done.problems, *checks.check(kind, filled, None, around)]
    return "\n".join(map(str, found))


@pytest.mark.parametrize(
    ("kind", "spec", "name"),
    [
        ("IPPool", POOL, "p"),
        ("IPPool", {"cidr": "fd00::/48"}, "p"),
        ("IPPool", {**POOL, "ipipMode": "Always", "blockSize": 20}, "p"),
        ("IPPool", {"cidr": "10.0.0.0/27", "disabled": True}, "p"),
        ("IPPool", {**POOL, "allowedUses": ["LoadBalancer"]}, "p"),
        ("BGPPeer", PEER, "p"),
        ("BGPPeer", {"peerIP": "[fd00::1]:1179", "asNumber": 1, "node": "n"}, "p"),
        ("BGPPeer", {"peerSelector": "has(rr)", "nodeSelector": "all()"}, "p"),
        ("BGPConfiguration", {}, "default"),
        ("BGPConfiguration", {"listenPort": 1179}, "node.n"),
        ("FelixConfiguration", {}, "node.n"),
        ("FelixConfiguration", {"nodeSelector": "has(a)"}, "some"),
        ("FelixConfiguration", {"failsafeInboundHostPorts": []}, "default"),
        ("Node", {}, "node-1.example.org"),
        ("Node", {"bgp": {"ipv4Address": "10.0.0.1/24"}}, "n"),
        ("Node", {"bgp": {"routeReflectorClusterID": "244.0.0.1"}}, "n"),
        ("Profile", {"ingress": [{"action": "Deny", "protocol": "TCP"}]}, "Mixed.Case"),
        ("WorkloadEndpoint", ENDPOINT, ""),
        ("IPReservation", {"reservedCIDRs": ["10.0.0.1", "10.0.0.0/30"]}, "r"),
    ],
)  # fmt: skip
def test_accepted(kind: str, spec: dict[str, Any], name: str) -> None:
    """Objects that Calico accepts are accepted."""
    assert problems(kind, spec, name) == ""


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        ("IPPool", {}, "spec.cidr: is required"),
        ("IPPool", {"cidr": "10.0.0.0"}, "spec.cidr: '10.0.0.0' is no prefix"),
        ("IPPool", {"cidr": "10.0.0.1/16"}, "has host bits set"),
        ("IPPool", {"cidr": "FD00::/48"}, "must be written fd00::/48"),
        ("IPPool", {"cidr": "169.254.1.0/24"}, "overlaps the link local range"),
        ("IPPool", {"cidr": "169.0.0.0/8"}, "overlaps the link local range"),
        ("IPPool", {**POOL, "blockSize": 19}, "spec.blockSize: 19 is not between 20 and 32"),
        ("IPPool", {"cidr": "fd00::/48", "blockSize": 64}, "is not between 116 and 128"),
        ("IPPool", {"cidr": "10.0.0.0/27"}, "a /26 block is larger than the pool"),
        ("IPPool", {**POOL, "ipipMode": "Sometimes"}, "'Sometimes' is not Never, Always"),
        ("IPPool", {**POOL, "ipipMode": "Always", "vxlanMode": "Always"}, "not together with ipip"),
        ("IPPool", {"cidr": "fd00::/48", "ipipMode": "Always"}, "IPIP is for IPv4 only"),
        ("IPPool", {**POOL, "nodeSelector": "has("}, "spec.nodeSelector: selector 'has('"),
        ("IPPool", {**POOL, "allowedUses": ["Play"]}, "'Play' is not Workload"),
        ("IPPool", {**POOL, "allowedUses": ["LoadBalancer", "Tunnel"]}, "excludes other uses"),
        (
            "IPPool",
            {**POOL, "allowedUses": ["LoadBalancer"], "nodeSelector": "has(a)"},
            "must be all() for a LoadBalancer pool",
        ),
        (
            "IPPool",
            {**POOL, "allowedUses": ["LoadBalancer"], "disableBGPExport": True},
            "spec.disableBGPExport",
        ),
        (
            "IPPool",
            {**POOL, "allowedUses": ["Tunnel"], "namespaceSelector": "all()"},
            "a pool for tunnels has no namespaces",
        ),
        ("IPPool", {**POOL, "namespaceSelector": "!global( )"}, "global() is not allowed here"),
        ("IPPool", {**POOL, "assignmentMode": "Never"}, "'Never' is not Automatic, Manual"),
        ("BGPPeer", {}, "one of peerIP, peerSelector, localWorkloadSelector"),
        ("BGPPeer", {"peerIP": "10.0.0.1"}, "spec.asNumber: is required"),
        ("BGPPeer", {**PEER, "node": "n", "nodeSelector": "all()"}, "not together with nodeSelec"),
        ("BGPPeer", {**PEER, "peerSelector": "all()"}, "not together with peerSelector"),
        ("BGPPeer", {**PEER, "peerIP": "10.0.0.300"}, "10.0.0.300"),
        ("BGPPeer", {**PEER, "peerIP": "10.0.0.1:0"}, "no valid port"),
        ("BGPPeer", {**PEER, "keepOriginalNextHop": True, "nextHopMode": "Keep"}, "nextHopMode"),
        ("BGPPeer", {**PEER, "sourceAddress": "Any"}, "'Any' is not UseNodeIP, None"),
        ("BGPPeer", {**PEER, "ttlSecurity": 256}, "is not between 0 and 255"),
        ("BGPFilter", {"importV4": [{"action": "Maybe"}]}, "spec.importV4[0]: "),
        (
            "BGPFilter",
            {"exportV6": [{"cidr": "10.0.0.0/8", "matchOperator": "In", "action": "Accept"}]},
            "spec.exportV6[0]: cidr 10.0.0.0/8 is not IPv6",
        ),
        (
            "BGPFilter",
            {"exportV4": [{"action": "Accept"}, {"cidr": "10.0.0.0/8", "action": "Accept"}]},
            "spec.exportV4[1]: cidr and matchOperator belong together",
        ),
        ("BGPPeer", {**PEER, "filters": ["f"]}, "there is no BGPFilter 'f'"),
        ("BGPConfiguration", {"logSeverityScreen": "Loud"}, "'Loud' is not Debug"),
        ("BGPConfiguration", {"listenPort": 70000}, "listenPort 70000 is no TCP port"),
        ("BGPConfiguration", {"serviceClusterIPs": [{"cidr": "x"}]}, "spec.serviceClusterIPs"),
        (
            "BGPConfiguration",
            {"nodeToNodeMeshEnabled": False, "nodeMeshMaxRestartTime": "9s"},
            "not with the node to node mesh disabled",
        ),
        (
            "BGPConfiguration",
            {"communities": [{"name": "b", "value": "1:2"}]},
            "of no use without prefixAdvertisements",
        ),
        (
            "BGPConfiguration",
            {"prefixAdvertisements": [{"cidr": "10.0.0.0/8", "communities": ["b", "70000:1"]}]},
            "'b' is neither defined nor a community",
        ),
        ("FelixConfiguration", {"nodeSelector": "all()"}, "spec.nodeSelector: not allowed"),
        ("FelixConfiguration", {"routeRefreshInterval": "fast"}, "spec.routeRefreshInterval"),
        ("FelixConfiguration", {"failsafeInboundHostPorts": [{"port": 0}]}, "between 1 and 65535"),
        ("Node", {"bgp": {}}, "spec.bgp: is empty"),
        ("Node", {"bgp": {"ipv4Address": "fd00::1/64"}}, "is not IPv4"),
        ("Node", {"bgp": {"ipv4Address": "10.0.0.1/33"}}, "10.0.0.1/33"),
        ("Node", {"bgp": {"routeReflectorClusterID": "rr"}}, "'rr' is not like 244.0.0.1"),
        ("Profile", {"egress": [{"action": "allow"}]}, "spec.egress[0].action: 'allow' is not"),
        ("WorkloadEndpoint", {**ENDPOINT, "pod": ""}, "spec.pod: is required by orchestrator"),
        ("WorkloadEndpoint", {**ENDPOINT, "ipNetworks": ["10.0.0.0/24"]}, "not a single address"),
        (
            "WorkloadEndpoint",
            {**ENDPOINT, "ipNetworks": ["10.0.0.1/32"], "ipNATs": [{"internalIP": "10.0.0.2"}]},
            "spec.ipNATs[0].internalIP: is none of ipNetworks",
        ),
        ("WorkloadEndpoint", {**ENDPOINT, "interfaceName": "x" * 16}, "longer than 15"),
        ("IPReservation", {"reservedCIDRs": ["10.0.0.1/8"]}, "spec.reservedCIDRs"),
    ],
)
def test_refused(kind: str, spec: dict[str, Any], said: str) -> None:
    """Objects that break a rule are refused, by the field and in words."""
    assert said in problems(kind, spec)


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("Node", "Big", "'Big' is no name"),
        ("Node", "a" * 254, "is no name"),
        ("Node", "-a", "is no name"),
        ("BGPConfiguration", "other", "must be default or node.<node name>"),
        ("FelixConfiguration", "other", "no nodeSelector"),
        ("ClusterInformation", "other", "is called default"),
        ("Profile", "projectcalico-default-allow", "built in"),
    ],
)
def test_refused_names(kind: str, name: str, said: str) -> None:
    """Names follow the rules of their kind."""
    assert said in problems(kind, {}, name)


@pytest.mark.parametrize("field", ["asNumber", "nodeToNodeMeshEnabled", "serviceClusterIPs"])
def test_cluster_settings_are_not_for_one_node(field: str) -> None:
    """What only the cluster can have cannot be set in a node's BGPConfiguration."""
    values: dict[str, Any] = {
        "asNumber": 1,
        "nodeToNodeMeshEnabled": True,
        "serviceClusterIPs": [{"cidr": "10.0.0.0/8"}],
    }
    said = problems("BGPConfiguration", {field: values[field]}, "node.n")
    assert f"spec.{field}: can be set on the BGPConfiguration default only" in said


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"labels": {"a b": "c"}}, "'a b' is no label name"),
        ({"labels": {"Exa_mple/a": "c"}}, "is no label name"),
        ({"labels": {"a": "b c"}}, "'b c' is no value"),
        ({"labels": {"a": "x" * 64}}, "is no value"),
        ({"annotations": {"a": "x" * 262144}}, "more than 262144 bytes"),
        ({"namespace": "x"}, "Node objects have no namespace"),
    ],
)
def test_refused_metadata(metadata: dict[str, Any], said: str) -> None:
    """Labels and annotations satisfy Kubernetes' rules; cluster objects have no namespace."""
    assert said in problems("Node", {}, **metadata)
    assert not problems("Node", {}, labels={"example.org/a": "", "b": "X_1"})


def test_a_new_pool_looks_around() -> None:
    """A new pool is compared with the other pools and with existing blocks, by family."""
    around = Surroundings(
        pools={"six": parse_network("fd00::/16"), "four": parse_network("10.0.0.0/8")},
        blocks=(parse_network("192.168.0.0/28"),),
        filters=frozenset(),
    )
    assert "overlaps IPPool four" in problems("IPPool", POOL, around=around)
    assert not problems("IPPool", {"cidr": "172.16.0.0/16"}, around=around)
    assert "another size" in problems("IPPool", {"cidr": "192.168.0.0/16"}, around=around)
    sized = {"cidr": "192.168.0.0/16", "blockSize": 28}
    assert not problems("IPPool", sized, around=around)


def test_encapsulation_is_warned_of() -> None:
    """A pool that asks for encapsulation is legal, and told not to be honoured."""
    tree = defaults.empty_resource("IPPool", "p", {**POOL, "vxlanMode": "Always"})
    defaults.fill(tree, None)
    assert "does not do" in checks.warnings(tree)[0]
    tree["spec"]["vxlanMode"] = "Never"
    assert checks.warnings(tree) == []
