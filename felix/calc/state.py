"""The calculation: updates in, the whole desired state of this node out.

`on_update` only stores and marks; `desired` works out what is marked and keeps the rest, so the
order and number of updates never matter, and one more pod does not cost the work of all. An object
that is None (gone or unreadable) counts as absent; one that makes no sense here is left out and
named in `problems`, as is one that is read in the strictest way because it is damaged.

    updates, hints ─▶ endpoints (this node's) ─┐
            │                                  ├▶ graph (policy) ─▶ Desired
            └▶ cluster, host endpoints ────────┘

Endpoints may be hinted at before the datastore tells of them (`hint`). A hint stands only where
nothing is stored, and ends as soon as the datastore says anything about its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from cymric.model.endpoints import HostEndpoint, WorkloadEndpoint
from cymric.model.keys import Key, ResourceKey
from cymric.model.resources import (
    BGPConfiguration,
    ClusterInformation,
    FelixConfiguration,
    IPPool,
    Node,
)
from cymric.model.strictest import Damaged
from felix.calc import cluster, graph, host_endpoints
from felix.calc.config import FelixConfig
from felix.calc.endpoints import LocalEndpoints
from felix.calc.host_endpoints import AddressesByInterface, Owners
from felix.calc.policies import WILDCARD_INTERFACE
from felix.calc.policies import HostEndpoint as ResolvedHostEndpoint
from felix.calc.sources import Source, from_environment
from felix.calc.values import Desired, Endpoint, Problem

_CLUSTER_KINDS = (
    "BGPConfiguration",
    "ClusterInformation",
    "FelixConfiguration",
    "IPPool",
    "Node",
)
KINDS = tuple(sorted({*_CLUSTER_KINDS, *graph.KINDS}))
"""What felix reads from the datastore."""

_ENDPOINT, _HOST_ENDPOINT = "WorkloadEndpoint", "HostEndpoint"
_INTERFACES, _OTHERS = "interfaces", "endpoints of other nodes"

T = TypeVar("T")


class HintRefused(ValueError):
    """Why a hint does not stand."""


class Calculation:
    """See the chapter. Without `has_ipv6` the kernel knows only IPv4, whatever is configured."""

    def __init__(
        self, node_name: str, environment: Mapping[str, str], *, has_ipv6: bool = True
    ) -> None:
        self.node_name = node_name
        self._environment: Source = from_environment(environment)
        self._has_ipv6 = has_ipv6
        self._objects: dict[str, dict[ResourceKey, object]] = {kind: {} for kind in KINDS}
        self._others: set[ResourceKey] = set()
        self._hints: dict[ResourceKey, WorkloadEndpoint] = {}
        self._damaged: dict[ResourceKey, Problem] = {}
        self._interfaces: AddressesByInterface = {}
        self._endpoints = LocalEndpoints()
        self._graph = graph.PolicyGraph()
        self._host_owners: Owners = {}
        self._host_names: frozenset[str] = frozenset()
        self._config = FelixConfig()
        self._labels: Mapping[str, str] = {}
        self._problems: dict[str, tuple[Problem, ...]] = {}
        self._with_tiers: dict[str, tuple[Endpoint, Endpoint]] = {}
        self._dirty = {*KINDS, _INTERFACES}
        self._desired = Desired()

    def on_update(self, key: Key, value: object | None) -> None:
        """Store one object, or forget it (None)."""
        if not isinstance(key, ResourceKey) or key.kind not in self._objects:
            return
        value = self._undamaged(key, value)
        if key.kind in graph.KINDS:
            self._graph.put(key, value)
        if isinstance(value, WorkloadEndpoint) and value.spec.node != self.node_name:
            # Of endpoints of other nodes only what IP sets need is kept, by the graph.
            self._others.add(key)
            self._dirty.add(_OTHERS)
            value = None
        elif key in self._others:
            self._others.discard(key)
            self._dirty.add(_OTHERS)
        objects = self._objects[key.kind]
        was_hinted = self._hints.pop(key, None) is not None
        before = objects.get(key)
        if value is None:
            objects.pop(key, None)
        else:
            objects[key] = value
        if before != value or was_hinted:
            self._dirty.add(key.kind)
            if key.kind == _ENDPOINT:
                self._endpoints.put(key, value if isinstance(value, WorkloadEndpoint) else None)

    def on_host_interfaces(self, addresses_by_interface: AddressesByInterface) -> None:
        """The host's interfaces and what addresses they have, all of them."""
        if addresses_by_interface != self._interfaces:
            self._interfaces = dict(addresses_by_interface)
            self._dirty.add(_INTERFACES)

    def hint(self, key: ResourceKey, value: WorkloadEndpoint) -> bool:
        """Take an endpoint as if it were stored; False if it is. Raises HintRefused."""
        if value.spec.node != self.node_name:
            raise HintRefused(f"the endpoint is on node {value.spec.node}, not here")
        stored = self._objects[_ENDPOINT].get(key)
        if stored == value:
            return False
        if stored is not None or key in self._others:
            raise HintRefused("another value is stored")
        self._hints[key] = value
        self._put_hint(key, value)
        return True

    def end_hint(self, key: ResourceKey) -> bool:
        """Forget a hint; False if the datastore has spoken since, or there was none."""
        if self._hints.pop(key, None) is None:
            return False
        self._put_hint(key, None)
        return True

    def _put_hint(self, key: ResourceKey, value: WorkloadEndpoint | None) -> None:
        self._endpoints.put(key, value)
        self._graph.put(key, value)
        self._dirty.add(_ENDPOINT)

    def has_endpoint(self, key: ResourceKey) -> bool:
        """Whether an endpoint of this node is stored or hinted at under `key`."""
        return key in self._hints or key in self._objects[_ENDPOINT]

    @property
    def hint_count(self) -> int:
        """How many hints stand."""
        return len(self._hints)

    @property
    def evaluations(self) -> int:
        """How many selectors were tried so far."""
        return self._graph.evaluations

    def desired(self) -> Desired:
        """The whole picture; the same object again while nothing has changed."""
        if self._dirty:
            dirty, self._dirty = self._dirty, set()
            self._work_out(dirty)
        return self._desired

    def _undamaged(self, key: ResourceKey, value: object | None) -> object | None:
        before = self._damaged.pop(key, None)
        if isinstance(value, Damaged):
            place = f"{key.namespace}/{key.name}" if key.namespace else key.name
            reason = f"cannot be read, so the strictest reading counts: {value.reason}"
            self._damaged[key] = Problem(f"{key.kind} {place}", reason)
            value = value.stand_in
        if before != self._damaged.get(key):
            self._problems.pop("damaged", None)
            self._dirty.add(key.kind)
        return value

    def _work_out(self, dirty: set[str]) -> None:
        before = self._desired
        changes: dict[str, object] = {}
        has_other_labels = "Node" in dirty and self._has_other_labels()
        if has_other_labels or "FelixConfiguration" in dirty:
            found = cluster.parameters(
                self.node_name,
                self._labels,
                self._environment,
                self._of("FelixConfiguration", FelixConfiguration),
                has_ipv6=self._has_ipv6,
            )
            self._config, self._problems["config"] = found.config, found.problems
            changes |= {"config": found.config, "notes": found.notes}
            dirty |= {"Node", _INTERFACES}  # external nodes; what a workload's interface is
        if dirty & {_HOST_ENDPOINT, _INTERFACES}:
            self._assign_interfaces()
        self._endpoints.configure(self._config)
        self._graph.flush(
            self._endpoints.keys | set(map(host_endpoints.key_of, self._host_owners.values())),
            self._endpoints.profiles.union(*(map(graph.host_profiles, self._host_owners.values()))),
        )
        changes["endpoints"] = self._endpoints_with_tiers()
        changes["host_endpoints"] = self._resolved_hosts()
        changes["host_names"] = self._host_names
        changes["profiles"] = self._graph.profiles
        changes["policies"] = self._graph.policies
        changes["ip_sets"] = self._graph.ip_sets
        if dirty & {*_CLUSTER_KINDS}:
            changes |= self._cluster(dirty)
        changes["problems"] = self._all_problems()
        if dirty != {_OTHERS}:  # which alone are no reason to tell anyone downstream
            changes["count_by_kind"] = self._counts()
        if any(getattr(before, name) != value for name, value in changes.items()):
            changes["count_by_kind"] = self._counts()
            self._desired = replace(before, **changes)  # type: ignore[arg-type]

    def _has_other_labels(self) -> bool:
        """Whether this node's labels, by which parameters are scoped, are others than before."""
        stored = self._objects["Node"].get(ResourceKey("Node", self.node_name))
        before, self._labels = self._labels, stored.labels if isinstance(stored, Node) else {}
        return before != self._labels

    def _of(self, kind: str, type_: type[T]) -> Iterable[T]:
        objects = self._objects[kind]
        for key in sorted(objects, key=str):
            value = objects[key]
            if isinstance(value, type_):
                yield value

    def _counts(self) -> dict[str, int]:
        counts = {kind: len(objects) for kind, objects in self._objects.items()}
        counts[_ENDPOINT] += len(self._others)
        return counts

    def _cluster(self, dirty: set[str]) -> dict[str, object]:
        changes: dict[str, object] = {}
        if "ClusterInformation" in dirty:
            found = self._of("ClusterInformation", ClusterInformation)
            changes["is_ready"] = cluster.is_ready(found)
        if "IPPool" in dirty:
            pools, masquerade_pools = cluster.pools(self._of("IPPool", IPPool))
            changes |= {"pools": pools, "masquerade_pools": masquerade_pools}
            exclusions, self._problems["pools"] = cluster.nat_exclusions(self._of("IPPool", IPPool))
            changes["nat_exclusions"] = exclusions
        if "Node" in dirty:
            changes["hosts"] = frozenset(cluster.hosts(self._of("Node", Node), self._config))
        if "BGPConfiguration" in dirty:
            key = ResourceKey("BGPConfiguration", "default")
            stored = self._objects["BGPConfiguration"].get(key)
            default = stored if isinstance(stored, BGPConfiguration) else None
            changes["service_cidrs"] = cluster.service_cidrs(default)
        return changes

    def _assign_interfaces(self) -> None:
        local = [
            one for one in self._of(_HOST_ENDPOINT, HostEndpoint) if one.spec.node == self.node_name
        ]
        self._host_names = frozenset(one.metadata.name for one in local)
        interfaces = {
            name: addresses
            for name, addresses in self._interfaces.items()
            if not self._config.is_excluded_interface(name)
        }
        self._host_owners, self._problems["hosts"] = host_endpoints.assign(
            local, interfaces, self._config.is_workload_interface
        )

    def _endpoints_with_tiers(self) -> tuple[Endpoint, ...]:
        """The endpoints with their policies; what did not change stays the same object."""
        before, self._with_tiers = self._with_tiers, {}
        found = []
        is_same = True
        for bare in self._endpoints.all:
            tiers = self._graph.tiers_of(self._endpoints.key_of(bare)).normal
            made = before.get(bare.interface)
            if made is None or made[0] is not bare or made[1].tiers is not tiers:
                made = (bare, replace(bare, tiers=tiers) if tiers else bare)
                is_same = False
            self._with_tiers[bare.interface] = made
            found.append(made[1])
        if is_same and len(found) == len(self._desired.endpoints):
            return self._desired.endpoints
        return tuple(found)

    def _resolved_hosts(self) -> tuple[ResolvedHostEndpoint, ...]:
        before = {one.interface: one for one in self._desired.host_endpoints}
        found = []
        for interface in sorted(self._host_owners):
            owner = self._host_owners[interface]
            tiers = self._graph.tiers_of(host_endpoints.key_of(owner))
            made = ResolvedHostEndpoint(
                id=owner.metadata.name,
                interface=interface,
                profiles=graph.host_profiles(owner),
                tiers=tiers.normal,
                forward_tiers=tiers.forward,
                untracked_tiers=() if interface == WILDCARD_INTERFACE else tiers.untracked,
                pre_dnat_tiers=tiers.pre_dnat,
            )
            known = before.get(interface)
            found.append(known if known is not None and known == made else made)
        return tuple(found)

    def _all_problems(self) -> tuple[Problem, ...]:
        found = self._problems
        found.setdefault("damaged", tuple(self._damaged.values()))
        found["endpoints"], found["policy"] = self._endpoints.problems, self._graph.problems
        return tuple(sorted(problem for group in found.values() for problem in group))
