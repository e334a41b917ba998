"""Clusters and packets for hypothesis: few names, labels and addresses, so that they meet often."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from cymric.model.net import parse_address
from felix.calc.verdict import Packet
from tests.support.felix_policy import Spec, Stored, hep, wep

ADDRESSES_V4 = ["198.19.16.1", "198.19.16.2", "198.19.17.1", "198.19.0.1", "10.0.0.1", "8.8.8.8"]
ADDRESSES_V6 = ["fd00::1", "fd00::2", "fd00:1::1", "2001:db8::1"]
NETS = [
    *ADDRESSES_V4[:3], "198.19.16.0/24", "198.19.0.0/16", "0.0.0.0/0", "fd00::/64", "::/0",
    "fd00::1",
]  # fmt: skip
PORTS = [53, 80, 8080]
PORT_NAMES = ["http", "dns"]

_LABELS = st.dictionaries(
    st.sampled_from(["app", "role", "pcns.env"]), st.sampled_from(["a", "b"]), max_size=2
)
_HANDED_DOWN = st.dictionaries(
    st.sampled_from(["app", "role", "pcns.env", "pcsa.team"]),
    st.sampled_from(["a", "b"]),
    max_size=3,
)
_PLAIN = st.sampled_from(
    [
        "app == 'a'",
        "app != 'a'",
        "app in {'a', 'b'}",
        "app not in {'b'}",
        "role starts with 'a'",
        "has(role)",
        "!has(role)",
        "all()",
        "!all()",
        "global()",
        "projectcalico.org/namespace == 'prod'",
        "has(projectcalico.org/serviceaccount)",
        "app == 'a' && has(role)",
        "app == 'b' || role == 'a'",
        "!(app == 'a' && !all())",
    ]
)
SELECTORS = st.one_of(st.just(""), st.just("app == 'a'"), _PLAIN)
PARENT_SELECTORS = st.sampled_from(
    [
        "",
        "",
        "",
        "env == 'a'",
        "env != 'a'",
        "all()",
        "global()",
        "team == 'a'",
        "!all()",
        "has(env)",
    ]
)


def _maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | st.none() | strategy


@st.composite
def _endpoint_ports(draw: st.DrawFn) -> list[Spec]:
    return draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "name": st.sampled_from(PORT_NAMES),
                    "protocol": st.sampled_from(["TCP", "UDP", 6]),
                    "port": st.sampled_from(PORTS),
                }
            ),
            max_size=2,
        )
    )


@st.composite
def entities(draw: st.DrawFn, *, numeric: bool) -> Spec:
    """One side of a rule."""
    ports = st.sampled_from(["http", "dns"] + ([80, "50:100", 8080] if numeric else []))
    side: Spec = {
        "nets": draw(_maybe(st.lists(st.sampled_from(NETS), max_size=2))),
        "notNets": draw(_maybe(st.lists(st.sampled_from(NETS[:-3]), max_size=2))),
        "selector": draw(SELECTORS),
        "notSelector": draw(st.just("") | SELECTORS),
        "namespaceSelector": draw(PARENT_SELECTORS),
        "ports": draw(_maybe(st.lists(ports, max_size=2))),
        "notPorts": draw(_maybe(st.lists(ports, max_size=2))),
        "serviceAccounts": draw(
            _maybe(
                st.fixed_dictionaries(
                    {
                        "names": st.lists(st.sampled_from(["sa1", "sa2"]), max_size=1),
                        "selector": PARENT_SELECTORS,
                    }
                )
            )
        ),
    }
    return {name: value for name, value in side.items() if value}


@st.composite
def rules(draw: st.DrawFn) -> Spec:
    """One rule."""
    protocol = draw(
        st.sampled_from([None, None, "TCP", "TCP", "UDP", 6, 17, "ICMP", "ICMPv6", "SCTP", 47])
    )
    has_ports = protocol in ("TCP", "UDP", 6, 17, "SCTP")
    rule: Spec = {
        "action": draw(st.sampled_from(["Allow", "Allow", "Deny", "Pass", "Log"])),
        "protocol": protocol,
        "notProtocol": draw(_maybe(st.sampled_from(["TCP", 17]))),
        "source": draw(st.just({}) | entities(numeric=has_ports)),
        "destination": draw(st.just({}) | entities(numeric=has_ports)),
    }
    family = {"ICMP": 4, "ICMPv6": 6}.get(str(protocol))
    rule["ipVersion"] = draw(_maybe(st.just(family) if family else st.sampled_from([4, 6])))
    if family:
        match = st.sampled_from([{"type": 8}, {"type": 128}, {"type": 3, "code": 4}])
        rule["icmp"], rule["notICMP"] = draw(_maybe(match)), draw(_maybe(match))
    if draw(st.integers(0, 19)) == 0:
        rule["http"] = {"methods": ["GET"]}
    if draw(st.integers(0, 19)) == 0:
        rule["source"] = {"services": {"name": "s", "namespace": "prod"}}
    return {name: value for name, value in rule.items() if value is not None}


_RULES = st.lists(rules(), max_size=3)
_TYPES = st.sampled_from([[], ["Ingress"], ["Egress"], ["Ingress", "Egress"]])


@st.composite
def policies(draw: st.DrawFn, *, is_global: bool) -> Spec:
    """A policy."""
    spec: Spec = {
        "tier": draw(st.sampled_from(["", "default", "security", "gone"])),
        "order": draw(st.sampled_from([None, 1, 2.5])),
        "ingress": draw(_RULES),
        "egress": draw(_RULES),
        "selector": draw(SELECTORS),
        "types": draw(_TYPES),
        "serviceAccountSelector": draw(PARENT_SELECTORS),
    }
    if is_global:
        spec["namespaceSelector"] = draw(PARENT_SELECTORS)
        spec |= draw(
            st.sampled_from(
                [
                    {},
                    {},
                    {"applyOnForward": True},
                    {"applyOnForward": True, "doNotTrack": True},
                    {"applyOnForward": True, "preDNAT": True},
                ]
            )
        )
    return spec


_PROFILES = st.lists(
    st.sampled_from(["kns.prod", "kns.test", "extra", "none", "projectcalico-default-allow"]),
    max_size=3,
    unique=True,
)


@st.composite
def workloads(draw: st.DrawFn, pod: str, node: str) -> Spec:
    """A workload endpoint."""
    networks = [
        *(f"{one}/32" for one in draw(st.lists(st.sampled_from(ADDRESSES_V4[:3]), max_size=2))),
        *(f"{one}/128" for one in draw(st.lists(st.sampled_from(ADDRESSES_V6[:3]), max_size=1))),
    ]
    return wep(
        pod,
        node=node,
        ipNetworks=networks,
        profiles=draw(_PROFILES),
        labels=draw(_LABELS),
        serviceAccountName=draw(st.sampled_from(["", "sa1", "sa2"])),
        ports=draw(_endpoint_ports()),
    )


@st.composite
def hosts(draw: st.DrawFn, node: str, interface: str) -> Spec:
    """A host endpoint."""
    return hep(
        node=node,
        interfaceName=interface,
        expectedIPs=draw(st.lists(st.sampled_from(["198.19.0.1", "fd00:1::1"]), max_size=2)),
        profiles=draw(_PROFILES),
        labels=draw(_LABELS),
        ports=draw(_endpoint_ports()),
    )


_PROFILE = st.fixed_dictionaries(
    {"ingress": _RULES, "egress": _RULES, "labelsToApply": _HANDED_DOWN}
)
_TIER = st.fixed_dictionaries(
    {"order": st.sampled_from([None, 1, 2]), "defaultAction": st.sampled_from(["Deny", "Pass"])}
)
_NET_SET = st.fixed_dictionaries(
    {"nets": st.lists(st.sampled_from(NETS), max_size=3), "labels": _LABELS}
)

OBJECTS: dict[str, st.SearchStrategy[Spec]] = {
    "WorkloadEndpoint prod/node1-k8s-a-eth0": workloads("a", "node1"),
    "WorkloadEndpoint test/node1-k8s-b-eth0": workloads("b", "node1"),
    "WorkloadEndpoint prod/node2-k8s-c-eth0": workloads("c", "node2"),
    "HostEndpoint here": hosts("node1", "eth0"),
    "HostEndpoint there": hosts("node2", "eth0"),
    "HostEndpoint all": hosts("node1", "*"),
    "NetworkSet prod/nets": _NET_SET,
    "GlobalNetworkSet nets": _NET_SET,
    "Profile kns.prod": _PROFILE,
    "Profile kns.test": _PROFILE,
    "Profile extra": _PROFILE,
    "Tier default": _TIER,
    "Tier security": _TIER,
    "NetworkPolicy prod/one": policies(is_global=False),
    "NetworkPolicy prod/two": policies(is_global=False),
    "NetworkPolicy test/one": policies(is_global=False),
    "GlobalNetworkPolicy one": policies(is_global=True),
    "GlobalNetworkPolicy two": policies(is_global=True),
    "GlobalNetworkPolicy three": policies(is_global=True),
}
"""One strategy for each object that there may be."""


@st.composite
def clusters(draw: st.DrawFn) -> Stored:
    """What may be stored."""
    names = draw(st.sets(st.sampled_from(sorted(OBJECTS)), min_size=4))
    return {name: draw(OBJECTS[name]) for name in sorted(names)}


@st.composite
def packets(draw: st.DrawFn) -> Packet:
    """The first packet of some connection."""
    pool = draw(st.sampled_from([ADDRESSES_V4, ADDRESSES_V4, ADDRESSES_V6]))
    protocol = draw(st.sampled_from([6, 6, 17, 1, 58, 132, 47]))
    has_ports, is_icmp = protocol in (6, 17, 132), protocol in (1, 58)
    port = st.sampled_from(PORTS) if has_ports else st.just(0)
    return Packet(
        source=parse_address(draw(st.sampled_from(pool))),
        destination=parse_address(draw(st.sampled_from(pool))),
        protocol=protocol,
        source_port=draw(port),
        destination_port=draw(port),
        icmp_type=draw(st.sampled_from([8, 128, 3])) if is_icmp else 0,
        icmp_code=draw(st.sampled_from([0, 4])) if is_icmp else 0,
    )
