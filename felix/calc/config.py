"""Felix' parameters as values: what each one is when nobody sets it, and what follows from several.

Where they come from and which source counts is told in `sources`, how their text is read in
`parameters`. Only what some code reads is here. Source: Calico 3.32, felix/config.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cymric.model.net import Network


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
    filter_allow_action: str = "accept"
    """What ends an accepted packet's way in filter, `accept` or `return` (to others' rules)."""
    mangle_allow_action: str = "accept"
    filter_deny_action: str = "drop"
    """`drop` or `reject`; raw and mangle cannot reject, they drop."""
    interface_exclude: tuple[str, ...] = ("kube-ipvs0",)
    """Interfaces of the host that are as if they were not there: names, or `/patterns/`."""
    feature_overrides: tuple[tuple[str, bool], ...] = ()
    device_route_source: str = ""
    device_route_source_ipv6: str = ""
    log_prefix: str = "calico-packet"
    log_action: str = "log"
    """`log` for the kernel's log, `nflog:<group>` for whoever listens to that group."""
    log_rate_limit: str = ""
    log_rate_limit_burst: int = 5
    log_severity: str = ""
    """The least that is logged, `debug` to `error`; empty leaves it to the settings."""
    openstack_region: str = ""
    reporting_interval_s: float = 30.0
    reporting_ttl_s: float = 90.0
    endpoint_reporting_enabled: bool = False
    endpoint_reporting_delay_s: float = 1.0
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

    def route_source(self, ip_version: int) -> str:
        """The address that the host uses towards workloads, empty to leave it to the kernel."""
        return self.device_route_source if ip_version == 4 else self.device_route_source_ipv6

    def can(self, feature: str) -> bool:
        """Whether the kernel is to be trusted with a feature; all are, unless one is overridden."""
        return dict(self.feature_overrides).get(feature, True)

    def is_excluded_interface(self, name: str) -> bool:
        """Whether an interface of the host is nobody's business."""
        return any(
            re.search(one[1:-1], name) is not None if one.startswith("/") else one == name
            for one in self.interface_exclude
        )

    def is_workload_interface(self, name: str) -> bool:
        """Whether an interface of that name belongs to a workload."""
        return name.startswith(self.interface_prefixes)
