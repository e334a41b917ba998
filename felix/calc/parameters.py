"""Felix' parameters by name: how the text of each is read, and why the others have no effect here.

The names are those of FelixConfiguration; `aliases` are what environment and annotations call them
besides. A parameter is in `PARAMETERS` or in `IGNORED`, and docs/felix-configuration.md has a line
for it. `logAction` is ours. Source: Calico 3.32, felix/config and its FelixConfiguration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cymric.model.durations import duration_s
from cymric.model.net import parse_address, parse_network
from felix.calc.config import ProtocolPort


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
        return duration_s(text)


_PREFIX = re.compile(r"[A-Za-z0-9_.-]{1,14}")
_REGION = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_RATE = re.compile(r"[1-9]\d{0,3}/(second|minute|hour|day)")
_SEVERITIES = {
    "trace": "debug",
    "debug": "debug",
    "info": "info",
    "warning": "warning",
    "error": "error",
    "fatal": "error",
}
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


def _address(version: int) -> Callable[[str], str]:
    def parse(text: str) -> str:
        address = parse_address(text)
        if address.version != version:
            raise ValueError(f"{text} is no IPv{version} address")
        return str(address)

    return parse


def _interfaces(text: str) -> tuple[str, ...]:
    """Names, or patterns between slashes. Raises ValueError."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in names:
        if name.startswith("/") != (len(name) > 1 and name.endswith("/")):
            raise ValueError(f"{name!r} is neither a name nor a pattern between slashes")
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"{name}: {error}") from None
    return names


def _features(text: str) -> tuple[tuple[str, bool], ...]:
    """`MASQFullyRandom=false,SNATFullyRandom=true`."""
    pairs = (part.strip().partition("=") for part in text.split(",") if part.strip())
    return tuple((name, _truth(value)) for name, _, value in pairs)


def _rate(text: str) -> str:
    if not _RATE.fullmatch(text):
        raise ValueError(f"{text!r} is no rate such as 10/minute")
    return text


def _log_action(text: str) -> str:
    word, colon, group = text.lower().partition(":")
    if word == "log" and not colon:
        return word
    if word != "nflog":
        raise ValueError(f"{text!r} is neither log nor nflog:<group>")
    return f"nflog:{_whole(0, 65535)(group or '0')}"


def _region(text: str) -> str:
    if not _REGION.fullmatch(text):
        raise ValueError(f"{text!r} is no name of a region")
    return text


def _severity(text: str) -> str:
    found = _SEVERITIES.get(text.lower())
    if found is None:
        raise ValueError(f"{text!r} is none of {', '.join(_SEVERITIES)}")
    return found


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
    "natOutgoingAddress": Parameter("nat_outgoing_address", _address(4)),
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
    "iptablesFilterAllowAction": Parameter("filter_allow_action", _one_of("accept", "return")),
    "iptablesMangleAllowAction": Parameter("mangle_allow_action", _one_of("accept", "return")),
    "iptablesFilterDenyAction": Parameter("filter_deny_action", _one_of("drop", "reject")),
    "interfaceExclude": Parameter("interface_exclude", _interfaces),
    "featureDetectOverride": Parameter("feature_overrides", _features),
    "deviceRouteSourceAddress": Parameter("device_route_source", _address(4)),
    "deviceRouteSourceAddressIPv6": Parameter("device_route_source_ipv6", _address(6)),
    "logActionRateLimit": Parameter("log_rate_limit", _rate),
    "logActionRateLimitBurst": Parameter("log_rate_limit_burst", _whole(0, 9999)),
    "logAction": Parameter("log_action", _log_action),
    "logSeverityScreen": Parameter("log_severity", _severity),
    "openstackRegion": Parameter("openstack_region", _region),
    "reportingInterval": Parameter(
        "reporting_interval_s", parse_duration, ("reportingIntervalSecs",)
    ),
    "reportingTTL": Parameter("reporting_ttl_s", parse_duration, ("reportingTTLSecs",)),
    "endpointReportingEnabled": Parameter("endpoint_reporting_enabled", _truth),
    "endpointReportingDelay": Parameter(
        "endpoint_reporting_delay_s", parse_duration, ("endpointReportingDelaySecs",)
    ),
    "logPrefix": Parameter("log_prefix", lambda text: re.sub(r'["\\\n]', "_", text)[:27]),
}
"""Every parameter in use, by its JSON name."""

_NO_TUNNELS = "there are no tunnels: pods are routed"
_NO_BPF = "there is no eBPF data plane"
_NO_NFTABLES = "rules are written through iptables, whichever backend it has"
_NO_WIREGUARD = "there is no WireGuard"
_NO_FLOW_LOGS = "there are no flow logs"
_NO_WINDOWS = "there is no Windows"
_NO_ISTIO = "there is no mesh of sidecars to serve"
_NO_GO = "this is no Go program"
_NO_USAGE = "usage is never reported to anybody"
_NO_FAULTS = "a fault of this kind cannot be simulated"
_NO_FILES = "logs go to standard error, for the supervisor to keep"
_OWN_PORTS = "a setting: felix serves before it knows the datastore (docs/operating.md)"
_NO_CLUSTER_ROUTES = "bgpd writes the routes to other nodes"
_NO_MIGRATION = "virtual machines are not moved alive"

_WORDS_BY_REASON: Mapping[str, str] = {
    _NO_TUNNELS: "ipipEnabled ipipMTU vxlanEnabled vxlanMTU vxlanMTUV6 vxlanVNI",
    _NO_NFTABLES: "nftablesMode nftablesRefreshInterval nftablesFilterAllowAction "
    "nftablesMangleAllowAction nftablesFilterDenyAction nftablesMarkMask",
    _NO_BPF: "xdpEnabled xdpRefreshInterval genericXDPEnabled sidecarAccelerationEnabled "
    "cgroupV2Path",
    _NO_WIREGUARD: "wireguardEnabled wireguardEnabledV6 wireguardThreadingEnabled "
    "wireguardListeningPort wireguardListeningPortV6 wireguardRoutingRulePriority "
    "wireguardInterfaceName wireguardInterfaceNameV6 wireguardMTU wireguardMTUV6 "
    "wireguardHostEncryptionEnabled wireguardKeepAlive prometheusWireGuardMetricsEnabled",
    _NO_FLOW_LOGS: "flowLogsPolicyEvaluationMode flowLogsFlushInterval "
    "flowLogsCollectorDebugTrace flowLogsGoldmaneServer flowLogsLocalReporter",
    _NO_WINDOWS: "windowsManageFirewallRules",
    _NO_ISTIO: "istioAmbientMode istioDSCPMark policySyncPathPrefix",
    _NO_GO: "goGCThreshold goMemoryLimitMB goMaxProcs prometheusGoMetricsEnabled featureGates "
    "debugMemoryProfilePath debugHost debugPort",
    _NO_USAGE: "usageReportingEnabled usageReportingInitialDelay usageReportingInterval",
    _NO_FAULTS: "debugDisableLogDropping debugSimulateCalcGraphHangAfter "
    "debugSimulateDataplaneHangAfter debugSimulateDataplaneApplyDelay",
    _NO_FILES: "logFilePath logSeverityFile logSeveritySys logDebugFilenameRegex",
    _OWN_PORTS: "healthEnabled healthHost healthPort prometheusMetricsEnabled "
    "prometheusMetricsHost prometheusMetricsPort prometheusMetricsCAFile "
    "prometheusMetricsCertFile prometheusMetricsKeyFile prometheusMetricsClientAuth "
    "prometheusProcessMetricsEnabled",
    _NO_CLUSTER_ROUTES: "programClusterRoutes routeSource routeTableRanges routeTableRange",
    _NO_MIGRATION: "ipv4ElevatedRoutePriority ipv6ElevatedRoutePriority "
    "liveMigrationRouteConvergenceTime",
    "there is only one data plane, part of felix": "useInternalDataplaneDriver dataplaneDriver",
    "liveness is the pulse of the event loop": "dataplaneWatchdogTimeout healthTimeoutOverrides",
    "interfaces are read with the routes, and followed meanwhile": "interfaceRefreshInterval",
    "iptables itself waits for its lock": "iptablesLockProbeInterval",
    "netlink of this machine is not waited for": "netlinkTimeout",
    "metadata services are nothing to us": "metadataAddr metadataPort",
    "the setting endpoint_status_dir, for cnid must know it as well": "endpointStatusPathPrefix",
    "needed for IPVS, where kube-proxy's own chains decide": "kubeNodePortRanges",
    "routes of others are left alone": "removeExternalRoutes",
    "without routes no pod would ever be complete": "routeSyncDisabled",
    "there is no cloud interface to switch": "awsSrcDstCheck",
    "the MTU is the CNI plugin's business": "mtuIfacePattern requireMTUFile",
}
IGNORED: Mapping[str, str] = {
    name: reason for reason, words in _WORDS_BY_REASON.items() for name in words.split()
}
"""Every other parameter of Calico, and why it has no effect."""


_REASON_BY_START = {
    "bpf": _NO_BPF,
    "typha": "there is no Typha",
    "etcd": "a setting (docs/etcd.md)",
    "datastore": "a setting (docs/etcd.md)",
}
_CALLED_OTHERWISE = {
    "ipinipenabled": "ipipenabled",
    "ipinipmtu": "ipipmtu",
    "wireguardpersistentkeepalive": "wireguardkeepalive",
}
"""Names of the environment that the object does not have."""


def why_ignored(spelling: str) -> str:
    """Why a name that is not in use has no effect."""
    lower = _CALLED_OTHERWISE.get(spelling.lower(), spelling.lower())
    for start, reason in _REASON_BY_START.items():
        if lower.startswith(start):
            return reason
    for name, reason in IGNORED.items():
        if lower.removesuffix("secs").removesuffix("millis") == name.lower():
            return reason
    return "no parameter of that name is known"
