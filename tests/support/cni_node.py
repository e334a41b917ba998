"""A node for CNI tests: a namespace with a real etcd and a real cnid, and pods to attach.

The test itself visits the node's namespace, so that everything it starts is there as well. The
executables are called as a container runtime calls them: environment, standard input, exit code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cymric.kernel.namespace import opened, visiting
from cymric.model.codec import encode
from cymric.model.keys import ResourceKey
from cymric.model.resources import (
    ClusterInformation,
    ClusterInformationSpec,
    IPPool,
    IPPoolSpec,
    Node,
    ObjectMeta,
)
from cymric.runtime.cni_executables import write_executables
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually_now

PREFIX = "cycni-"
NODE = "node-a"
POOL = "198.19.16.0/24"
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Answer:
    """What an executable said."""

    code: int
    tree: dict[str, Any]

    @property
    def address(self) -> str:
        """The first address of a result, without its length."""
        text: str = self.tree["ips"][0]["address"]
        return text.partition("/")[0]


@dataclass
class Pod:
    """A container: a network namespace under an id."""

    container_id: str
    namespace: str

    @property
    def path(self) -> Path:
        """Where its namespace is."""
        return Path("/run/netns") / self.namespace

    def run(self, *command: str) -> str:
        """Run a command in the container."""
        return output("ip", "netns", "exec", self.namespace, *command)


@dataclass
class CniNode:
    """One node. Everything below `directory` is its own."""

    directory: Path
    etcd: EtcdServer
    wait_s: float = 0.0
    process: subprocess.Popen[bytes] | None = None
    pods: list[Pod] = field(default_factory=list)

    @property
    def socket(self) -> Path:
        """Where cnid listens."""
        return self.directory / "run" / "cni.sock"

    @property
    def status_dir(self) -> Path:
        """Where felix would write."""
        return self.directory / "status"

    @property
    def journal(self) -> Path:
        """The journal of cnid."""
        return self.directory / "state" / "cni" / "unfinished"

    @property
    def log(self) -> str:
        """What cnid logged, in all its runs."""
        return (self.directory / "cnid.log").read_text()

    @property
    def settings(self) -> dict[str, str]:
        """The environment of this node's daemons."""
        return {
            "CYMRIC_NODE_NAME": NODE,
            "CYMRIC_ETCD_ENDPOINTS": self.etcd.endpoint,
            "CYMRIC_RUN_DIR": str(self.directory / "run"),
            "CYMRIC_STATE_DIR": str(self.directory / "state"),
            "CYMRIC_ENDPOINT_STATUS_DIR": str(self.status_dir),
            "CYMRIC_POLICY_SETUP_TIMEOUT_S": str(self.wait_s),
        }

    def start(self) -> None:
        """Start cnid and wait until it listens."""
        self.socket.unlink(missing_ok=True)
        self.process = self.run("cnid")
        eventually_now(self.socket.exists, 15, what="cnid listens")

    def run(self, daemon: str) -> subprocess.Popen[bytes]:
        """Start a daemon on this node; whoever does this for others than cnid ends them."""
        with (self.directory / f"{daemon}.log").open("ab") as log:
            return subprocess.Popen(
                [BIN / f"cymric-{daemon}"],
                env={**os.environ, **self.settings},
                stderr=log,
                stdout=log,
            )

    def stop(self, *, kill: bool = False) -> None:
        """End cnid."""
        if self.process is not None:
            self.process.kill() if kill else self.process.terminate()
            self.process.wait(10)
            self.process = None

    def pod(self, container_id: str) -> Pod:
        """A new container, not attached yet."""
        pod = Pod(container_id, f"{PREFIX}{os.getpid()}-{container_id[-8:]}")
        output("ip", "netns", "add", pod.namespace)
        self.pods.append(pod)
        return pod

    def remove(self, pod: Pod) -> None:
        """Remove a container's namespace."""
        output("ip", "netns", "del", pod.namespace)
        self.pods.remove(pod)

    def call(
        self,
        command: str,
        pod: Pod,
        *,
        interface: str = "eth0",
        args: str = "",
        plugin: str = "cymric-cni",
        netns: str | None = None,
        **config: Any,
    ) -> Answer:
        """Call an executable and wait for its answer."""
        process = self.begin(
            command, pod, interface=interface, args=args, plugin=plugin, netns=netns, **config
        )
        return finished(process)

    def begin(
        self,
        command: str,
        pod: Pod,
        *,
        interface: str = "eth0",
        args: str = "",
        plugin: str = "cymric-cni",
        netns: str | None = None,
        path: str = "",
        **config: Any,
    ) -> subprocess.Popen[bytes]:
        """Call an executable, as a runtime does."""
        environment = {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod.container_id,
            "CNI_IFNAME": interface,
            "CNI_NETNS": str(pod.path) if netns is None else netns,
            "CNI_ARGS": args,
            "CNI_PATH": path or str(self.directory / "bin"),
            "PATH": os.environ["PATH"],
        }
        process = subprocess.Popen(
            [self.directory / "bin" / plugin],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(netconf(self.socket, **config)).encode())
        process.stdin.close()
        process.stdin = None
        return process

    def call_node(
        self, command: str, *, plugin: str = "cymric-cni", path: str = "", **config: Any
    ) -> Answer:
        """Call an executable about no container: GC, STATUS."""
        done = subprocess.run(
            [self.directory / "bin" / plugin],
            env={
                "CNI_COMMAND": command,
                "CNI_PATH": path or str(self.directory / "bin"),
                "PATH": os.environ["PATH"],
            },
            input=json.dumps(netconf(self.socket, **{"cniVersion": "1.1.0", **config})),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return Answer(done.returncode, json.loads(done.stdout) if done.stdout.strip() else {})

    def keys(self, prefix: str) -> dict[str, Any]:
        """What etcd holds below a prefix, values as JSON trees."""
        listing = json.loads(self.etcd.etcdctl("get", "--prefix", prefix, "-w", "json"))
        return {
            _text(pair["key"]): json.loads(_text(pair["value"])) for pair in listing.get("kvs", [])
        }

    def put(self, key: object, value: object) -> None:
        """Store a value."""
        stored = json.dumps(value) if isinstance(value, dict) else encode(value).decode()
        self.etcd.etcdctl("put", str(key), stored)

    @property
    def endpoints(self) -> dict[str, Any]:
        """All stored workload endpoints."""
        return self.keys("/calico/resources/v3/projectcalico.org/workloadendpoints/")

    @property
    def handles(self) -> dict[str, Any]:
        """All stored handles."""
        return self.keys("/calico/ipam/v2/handle/")

    @property
    def held(self) -> int:
        """How many addresses are held, by the blocks."""
        blocks = self.keys("/calico/ipam/v2/assignment/").values()
        return sum(index is not None for block in blocks for index in block["allocations"])

    @property
    def interfaces(self) -> set[str]:
        """The node's own ends of pairs."""
        return {link["ifname"] for link in json.loads(output("ip", "-j", "link"))} - {"lo"}

    def assert_nothing_left(self) -> None:
        """No endpoint, no handle, no address, no link, no journal."""
        assert self.endpoints == {}
        assert self.handles == {}
        assert self.held == 0
        assert self.interfaces == set()
        assert list(self.journal.iterdir()) == []


def netconf(socket: Path, **config: Any) -> dict[str, Any]:
    """A network configuration; `None` removes a field, `conf_args` are its `args`."""
    if "conf_args" in config:
        config["args"] = config.pop("conf_args")
    tree = {
        "cniVersion": "1.0.0",
        "name": "pod-network",
        "type": "cymric-cni",
        "socket": str(socket),
        "ipam": {"type": "cymric-cni-ipam"},
        **config,
    }
    return {name: value for name, value in tree.items() if value is not None}


def finished(process: subprocess.Popen[bytes]) -> Answer:
    """Wait for an executable that `begin` started."""
    said, _ = process.communicate(timeout=60)
    return Answer(process.returncode, json.loads(said) if said.strip() else {})


def output(*command: str) -> str:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


@contextmanager
def node_with_etcd(directory: Path, **options: Any) -> Iterator[CniNode]:
    """A node with pool, Node and ClusterInformation stored; cnid is not started yet."""
    name = f"{PREFIX}{os.getpid()}-node"
    output("ip", "netns", "add", name)
    try:
        with opened(f"/run/netns/{name}") as descriptor, visiting(descriptor):
            output("ip", "link", "set", "lo", "up")
            node = CniNode(directory, EtcdServer(directory / "etcd"), **options)
            write_executables(directory / "bin", socket=node.socket)
            node.etcd.start()
            try:
                _set_up(node)
                yield node
            finally:
                node.stop()
                node.etcd.kill()
                for pod in list(node.pods):
                    node.remove(pod)
    finally:
        output("ip", "netns", "del", name)


def _set_up(node: CniNode) -> None:
    resources: Mapping[ResourceKey, object] = {
        ResourceKey("Node", NODE): Node(metadata=ObjectMeta(name=NODE)),
        ResourceKey("ClusterInformation", "default"): ClusterInformation(
            metadata=ObjectMeta(name="default"), spec=ClusterInformationSpec(datastoreReady=True)
        ),
        ResourceKey("IPPool", "pods"): IPPool(
            metadata=ObjectMeta(name="pods"), spec=IPPoolSpec(cidr=POOL)
        ),
    }
    for key, value in resources.items():
        node.put(key, value)


def _text(encoded: str) -> str:
    import base64

    return base64.b64decode(encoded).decode()
