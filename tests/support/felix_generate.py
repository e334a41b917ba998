"""Whole small clusters and packets by chance, made so that they meet: strategies and a shrinker.

    clusters() ─▶ every kind of object that felix reads, as specs by `Kind [namespace/]name`
    questions() ─▶ packets between places, with ports at the edges of those that rules name

A cluster is made from a seed, for drawing every field one by one is too slow for hypothesis; what
fails is cut down by `shrunk`, which leaves out objects, rules and fields while it stays wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import Any, TypeVar

from hypothesis import strategies as st

from cymric.model.net import Address
from felix.calc.journey import Way
from felix.calc.verdict import Packet
from tests.support.felix_places import HOST, NODE, PLACES, PODS, REMOTE_PODS, UP0, UP1, Place, way
from tests.support.felix_policy import Spec, Stored, hep, wep

TCP, UDP, SCTP, ICMP, ICMPV6, OTHER = 6, 17, 132, 1, 58, 253
EDGES = (1, 22, 52, 53, 54, 79, 80, 81, 1023, 1024, 4789, 8080, 8090, 8091, 65535)
"""Ports of packets: those of rules, their neighbours, a failsafe port, VXLAN's."""
_RULE_PORTS = (53, 80, "1:53", "53:1023", "80:8090", "8080:8090", "1024:65535", 65535, 1)
_MANY_PORTS: tuple[int | str, ...] = (*range(1, 80, 5), 80, "8080:8090", 1023)
_NAMES = ("http", "dns", "none")
_NETS = (
    "198.19.16.2/32", "198.19.16.2/31", "198.19.16.0/24", "198.19.20.1", "198.19.8.77/24",
    "198.19.0.0/16", "0.0.0.0/0", "fd00:198:16::2/128", "fd00:198:16::/64", "fd00:198:20::1",
    "fd00::/16", "::/0", "198.19.0.0/23", "fd00:198::/64",
)  # fmt: skip
_NOT_NETS = (
    *_NETS[:2], "198.19.16.4/30", "198.19.20.0/24", "fd00:198:16::4/126", "fd00:198:20::/64",
    "0.0.0.0/0", "::/0",
)  # fmt: skip
_PLAIN = (
    "app == 'a'", "app != 'a'", "app in {'a', 'b'}", "app not in {'b'}", "role starts with 'a'",
    "has(role)", "!has(role)", "all()", "global()", "projectcalico.org/namespace == 'prod'",
    "has(projectcalico.org/serviceaccount)", "app == 'a' && has(role)",
    "app == 'b' || role == 'a'", "!(app == 'a' && !all())", "tier contains 'a'",
    "app ends with 'b'",
)  # fmt: skip
_PARENT = ("env == 'a'", "env != 'a'", "all()", "global()", "has(env)", "!has(env)", "!all()")
_ACTIONS = ("Allow", "Allow", "Allow", "Deny", "Deny", "Pass", "Log", "allow", "next-tier", "")
_PROFILES = ("kns.prod", "kns.test", "ksa.prod.sa1", "extra", "none")
_CLASSES: tuple[Spec, ...] = (
    {},
    {},
    {"applyOnForward": True},
    {"applyOnForward": True},
    {"applyOnForward": True, "doNotTrack": True},
    {"applyOnForward": True, "preDNAT": True},
)
FIELDS = (
    "ipVersion", "protocol", "notProtocol", "icmp", "notICMP", "metadata", "http", "nets",
    "notNets", "selector", "notSelector", "namespaceSelector", "serviceAccounts", "ports",
    "notPorts", "services",
)  # fmt: skip
"""Everything that a rule can hold beside its action."""

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """What happens to this packet?"""

    source: Place
    destination: Place
    packet: Packet

    @property
    def way(self) -> Way:
        """How it crosses the node."""
        return way(self.source, self.destination)

    @property
    def direction(self) -> str:
        """In words."""
        if self.source.kind == self.destination.kind == "outside":
            return "forwarded"
        return f"{self.source.kind}-{self.destination.kind}"

    def __str__(self) -> str:
        return f"{self.source.name} to {self.destination.name}: {self.packet}"


def clusters() -> st.SearchStrategy[Stored]:
    """Whole clusters."""
    return st.integers(0, 2**40).map(cluster)


def questions(count: int) -> st.SearchStrategy[list[Question]]:
    """So many packets, no two of them of one connection."""
    return st.integers(0, 2**40).map(lambda seed: packets(seed, count))


def cluster(seed: object) -> Stored:
    """The cluster of a seed."""
    return _Maker(Random(f"cluster {seed}")).cluster()


def selective_cluster(seed: object) -> Stored:
    """One whose verdicts depend on IP sets as much as can be, and on the filter table alone.

    Endpoints are labelled, rules ask for little else than labels and names of ports, and there is
    no untracked and no pre-DNAT policy.
    """
    return _Selective(Random(f"selective {seed}")).cluster()


def packets(seed: object, count: int) -> list[Question]:
    """The packets of a seed."""
    chance = Random(f"packets {seed}")
    found: dict[object, Question] = {}
    while len(found) < count:
        question = _question(chance)
        if question is not None:
            found.setdefault(_connection(question.packet), question)
    return list(found.values())


class _Maker:
    classes = _CLASSES

    def __init__(self, chance: Random) -> None:
        self._chance = chance

    def _one(self, choices: Sequence[T]) -> T:
        return self._chance.choice(choices)

    def _some(self, choices: Sequence[T], most: int, least: int = 1) -> list[T]:
        return [self._one(choices) for _ in range(self._chance.randint(least, most))]

    def _is(self, part: float) -> bool:
        return self._chance.random() < part

    def cluster(self) -> Stored:
        """Everything; what may be absent, is, now and then."""
        found: Stored = dict(self._endpoints())
        for name in ("kns.prod", "kns.test", "ksa.prod.sa1", "extra"):
            if self._is(0.85):
                found[f"Profile {name}"] = self._profile()
        found["NetworkSet prod/nets"] = self._nets()
        found["GlobalNetworkSet nets"] = self._nets()
        for name in ("default", "security"):
            if self._is(0.85):
                found[f"Tier {name}"] = {
                    "order": self._one([None, 1, 2]),
                    "defaultAction": self._one(["Deny", "Pass", "Pass", ""]),
                }
        for number in range(self._chance.randint(1, 4)):
            namespace = self._one(["prod", "test"])
            found[f"NetworkPolicy {namespace}/p{number}"] = self._policy(is_global=False)
        for number in range(self._chance.randint(1, 5)):
            found[f"GlobalNetworkPolicy g{number}"] = self._policy(is_global=True)
        return {name: spec for name, spec in found.items() if spec is not None}

    def _endpoints(self) -> Iterator[tuple[str, Spec]]:
        for pod in PODS:
            if self._is(0.95):
                yield self._workload(pod, NODE, pod.namespace)
        for name, (place, number) in REMOTE_PODS.items():
            addresses = tuple(str(place.of(version)[number]) for version in (4, 6))
            remote = Place(name, "pod", f"cali0{name}", addresses)
            yield self._workload(remote, "node2", self._one(["prod", "test"]))
        if self._is(0.5):
            yield "HostEndpoint up0", self._host(NODE, "up0", UP0)
        if self._is(0.4):
            yield "HostEndpoint up1", self._host(NODE, self._one(["", "up1"]), UP1)
        if self._is(0.3):
            yield "HostEndpoint all", self._host(NODE, "*", ())
        if self._is(0.5):
            yield "HostEndpoint there", self._host("node2", "up0", ("198.19.0.1", "fd00:198::1"))

    def _workload(self, pod: Place, node: str, namespace: str) -> tuple[str, Spec]:
        spec = wep(
            pod.name,
            node=node,
            ipNetworks=[f"{one}/{128 if ':' in one else 32}" for one in pod.addresses],
            interfaceName=pod.interface,
            mac=pod.mac,
            profiles=self._profiles(),
            labels=self._labels("tier", "pcns.env"),
            serviceAccountName=self._one(["", "sa1", "sa1", "sa2"]),
            ports=self._ports(),
        )
        return f"WorkloadEndpoint {namespace}/{node}-k8s-{pod.name}-eth0", spec

    def _host(self, node: str, interface: str, addresses: Sequence[str]) -> Spec:
        return hep(
            node=node,
            interfaceName=interface,
            expectedIPs=list(addresses),
            profiles=self._profiles(),
            labels=self._labels(),
            ports=self._ports(),
        )

    def _profiles(self) -> list[str]:
        own = list(dict.fromkeys(self._some(_PROFILES, 2, 0)))
        return [*own, "projectcalico-default-allow"] if self._is(0.7) else own

    def _labels(self, *more: str) -> dict[str, str]:
        return {name: self._one("ab") for name in self._some(["app", "app", "role", *more], 3, 0)}

    def _ports(self) -> list[Spec]:
        return [
            {
                "name": self._one(_NAMES[:2]),
                "protocol": self._one(["TCP", "TCP", "UDP", 6, "SCTP"]),
                "port": self._one([53, 80, 8080]),
            }
            for _ in range(self._chance.randint(0, 3))
        ]

    def _nets(self) -> Spec:
        return {"nets": self._some(_NETS, 3), "labels": self._labels()}

    def _profile(self) -> Spec:
        labels = {name: self._one("ab") for name in self._some(["pcns.env", "pcsa.env", "app"], 2)}
        rules = [self._rules(2, 0) for _ in range(2)]
        return {"ingress": rules[0], "egress": rules[1], "labelsToApply": labels}

    def _policy(self, *, is_global: bool) -> Spec:
        spec: Spec = {
            "tier": self._one(["", "default", "default", "security", "security", "gone"]),
            "order": self._one([None, 1, 2.5, -1]),
            "ingress": self._rules(6),
            "egress": self._rules(6),
            "selector": self._one(_PLAIN) if self._is(0.4) else "",
            "types": self._one([[], ["Ingress"], ["Egress"], ["Ingress", "Egress"]]),
        }
        if self._is(0.15):
            spec["serviceAccountSelector"] = self._one(_PARENT)
        if is_global:
            if self._is(0.2):
                spec["namespaceSelector"] = self._one(_PARENT)
            spec |= self._one(self.classes)
        return spec

    def _rules(self, most: int, least: int = 0) -> list[Spec]:
        return [self._rule() for _ in range(self._chance.randint(least, most))]

    def _rule(self) -> Spec:
        protocol = self._one(
            [*[None] * 7, *["TCP"] * 4, "UDP", "UDP", 6, 17, *["ICMP", "ICMPv6"] * 2, "SCTP", OTHER]
        )
        has_ports = protocol in ("TCP", "UDP", 6, 17, "SCTP")
        family = {"ICMP": 4, "ICMPv6": 6}.get(str(protocol))
        rule: Spec = {"action": self._one(_ACTIONS)}
        if protocol is not None:
            rule["protocol"] = protocol
        if self._is(0.1):
            rule["notProtocol"] = self._one(["TCP", 17, "ICMP"])
        if self._is(0.15):
            rule["ipVersion"] = family or self._one([4, 6])
        if family:
            types = [8, 13] if family == 4 else [128, 139]
            for name, part in (("icmp", 0.5), ("notICMP", 0.3)):
                if self._is(part):
                    code = {"code": self._one([0, 1])} if self._is(0.4) else {}
                    rule[name] = {"type": self._one(types), **code}
        if self._is(0.02):
            rule["http"] = {"methods": ["GET"]}
        if self._is(0.05):
            rule["metadata"] = {"annotations": {"why": "so that it is 'here'"}}
        for side in ("source", "destination"):
            if self._is(0.5) and (found := self._side(has_ports)):
                rule[side] = found
        return rule

    def _side(self, has_ports: bool) -> Spec:
        ports: tuple[int | str, ...] = (*_NAMES, *(_RULE_PORTS if has_ports else ()))
        makers: dict[str, tuple[float, Callable[[], object]]] = {
            "nets": (0.25, lambda: self._some(_NETS, 3)),
            "notNets": (0.12, lambda: self._some(_NOT_NETS, 3)),
            "selector": (0.3, lambda: self._one(_PLAIN)),
            "notSelector": (0.12, lambda: self._one(_PLAIN)),
            "namespaceSelector": (0.12, lambda: self._one(_PARENT)),
            "ports": (0.6 if has_ports else 0.05, lambda: self._port_list(ports, has_ports)),
            "notPorts": (0.15 if has_ports else 0.04, lambda: self._port_list(ports, has_ports)),
            "serviceAccounts": (
                0.1,
                lambda: {
                    "names": self._some(["sa1", "sa2"], 2, 0),
                    "selector": self._one(_PARENT) if self._is(0.4) else "",
                },
            ),
            "services": (0.02, lambda: {"name": "s", "namespace": "prod"}),
        }
        return {name: make() for name, (part, make) in makers.items() if self._is(part)}

    def _port_list(self, ports: Sequence[int | str], has_ports: bool) -> list[int | str]:
        if has_ports and self._is(0.15):
            return [*_MANY_PORTS, *self._some(_NAMES, 1, 0)]
        return self._some(ports, 3)


class _Selective(_Maker):
    classes = _CLASSES[:4]

    def _labels(self, *more: str) -> dict[str, str]:
        return {name: self._one("ab") for name in ("app", "role", *more)}

    def _ports(self) -> list[Spec]:
        return [
            {"name": name, "protocol": protocol, "port": port}
            for name, port in zip(_NAMES, self._chance.sample([53, 80], 2), strict=False)
            for protocol in ("TCP", "UDP")
        ]

    def _nets(self) -> Spec:
        return {"nets": self._some(_SMALL_NETS, 3), "labels": self._labels()}

    def _rules(self, most: int, least: int = 0) -> list[Spec]:
        return [self._rule() for _ in range(self._chance.randint(2, 4))]

    def _rule(self) -> Spec:
        rule: Spec = {"action": self._one(["Allow", "Deny", "Allow", "Deny", "Pass"])}
        if self._is(0.4):
            rule["protocol"] = self._one(["TCP", "UDP"])
            side = "destination" if self._is(0.8) else "source"
            rule[side] = {"ports": [self._one(_NAMES[:2])]}
        name = "notSelector" if self._is(0.2) else "selector"
        rule.setdefault(self._one(["source", "source", "destination"]), {})[name] = self._one(
            _EQUAL
        )
        return rule


_SMALL_NETS = ("198.19.8.1", "198.19.9.1", "198.19.1.1", "fd00:198:8::1", "fd00:198:1::1")
_EQUAL = tuple(f"{name} == '{value}'" for name in ("app", "role") for value in "ab")


def _question(chance: Random) -> Question | None:
    source, destination = chance.sample(PLACES, 2)
    if source.kind == destination.kind == "outside" and chance.random() < 0.3:
        return None
    version = 6 if chance.random() < 0.35 else 4
    ours, theirs = source.of(version), destination.of(version)
    if not ours or not theirs:
        return None
    protocol = chance.choice([TCP, TCP, TCP, UDP, UDP, SCTP, ICMP, ICMP, OTHER])
    if protocol == ICMP and version == 6:
        protocol = ICMPV6
    has_ports, is_icmp = protocol in (TCP, UDP, SCTP), protocol in (ICMP, ICMPV6)
    types = (8, 13) if version == 4 else (128, 139)
    packet = Packet(
        source=_source(chance, source, destination, ours),
        destination=chance.choice(theirs),
        protocol=protocol,
        source_port=chance.choice((*EDGES, 40000, 40000)) if has_ports else 0,
        destination_port=chance.choice(EDGES) if has_ports else 0,
        icmp_type=chance.choice(types) if is_icmp else 0,
        icmp_code=chance.choice([0, 0, 1]) if is_icmp else 0,
    )
    return Question(source, destination, packet)


def _source(chance: Random, source: Place, destination: Place, ours: Sequence[Address]) -> Address:
    if source is not HOST:
        return chance.choice(ours)
    return ours[1] if destination.interface == "up1" else ours[0]


def _connection(packet: Packet) -> object:
    """What conntrack tells connections by, whoever began: the sides, and no ICMP type."""
    ends = ((packet.source, packet.source_port), (packet.destination, packet.destination_port))
    return packet.protocol, frozenset((str(address), port) for address, port in ends)


def shrunk(stored: Stored, is_wrong: Callable[[Stored], bool]) -> Stored:
    """A smaller cluster that is still wrong: without objects, rules, fields that do not matter."""
    smaller = deepcopy(stored)
    is_done = False
    while not is_done:
        is_done = True
        for container, key in _parts(smaller):
            kept = container[key]
            del container[key]
            if _holds(smaller, is_wrong):
                is_done = False
                break
            if isinstance(container, list):
                container.insert(key, kept)
            else:
                container[key] = kept
    return smaller


def _parts(tree: Any) -> list[tuple[Any, Any]]:
    """Every place in a tree of dicts and lists, the large parts first."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    here = [(tree, key) for key in keys]
    below = [
        part for key in keys if isinstance(tree[key], dict | list) for part in _parts(tree[key])
    ]
    return [*here, *below]


def _holds(stored: Stored, is_wrong: Callable[[Stored], bool]) -> bool:
    try:
        return is_wrong(stored)
    except (ValueError, KeyError, AssertionError, TypeError):
        return False  # a part was left out that its object needs
