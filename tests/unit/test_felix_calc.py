"""What felix wants, worked out from what is stored."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cymric.model import codec
from cymric.model.keys import Key, ResourceKey
from felix.calc.config import FelixConfig
from felix.calc.parameters import parse_duration
from felix.calc.sources import from_environment, from_object, settle
from felix.calc.state import Calculation
from felix.calc.values import Desired, PolicyRule, ProfileRules, Verdict

NODE = "node1"
Stored = dict[str, dict[str, Any]]
"""JSON trees by `Kind [namespace/]name`."""


def wep(pod: str, *, interface: str = "", node: str = NODE, **spec: Any) -> dict[str, Any]:
    """The spec of a WorkloadEndpoint."""
    return {
        "orchestrator": "k8s",
        "node": node,
        "pod": pod,
        "endpoint": "eth0",
        "ipNetworks": ["198.19.16.2/32"],
        "profiles": ["projectcalico-default-allow"],
        "interfaceName": interface or f"cali{pod}",
        "mac": "02:00:00:00:00:01",
        **spec,
    }


def pool(cidr: str, **spec: Any) -> dict[str, Any]:
    """The spec of an IPPool."""
    return {"cidr": cidr, "blockSize": 26, **spec}


def update(name: str, spec: dict[str, Any]) -> tuple[Key, object]:
    """The typed pair behind `Kind [namespace/]name`."""
    kind, _, full = name.partition(" ")
    namespace, _, short = full.rpartition("/")
    key = ResourceKey(kind, short, namespace)
    metadata = {"name": short, "namespace": namespace}
    tree = {"kind": kind, "apiVersion": "projectcalico.org/v3", "metadata": metadata, "spec": spec}
    decoded = codec.decode(str(key), json.dumps(tree).encode())
    assert decoded is not None
    return decoded


def calculate(stored: Stored, **environment: str) -> Desired:
    """What is wanted when exactly this is stored."""
    calculation = Calculation(NODE, environment)
    for name, spec in stored.items():
        calculation.on_update(*update(name, spec))
    return calculation.desired()


def texts(networks: Iterable[object]) -> set[str]:
    """Networks as they are written."""
    return set(map(str, networks))


def test_local_endpoints_only() -> None:
    """Endpoints of other nodes are counted, not enforced."""
    desired = calculate(
        {
            "WorkloadEndpoint default/node1-k8s-a-eth0": wep("a"),
            "WorkloadEndpoint default/node2-k8s-b-eth0": wep("b", node="node2"),
        }
    )
    (endpoint,) = desired.endpoints
    assert str(endpoint.id) == "k8s/default/a/eth0"
    assert endpoint.interface == "calia"
    assert [str(address) for address in endpoint.addresses] == ["198.19.16.2"]
    assert desired.count_by_kind["WorkloadEndpoint"] == 2
    assert desired.problems == ()


def test_of_two_endpoints_on_one_interface_the_first_id_counts() -> None:
    """And the other is named."""
    desired = calculate(
        {
            "WorkloadEndpoint default/node1-k8s-b-eth0": wep("b", interface="cali1"),
            "WorkloadEndpoint default/node1-k8s-a-eth0": wep("a", interface="cali1"),
        }
    )
    assert [str(one.id) for one in desired.endpoints] == ["k8s/default/a/eth0"]
    (problem,) = desired.problems
    assert problem.subject == "WorkloadEndpoint k8s/default/b/eth0"
    assert "already belongs to k8s/default/a/eth0" in problem.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ipNetworks": []}, "no address"),
        ({"interfaceName": ""}, "no usable interface name"),
        ({"interfaceName": "cali x"}, "no usable interface name"),
        ({"interfaceName": "eth0"}, "no workload prefix"),
        ({"mac": "nonsense"}, "no usable MAC"),
        ({"profiles": ['x" -j ACCEPT']}, "impossible profile"),
    ],
)
def test_unusable_endpoints_are_left_out_and_named(change: dict[str, Any], reason: str) -> None:
    """Nothing that could break a rule's text gets past the calculation."""
    spec = {**wep("a"), **change}
    desired = calculate({"WorkloadEndpoint default/node1-k8s-a-eth0": spec})
    assert desired.endpoints == ()
    assert reason in desired.problems[0].reason


def test_pools_and_hosts() -> None:
    """All pools but those for load balancers; those with natOutgoing; every node's addresses."""
    desired = calculate(
        {
            "IPPool one": pool("198.19.16.0/21", natOutgoing=True),
            "IPPool two": pool("198.19.24.0/21", disabled=True),
            "IPPool lb": pool("198.19.48.0/24", allowedUses=["LoadBalancer"]),
            "IPPool six": {"cidr": "fd00::/48", "blockSize": 122, "natOutgoing": True},
            "Node node1": {"bgp": {"ipv4Address": "198.19.0.2/20", "ipv6Address": "fd00::2/64"}},
            "Node node2": {},
        },
        FELIX_EXTERNALNODESLIST="192.0.2.0/24",
    )
    assert texts(desired.pools) == {"198.19.16.0/21", "198.19.24.0/21", "fd00::/48"}
    assert texts(desired.masquerade_pools) == {"198.19.16.0/21", "fd00::/48"}
    assert texts(desired.hosts) == {"198.19.0.2/32", "fd00::2/128", "192.0.2.0/24"}


def profile(ingress: list[Any], egress: list[Any] | None = None) -> tuple[ProfileRules, Desired]:
    """What a profile that a pod names becomes."""
    desired = calculate(
        {
            "WorkloadEndpoint default/node1-k8s-a-eth0": wep("a", profiles=["kns.x"]),
            "Profile kns.x": {"ingress": ingress, "egress": egress or []},
        }
    )
    return desired.profiles["kns.x"], desired


def test_profile_rules_without_matches_are_verdicts() -> None:
    """An empty action allows; a rule may be for one family; empty match fields match all."""
    rules, desired = profile(
        [{"action": "Log"}, {"action": "Pass"}, {"action": "Deny", "ipVersion": 6}, {"action": ""}],
        [{"action": "Deny", "source": {}, "ipVersion": 4}],
    )
    assert rules.inbound == (
        PolicyRule(Verdict.LOG),
        PolicyRule(Verdict.PASS),
        PolicyRule(Verdict.DENY, 6),
        PolicyRule(Verdict.ALLOW),
    )
    assert rules.outbound == (PolicyRule(Verdict.DENY, 4),)
    assert desired.problems == ()


def test_missing_profile_drops_and_default_allow_is_built_in() -> None:
    """A profile that does not exist allows nothing."""
    desired = calculate(
        {
            "WorkloadEndpoint default/node1-k8s-a-eth0": wep(
                "a", profiles=["projectcalico-default-allow", "kns.none"]
            )
        }
    )
    assert desired.profiles["kns.none"].inbound is None
    assert desired.profiles["projectcalico-default-allow"].outbound == (PolicyRule(Verdict.ALLOW),)
    assert [problem.subject for problem in desired.problems] == ["Profile kns.none"]


@pytest.mark.parametrize(("ready", "expected"), [(True, True), (False, False), (None, True)])
def test_datastore_ready(ready: bool | None, expected: bool) -> None:
    """Only an explicit false locks."""
    spec = {} if ready is None else {"datastoreReady": ready}
    assert calculate({"ClusterInformation default": spec}).is_ready is expected
    assert calculate({}).is_ready


def test_service_ranges() -> None:
    """The service ranges of BGPConfiguration default, sorted."""
    spec = {
        "serviceClusterIPs": [{"cidr": "198.19.32.0/20"}, {"cidr": "fd00::/108"}],
        "serviceExternalIPs": [{"cidr": "198.19.48.0/20"}],
        "serviceLoadBalancerIPs": [{"cidr": "192.0.2.0/24"}],
    }
    desired = calculate({"BGPConfiguration default": spec})
    assert list(map(str, desired.service_cidrs)) == [
        "192.0.2.0/24",
        "198.19.32.0/20",
        "198.19.48.0/20",
        "fd00::/108",
    ]


def test_unchanged_state_is_the_same_picture() -> None:
    """Updates that change nothing, or concern nobody here, cost nothing downstream."""
    calculation = Calculation(NODE, {})
    name = "WorkloadEndpoint default/node1-k8s-a-eth0"
    calculation.on_update(*update(name, wep("a")))
    before = calculation.desired()
    calculation.on_update(*update(name, wep("a")))
    other = "WorkloadEndpoint default/node2-k8s-b-eth0"
    calculation.on_update(*update(other, wep("b", node="node2")))
    assert calculation.desired() is before


def test_endpoint_that_moves_to_another_node_goes() -> None:
    """The same key with another node is no longer ours."""
    calculation = Calculation(NODE, {})
    name = "WorkloadEndpoint default/node1-k8s-a-eth0"
    key, value = update(name, wep("a"))
    calculation.on_update(key, value)
    assert calculation.desired().endpoints
    calculation.on_update(key, None)
    assert calculation.desired().endpoints == ()


SCENARIO: Stored = {
    "WorkloadEndpoint default/node1-k8s-a-eth0": wep("a", profiles=["kns.x"]),
    "WorkloadEndpoint default/node1-k8s-b-eth0": wep("b", interface="calia"),
    "WorkloadEndpoint default/node1-k8s-c-eth0": wep("c"),
    "Profile kns.x": {"ingress": [{"action": "Allow"}]},
    "IPPool one": pool("198.19.16.0/21", natOutgoing=True),
    "Node node1": {"bgp": {"ipv4Address": "198.19.0.2/20"}},
    "FelixConfiguration default": {"defaultEndpointToHostAction": "Accept"},
    "NetworkPolicy default/one": {},
}


@settings(deadline=None)
@given(st.permutations(sorted(SCENARIO)), st.sets(st.sampled_from(sorted(SCENARIO))))
def test_order_and_repetition_never_matter(order: list[str], flapping: set[str]) -> None:
    """Any order, with objects that come, go and come again, ends in the same picture."""
    calculation = Calculation(NODE, {})
    for name in order:
        key, value = update(name, SCENARIO[name])
        calculation.on_update(key, value)
        if name in flapping:
            calculation.desired()
            calculation.on_update(key, None)
            calculation.desired()
            calculation.on_update(key, value)
    assert calculation.desired() == calculate(SCENARIO)


def test_config_precedence() -> None:
    """Environment before this node's object before the cluster's before the default."""
    stored: Stored = {
        "FelixConfiguration default": {
            "chainInsertMode": "Append",
            "defaultEndpointToHostAction": "Accept",
            "vxlanPort": 4790,
        },
        "FelixConfiguration node.node1": {
            "defaultEndpointToHostAction": "Return",
            "vxlanPort": 4791,
        },
        "FelixConfiguration node.node2": {"vxlanPort": 1},
    }
    config = calculate(stored, FELIX_vxlanport="4792").config
    assert config.vxlan_port == 4792
    assert config.default_endpoint_to_host_action == "return"
    assert config.chain_insert_mode == "append"
    assert config.max_ipset_size == 1048576


def test_unreadable_parameters_are_reported_and_the_next_source_counts() -> None:
    """A typing error never stops a node; a selector that cannot be read selects nobody."""
    desired = calculate(
        {
            "FelixConfiguration default": {"vxlanPort": 4790},
            "FelixConfiguration node.node1": {"vxlanPort": 99999, "unknownField": 1},
            "FelixConfiguration rack": {"nodeSelector": "rack ==", "vxlanPort": 1},
        }
    )
    assert desired.config.vxlan_port == 4790
    assert [problem.subject for problem in desired.problems] == [
        "FelixConfiguration node.node1 vxlanPort",
        "FelixConfiguration rack",
    ]
    assert [(note.subject, note.reason) for note in desired.notes] == [
        ("FelixConfiguration node.node1 unknownField", "no parameter of that name is known")
    ]


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("interfacePrefix", "cali,tap", "interface_prefixes", ("cali", "tap")),
        ("iptablesBackend", "NFT", "iptables_backend", "nft"),
        ("iptablesRefreshInterval", "3m0s", "iptables_refresh_interval_s", 180.0),
        ("iptablesRefreshInterval", "none", "iptables_refresh_interval_s", 0.0),
        ("iptablesPostWriteCheckIntervalSecs", "7", "iptables_post_write_check_interval_s", 7.0),
        ("iptablesMarkMask", 4278190080, "iptables_mark_mask", 0xFF000000),
        ("iptablesMarkMask", "0xff00", "iptables_mark_mask", 0xFF00),
        ("natPortRange", "32768:65535", "nat_port_range", "32768-65535"),
        ("natOutgoingAddress", "192.0.2.1", "nat_outgoing_address", "192.0.2.1"),
        ("natOutgoingExclusions", "IPPoolsAndHostIPs", "nat_outgoing_exclusions",
         "ippoolsandhostips"),
        ("externalNodesList", ["192.0.2.1", "fd00::1"], "external_nodes",
         ("192.0.2.1/32", "fd00::1/128")),
        ("disableConntrackInvalidCheck", True, "disable_conntrack_invalid_check", True),
        ("deviceRouteProtocol", 80, "device_route_protocol", 80),
        ("interfaceExclude", "/^kube/,docker0", "interface_exclude", ("/^kube/", "docker0")),
        ("interfaceExclude", "none", "interface_exclude", ()),
        ("featureDetectOverride", "MASQFullyRandom=false", "feature_overrides",
         (("MASQFullyRandom", False),)),
        ("iptablesFilterDenyAction", "Reject", "filter_deny_action", "reject"),
        ("iptablesMangleAllowAction", "Return", "mangle_allow_action", "return"),
        ("deviceRouteSourceAddressIPv6", "fd00::1", "device_route_source_ipv6", "fd00::1"),
        ("logActionRateLimit", "10/minute", "log_rate_limit", "10/minute"),
        ("logSeverityScreen", "Fatal", "log_severity", "error"),
        ("logAction", "NFLOG:7", "log_action", "nflog:7"),
        ("reportingInterval", "0s", "reporting_interval_s", 0.0),
        ("ReportingTTLSecs", "120", "reporting_ttl_s", 120.0),
    ],
)  # fmt: skip
def test_parameters(name: str, value: object, field: str, expected: object) -> None:
    """Each parameter is read from its JSON form."""
    config, rejected = settle([from_object("default", {name: value}, {})])
    assert getattr(config, field) == expected
    assert rejected == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("interfacePrefix", "cali tap"),
        ("interfacePrefix", ","),
        ("natPortRange", "9:1"),
        ("natOutgoingAddress", "here"),
        ("iptablesNATOutgoingInterfaceFilter", "eth0 -j ACCEPT"),
        ("iptablesMarkMask", "0x7"),
        ("chainInsertMode", "prepend"),
        ("iptablesRefreshInterval", "soon"),
        ("iptablesRefreshInterval", "-1"),
        ("disableConntrackInvalidCheck", "perhaps"),
        ("interfaceExclude", "/(/"),
        ("deviceRouteSourceAddress", "fd00::1"),
        ("logAction", "mail:root"),
        ("logActionRateLimit", "10 -j ACCEPT"),
        ("openstackRegion", "a/b"),
    ],
)
def test_bad_parameters(name: str, value: str) -> None:
    """What could harm, or means nothing, is refused and the default stands."""
    config, rejected = settle([from_object("default", {name: value}, {})])
    assert config == FelixConfig()
    assert rejected[0][0] == f"FelixConfiguration default {name}"


def test_annotation_forces_a_parameter() -> None:
    """As Calico allows for parameters without a field."""
    source = from_object("default", {}, {"config.projectcalico.org/VXLANPort": "4790"})
    assert settle([source])[0].vxlan_port == 4790


def test_environment_ignores_case_and_other_programs() -> None:
    """Only FELIX_ variables count."""
    source = from_environment({"Felix_ChainInsertMode": "append", "OTHER_VXLANPORT": "1"})
    assert settle([source])[0] == FelixConfig(chain_insert_mode="append")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("1m30s", 90.0), ("500ms", 0.5), ("1h", 3600.0), ("0", 0.0)]
)
def test_durations(text: str, seconds: float) -> None:
    """Go's text, or plain seconds."""
    assert parse_duration(text) == seconds


def test_families_in_use() -> None:
    """Addresses of a family that is off, or that the kernel does not know, are left out."""
    name = "WorkloadEndpoint default/node1-k8s-a-eth0"
    both, only_ipv6 = ["198.19.16.2/32", "fd00::2/128"], ["fd00::2/128"]

    def addresses(networks: list[str], *, has_ipv6: bool = True, **environment: str) -> list[str]:
        calculation = Calculation(NODE, environment, has_ipv6=has_ipv6)
        calculation.on_update(*update(name, wep("a", ipNetworks=networks)))
        desired = calculation.desired()
        if not desired.endpoints:
            return [problem.reason for problem in desired.problems]
        return list(map(str, desired.endpoints[0].addresses))

    assert addresses(both) == ["198.19.16.2", "fd00::2"]
    assert addresses(only_ipv6) == ["fd00::2"]
    assert addresses(both, FELIX_IPV6SUPPORT="false") == ["198.19.16.2"]
    assert addresses(both, has_ipv6=False) == ["198.19.16.2"]
    assert addresses(only_ipv6, has_ipv6=False) == ["has no IPv4 address: ignored"]


def test_floating_and_spoofable_only_where_they_are_switched_on() -> None:
    """Both are off by default; a change of the parameter reaches endpoints that are there."""
    special = wep(
        "a",
        ipNATs=[
            {"internalIP": "198.19.16.2", "externalIP": "192.0.2.7"},
            {"internalIP": "198.19.16.9", "externalIP": "192.0.2.8"},
        ],
        allowSpoofedSourcePrefixes=["198.19.64.0/24"],
    )
    calculation = Calculation(NODE, {})
    calculation.on_update(*update("WorkloadEndpoint default/node1-k8s-a-eth0", special))
    (plain,) = calculation.desired().endpoints
    assert (plain.floating, plain.spoofable) == ((), ())
    allow = {"floatingIPs": "Enabled", "workloadSourceSpoofing": "Any"}
    calculation.on_update(*update("FelixConfiguration default", allow))
    (one,) = calculation.desired().endpoints
    assert [str(pair.external) for pair in one.floating] == ["192.0.2.7"], (
        "internal must be its own"
    )
    assert [str(address) for address in one.routed] == ["198.19.16.2", "192.0.2.7"]
    assert texts(one.spoofable) == {"198.19.64.0/24"}
