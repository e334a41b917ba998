"""From a call to the WorkloadEndpoint it is about: names, labels, profiles. Pure.

A pod (`k8s`) is known by namespace and name, anything else (`cni`) by its container id in
namespace `default`. Source: Calico's CNI plugin, identifiers and generic endpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import quote

from cni.errors import CniError, Code
from cni.request import Call
from cymric.model.endpoints import (
    ANNOTATION_ANNOUNCE,
    LABEL_NAMESPACE,
    LABEL_ORCHESTRATOR,
    LABEL_SERVICE_ACCOUNT,
    WorkloadEndpoint,
    WorkloadEndpointSpec,
    endpoint_name,
    host_interface_name,
)
from cymric.model.keys import ResourceKey
from cymric.model.net import Address, host_network
from cymric.model.resources import DEFAULT_ALLOW_PROFILE, ObjectMeta

DEFAULT_NAMESPACE = "default"
POLICY_KUBERNETES = "k8s"
ANNOTATION_NETWORK = "cymric.io/network"
ANNOTATION_FOREIGN = "cymric.io/foreign-ipam"
_LEFT_BY_GO = "$&+=:@"
"""What Go's url.PathEscape leaves alone beyond letters, digits and `-_.~`."""


@dataclass(frozen=True, kw_only=True)  # no slots: names are worked out once and kept
class Identity:
    """All the names of one endpoint."""

    node: str
    orchestrator: str
    namespace: str
    workload: str
    endpoint: str
    container_id: str
    host_interface: str

    @cached_property
    def key(self) -> ResourceKey:
        """Where the endpoint is stored."""
        name = endpoint_name(self.node, self.orchestrator, self.workload, self.endpoint)
        return ResourceKey("WorkloadEndpoint", name, self.namespace)

    @cached_property
    def key_text(self) -> str:
        """The key as it is in the datastore."""
        return str(self.key)

    @cached_property
    def status_file(self) -> str:
        """The name of the file felix writes when the endpoint is programmed."""
        parts = (self.orchestrator, f"{self.namespace}/{self.workload}", self.endpoint)
        return " ".join(quote(part, safe=_LEFT_BY_GO) for part in parts)


def identify(call: Call, node: str) -> Identity:
    """The endpoint a call is about. Raises CniError when the names cannot be stored."""
    orchestrator = "k8s" if call.is_kubernetes else "cni"
    namespace = call.namespace if call.is_kubernetes else DEFAULT_NAMESPACE
    identity = Identity(
        node=node,
        orchestrator=orchestrator,
        namespace=namespace,
        workload=call.pod or call.container_id,
        endpoint=call.interface,
        container_id=call.container_id,
        host_interface=host_interface_name(
            namespace=namespace, pod=call.pod, container_id=call.container_id
        ),
    )
    try:
        _ = identity.key
    except ValueError as error:
        raise CniError(
            Code.INVALID_ENVIRONMENT, "the endpoint cannot be named", str(error)
        ) from None
    return identity


def attributes(call: Call, node: str, timestamp: str) -> dict[str, str]:
    """What IPAM stores beside the handle."""
    found = {"node": node, "timestamp": timestamp}
    if call.is_kubernetes:
        found |= {"namespace": call.namespace, "pod": call.pod}
    return found


def build(
    call: Call, identity: Identity, *, addresses: Sequence[Address], mac: str, is_foreign: bool
) -> WorkloadEndpoint:
    """The endpoint as it is stored, but for its uid and time of creation.

    `is_foreign`: the addresses are not from our IPAM. Then no block of this node covers them, and
    bgpd is told to announce them one by one, unless the network says not to.
    """
    labels = {
        **call.config.labels,
        LABEL_NAMESPACE: identity.namespace,
        LABEL_ORCHESTRATOR: identity.orchestrator,
    }
    if call.service_account:
        labels[LABEL_SERVICE_ACCOUNT] = call.service_account
    notes = {ANNOTATION_NETWORK: call.config.name}
    if is_foreign:
        notes[ANNOTATION_FOREIGN] = "true"
        if call.config.announce:
            notes[ANNOTATION_ANNOUNCE] = "true"
    wishes = call.wishes
    return WorkloadEndpoint(
        metadata=ObjectMeta(
            name=identity.key.name,
            namespace=identity.namespace,
            labels=labels,
            annotations=notes,
        ),
        spec=WorkloadEndpointSpec(
            orchestrator=identity.orchestrator,
            node=identity.node,
            container_id=identity.container_id,
            pod=call.pod,
            endpoint=identity.endpoint,
            service_account_name=call.service_account,
            ip_networks=tuple(str(host_network(address)) for address in addresses),
            ip_nats=wishes.nats(tuple(addresses)),
            profiles=_profiles(call, identity),
            interface_name=identity.host_interface,
            mac=mac,
            ports=wishes.ports,
            allow_spoofed_source_prefixes=wishes.source_prefixes,
            qos_controls=wishes.qos,
        ),
    )


def is_foreign(endpoint: WorkloadEndpoint) -> bool:
    """Whether its addresses are from elsewhere than our IPAM."""
    return (endpoint.metadata.annotations or {}).get(ANNOTATION_FOREIGN) == "true"


def network_of(endpoint: WorkloadEndpoint) -> str | None:
    """The CNI network that it was made for; None if whoever made it did not say."""
    return (endpoint.metadata.annotations or {}).get(ANNOTATION_NETWORK)


def _profiles(call: Call, identity: Identity) -> tuple[str, ...]:
    if call.config.policy.type != POLICY_KUBERNETES:
        return (DEFAULT_ALLOW_PROFILE,)
    namespace = f"kns.{identity.namespace}"
    if not call.service_account:
        return (namespace,)
    return namespace, f"ksa.{identity.namespace}.{call.service_account}"
