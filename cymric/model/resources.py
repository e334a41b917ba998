"""The v3 resources that the daemons read: Node, IPPool, BGPPeer and the configurations.

Each kind is a frozen struct with Calico's JSON names and defaults, checked once when decoded: a
value that breaks a rule never becomes an object. Only the fields that some program reads are
typed; what else an operator stored is ignored here and kept by the command line, which works on
the JSON trees. Source: Calico 3.32 resource definitions; each field keeps its name there.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from cymric.model.durations import duration_s
from cymric.model.net import (
    Interface,
    Network,
    parse_address,
    parse_asn,
    parse_interface,
    parse_network,
)
from cymric.model.selector import parse as parse_selector

API_VERSION = "projectcalico.org/v3"
DEFAULT_ASN = 64512
DEFAULT_BGP_PORT = 179
DEFAULT_ROUTE_PRIORITY = 1024
"""The kernel metric of routes to pods."""
DEFAULT_ALLOW_PROFILE = "projectcalico-default-allow"
"""The profile that exists without being stored: it allows everything both ways."""


class ObjectMeta(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Kubernetes object metadata, as far as Calico stores it."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    creation_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None

    @property
    def full_name(self) -> str:
        """`namespace/name`, or the name alone."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class Resource(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What every kind has in common."""

    kind: str
    api_version: str = API_VERSION
    metadata: ObjectMeta

    @property
    def labels(self) -> dict[str, str]:
        """The labels, empty when none are set."""
        return self.metadata.labels or {}

    @property
    def annotations(self) -> dict[str, str]:
        """The annotations, empty when none are set."""
        return self.metadata.annotations or {}


class Spec(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """A spec whose fields are dropped when they hold their default."""


# --- Node -----------------------------------------------------------------------------------------


class NodeBGPSpec(Spec, frozen=True, kw_only=True):
    """A node's BGP addresses (with prefix length, host bits kept) and AS number."""

    as_number: int | str | None = None
    ipv4_address: str = ""
    ipv6_address: str = ""
    ipv4_ipip_tunnel_addr: str = msgspec.field(default="", name="ipv4IPIPTunnelAddr")
    route_reflector_cluster_id: str = msgspec.field(default="", name="routeReflectorClusterID")

    def __post_init__(self) -> None:
        if self.as_number is not None:
            parse_asn(self.as_number)
        if self.ipv4_address and parse_interface(self.ipv4_address).version != 4:
            raise ValueError(f"ipv4Address {self.ipv4_address!r} is not IPv4")
        if self.ipv6_address and parse_interface(self.ipv6_address).version != 6:
            raise ValueError(f"ipv6Address {self.ipv6_address!r} is not IPv6")
        cluster_id = self.route_reflector_cluster_id
        if cluster_id and parse_address(cluster_id).version != 4:
            raise ValueError(f"routeReflectorClusterID {cluster_id!r} is not like an IPv4 address")

    @property
    def ipv4_interface(self) -> Interface | None:
        """The IPv4 address with its network; None if the node has none."""
        return parse_interface(self.ipv4_address) if self.ipv4_address else None

    @property
    def ipv6_interface(self) -> Interface | None:
        """The IPv6 address with its network; None if the node has none."""
        return parse_interface(self.ipv6_address) if self.ipv6_address else None

    @property
    def asn(self) -> int | None:
        """The node's own AS number; None means the cluster's."""
        return None if self.as_number is None else parse_asn(self.as_number)


class NodeAddress(Spec, frozen=True, kw_only=True):
    """One more address of a node; `type` is CalicoNodeIP, InternalIP or ExternalIP."""

    address: str
    type: str = ""


class OrchRef(Spec, frozen=True, kw_only=True):
    """Which object of an orchestrator this node is."""

    node_name: str = ""
    orchestrator: str = ""


class NodeInterface(Spec, frozen=True, kw_only=True):
    """A discovered interface and its addresses."""

    name: str = ""
    addresses: tuple[str, ...] = ()


class NodeSpec(Spec, frozen=True, kw_only=True):
    """See Calico's Node resource."""

    bgp: NodeBGPSpec | None = None
    orch_refs: tuple[OrchRef, ...] = ()
    addresses: tuple[NodeAddress, ...] = ()
    interfaces: tuple[NodeInterface, ...] = ()


class Node(Resource, frozen=True, kw_only=True):
    """A host of the cluster."""

    kind: str = "Node"
    spec: NodeSpec = NodeSpec()
    status: dict[str, Any] = {}


# --- IPPool ---------------------------------------------------------------------------------------


class IPPoolSpec(Spec, frozen=True, kw_only=True):
    """See Calico's IPPool resource. `block_size` is a prefix length."""

    cidr: str
    vxlan_mode: str = "Never"
    ipip_mode: str = "Never"
    nat_outgoing: bool = False
    disabled: bool = False
    disable_bgp_export: bool = msgspec.field(default=False, name="disableBGPExport")
    block_size: int = 0
    node_selector: str = "all()"
    namespace_selector: str = ""
    allowed_uses: tuple[str, ...] = ("Workload", "Tunnel")
    assignment_mode: str = "Automatic"

    def __post_init__(self) -> None:
        network = parse_network(self.cidr)
        low, high = (20, 32) if network.version == 4 else (116, 128)
        if self.block_size and not low <= self.block_size <= high:
            raise ValueError(f"blockSize {self.block_size} is not between {low} and {high}")
        if not self.disabled and self.block_prefix_length < network.prefixlen:
            raise ValueError(
                f"blockSize {self.block_prefix_length} is larger than pool {self.cidr}"
            )
        parse_selector(self.node_selector)
        parse_selector(self.namespace_selector)

    @property
    def network(self) -> Network:
        """The pool's prefix."""
        return parse_network(self.cidr)

    @property
    def block_prefix_length(self) -> int:
        """The prefix length of the pool's blocks: 26 (IPv4) or 122 (IPv6) unless set."""
        return self.block_size or (26 if self.network.version == 4 else 122)

    @property
    def is_encapsulated(self) -> bool:
        """Whether the pool asks for IPIP or VXLAN, which this system does not do."""
        return self.ipip_mode not in ("", "Never") or self.vxlan_mode not in ("", "Never")


class IPPool(Resource, frozen=True, kw_only=True):
    """A range that blocks are cut from."""

    kind: str = "IPPool"
    spec: IPPoolSpec
    status: dict[str, Any] | UnsetType = UNSET

    @property
    def is_allocatable(self) -> bool:
        """Whether new addresses may be given: not disabled, and no condition says otherwise."""
        status = self.status if isinstance(self.status, dict) else {}
        conditions = status.get("conditions") or ()
        refused = any(
            isinstance(condition, dict)
            and condition.get("type") == "Allocatable"
            and condition.get("status") == "False"
            for condition in conditions
        )
        return not self.spec.disabled and not refused


class IPReservationSpec(Spec, frozen=True, kw_only=True):
    """Addresses that are never assigned automatically."""

    reserved_cidrs: tuple[str, ...] = msgspec.field(default=(), name="reservedCIDRs")

    def __post_init__(self) -> None:
        for cidr in self.reserved_cidrs:
            parse_network(cidr)


class IPReservation(Resource, frozen=True, kw_only=True):
    """See Calico's IPReservation resource."""

    kind: str = "IPReservation"
    spec: IPReservationSpec = IPReservationSpec()


# --- BGP ------------------------------------------------------------------------------------------


class BGPPeerSpec(Spec, frozen=True, kw_only=True):
    """See Calico's BGPPeer resource. Durations are Go text (`2m0s`)."""

    node: str = ""
    node_selector: str = ""
    peer_ip: str = msgspec.field(default="", name="peerIP")
    as_number: int | str | None = None
    peer_selector: str = ""
    local_as_number: int | str | None = msgspec.field(default=None, name="localASNumber")
    keep_original_next_hop: bool = False
    next_hop_mode: str = ""
    source_address: str = ""
    max_restart_time: str = ""
    keepalive_time: str = ""
    num_allowed_local_as_numbers: int = msgspec.field(default=0, name="numAllowedLocalASNumbers")
    reachable_by: str = ""
    ttl_security: int | None = None
    reverse_peering: str = ""
    local_workload_selector: str = ""
    filters: tuple[str, ...] = ()
    password: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.node and self.node_selector:
            raise ValueError("node and nodeSelector exclude each other")
        if self.peer_ip and self.peer_selector:
            raise ValueError("peerIP and peerSelector exclude each other")
        if self.as_number is not None:
            parse_asn(self.as_number)
        if self.local_as_number is not None:
            parse_asn(self.local_as_number)
        for duration in (self.max_restart_time, self.keepalive_time):
            if duration:
                duration_s(duration)
        if self.peer_ip:
            split_peer_address(self.peer_ip)
        if self.reachable_by:
            if not self.peer_ip:
                raise ValueError("reachableBy needs peerIP")
            peer = parse_address(split_peer_address(self.peer_ip)[0])
            if parse_address(self.reachable_by).version != peer.version:
                raise ValueError("reachableBy and peerIP are of two families")
        if self.ttl_security is not None and not 0 <= self.ttl_security <= 255:
            raise ValueError(f"ttlSecurity {self.ttl_security} is not between 0 and 255")
        for selector in (self.node_selector, self.peer_selector, self.local_workload_selector):
            parse_selector(selector)

    @property
    def asn(self) -> int | None:
        """The peer's AS number; None if not given."""
        return None if self.as_number is None else parse_asn(self.as_number)

    @property
    def local_asn(self) -> int | None:
        """The AS number to present on these sessions; None means the node's."""
        return None if self.local_as_number is None else parse_asn(self.local_as_number)


class BGPPeer(Resource, frozen=True, kw_only=True):
    """A BGP session that some or all nodes have."""

    kind: str = "BGPPeer"
    spec: BGPPeerSpec = BGPPeerSpec()


class CIDRBlock(Spec, frozen=True, kw_only=True):
    """`{"cidr": …}` in lists of service ranges."""

    cidr: str

    def __post_init__(self) -> None:
        parse_network(self.cidr)


def parse_community(text: str) -> tuple[int, ...]:
    """Two numbers of 16 bits (`aa:nn`) or three of 32 (`aa:nn:mm`). Raises ValueError."""
    parts = text.split(":")
    bits = {2: 16, 3: 32}.get(len(parts))
    if bits is None or not all(part.isdecimal() and int(part) < 1 << bits for part in parts):
        raise ValueError(f"community {text!r} is neither aa:nn nor aa:nn:mm")
    return tuple(map(int, parts))


class NamedCommunity(Spec, frozen=True, kw_only=True):
    """A name for a community."""

    name: str
    value: str

    def __post_init__(self) -> None:
        parse_community(self.value)


class PrefixAdvertisement(Spec, frozen=True, kw_only=True):
    """Communities, by value or name, for all routes inside a prefix."""

    cidr: str
    communities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        parse_network(self.cidr)


class BGPConfigurationSpec(Spec, frozen=True, kw_only=True):
    """See Calico's BGPConfiguration resource."""

    log_severity_screen: str = ""
    node_to_node_mesh_enabled: bool = True
    as_number: int | str | None = None
    service_load_balancer_ips: tuple[CIDRBlock, ...] = msgspec.field(
        default=(), name="serviceLoadBalancerIPs"
    )
    service_external_ips: tuple[CIDRBlock, ...] = msgspec.field(
        default=(), name="serviceExternalIPs"
    )
    service_cluster_ips: tuple[CIDRBlock, ...] = msgspec.field(default=(), name="serviceClusterIPs")
    listen_port: int = 0
    """The port to listen on; 0 means not said here."""
    service_load_balancer_aggregation: str = ""
    program_cluster_routes: str = ""
    communities: tuple[NamedCommunity, ...] = ()
    prefix_advertisements: tuple[PrefixAdvertisement, ...] = ()
    ipv4_normal_route_priority: int = DEFAULT_ROUTE_PRIORITY
    ipv6_normal_route_priority: int = DEFAULT_ROUTE_PRIORITY
    node_mesh_max_restart_time: str = ""
    node_mesh_password: dict[str, Any] | None = None
    bind_mode: str = ""
    ignored_interfaces: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.as_number is not None:
            parse_asn(self.as_number)
        if not 0 <= self.listen_port < 65536:
            raise ValueError(f"listenPort {self.listen_port} is no TCP port")
        if self.node_mesh_max_restart_time:
            duration_s(self.node_mesh_max_restart_time)
        for priority in (self.ipv4_normal_route_priority, self.ipv6_normal_route_priority):
            if not 1 <= priority <= 2**31 - 2:
                raise ValueError(f"route priority {priority} is not between 1 and {2**31 - 2}")

    @property
    def asn(self) -> int:
        """The cluster's AS number."""
        return DEFAULT_ASN if self.as_number is None else parse_asn(self.as_number)


class BGPConfiguration(Resource, frozen=True, kw_only=True):
    """Cluster-wide (`default`) or one node's (`node.<name>`) BGP settings."""

    kind: str = "BGPConfiguration"
    spec: BGPConfigurationSpec = BGPConfigurationSpec()


def split_peer_address(text: str) -> tuple[str, int | None]:
    """Address and port of `10.0.0.1`, `10.0.0.1:1179`, `[fd00::1]:1179` or `fd00::1`."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"peer address {text!r} has a broken bracket")
        port_text = rest[1:]
    elif text.count(":") == 1:
        host, _, port_text = text.partition(":")
        if not port_text:
            raise ValueError(f"peer address {text!r} has no port after the colon")
    else:
        host, port_text = text, ""
    port = int(port_text) if port_text else None
    if port is not None and not 0 < port < 65536:
        raise ValueError(f"peer address {text!r} has no valid port")
    return str(parse_address(host)), port


# --- Felix, cluster -------------------------------------------------------------------------------


class FelixConfiguration(Resource, frozen=True, kw_only=True):
    """Felix' parameters by their JSON names; which of them count is Felix' own business."""

    kind: str = "FelixConfiguration"
    spec: dict[str, Any] = {}


class ClusterInformationSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who this cluster is. `datastoreReady` false means: locked, change nothing."""

    clusterGUID: str = ""  # noqa: N815
    clusterType: str = ""  # noqa: N815
    calicoVersion: str = ""  # noqa: N815
    datastoreReady: bool | None = None  # noqa: N815
    variant: str = ""


class ClusterInformation(Resource, frozen=True, kw_only=True):
    """The singleton `default`."""

    kind: str = "ClusterInformation"
    spec: ClusterInformationSpec = ClusterInformationSpec()
