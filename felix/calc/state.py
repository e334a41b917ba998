"""The calculation: updates in, the whole desired state of this node out.

`on_update` only stores and marks; `desired` works out what is marked and keeps the rest, so the
order and number of updates never matter, and one more pod does not cost the work of all. An object
that is None (gone or unreadable) counts as absent; one that makes no sense here is left out and
named in `problems`. Policies and host endpoints cannot be enforced yet; they are listed, for
nothing may be weaker than written in silence.

Endpoints may be hinted at before the datastore tells of them (`hint`). A hint stands only where
nothing is stored, and ends as soon as the datastore says anything about its key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.keys import Key, ResourceKey
from cymric.model.net import Network, host_network, parse_interface, parse_network
from cymric.model.policy import Profile
from cymric.model.resources import (
    DEFAULT_ALLOW_PROFILE,
    BGPConfiguration,
    ClusterInformation,
    FelixConfiguration,
    IPPool,
    Node,
)
from cymric.model.strictest import Damaged
from felix.calc import profiles
from felix.calc.config import FelixConfig, Source, from_environment, from_object, settle
from felix.calc.endpoints import LocalEndpoints
from felix.calc.values import Desired, Problem, ProfileRules

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
_ENDPOINT = "WorkloadEndpoint"

T = TypeVar("T")
_Profiles = Mapping[str, ProfileRules]


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
        self._endpoints = LocalEndpoints()
        self._config = FelixConfig()
        self._config_problems: tuple[Problem, ...] = ()
        self._profiles: _Profiles = {}
        self._profile_problems: tuple[Problem, ...] = ()
        self._profile_names: frozenset[str] = frozenset()
        self._dirty = set(KINDS)
        self._desired = Desired()

    def on_update(self, key: Key, value: object | None) -> None:
        """Store one object, or forget it (None)."""
        if not isinstance(key, ResourceKey) or key.kind not in self._objects:
            return
        objects = self._objects[key.kind]
        if isinstance(value, Damaged):
            value = value.stand_in
        if isinstance(value, WorkloadEndpoint) and value.spec.node != self.node_name:
            # Endpoints of other nodes are counted only; a large cluster has very many.
            self._others.add(key)
            value = None
        else:
            self._others.discard(key)
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
        self._endpoints.put(key, value)
        self._dirty.add(_ENDPOINT)
        return True

    def end_hint(self, key: ResourceKey) -> bool:
        """Forget a hint; False if the datastore has spoken since, or there was none."""
        if self._hints.pop(key, None) is None:
            return False
        self._endpoints.put(key, None)
        self._dirty.add(_ENDPOINT)
        return True

    def has_endpoint(self, key: ResourceKey) -> bool:
        """Whether an endpoint of this node is stored or hinted at under `key`."""
        return key in self._hints or key in self._objects[_ENDPOINT]

    @property
    def hint_count(self) -> int:
        """How many hints stand."""
        return len(self._hints)

    def desired(self) -> Desired:
        """The whole picture; the same object again while nothing has changed."""
        if self._dirty:
            self._work_out(self._dirty)
            self._dirty = set()
        return self._desired

    def _work_out(self, dirty: set[str]) -> None:
        before = self._desired
        if "FelixConfiguration" in dirty:
            self._work_out_config()
            dirty |= {"Node"}  # its external nodes
        config = self._config
        self._endpoints.configure(config)
        endpoints = self._endpoints.all
        names = self._endpoints.profiles
        if "Profile" in dirty or names != self._profile_names:
            self._work_out_profiles(names)
        changes: dict[str, object] = {
            "config": config,
            "endpoints": endpoints,
            "profiles": self._profiles,
            "problems": tuple(
                sorted((*self._config_problems, *self._endpoints.problems, *self._profile_problems))
            ),
            "count_by_kind": self._counts(),
        }
        if "ClusterInformation" in dirty:
            changes["is_ready"] = self._is_ready()
        if "IPPool" in dirty:
            changes |= self._pools()
        if "Node" in dirty:
            changes["hosts"] = frozenset(self._hosts(config))
        if "BGPConfiguration" in dirty:
            changes["service_cidrs"] = self._service_cidrs()
        if dirty & UNENFORCED_KINDS:
            changes["unenforced"] = tuple(
                sorted(str(key) for kind in UNENFORCED_KINDS for key in self._objects[kind])
            )
        self._desired = replace(before, **changes)  # type: ignore[arg-type]

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

    def _work_out_config(self) -> None:
        sources = [self._environment]
        problems = []
        found = {
            item.metadata.name: item for item in self._of("FelixConfiguration", FelixConfiguration)
        }
        for name in (f"node.{self.node_name}", "default"):
            if item := found.pop(name, None):
                sources.append(from_object(name, item.spec, item.annotations))
        for name in found:
            if not name.startswith("node."):
                reason = "scoped by selector: ignored"
                problems.append(Problem(f"FelixConfiguration {name}", reason))
        config, rejected = settle(sources)
        problems.extend(Problem(subject, reason) for subject, reason in rejected)
        if not self._has_ipv6:
            config = replace(config, ipv6_support=False)
        self._config, self._config_problems = config, tuple(problems)

    def _is_ready(self) -> bool:
        return all(
            info.spec.datastoreReady is not False
            for info in self._of("ClusterInformation", ClusterInformation)
        )

    def _work_out_profiles(self, names: frozenset[str]) -> None:
        found: dict[str, ProfileRules] = {}
        problems = []
        for name in sorted(names):
            stored = self._objects["Profile"].get(ResourceKey("Profile", name))
            if name == DEFAULT_ALLOW_PROFILE:
                rules, trouble = profiles.DEFAULT_ALLOW, None
            elif isinstance(stored, Profile):
                rules, trouble = profiles.rules_of(stored)
            else:
                rules, trouble = profiles.missing(name), "missing, so it drops everything"
            found[name] = rules
            if trouble:
                problems.append(Problem(f"Profile {name}", trouble))
        self._profiles, self._profile_names = found, names
        self._profile_problems = tuple(problems)

    def _pools(self) -> dict[str, frozenset[Network]]:
        pools = tuple(self._of("IPPool", IPPool))
        return {
            "pools": frozenset(
                pool.spec.network
                for pool in pools
                if tuple(pool.spec.allowed_uses) != ("LoadBalancer",)
            ),
            "masquerade_pools": frozenset(
                pool.spec.network for pool in pools if pool.spec.nat_outgoing
            ),
        }

    def _hosts(self, config: FelixConfig) -> Iterable[Network]:
        yield from map(parse_network, config.external_nodes)
        for node in self._of("Node", Node):
            if bgp := node.spec.bgp:
                for text in (bgp.ipv4_address, bgp.ipv6_address):
                    if text:
                        yield host_network(parse_interface(text).ip)

    def _service_cidrs(self) -> tuple[Network, ...]:
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
        texts = sorted({item.cidr for group in groups for item in group})
        return tuple(map(parse_network, texts))
