"""The calculation: updates in, the whole desired state of this node out.

`on_update` only stores; `desired` works out everything from what is stored now, so the order and
number of updates never matter. An object that is None (gone or unreadable) counts as absent; one
that makes no sense here is left out and named in `problems`. Of two endpoints on one interface the
lexically first id counts. Policies and host endpoints cannot be enforced yet; they are listed, for
nothing may be weaker than written in silence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address
from typing import TypeVar

from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.keys import Key, ResourceKey
from cymric.model.net import is_ipv4
from cymric.model.resources import (
    DEFAULT_ALLOW_PROFILE,
    BGPConfiguration,
    ClusterInformation,
    FelixConfiguration,
    IPPool,
    Node,
    Profile,
)
from felix.calc import profiles
from felix.calc.config import FelixConfig, Source, from_environment, from_object, settle
from felix.calc.values import Desired, Endpoint, EndpointId, Problem, ProfileRules

KINDS = (
    "BGPConfiguration",
    "ClusterInformation",
    "FelixConfiguration",
    "GlobalNetworkPolicy",
    "HostEndpoint",
    "IPPool",
    "NetworkPolicy",
    "Node",
    "Profile",
    "WorkloadEndpoint",
)
"""What felix reads from the datastore."""

UNENFORCED_KINDS = frozenset({"GlobalNetworkPolicy", "HostEndpoint", "NetworkPolicy"})

T = TypeVar("T")

_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_MAC = re.compile(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")
_PROFILE = re.compile(r"[A-Za-z0-9._-]{1,253}")


class Calculation:
    """See the chapter."""

    def __init__(self, node_name: str, environment: Mapping[str, str]) -> None:
        self._node_name = node_name
        self._environment: Source = from_environment(environment)
        self._objects: dict[str, dict[ResourceKey, object]] = {kind: {} for kind in KINDS}
        self._endpoint_by_key: dict[ResourceKey, Endpoint] = {}
        self._others: set[ResourceKey] = set()
        self._desired: Desired | None = None

    def on_update(self, key: Key, value: object | None) -> None:
        """Store one object, or forget it (None)."""
        if not isinstance(key, ResourceKey) or key.kind not in self._objects:
            return
        objects = self._objects[key.kind]
        if isinstance(value, WorkloadEndpoint) and value.spec.node != self._node_name:
            # Endpoints of other nodes are counted only; a large cluster has very many.
            self._others.add(key)
            self._endpoint_by_key.pop(key, None)
            if objects.pop(key, None) is not None:
                self._desired = None
            return
        self._others.discard(key)
        before = objects.get(key)
        if value is None:
            objects.pop(key, None)
            self._endpoint_by_key.pop(key, None)
        else:
            objects[key] = value
            if isinstance(value, WorkloadEndpoint):
                self._endpoint_by_key[key] = _to_endpoint(value)
        if before != value:
            self._desired = None

    def desired(self) -> Desired:
        """The whole picture; the same object again while nothing has changed."""
        if self._desired is None:
            self._desired = self._work_out()
        return self._desired

    def _work_out(self) -> Desired:
        problems: list[Problem] = []
        config = self._config(problems)
        endpoints = self._endpoints(config, problems)
        pools = [pool for pool in self._of("IPPool", IPPool) if is_ipv4(pool.spec.network)]
        return Desired(
            config=config,
            is_ready=self._is_ready(),
            endpoints=endpoints,
            profiles=self._profiles(endpoints, problems),
            pools=frozenset(
                str(pool.spec.network)
                for pool in pools
                if tuple(pool.spec.allowed_uses) != ("LoadBalancer",)
            ),
            masquerade_pools=frozenset(
                str(pool.spec.network) for pool in pools if pool.spec.nat_outgoing
            ),
            hosts=frozenset({*self._host_addresses(), *config.external_nodes}),
            service_cidrs=self._service_cidrs(),
            problems=tuple(sorted(problems)),
            unenforced=tuple(
                sorted(str(key) for kind in UNENFORCED_KINDS for key in self._objects[kind])
            ),
            count_by_kind=self._counts(),
        )

    def _of(self, kind: str, type_: type[T]) -> Iterable[T]:
        objects = self._objects[kind]
        for key in sorted(objects, key=str):
            value = objects[key]
            if isinstance(value, type_):
                yield value

    def _counts(self) -> dict[str, int]:
        counts = {kind: len(objects) for kind, objects in self._objects.items()}
        counts["WorkloadEndpoint"] += len(self._others)
        return counts

    def _config(self, problems: list[Problem]) -> FelixConfig:
        sources = [self._environment]
        found = {item.metadata.name: item for item in self._of_config()}
        for name in (f"node.{self._node_name}", "default"):
            if item := found.pop(name, None):
                sources.append(from_object(name, item.spec, item.annotations))
        for name in found:
            if not name.startswith("node."):
                problems.append(
                    Problem(f"FelixConfiguration {name}", "scoped by selector: ignored")
                )
        config, rejected = settle(sources)
        problems.extend(Problem(subject, reason) for subject, reason in rejected)
        return config

    def _of_config(self) -> Iterable[FelixConfiguration]:
        return self._of("FelixConfiguration", FelixConfiguration)

    def _is_ready(self) -> bool:
        return all(
            info.spec.datastoreReady is not False
            for info in self._of("ClusterInformation", ClusterInformation)
        )

    def _endpoints(self, config: FelixConfig, problems: list[Problem]) -> tuple[Endpoint, ...]:
        by_interface: dict[str, Endpoint] = {}
        for endpoint in sorted(self._endpoint_by_key.values(), key=lambda item: str(item.id)):
            if reason := _why_not(endpoint, config):
                problems.append(Problem(f"WorkloadEndpoint {endpoint.id}", reason))
            elif (first := by_interface.setdefault(endpoint.interface, endpoint)) is not endpoint:
                reason = f"{endpoint.interface} already belongs to {first.id}"
                problems.append(Problem(f"WorkloadEndpoint {endpoint.id}", reason))
        return tuple(by_interface[name] for name in sorted(by_interface))

    def _profiles(
        self, endpoints: Iterable[Endpoint], problems: list[Problem]
    ) -> dict[str, ProfileRules]:
        found: dict[str, ProfileRules] = {}
        for name in sorted({name for endpoint in endpoints for name in endpoint.profiles}):
            if name == DEFAULT_ALLOW_PROFILE:
                found[name] = profiles.DEFAULT_ALLOW
                continue
            stored = self._objects["Profile"].get(ResourceKey("Profile", name))
            if isinstance(stored, Profile):
                found[name], trouble = profiles.convert(stored)
            else:
                found[name], trouble = profiles.missing(name), "missing, so it drops everything"
            if trouble:
                problems.append(Problem(f"Profile {name}", trouble))
        return found

    def _host_addresses(self) -> Iterable[str]:
        for node in self._of("Node", Node):
            if node.spec.bgp and (interface := node.spec.bgp.ipv4_interface):
                yield str(interface.ip)

    def _service_cidrs(self) -> tuple[str, ...]:
        key = ResourceKey("BGPConfiguration", "default")
        stored = self._objects["BGPConfiguration"].get(key)
        if not isinstance(stored, BGPConfiguration):
            return ()
        spec = stored.spec
        groups = (
            spec.service_cluster_ips,
            spec.service_external_ips,
            spec.service_load_balancer_ips,
        )
        return tuple(sorted({item.cidr for group in groups for item in group if "." in item.cidr}))


def _to_endpoint(stored: WorkloadEndpoint) -> Endpoint:
    spec = stored.spec
    return Endpoint(
        id=EndpointId(spec.orchestrator, stored.workload_id, spec.endpoint),
        interface=spec.interface_name,
        mac=spec.mac.lower(),
        addresses=tuple(item for item in spec.addresses if isinstance(item, IPv4Address)),
        profiles=spec.profiles,
    )


def _why_not(endpoint: Endpoint, config: FelixConfig) -> str | None:
    """Why an endpoint cannot be enforced. What reaches rule text is checked here, once."""
    if not endpoint.addresses:
        return "has no IPv4 address: ignored"
    if not _INTERFACE.fullmatch(endpoint.interface):
        return f"has no usable interface name ({endpoint.interface!r}): ignored"
    if not config.is_workload_interface(endpoint.interface):
        return f"is on {endpoint.interface}, which no workload prefix covers: ignored"
    if endpoint.mac and not _MAC.fullmatch(endpoint.mac):
        return f"has no usable MAC ({endpoint.mac!r}): ignored"
    if bad := [name for name in endpoint.profiles if not _PROFILE.fullmatch(name)]:
        return f"names the impossible profile {bad[0]!r}: ignored"
    return None
