"""The workload endpoints of this node, one per interface, kept up endpoint by endpoint.

What one endpoint is does not depend on the others, save that of two on one interface the lexically
first id counts; so a change costs the work of its own interface, however many pods there are. An
unchanged endpoint stays the same object, which is how those downstream see that it is unchanged.
The picture depends on what is there now, never on the order in which it came.
"""

from __future__ import annotations

import re
from bisect import bisect_left, insort
from collections import Counter
from contextlib import suppress

from cymric.model.endpoints import WorkloadEndpoint, parse_dscp
from cymric.model.keys import ResourceKey
from cymric.model.net import Address, parse_address
from felix.calc.config import FelixConfig
from felix.calc.values import Endpoint, EndpointId, FloatingAddress, Problem

_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_MAC = re.compile(r"([0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}")
_PROFILE = re.compile(r"[A-Za-z0-9._-]{1,253}")


class LocalEndpoints:
    """See the chapter."""

    def __init__(self) -> None:
        self._config = FelixConfig()
        self._stored: dict[ResourceKey, WorkloadEndpoint] = {}
        self._usable: dict[ResourceKey, Endpoint] = {}
        self._unusable: dict[ResourceKey, Problem] = {}
        self._keys_by_interface: dict[str, set[ResourceKey]] = {}
        self._by_interface: dict[str, Endpoint] = {}
        self._key_by_interface: dict[str, ResourceKey] = {}
        self._interfaces: list[str] = []
        self._second: dict[str, tuple[Problem, ...]] = {}
        self._profile_uses: Counter[str] = Counter()
        self._listed: tuple[Endpoint, ...] | None = ()

    def put(self, key: ResourceKey, stored: WorkloadEndpoint | None) -> None:
        """Note one endpoint, or that there is none (None)."""
        if stored is None:
            self._stored.pop(key, None)
            self._unusable.pop(key, None)
            self._use(key, None)
            return
        self._stored[key] = stored
        self._judge(key, stored)

    def configure(self, config: FelixConfig) -> None:
        """Judge all endpoints by these parameters from now on."""
        if config != self._config:
            self._config = config
            for key, stored in self._stored.items():
                self._judge(key, stored)

    @property
    def all(self) -> tuple[Endpoint, ...]:
        """By interface name; the same tuple again while nothing has changed."""
        if self._listed is None:
            self._listed = tuple(map(self._by_interface.__getitem__, self._interfaces))
        return self._listed

    @property
    def keys(self) -> frozenset[ResourceKey]:
        """The keys of `all`."""
        return frozenset(self._key_by_interface.values())

    def key_of(self, endpoint: Endpoint) -> ResourceKey:
        """Under which key one of `all` is stored."""
        return self._key_by_interface[endpoint.interface]

    @property
    def profiles(self) -> frozenset[str]:
        """The profiles that endpoints name."""
        return frozenset(self._profile_uses)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What is left out, and why."""
        second = (problem for found in self._second.values() for problem in found)
        return (*self._unusable.values(), *second)

    def _judge(self, key: ResourceKey, stored: WorkloadEndpoint) -> None:
        endpoint = to_endpoint(stored, self._config)
        if reason := _why_not(endpoint, self._config):
            self._unusable[key] = Problem(f"WorkloadEndpoint {endpoint.id}", reason)
            self._use(key, None)
        else:
            self._unusable.pop(key, None)
            if endpoint.dscp is None and (reason := _why_no_dscp(stored)):
                self._unusable[key] = Problem(f"WorkloadEndpoint {endpoint.id}", reason)
            self._use(key, endpoint)

    def _use(self, key: ResourceKey, endpoint: Endpoint | None) -> None:
        before = self._usable.get(key)
        if before == endpoint:
            return
        if endpoint is None:
            del self._usable[key]
        else:
            self._usable[key] = endpoint
            self._keys_by_interface.setdefault(endpoint.interface, set()).add(key)
        if before is not None and (endpoint is None or endpoint.interface != before.interface):
            self._keys_by_interface[before.interface].discard(key)
        for name in {one.interface for one in (before, endpoint) if one is not None}:
            self._settle(name)

    def _settle(self, interface: str) -> None:
        """Find out whose `interface` is."""
        keys = self._keys_by_interface[interface]
        found_keys = sorted(keys, key=lambda key: str(self._usable[key].id))
        found = [self._usable[key] for key in found_keys]
        first = found[0] if found else None
        self._key_by_interface.pop(interface, None)
        if found_keys:
            self._key_by_interface[interface] = found_keys[0]
        self._second.pop(interface, None)
        if first is not None and len(found) > 1:
            reason = f"{interface} already belongs to {first.id}"
            self._second[interface] = tuple(
                Problem(f"WorkloadEndpoint {one.id}", reason) for one in found[1:]
            )
        before = self._by_interface.pop(interface, None)
        if before is first:
            if first is not None:
                self._by_interface[interface] = first
            return
        self._listed = None
        if before is not None:
            self._profile_uses -= Counter(before.profiles)
        if first is not None:
            self._profile_uses.update(first.profiles)
            self._by_interface[interface] = first
            if before is None:
                insort(self._interfaces, interface)
        else:
            del self._interfaces[bisect_left(self._interfaces, interface)]
            del self._keys_by_interface[interface]


def to_endpoint(stored: WorkloadEndpoint, config: FelixConfig) -> Endpoint:
    """What a stored endpoint means under these parameters."""
    spec = stored.spec
    addresses = tuple(item for item in spec.addresses if item.version in config.ip_versions)
    return Endpoint(
        id=EndpointId(spec.orchestrator, stored.workload_id, spec.endpoint),
        interface=spec.interface_name,
        mac=spec.mac.lower(),
        addresses=addresses,
        profiles=spec.profiles,
        spoofable=spec.spoofable if config.workload_source_spoofing == "any" else (),
        floating=_floating(stored, addresses) if config.floating_ips == "enabled" else (),
        dscp=_dscp(stored),
    )


def _dscp(stored: WorkloadEndpoint) -> int | None:
    """None, too, where what is written cannot be read: that is no reason to refuse a pod."""
    controls = stored.spec.qos_controls
    if controls is None or controls.dscp is None:
        return None
    with suppress(ValueError):
        return parse_dscp(controls.dscp)
    return None


def _why_no_dscp(stored: WorkloadEndpoint) -> str:
    controls = stored.spec.qos_controls
    wish = None if controls is None else controls.dscp
    return "" if wish is None else f"its packets keep their DSCP: {wish!r} is none"


def _floating(
    stored: WorkloadEndpoint, addresses: tuple[Address, ...]
) -> tuple[FloatingAddress, ...]:
    pairs = (
        FloatingAddress(parse_address(nat.external_ip), parse_address(nat.internal_ip))
        for nat in stored.spec.ip_nats
    )
    return tuple(pair for pair in pairs if pair.internal in addresses)


def _why_not(endpoint: Endpoint, config: FelixConfig) -> str | None:
    """Why an endpoint cannot be enforced. What reaches rule text is checked here, once."""
    if not endpoint.addresses:
        which = "address" if 6 in config.ip_versions else "IPv4 address"
        return f"has no {which}: ignored"
    if not _INTERFACE.fullmatch(endpoint.interface):
        return f"has no usable interface name ({endpoint.interface!r}): ignored"
    if not config.is_workload_interface(endpoint.interface):
        return f"is on {endpoint.interface}, which no workload prefix covers: ignored"
    if endpoint.mac and not _MAC.fullmatch(endpoint.mac):
        return f"has no usable MAC ({endpoint.mac!r}): ignored"
    if bad := [name for name in endpoint.profiles if not _PROFILE.fullmatch(name)]:
        return f"names the impossible profile {bad[0]!r}: ignored"
    return None
