"""What is in each IP set: the addresses, or ports by name, of all that its selector chooses.

    endpoints of all nodes, host endpoints, sets of networks ─▶ label index ─▶ members, counted

An address counts once for each owner and leaves a set with the last of them. Only sets that are
asked for exist. A set that did not change stays the same object.
Source: Calico 3.32 felix/labelindex, in our own words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cymric.model.endpoints import (
    LABEL_NAMESPACE,
    LABEL_ORCHESTRATOR,
    LABEL_SERVICE_ACCOUNT,
    EndpointPort,
    HostEndpoint,
    HostEndpointPort,
    WorkloadEndpoint,
)
from cymric.model.keys import ResourceKey
from cymric.model.net import Network, parse_network
from cymric.model.policy import GlobalNetworkSet, NetworkSet
from cymric.model.rules import protocol_number
from felix.calc.conversion import PORT_PROTOCOL_NAMES, SetSpec
from felix.calc.label_index import LabelIndex, Labels
from felix.calc.policies import IPSet
from felix.calc.selection import NAMESPACE_PREFIX, SERVICE_ACCOUNT_PREFIX

PROFILE_OF_NAMESPACE = "kns."


@dataclass(frozen=True, slots=True)
class Owner:
    """Something with labels and addresses (in ipset's text, by family) and named ports."""

    labels: Labels
    profiles: tuple[str, ...]
    v4: tuple[str, ...]
    v6: tuple[str, ...]
    ports: tuple[tuple[str, str, int], ...] = ()
    """Name, protocol in lower case, number."""


_Counts = tuple[dict[str, int], dict[str, int]]


class SetMembers:
    """See the chapter."""

    def __init__(self) -> None:
        self._index: LabelIndex[str, ResourceKey] = LabelIndex(self._on_match)
        self._owners: dict[ResourceKey, Owner] = {}
        self._specs: dict[str, SetSpec] = {}
        self._counts: dict[str, _Counts] = {}
        self._dirty: set[str] = set()
        self._sets: dict[str, IPSet] = {}

    @property
    def evaluations(self) -> int:
        """How many selectors were tried on owners so far."""
        return self._index.evaluations

    def put_owner(self, key: ResourceKey, owner: Owner | None) -> None:
        """What is known of one owner; None: it is gone."""
        before = self._owners.get(key)
        if owner is None:
            self._index.drop_item(key)
            self._owners.pop(key, None)
            return
        if before is not None and _contribution(before) != _contribution(owner):
            matched = tuple(self._index.selectors_of(key))
            for set_id in matched:
                self._count(set_id, before, -1)
                self._count(set_id, owner, 1)
        self._owners[key] = owner
        self._index.put_item(key, owner.labels, owner.profiles)

    def put_profile(self, name: str, labels: Labels) -> None:
        """The labels that a profile hands down."""
        self._index.put_parent(name, labels)

    def want(self, spec: SetSpec) -> None:
        """From now on this set is kept."""
        if spec.id in self._specs:
            return
        self._specs[spec.id] = spec
        self._counts[spec.id] = ({}, {})
        self._dirty.add(spec.id)
        if spec.selector is not None:
            self._index.put_selector(spec.id, spec.selector)

    def forget(self, set_id: str) -> None:
        """From now on this set is not kept."""
        del self._specs[set_id]
        self._index.drop_selector(set_id)
        del self._counts[set_id]
        self._dirty.add(set_id)

    def sets(self) -> Mapping[str, IPSet]:
        """Every set that is kept; the same mapping again while nothing has changed."""
        changed: dict[str, IPSet | None] = {}
        for set_id in self._dirty:
            spec = self._specs.get(set_id)
            if spec is None:
                if set_id in self._sets:
                    changed[set_id] = None
                continue
            v4, v6 = self._counts[set_id]
            found = IPSet(set_id, spec.kind, frozenset(v4), frozenset(v6))
            if found != self._sets.get(set_id):
                changed[set_id] = found
        self._dirty.clear()
        if changed:
            merged = {**self._sets, **changed}
            self._sets = {name: one for name, one in merged.items() if one is not None}
        return self._sets

    def _on_match(self, set_id: str, key: ResourceKey, is_match: bool) -> None:
        # A set that is being forgotten loses its members, too; nobody will look at them.
        self._count(set_id, self._owners[key], 1 if is_match else -1)

    def _count(self, set_id: str, owner: Owner, by: int) -> None:
        spec = self._specs.get(set_id)
        if spec is None:
            return
        self._dirty.add(set_id)
        for addresses, counts in zip((owner.v4, owner.v6), self._counts[set_id], strict=True):
            for member in _members(spec, owner, addresses):
                count = counts.get(member, 0) + by
                if count:
                    counts[member] = count
                else:
                    del counts[member]


def _contribution(owner: Owner) -> tuple[object, ...]:
    return owner.v4, owner.v6, owner.ports


def _members(spec: SetSpec, owner: Owner, addresses: Iterable[str]) -> Iterable[str]:
    if not spec.port_name:
        return addresses
    # One address can have a name for two protocols, and the same port twice under one name.
    return [
        f"{address},{protocol}:{port}"
        for address in addresses
        for name, protocol, port in owner.ports
        if name == spec.port_name and spec.port_protocol in ("", protocol)
    ]


# --- stored objects as owners ---------------------------------------------------------------------

_HALVES = {
    "0.0.0.0/0": ("0.0.0.0/1", "128.0.0.0/1"),
    "::/0": ("::/1", "8000::/1"),
}
"""An IP set cannot hold a prefix of length 0."""


def owner_of(stored: object) -> Owner | None:
    """A stored object as owner of addresses; None if it is none."""
    match stored:
        case WorkloadEndpoint():
            return _of_workload(stored)
        case HostEndpoint():
            networks = tuple(map(parse_network, stored.spec.expected_ips))
            ports = _ports(stored.spec.ports)
            return Owner(stored.labels, stored.spec.profiles, *texts(networks), ports)
        case NetworkSet():
            namespace = stored.metadata.namespace
            labels = {**stored.labels, LABEL_NAMESPACE: namespace}
            profiles = (PROFILE_OF_NAMESPACE + namespace,)
            return Owner(labels, profiles, *texts(stored.spec.networks))
        case GlobalNetworkSet():
            return Owner(stored.labels, (), *texts(stored.spec.networks))
    return None


def _of_workload(stored: WorkloadEndpoint) -> Owner | None:
    spec = stored.spec
    if not spec.ip_networks or not spec.interface_name:
        return None
    v4 = tuple(text.removesuffix("/32") for text in spec.ip_networks if ":" not in text)
    v6 = texts(tuple(parse_network(text) for text in spec.ip_networks if ":" in text))[1]
    return Owner(workload_labels(stored), spec.profiles, v4, v6, _ports(spec.ports))


def workload_labels(stored: WorkloadEndpoint) -> Labels:
    """A workload's own labels. Those that only profiles may set cannot be forged."""
    labels = {
        label: value
        for label, value in stored.labels.items()
        if not label.startswith((NAMESPACE_PREFIX, SERVICE_ACCOUNT_PREFIX))
    }
    labels[LABEL_NAMESPACE] = stored.metadata.namespace
    labels[LABEL_ORCHESTRATOR] = stored.spec.orchestrator
    if stored.spec.service_account_name:
        labels[LABEL_SERVICE_ACCOUNT] = stored.spec.service_account_name
    return labels


def texts(networks: Iterable[Network]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Networks as ipset writes them, IPv4 and IPv6; equal ones once."""
    found: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for network in networks:
        into = found[0] if network.version == 4 else found[1]
        if network.prefixlen == network.max_prefixlen:
            into[str(network.network_address)] = None
        else:
            into.update(dict.fromkeys(_HALVES.get(str(network), (str(network),))))
    return tuple(found[0]), tuple(found[1])


def _ports(
    stored: Iterable[EndpointPort | HostEndpointPort],
) -> tuple[tuple[str, str, int], ...]:
    found: dict[tuple[str, str, int], None] = {}
    for port in stored:
        try:
            number = protocol_number(port.protocol)
        except ValueError:
            continue  # no rule can name such a port
        if port.name and number in PORT_PROTOCOL_NAMES:
            found[(port.name, PORT_PROTOCOL_NAMES[number], port.port)] = None
    return tuple(found)
