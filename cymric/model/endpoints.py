"""WorkloadEndpoint, and the names that Calico computes for endpoints.

Source: Calico's internal WorkloadEndpoint resource and its CNI plugin. Resource name: four
segments joined by `-`, inside a segment each `-` doubled. Host side interface: `cali` and eleven
hexadecimal digits of SHA-1 (Kubernetes), or the start of the container id.
"""

from __future__ import annotations

import hashlib

import msgspec

from cymric.model.net import Address, Network, parse_address, parse_interface, parse_network
from cymric.model.resources import Resource, Spec

LABEL_NAMESPACE = "projectcalico.org/namespace"
LABEL_ORCHESTRATOR = "projectcalico.org/orchestrator"
LABEL_SERVICE_ACCOUNT = "projectcalico.org/serviceaccount"
ANNOTATION_ANNOUNCE = "cymric.io/announce"
"""On an endpoint, `true`: its addresses are announced even where no pool covers them."""
HOST_MAC = "ee:ee:ee:ee:ee:ee"
"""The MAC of every host side veth: pods never need to learn it anew."""
POD_GATEWAY = "169.254.1.1"
"""The next hop inside every pod; the host answers ARP for it by proxy."""

MAX_INTERFACE_NAME = 15


class EndpointNAT(msgspec.Struct, frozen=True, kw_only=True):
    """A floating address: what is sent to `external_ip` reaches the endpoint at `internal_ip`."""

    internal_ip: str = msgspec.field(default="", name="internalIP")
    external_ip: str = msgspec.field(default="", name="externalIP")


class EndpointPort(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A port by name, as policy may refer to it. Host port 0 and an empty host IP mean none."""

    name: str = ""
    protocol: str | int = ""
    port: int = 0
    host_port: int = 0
    host_ip: str = msgspec.field(default="", name="hostIP")


_DSCP_BY_NAME = {
    "DF": 0,
    **{f"CS{n}": 8 * n for n in range(8)},
    **{f"AF{n}{drop}": 8 * n + 2 * drop for n in range(1, 5) for drop in range(1, 4)},
    "VA": 44,
    "EF": 46,
}


def parse_dscp(value: int | str) -> int:
    """The six bits behind a number or a name such as AF11 (RFC 2474, 2597, 3246). ValueError."""
    text = str(value).upper()
    number = _DSCP_BY_NAME.get(text, int(text) if text.isdecimal() else -1)
    if not 0 <= number < 64:
        raise ValueError(f"{value!r} is no DSCP")
    return number


class QoSControls(Spec, frozen=True, kw_only=True):
    """Limits of one endpoint; 0 is none. Rates and bursts in bits, `minburst` in bytes."""

    ingress_bandwidth: int = 0
    ingress_burst: int = 0
    ingress_peakrate: int = 0
    ingress_minburst: int = 0
    egress_bandwidth: int = 0
    egress_burst: int = 0
    egress_peakrate: int = 0
    egress_minburst: int = 0
    ingress_packet_rate: int = 0
    ingress_packet_burst: int = 0
    egress_packet_rate: int = 0
    egress_packet_burst: int = 0
    ingress_max_connections: int = 0
    egress_max_connections: int = 0
    dscp: int | str | None = None
    """See `parse_dscp`."""


class WorkloadEndpointSpec(Spec, frozen=True, kw_only=True):
    """See Calico's WorkloadEndpoint resource. `ip_networks` holds /32 and /128 only."""

    orchestrator: str
    workload: str = ""
    node: str
    container_id: str = msgspec.field(default="", name="containerID")
    pod: str = ""
    endpoint: str
    service_account_name: str = ""
    ip_networks: tuple[str, ...] = ()
    ip_nats: tuple[EndpointNAT, ...] = msgspec.field(default=(), name="ipNATs")
    ipv4_gateway: str = ""
    ipv6_gateway: str = ""
    profiles: tuple[str, ...] = ()
    interface_name: str = ""
    mac: str = ""
    ports: tuple[EndpointPort, ...] = ()
    allow_spoofed_source_prefixes: tuple[str, ...] = ()
    qos_controls: QoSControls | None = msgspec.field(default=None, name="qosControls")

    def __post_init__(self) -> None:
        if not (self.orchestrator and self.node and self.endpoint):
            raise ValueError("orchestrator, node and endpoint are required")
        if len(self.interface_name) > MAX_INTERFACE_NAME:
            raise ValueError(f"interfaceName {self.interface_name!r} is longer than 15 characters")
        for text in self.ip_networks:
            network = parse_network(text)
            if network.prefixlen != network.max_prefixlen:
                raise ValueError(f"ipNetworks {text!r} is not a single address")
        for nat in self.ip_nats:
            internal, external = parse_address(nat.internal_ip), parse_address(nat.external_ip)
            if internal.version != external.version:
                raise ValueError(f"ipNATs maps {nat.external_ip} to the other family")
        _ = self.spoofable  # readable, or this is no endpoint

    @property
    def spoofable(self) -> tuple[Network, ...]:
        """The prefixes that the endpoint may send from beside its addresses; host bits are cut."""
        return tuple(parse_interface(text).network for text in self.allow_spoofed_source_prefixes)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The endpoint's addresses."""
        return tuple(parse_network(text).network_address for text in self.ip_networks)

    @property
    def workload_name(self) -> str:
        """The third segment of the endpoint's name: pod, container or workload."""
        if self.orchestrator == "k8s":
            return self.pod
        if self.orchestrator == "cni":
            return self.container_id
        if self.orchestrator == "libnetwork":
            return "libnetwork"
        return self.workload


class WorkloadEndpoint(Resource, frozen=True, kw_only=True):
    """One interface of one workload, namespaced."""

    kind: str = "WorkloadEndpoint"
    spec: WorkloadEndpointSpec

    def __post_init__(self) -> None:
        expected = endpoint_name(
            self.spec.node, self.spec.orchestrator, self.spec.workload_name, self.spec.endpoint
        )
        if self.metadata.name != expected:
            raise ValueError(f"the endpoint's fields make its name {expected}")

    @property
    def is_announced_anywhere(self) -> bool:
        """Whether addresses outside every pool are announced, too: another IPAM gave them."""
        return (self.metadata.annotations or {}).get(ANNOTATION_ANNOUNCE) == "true"

    @property
    def workload_id(self) -> str:
        """`<namespace>/<pod | container | workload>`, as in status files and keys."""
        return f"{self.metadata.namespace}/{self.spec.workload_name}"


def endpoint_name(node: str, orchestrator: str, workload: str, endpoint: str) -> str:
    """The resource name made of four segments. Raises ValueError for an empty or dashed edge."""
    segments = (node, orchestrator, workload, endpoint)
    for segment in segments:
        if not segment or segment.startswith("-") or segment.endswith("-"):
            raise ValueError(f"{segment!r} cannot be part of an endpoint's name")
    return "-".join(segment.replace("-", "--") for segment in segments)


def endpoint_name_prefix(node: str, orchestrator: str, workload: str) -> str:
    """How the names of all endpoints of one workload begin."""
    return endpoint_name(node, orchestrator, workload, "x")[:-1]


def host_interface_name(
    *, namespace: str, pod: str = "", container_id: str = "", prefix: str = "cali"
) -> str:
    """The name of the host side veth: by pod when there is one, else by container id."""
    if pod:
        digest = hashlib.sha1(f"{namespace}.{pod}".encode(), usedforsecurity=False).hexdigest()
        return prefix + digest[:11]
    return prefix + container_id[:11]


class HostEndpointPort(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A port of the host by name, as policy may refer to it."""

    name: str
    protocol: str | int
    port: int


class HostEndpointSpec(Spec, frozen=True, kw_only=True):
    """One interface of a node, by name (`*`: all that have no own one) or by its addresses."""

    node: str
    interface_name: str = ""
    expected_ips: tuple[str, ...] = msgspec.field(default=(), name="expectedIPs")
    profiles: tuple[str, ...] = ()
    ports: tuple[HostEndpointPort, ...] = ()

    def __post_init__(self) -> None:
        if not self.node:
            raise ValueError("node is required")
        if len(self.interface_name) > MAX_INTERFACE_NAME:
            raise ValueError(f"interfaceName {self.interface_name!r} is longer than 15 characters")
        if not (self.interface_name or self.expected_ips):
            raise ValueError("one of interfaceName and expectedIPs is required")
        for text in self.expected_ips:
            parse_address(text)

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The addresses that it is expected to have, and that IP sets hold of it."""
        return tuple(map(parse_address, self.expected_ips))


class HostEndpoint(Resource, frozen=True, kw_only=True):
    """See Calico's HostEndpoint resource."""

    kind: str = "HostEndpoint"
    spec: HostEndpointSpec
