"""Felix' parameters: environment before this node's object before the cluster's before defaults.

Only the parameters that some code reads are here; the rest of Calico's table is ignored. A value
that cannot be read is reported and the next source counts. `none` means the zero value.
Source: Calico 3.32, felix/config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from ipaddress import IPv4Address
from typing import Any

from cymric.model.net import Network, parse_network

ANNOTATION_PREFIX = "config.projectcalico.org/"
ENVIRONMENT_PREFIX = "felix_"


@dataclass(frozen=True, slots=True)
class ProtocolPort:
    """A port that stays open on host endpoints whatever policy says, to `net` or everybody."""

    protocol: str
    port: int
    net: Network | None = None


_ALWAYS_OPEN = tuple(
    ProtocolPort("tcp", port) for port in (179, 2379, 2380, 5473, 6443, 6666, 6667)
)
FAILSAFE_INBOUND = (ProtocolPort("tcp", 22), ProtocolPort("udp", 68), *_ALWAYS_OPEN)
FAILSAFE_OUTBOUND = (ProtocolPort("udp", 53), ProtocolPort("udp", 67), *_ALWAYS_OPEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class FelixConfig:
    """The parameters in use. Intervals are in seconds; 0 switches a periodic check off."""

    interface_prefixes: tuple[str, ...] = ("cali",)
    chain_insert_mode: str = "insert"
    default_endpoint_to_host_action: str = "drop"
    disable_conntrack_invalid_check: bool = False
    allow_vxlan_from_workloads: bool = False
    allow_ipip_from_workloads: bool = False
    vxlan_port: int = 4789
    iptables_backend: str = "auto"
    iptables_refresh_interval_s: float = 180.0
    iptables_post_write_check_interval_s: float = 5.0
    ipsets_refresh_interval_s: float = 90.0
    route_refresh_interval_s: float = 90.0
    iptables_mark_mask: int = 0xFFFF0000
    max_ipset_size: int = 1048576
    nat_outgoing_address: str = ""
    nat_outgoing_exclusions: str = "ippoolsonly"
    nat_outgoing_interface_filter: str = ""
    nat_port_range: str = ""
    external_nodes: tuple[str, ...] = ()
    service_loop_prevention: str = "drop"
    device_route_protocol: int = 3
    normal_route_priority: int = 1024
    normal_route_priority_ipv6: int = 1024
    ip_forwarding: str = "enabled"
    log_prefix: str = "calico-packet"
    ipv6_support: bool = True
    floating_ips: str = "disabled"
    workload_source_spoofing: str = "disabled"
    failsafe_inbound: tuple[ProtocolPort, ...] = FAILSAFE_INBOUND
    failsafe_outbound: tuple[ProtocolPort, ...] = FAILSAFE_OUTBOUND

    @property
    def ip_versions(self) -> tuple[int, ...]:
        """The families in use."""
        return (4, 6) if self.ipv6_support else (4,)

    def route_priority(self, ip_version: int) -> int:
        """The metric of routes to workloads."""
        return self.normal_route_priority if ip_version == 4 else self.normal_route_priority_ipv6

    def is_workload_interface(self, name: str) -> bool:
        """Whether an interface of that name belongs to a workload."""
        return name.startswith(self.interface_prefixes)


@dataclass(frozen=True, slots=True)
class Parameter:
    """How one parameter is called in JSON, where it is kept, and how its text is read."""

    field: str
    parse: Callable[[str], Any]
    aliases: tuple[str, ...] = ()


def parse_duration(text: str) -> float:
    """Seconds in Go's duration text (`1m30s`, `500ms`) or in a plain number of seconds."""
    try:
        return _not_negative(float(text))
    except ValueError:
        parts = _DURATION_PART.findall(text)
        if not parts or "".join(number + unit for number, unit in parts) != text:
            raise ValueError(f"{text!r} is no duration") from None
        return sum(float(number) * _SECONDS_BY_UNIT[unit] for number, unit in parts)


_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(h|ms|m|s|us)")
_SECONDS_BY_UNIT = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "us": 0.000001}
_PREFIX = re.compile(r"[A-Za-z0-9_.-]{1,14}")
_INTERFACE_FILTER = re.compile(r"[A-Za-z0-9_.:-]{1,14}\+?|[A-Za-z0-9_.:-]{15}")


def _not_negative(value: float) -> float:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{value} is negative or endless")
    return value


def _one_of(*words: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"{text!r} is none of {', '.join(words)}")
        return text.lower()

    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text, 0)
        if not low <= number <= high:
            raise ValueError(f"{text} is not between {low} and {high}")
        return number

    return parse


def _truth(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "y", "t"):
        return True
    if text.lower() in ("false", "0", "no", "n", "f"):
        return False
    raise ValueError(f"{text!r} is neither true nor false")


def _prefixes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if not _PREFIX.fullmatch(name):
            raise ValueError(f"{name!r} cannot start an interface name")
    return names


def _interface_filter(text: str) -> str:
    if not _INTERFACE_FILTER.fullmatch(text):
        raise ValueError(f"{text!r} cannot be an interface name")
    return text


def _mark_mask(text: str) -> int:
    mask = _whole(0, 0xFFFFFFFF)(text)
    if mask.bit_count() < 5:
        raise ValueError(f"mask {text} has fewer than five bits")
    return mask


def _port_range(text: str) -> str:
    low, colon, high = text.partition(":")
    if not colon or not 0 < int(low) <= int(high) < 65536:
        raise ValueError(f"{text!r} is no range of ports")
    return f"{int(low)}-{int(high)}"


def _cidrs(text: str) -> tuple[str, ...]:
    return tuple(str(parse_network(part.strip())) for part in text.split(","))


def _protocol_ports(text: str) -> tuple[ProtocolPort, ...]:
    """`tcp:22,udp:68,tcp:10.0.0.0/8:179`; a bare port is tcp."""
    return tuple(_protocol_port(part.strip()) for part in text.split(","))


def _protocol_port(text: str) -> ProtocolPort:
    protocol, _, rest = text.rpartition(":")[0].partition(":")
    protocol = protocol.lower() or "tcp"
    if protocol not in ("tcp", "udp", "sctp"):
        raise ValueError(f"{text!r} names no protocol with ports")
    port = _whole(0, 65535)(text.rpartition(":")[2])
    return ProtocolPort(protocol, port, parse_network(rest.strip("[]")) if rest else None)


PARAMETERS: Mapping[str, Parameter] = {
    "interfacePrefix": Parameter("interface_prefixes", _prefixes),
    "chainInsertMode": Parameter("chain_insert_mode", _one_of("insert", "append")),
    "defaultEndpointToHostAction": Parameter(
        "default_endpoint_to_host_action", _one_of("drop", "return", "accept", "reject")
    ),
    "disableConntrackInvalidCheck": Parameter("disable_conntrack_invalid_check", _truth),
    "allowVXLANPacketsFromWorkloads": Parameter("allow_vxlan_from_workloads", _truth),
    "allowIPIPPacketsFromWorkloads": Parameter("allow_ipip_from_workloads", _truth),
    "vxlanPort": Parameter("vxlan_port", _whole(1, 65535)),
    "iptablesBackend": Parameter("iptables_backend", _one_of("auto", "nft", "legacy")),
    "iptablesRefreshInterval": Parameter("iptables_refresh_interval_s", parse_duration),
    "iptablesPostWriteCheckInterval": Parameter(
        "iptables_post_write_check_interval_s",
        parse_duration,
        ("iptablesPostWriteCheckIntervalSecs",),
    ),
    "ipsetsRefreshInterval": Parameter("ipsets_refresh_interval_s", parse_duration),
    "routeRefreshInterval": Parameter("route_refresh_interval_s", parse_duration),
    "iptablesMarkMask": Parameter("iptables_mark_mask", _mark_mask),
    "maxIpsetSize": Parameter("max_ipset_size", _whole(1, 2**32 - 1)),
    "natOutgoingAddress": Parameter(
        "nat_outgoing_address", lambda text: str(IPv4Address(text)) if text else ""
    ),
    "natOutgoingExclusions": Parameter(
        "nat_outgoing_exclusions", _one_of("ippoolsonly", "ippoolsandhostips")
    ),
    "iptablesNATOutgoingInterfaceFilter": Parameter(
        "nat_outgoing_interface_filter", _interface_filter
    ),
    "natPortRange": Parameter("nat_port_range", _port_range),
    "externalNodesList": Parameter("external_nodes", _cidrs, ("externalNodesCIDRList",)),
    "serviceLoopPrevention": Parameter(
        "service_loop_prevention", _one_of("drop", "reject", "disabled")
    ),
    "deviceRouteProtocol": Parameter("device_route_protocol", _whole(1, 255)),
    "ipv4NormalRoutePriority": Parameter("normal_route_priority", _whole(1, 2147483646)),
    "ipv6NormalRoutePriority": Parameter("normal_route_priority_ipv6", _whole(1, 2147483646)),
    "ipv6Support": Parameter("ipv6_support", _truth),
    "floatingIPs": Parameter("floating_ips", _one_of("enabled", "disabled")),
    "workloadSourceSpoofing": Parameter("workload_source_spoofing", _one_of("any", "disabled")),
    "failsafeInboundHostPorts": Parameter("failsafe_inbound", _protocol_ports),
    "failsafeOutboundHostPorts": Parameter("failsafe_outbound", _protocol_ports),
    "ipForwarding": Parameter("ip_forwarding", _one_of("enabled", "disabled")),
    "logPrefix": Parameter("log_prefix", lambda text: re.sub(r'["\\\n]', "_", text)[:27]),
}
"""Every parameter in use, by its JSON name."""

_PARAMETER_BY_LOWER_NAME = {
    spelling.lower(): name
    for name, parameter in PARAMETERS.items()
    for spelling in (name, *parameter.aliases)
}
_DEFAULTS = {item.name: getattr(FelixConfig(), item.name) for item in fields(FelixConfig)}


@dataclass(frozen=True, slots=True)
class Source:
    """One place parameters come from: its name for reports, and text by any spelling."""

    name: str
    texts: Mapping[str, str]


def from_environment(environment: Mapping[str, str]) -> Source:
    """The variables `FELIX_<NAME>`, case ignored."""
    return Source(
        "environment",
        {
            name[len(ENVIRONMENT_PREFIX) :]: text
            for name, text in environment.items()
            if name.lower().startswith(ENVIRONMENT_PREFIX)
        },
    )


def from_object(name: str, spec: Mapping[str, Any], annotations: Mapping[str, str]) -> Source:
    """One FelixConfiguration; its annotations may force a parameter by name."""
    texts = {key: _text(value) for key, value in spec.items() if value is not None}
    for key, value in annotations.items():
        if key.startswith(ANNOTATION_PREFIX):
            texts[key[len(ANNOTATION_PREFIX) :]] = value
    return Source(f"FelixConfiguration {name}", texts)


def settle(sources: Sequence[Source]) -> tuple[FelixConfig, tuple[tuple[str, str], ...]]:
    """The parameters from `sources`, strongest first; (place, reason) of what was unreadable."""
    values: dict[str, Any] = {}
    rejected: list[tuple[str, str]] = []
    for source in reversed(sources):
        for spelling, text in source.texts.items():
            name = _PARAMETER_BY_LOWER_NAME.get(spelling.lower())
            if name is None:
                continue
            parameter = PARAMETERS[name]
            try:
                values[parameter.field] = _read(parameter, text)
            except ValueError as error:
                rejected.append((f"{source.name} {name}", str(error)))
    return FelixConfig(**values), tuple(rejected)


def _read(parameter: Parameter, text: str) -> Any:
    default = _DEFAULTS[parameter.field]
    if text.strip().lower() not in ("none", ""):
        return parameter.parse(text.strip())
    zero = type(default)()
    # A parameter whose zero value is none of its words keeps its default.
    return zero if parameter.field in _ZERO_ALLOWED else default


_ZERO_ALLOWED = frozenset(
    {
        "iptables_refresh_interval_s",
        "iptables_post_write_check_interval_s",
        "ipsets_refresh_interval_s",
        "route_refresh_interval_s",
        "nat_outgoing_address",
        "nat_outgoing_interface_filter",
        "nat_port_range",
        "external_nodes",
        "log_prefix",
        "failsafe_inbound",
        "failsafe_outbound",
    }
)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):  # a protocol with its port
        words = (value.get("protocol", "tcp"), value.get("net"), value.get("port"))
        return ":".join(str(word) for word in words if word not in (None, ""))
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return ",".join(_text(item) for item in value)
    return str(value)
