"""What etcd holds of a small sound cluster, written by hand: values to spoil one by one."""

from __future__ import annotations

import json
from typing import Any

from cymric.datastore.api import KeyValue
from cymric.model.net import parse_network
from ipam import snapshot
from ipam.snapshot import Snapshot

RESOURCES = "/calico/resources/v3/projectcalico.org"
IPAM = "/calico/ipam/v2"
BLOCK = f"{IPAM}/assignment/ipv4/block/10.0.0.0-30"
OTHER_BLOCK = f"{IPAM}/assignment/ipv4/block/10.0.0.4-30"
SIX_BLOCK = f"{IPAM}/assignment/ipv6/block/fd00::-126"
CLAIM = f"{IPAM}/host/node1/ipv4/block/10.0.0.0-30"
HANDLE = f"{IPAM}/handle/net.a"
POOL = f"{RESOURCES}/ippools/main"
ENDPOINT = f"{RESOURCES}/workloadendpoints/default/node1-cni-a-eth0"
NODE = f"{RESOURCES}/nodes/node1"
NOW_S = 1_767_323_045.0  # 2026-01-02 03:04:05 UTC

Stored = dict[str, Any]


def block(cidr: str, affinity: str | None, *holders: dict[str, Any]) -> Stored:
    """A block whose first addresses are held, each by a holder of its own."""
    size, held = parse_network(cidr).num_addresses, len(holders)
    return {
        "cidr": cidr,
        "affinity": affinity,
        "allocations": [*range(held), *[None] * (size - held)],
        "unallocated": list(range(held, size)),
        "attributes": list(holders) or None,
        "sequenceNumber": 9,
        "sequenceNumberForAllocation": {str(n): 7 for n in range(held)},
        "deleted": False,
    }


def holder(handle: str, **attributes: str) -> Stored:
    """Who holds an address, by handle, on node1 unless said otherwise."""
    return {"handle_id": handle, "secondary": {"node": "node1", **attributes}}


def resource(kind: str, name: str, spec: Stored, **metadata: str) -> Stored:
    """A resource as stored."""
    metadata = {"name": name, **metadata}
    return {"kind": kind, "apiVersion": "projectcalico.org/v3", "metadata": metadata, "spec": spec}


def endpoint(node: str, container: str, *networks: str) -> Stored:
    """A container's endpoint, in the namespace default."""
    spec = {"orchestrator": "cni", "node": node, "containerID": container, "endpoint": "eth0",
            "ipNetworks": list(networks)}  # fmt: skip
    name = f"{node}-cni-{container}-eth0"
    return resource("WorkloadEndpoint", name, spec, namespace="default")


CONFIRMED = {"state": "confirmed", "deleted": False}


def sound() -> Stored:
    """Two nodes; node1 owns a block of which a container holds an address, and one of IPv6."""
    return {
        POOL: resource("IPPool", "main", {"cidr": "10.0.0.0/24", "blockSize": 30}),
        f"{RESOURCES}/ippools/six": resource(
            "IPPool", "six", {"cidr": "fd00::/64", "blockSize": 126}
        ),
        NODE: resource("Node", "node1", {}),
        f"{RESOURCES}/nodes/node2": resource("Node", "node2", {}),
        ENDPOINT: endpoint("node1", "a", "10.0.0.0/32", "fd00::/128"),
        BLOCK: block("10.0.0.0/30", "host:node1", holder("net.a")),
        SIX_BLOCK: block("fd00::/126", "host:node1", holder("net.a")),
        CLAIM: CONFIRMED,
        f"{IPAM}/host/node1/ipv6/block/fd00::-126": CONFIRMED,
        HANDLE: {"block": {"10.0.0.0/30": 1, "fd00::/126": 1}, "deleted": False},
    }


def read(stored: Stored) -> Snapshot:
    """The snapshot of these keys; texts are stored as they are, all else as JSON."""
    pairs = [
        KeyValue(key, (value if isinstance(value, str) else json.dumps(value)).encode(), 5)
        for key, value in sorted(stored.items())
    ]
    return snapshot.read(pairs, 7)


LEAK = holder("net.b", pod="p", namespace="ns", timestamp="2026-01-01 03:04:05.5 +0000 UTC")

CLUSTER = resource(
    "ClusterInformation",
    "default",
    {"clusterGUID": "g", "clusterType": "bgp", "datastoreReady": False},
)
CLUSTER_KEY = f"{RESOURCES}/clusterinformations/default"


def leaking() -> Stored:
    """The sound cluster, locked, with an address and a handle that nothing uses."""
    stored = sound()
    stored[BLOCK] = block("10.0.0.0/30", "host:node1", holder("net.a"), LEAK)
    stored[f"{IPAM}/handle/old"] = {"block": {"10.0.0.0/30": 1}}
    stored[CLUSTER_KEY] = json.loads(json.dumps(CLUSTER))
    return stored
