"""Clusters and packets by chance: few names, labels and addresses, so that they meet often.

Each object is made from a seed and its own name, so that leaving others out does not change it: a
property that fails shrinks to the objects that matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import TypeVar

from cymric.model.net import parse_address
from felix.calc.verdict import Packet
from tests.support.felix_policy import Spec, Stored, hep, wep

ADDRESSES_V4 = ["198.19.16.1", "198.19.16.2", "198.19.17.1", "198.19.0.1", "10.0.0.1", "8.8.8.8"]
ADDRESSES_V6 = ["fd00::1", "fd00::2", "fd00:1::1", "2001:db8::1"]
NETS = [
    *ADDRESSES_V4[:3], "198.19.16.0/24", "198.19.0.0/16", "0.0.0.0/0", "fd00::/64", "::/0",
    "fd00::1",
]  # fmt: skip
PORTS = [53, 80]
PORT_NAMES = ["http", "dns"]

T = TypeVar("T")

_PLAIN = [
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
_PARENT = [
    "env == 'a'", "env != 'a'", "all()", "global()", "team == 'a'", "!all()", "has(env)",
]  # fmt: skip
_ICMP: list[Spec] = [{"type": 8}, {"type": 128}, {"type": 3, "code": 4}]
_CLASSES: list[Spec] = [
    {},
    {},
    {"applyOnForward": True},
    {"applyOnForward": True, "doNotTrack": True},
    {"applyOnForward": True, "preDNAT": True},
]
_PROFILE_NAMES = ["kns.prod", "kns.test", "extra", "none", "projectcalico-default-allow"]


class Maker:
    """Makes the parts of one object."""

    def __init__(self, seed: object) -> None:
        self._chance = Random(str(seed))

    def _one(self, choices: Sequence[T]) -> T:
        return self._chance.choice(choices)

    def _some(self, choices: Sequence[T], most: int) -> list[T]:
        return [self._one(choices) for _ in range(self._chance.randint(0, most))]

    def _is_rare(self, part: float = 0.2) -> bool:
        # Rules with a match for everything meet no packet: most matches are left out.
        return self._chance.random() < part

    def _selector(self) -> str:
        return self._one(_PLAIN) if self._is_rare(0.35) else ""

    def _parent_selector(self) -> str:
        return self._one(_PARENT) if self._is_rare() else ""

    def _labels(self, *more: str) -> dict[str, str]:
        names = self._some(["app", "role", "pcns.env", *more], 3)
        return {name: self._one(["a", "b"]) for name in names}

    def _profiles(self) -> list[str]:
        return list(dict.fromkeys(self._some(_PROFILE_NAMES, 3)))

    def _endpoint_ports(self) -> list[Spec]:
        return [
            {
                "name": self._one(PORT_NAMES),
                "protocol": self._one(["TCP", "TCP", "UDP", 6]),
                "port": self._one(PORTS),
            }
            for _ in range(self._chance.randint(0, 3))
        ]

    def workload(self, pod: str, node: str) -> Spec:
        """A workload endpoint."""
        networks = [
            *(f"{one}/32" for one in self._some(ADDRESSES_V4[:3], 2)),
            *(f"{one}/128" for one in self._some(ADDRESSES_V6[:3], 1)),
        ]
        return wep(
            pod,
            node=node,
            ipNetworks=networks,
            profiles=self._profiles(),
            labels=self._labels(),
            serviceAccountName=self._one(["", "sa1", "sa2"]),
            ports=self._endpoint_ports(),
        )

    def host(self, node: str, interface: str) -> Spec:
        """A host endpoint."""
        return hep(
            node=node,
            interfaceName=interface,
            expectedIPs=self._some(["198.19.0.1", "fd00:1::1"], 2),
            profiles=self._profiles(),
            labels=self._labels(),
            ports=self._endpoint_ports(),
        )

    def networks(self) -> Spec:
        """A set of networks."""
        return {"nets": self._some(NETS, 3), "labels": self._labels()}

    def tier(self) -> Spec:
        """A tier."""
        return {"order": self._one([None, 1, 2]), "defaultAction": self._one(["Deny", "Pass"])}

    def profile(self) -> Spec:
        """A profile."""
        labels = self._labels("pcsa.team")
        return {"ingress": self._rules(), "egress": self._rules(), "labelsToApply": labels}

    def policy(self, *, is_global: bool) -> Spec:
        """A policy."""
        spec: Spec = {
            "tier": self._one(["", "default", "security", "security", "gone"]),
            "order": self._one([None, 1, 2.5]),
            "ingress": self._rules(),
            "egress": self._rules(),
            "selector": self._selector(),
            "types": self._one([[], ["Ingress"], ["Egress"], ["Ingress", "Egress"]]),
            "serviceAccountSelector": self._parent_selector(),
        }
        if is_global:
            spec["namespaceSelector"] = self._parent_selector()
            spec |= self._one(_CLASSES)
        return spec

    def _rules(self) -> list[Spec]:
        return [self._rule() for _ in range(self._chance.randint(0, 3))]

    def _rule(self) -> Spec:
        protocol = self._one(
            [*[None] * 8, *["TCP"] * 5, "UDP", 6, 17, "ICMP", "ICMPv6", "SCTP", 47]
        )
        has_ports = protocol in ("TCP", "UDP", 6, 17, "SCTP")
        family = {"ICMP": 4, "ICMPv6": 6}.get(str(protocol))
        rule: Spec = {
            "action": self._one(["Allow", "Allow", "Deny", "Pass", "Log"]),
            "protocol": protocol,
            "notProtocol": self._one(["TCP", 17]) if self._is_rare(0.1) else None,
            "ipVersion": (family or self._one([4, 6])) if self._is_rare(0.1) else None,
            "source": self._side(has_ports),
            "destination": self._side(has_ports),
        }
        if family:
            rule["icmp"] = self._one(_ICMP) if self._is_rare(0.5) else None
            rule["notICMP"] = self._one(_ICMP) if self._is_rare() else None
        if self._is_rare(0.03):
            rule["http"] = {"methods": ["GET"]}
        if self._is_rare(0.03):
            rule["source"] = {"services": {"name": "s", "namespace": "prod"}}
        return {name: value for name, value in rule.items() if value is not None}

    def _side(self, has_ports: bool) -> Spec:
        if self._is_rare(0.4):
            return {}
        ports = ["http", "dns", *([80, "50:60"] if has_ports else [])]
        side: Spec = {
            "nets": self._some(NETS, 2) if self._is_rare() else [],
            "notNets": self._some(NETS[:-3], 2) if self._is_rare(0.1) else [],
            "selector": self._selector(),
            "notSelector": self._one(_PLAIN) if self._is_rare(0.15) else "",
            "namespaceSelector": self._parent_selector(),
            "ports": self._some(ports, 2) if self._is_rare(0.3) else [],
            "notPorts": self._some(ports, 2) if self._is_rare(0.1) else [],
        }
        if self._is_rare(0.1):
            names = self._some(["sa1", "sa2"], 1)
            side["serviceAccounts"] = {"names": names, "selector": self._parent_selector()}
        return {name: value for name, value in side.items() if value}


OBJECTS: dict[str, Callable[[Maker], Spec]] = {
    "WorkloadEndpoint prod/node1-k8s-a-eth0": lambda make: make.workload("a", "node1"),
    "WorkloadEndpoint test/node1-k8s-b-eth0": lambda make: make.workload("b", "node1"),
    "WorkloadEndpoint prod/node2-k8s-c-eth0": lambda make: make.workload("c", "node2"),
    "HostEndpoint here": lambda make: make.host("node1", "eth0"),
    "HostEndpoint there": lambda make: make.host("node2", "eth0"),
    "HostEndpoint all": lambda make: make.host("node1", "*"),
    "NetworkSet prod/nets": Maker.networks,
    "GlobalNetworkSet nets": Maker.networks,
    "Profile kns.prod": Maker.profile,
    "Profile kns.test": Maker.profile,
    "Profile extra": Maker.profile,
    "Tier default": Maker.tier,
    "Tier security": Maker.tier,
    "NetworkPolicy prod/one": lambda make: make.policy(is_global=False),
    "NetworkPolicy prod/two": lambda make: make.policy(is_global=False),
    "NetworkPolicy test/one": lambda make: make.policy(is_global=False),
    "GlobalNetworkPolicy one": lambda make: make.policy(is_global=True),
    "GlobalNetworkPolicy two": lambda make: make.policy(is_global=True),
    "GlobalNetworkPolicy three": lambda make: make.policy(is_global=True),
}
"""How each object that there may be is made."""


def an_object(seed: object, name: str) -> Spec:
    """One version of one object."""
    return OBJECTS[name](Maker(f"{seed} {name}"))


def cluster(seed: object, without: Collection[str] = ()) -> Stored:
    """All objects but some."""
    return {name: an_object(seed, name) for name in OBJECTS if name not in without}


def packets(chance: Random, count: int) -> list[Packet]:
    """First packets of connections between those who are about."""
    return [_packet(chance) for _ in range(count)]


def _packet(chance: Random) -> Packet:
    pool = chance.choice([ADDRESSES_V4, ADDRESSES_V4, ADDRESSES_V6])
    protocol = chance.choice([6, 6, 6, 17, 1, 58, 132, 47])
    has_ports, is_icmp = protocol in (6, 17, 132), protocol in (1, 58)
    return Packet(
        source=parse_address(chance.choice(pool)),
        destination=parse_address(chance.choice(pool)),
        protocol=protocol,
        source_port=chance.choice(PORTS) if has_ports else 0,
        destination_port=chance.choice(PORTS) if has_ports else 0,
        icmp_type=chance.choice([8, 128, 3]) if is_icmp else 0,
        icmp_code=chance.choice([0, 4]) if is_icmp else 0,
    )
