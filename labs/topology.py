"""Who is where: names, addresses and folders of a lab, as values.

Every other module of the lab takes its names from here, so that two labs with different names can
run beside each other on one machine: nothing is shared but the program files. The addresses follow
the plan of Calico's operator course: nodes in 198.19.0.0/20, pods in 198.19.16.0/20.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

UNDERLAY = IPv4Network("198.19.0.0/20")
POD_RANGE = IPv4Network("198.19.16.0/20")
DEFAULT_POOL = IPv4Network("198.19.16.0/21")
EXTERNAL_POOL = IPv4Network("198.19.24.0/21")
SERVICE_RANGE = IPv4Network("198.19.32.0/20")
EXTERNAL_SERVICE_RANGE = IPv4Network("198.19.48.0/20")

CONTROL = "control"
HOST = "host1"
HOST_ADDRESS = IPv4Address("198.19.15.254")
AS_NUMBER = 64512
ETCD_PORT = 2379
HTTP_PORT = 80
"""Every pod, and the host outside, answers HTTP here with the address of the client it sees."""

DEFAULT_POOL_NAME = "default-ipv4-ippool"
EXTERNAL_POOL_NAME = "external-pool"

LAB_NAME = "cymric"
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?")


class Unknown(ValueError):
    """A name that this lab does not have, or a name that no lab can have."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster: a network namespace with one address on the bridge."""

    name: str
    address: IPv4Address

    @property
    def interface(self) -> IPv4Interface:
        """The address with the length of the underlay, as the Node object stores it."""
        return IPv4Interface(f"{self.address}/{UNDERLAY.prefixlen}")


@dataclass(frozen=True, slots=True)
class Pod:
    """A namespace with a small HTTP server in it. `pools` empty: any pool that selects the node."""

    name: str
    node: str
    pools: tuple[str, ...] = ()
    container_id: str = ""
    address: str = ""


NODES = (
    Node(CONTROL, IPv4Address("198.19.0.1")),
    Node("node1", IPv4Address("198.19.0.2")),
    Node("node2", IPv4Address("198.19.0.3")),
)
PODS = (
    Pod("customer", "node1"),
    Pod("summary-1", CONTROL),
    Pod("summary-2", "node2"),
    Pod("database", "node2"),
    Pod("nginx", "node1", pools=(EXTERNAL_POOL.exploded,)),
)
DAEMONS = ("cnid", "confd", "exabgp", "bgpd", "felix")
"""The programs of a node, in the order in which they are started."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where one lab keeps its things. Namespaces start with `name`, files are under `state`."""

    name: str = LAB_NAME
    run_root: Path = field(default=Path("/run"))

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def state(self) -> Path:
        """Everything the lab writes; removed when it is taken down."""
        return self.run_root / f"{self.name}-lab"

    @property
    def logs(self) -> Path:
        """One file per process."""
        return self.state / "log"

    @property
    def bridge_namespace(self) -> str:
        """The namespace that holds the bridge, and nothing else."""
        return f"{self.name}-net"

    def namespace(self, machine: str) -> str:
        """The network namespace of a node or of the host outside."""
        return f"{self.name}-{machine}"

    def pod_namespace(self, pod: str) -> str:
        """The network namespace of a pod."""
        return f"{self.name}-pod-{pod}"

    def owns_namespace(self, namespace: str) -> bool:
        """True for names that only this lab gives, even when its records are lost."""
        known = rf"{re.escape(self.name)}-(net|{HOST}|{CONTROL}|node\d+|tor\d|pod-[a-z0-9-]+)"
        return re.fullmatch(known, namespace) is not None

    def node_dir(self, node: str) -> Path:
        """Sockets, caches and status files of one node."""
        return self.state / node

    @property
    def etcd_url(self) -> str:
        """Reachable from every namespace of the lab, and from nowhere else."""
        return f"http://{NODES[0].address}:{ETCD_PORT}"

    def environment(self, node: Node) -> dict[str, str]:
        """What configures every Cymric program on `node`."""
        home = self.node_dir(node.name)
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "CYMRIC_NODE_NAME": node.name,
            "CYMRIC_NODE_IP": str(node.interface),
            "CYMRIC_ETCD_ENDPOINTS": self.etcd_url,
            "CYMRIC_RUN_DIR": str(home / "run"),
            "CYMRIC_STATE_DIR": str(home / "state"),
            "CYMRIC_ENDPOINT_STATUS_DIR": str(home / "endpoint-status"),
            "CYMRIC_LOG_FORMAT": "console",
            # Not the file of this machine, which may be a node of a real cluster.
            "CYMRIC_CONFIG": str(home / "cymric.toml"),
            "NO_DEFAULT_POOLS": "true",
        }


def check_name(name: str) -> str:
    """Return `name` if it can name a lab, node or pod; raise Unknown otherwise."""
    if not LABEL.fullmatch(name):
        raise Unknown(f"not a name: {name!r} (small letters, digits and - inside)")
    return name


def address_for(name: str, taken: frozenset[IPv4Address]) -> IPv4Address:
    """The underlay address of a new node: nodeN gets 198.19.0.(N+1) if free, else the first free.

    The first three are the course's (control .1, node1 .2, node2 .3), and stay reserved for them.
    """
    for node in NODES:
        if node.name == name:
            return node.address
    numbered = re.fullmatch(r"node(\d{1,3})", name)
    wish = [UNDERLAY[int(numbered[1]) + 1]] if numbered else []
    reserved = taken | {node.address for node in NODES} | {HOST_ADDRESS}
    for address in (*wish, *UNDERLAY.hosts()):
        if address not in reserved:
            return address
    raise Unknown(f"no address left in {UNDERLAY} for {name}")


def mac_for(address: IPv4Address) -> str:
    """A stable, locally administered MAC, so that a node that comes back is the same neighbour.

    Otherwise the other nodes would send to the old one until their neighbour entries expire.
    """
    return "02:00:" + ":".join(f"{byte:02x}" for byte in address.packed)


def container_id(pod: str, generation: str) -> str:
    """64 hex digits, as a container runtime makes them; `generation` tells two lives apart."""
    return hashlib.sha256(f"{pod} {generation}".encode()).hexdigest()
