"""One node with felix on it, in namespaces: pods on veth pairs, a world outside, an etcd inside.

    pod a ── cali0a ┐
    pod b ── cali0b ├ node 198.19.0.2 ── up0 ── world 198.19.0.1
    pod …           ┘

Node and world have IPv6 addresses too, and so has a pod that is given one.

Felix is the real program; pods are wired here the way the CNI plugin does it. Everything is gone
after `close`.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cymric.model.endpoints import endpoint_name
from tests.support.etcd import free_port
from tests.support.eventually import eventually_now

RESOURCES = "/calico/resources/v3/projectcalico.org"
NODE = "node1"
NODE_ADDRESS, WORLD_ADDRESS = "198.19.0.2", "198.19.0.1"
NODE_ADDRESS6, WORLD_ADDRESS6 = "fd00:198::2", "fd00:198::1"
POOL = "198.19.16.0/21"
POOL6 = "fd00:198:16::/64"
HOST_LINK_LOCAL = "fe80::ecee:eeff:feee:eeee"
GATEWAY, HOST_MAC = "169.254.1.1", "ee:ee:ee:ee:ee:ee"


def run(*words: str, stdin: str = "", check: bool = True) -> str:
    """Run a program of the host and return what it printed."""
    done = subprocess.run(
        words, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr}{done.stdout}"
    return done.stdout


@dataclass(frozen=True)
class Pod:
    """A namespace behind a veth pair."""

    name: str
    namespace: str
    interface: str
    address: str
    mac: str
    address6: str = ""

    def run(self, *words: str, check: bool = True) -> str:
        """Run a program in the pod."""
        return run("ip", "netns", "exec", self.namespace, *words, check=check)

    def pings(self, address: str, *options: str) -> bool:
        """Whether one of two echo requests is answered."""
        words = ["ip", "netns", "exec", self.namespace, "ping", "-c", "2", "-i", "0.2", "-W", "1"]
        done = subprocess.run([*words, *options, address], capture_output=True, check=False)
        return done.returncode == 0


@dataclass
class FelixLab:
    """See the chapter. `backend` is auto, nft or legacy."""

    directory: Path
    backend: str = "auto"
    tag: str = field(default_factory=lambda: secrets.token_hex(2))
    namespaces: list[str] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    felix: subprocess.Popen[bytes] | None = None
    client_port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)

    @property
    def node(self) -> str:
        """The node's namespace."""
        return f"cyflx-{self.tag}-node"

    @property
    def world(self) -> str:
        """The namespace of everybody else."""
        return f"cyflx-{self.tag}-world"

    @property
    def status_dir(self) -> Path:
        """Where felix writes endpoint status."""
        return self.directory / "endpoint-status"

    def open(self) -> FelixLab:
        """Make node and world, start etcd."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for name in (self.node, self.world):
            self._add_namespace(name)
        run("ip", "-n", self.node, "link", "add", "up0", "type", "veth", "peer", "name", "eth0",
            "netns", self.world)  # fmt: skip
        for namespace, device, address, address6 in (
            (self.node, "up0", NODE_ADDRESS, NODE_ADDRESS6),
            (self.world, "eth0", WORLD_ADDRESS, WORLD_ADDRESS6),
        ):
            run("ip", "-n", namespace, "address", "add", f"{address}/20", "dev", device)
            run("ip", "-n", namespace, "link", "set", device, "up")
            run("ip", "-n", namespace, "address", "add", f"{address6}/64", "dev", device, "nodad")
        run("ip", "-n", self.world, "route", "add", "198.19.16.0/20", "via", NODE_ADDRESS)
        run("ip", "-n", self.world, "route", "add", POOL6, "via", NODE_ADDRESS6)
        self._start_etcd()
        return self

    def close(self) -> None:
        """Take everything down."""
        if self.felix is not None:
            self.kill_felix()
        for process in self.processes:
            process.kill()
            process.wait()
        for name in self.namespaces:
            run("ip", "netns", "del", name, check=False)

    def on_node(self, *words: str, stdin: str = "", check: bool = True) -> str:
        """Run a program in the node's namespace."""
        return run("ip", "netns", "exec", self.node, *words, stdin=stdin, check=check)

    def start_felix(self) -> None:
        """Start the program and wait until it says that it is ready."""
        environment = {
            **os.environ,
            "CYMRIC_NODE_NAME": NODE,
            "CYMRIC_ETCD_ENDPOINTS": f"http://127.0.0.1:{self.client_port}",
            "CYMRIC_RUN_DIR": str(self.directory),
            "CYMRIC_STATE_DIR": str(self.directory),
            "CYMRIC_ENDPOINT_STATUS_DIR": str(self.status_dir),
            "CYMRIC_FELIX_METRICS_PORT": str(self.metrics_port),
            "CYMRIC_FELIX_HEALTH_PORT": "0",
            "FELIX_IPTABLESBACKEND": self.backend,
            "FELIX_IPTABLESPOSTWRITECHECKINTERVALSECS": "2",
        }
        with (self.directory / "felix.log").open("ab") as log:
            self.felix = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.node}", sys.executable, "-m", "felix.daemon"],
                env=environment,
                stdout=log,
                stderr=log,
            )
        eventually_now(self._is_ready, 20.0, what=f"felix is ready; log: {self.directory}")

    def kill_felix(self, with_signal: signal.Signals = signal.SIGKILL) -> int:
        """End felix; its exit code."""
        assert self.felix is not None
        self.felix.send_signal(with_signal)
        code = self.felix.wait(timeout=10)
        self.felix = None
        return code

    @property
    def log(self) -> str:
        """What felix said so far."""
        return (self.directory / "felix.log").read_text()

    def metric(self, name: str) -> float:
        """The value of one metric."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        for line in self.on_node("curl", "-s", "--max-time", "2", url).splitlines():
            if line.rpartition(" ")[0] == name:
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"felix has no metric {name}")

    def put(
        self,
        kind: str,
        plural: str,
        name: str,
        spec: Mapping[str, object],
        labels: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
    ) -> None:
        """Store an object; `name` may start with a namespace and a slash."""
        namespace, _, short = name.rpartition("/")
        metadata: dict[str, object] = {
            "name": short,
            **({"namespace": namespace} if namespace else {}),
            "labels": dict(labels or {}),
            "annotations": dict(annotations or {}),
        }
        tree = {"kind": kind, "apiVersion": "projectcalico.org/v3", "metadata": metadata}
        text = json.dumps({**tree, "spec": spec})
        self._etcdctl("put", f"{RESOURCES}/{plural}/{name}", stdin=text)

    def delete(self, plural: str, name: str) -> None:
        """Remove an object."""
        self._etcdctl("del", f"{RESOURCES}/{plural}/{name}")

    def put_pool(self, name: str, cidr: str, *, nat_outgoing: bool) -> None:
        """Store an IP pool."""
        spec: dict[str, object] = {"cidr": cidr, "natOutgoing": nat_outgoing}
        spec["blockSize"] = 122 if ":" in cidr else 26
        self.put("IPPool", "ippools", name, spec)

    def put_endpoint(
        self,
        pod: Pod,
        profile: str = "projectcalico-default-allow",
        labels: Mapping[str, str] | None = None,
        **more: object,
    ) -> None:
        """Store a pod's endpoint; `more` goes into its spec."""
        spec: dict[str, object] = {
            "orchestrator": "k8s",
            "node": NODE,
            "containerID": "0123456789",
            "pod": pod.name,
            "endpoint": "eth0",
            "ipNetworks": [
                f"{pod.address}/32",
                *([f"{pod.address6}/128"] if pod.address6 else []),
            ],
            "profiles": [profile],
            "interfaceName": pod.interface,
            "mac": pod.mac,
            **more,
        }
        name = f"default/{wep_name(pod)}"
        self.put("WorkloadEndpoint", "workloadendpoints", name, spec, labels)

    def delete_endpoint(self, pod: Pod) -> None:
        """Remove a pod's endpoint."""
        self.delete("workloadendpoints", f"default/{wep_name(pod)}")

    def add_pod(self, name: str, address: str, address6: str = "") -> Pod:
        """Wire a pod as the CNI plugin does, without its endpoint."""
        namespace = f"cyflx-{self.tag}-{name}"
        self._add_namespace(namespace)
        pod = Pod(name, namespace, f"cali{self.tag}{name}"[:15], address, f"02:00:{_mac(address)}",
                  address6)  # fmt: skip
        run("ip", "-n", self.node, "link", "add", pod.interface, "address", HOST_MAC, "type",
            "veth", "peer", "name", "eth0", "address", pod.mac, "netns", namespace)  # fmt: skip
        # As the plugin does: addresses that are ours by construction are not probed for.
        for where, device in ((self.node, pod.interface), (namespace, "eth0")):
            path = f"/proc/sys/net/ipv6/conf/{device}/accept_dad"
            run("ip", "netns", "exec", where, "sh", "-c", f"echo 0 > {path}")
        for words in (
            ("link", "set", "eth0", "up"),
            ("address", "add", f"{address}/32", "dev", "eth0"),
            ("route", "add", GATEWAY, "dev", "eth0", "scope", "link"),
            ("route", "add", "default", "via", GATEWAY, "dev", "eth0"),
            ("neigh", "replace", GATEWAY, "lladdr", HOST_MAC, "dev", "eth0", "nud", "permanent"),
        ):
            run("ip", "-n", namespace, *words)
        run("ip", "-n", self.node, "link", "set", pod.interface, "up")
        if address6:
            run("ip", "-n", namespace, "address", "add", f"{address6}/128", "dev", "eth0", "nodad")
            run("ip", "-n", namespace, "route", "add", "default", "via", HOST_LINK_LOCAL, "dev",
                "eth0")  # fmt: skip
        return pod

    def remove_pod(self, pod: Pod) -> None:
        """Remove a pod's link and namespace, not its endpoint."""
        run("ip", "-n", self.node, "link", "del", pod.interface, check=False)
        run("ip", "netns", "del", pod.namespace, check=False)
        self.namespaces.remove(pod.namespace)

    def start_in(self, namespace: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a program in a namespace; it is killed at the end."""
        process = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{namespace}", *words], stdout=subprocess.PIPE
        )
        self.processes.append(process)
        return process

    def status_file(self, pod: Pod) -> Path:
        """The pod's status file."""
        return self.status_dir / f"k8s default%2F{pod.name} eth0"

    def wait_up(self, *pods: Pod) -> None:
        """Wait until felix says that all of these are complete."""
        for pod in pods:
            eventually_now(self.status_file(pod).exists, 10.0, what=f"{pod.name} is up")

    def wait_down(self, pod: Pod) -> None:
        """Wait until felix says that a pod is not complete."""
        eventually_now(lambda: not self.status_file(pod).exists(), 10.0, what=f"{pod.name} down")

    def save(self, table: str, variant: str | None = None, program: str = "iptables") -> list[str]:
        """The rules of a table, counters left out; `program` may be ip6tables."""
        text = self.on_node(f"{program}-{variant or self.backend}-save", "-t", table)
        return [line for line in text.splitlines() if line.startswith("-A")]

    def _is_ready(self) -> bool:
        assert self.felix is not None
        assert self.felix.poll() is None, f"felix ended: {self.log[-3000:]}"
        url = f"http://127.0.0.1:{self.metrics_port}/readiness"
        return "not ready" not in (
            self.on_node("curl", "-s", "--max-time", "1", url, check=False) or "not ready"
        )

    def _add_namespace(self, name: str) -> None:
        run("ip", "netns", "add", name)
        self.namespaces.append(name)
        run("ip", "-n", name, "link", "set", "lo", "up")

    def _start_etcd(self) -> None:
        client, peer = (f"http://127.0.0.1:{port}" for port in (self.client_port, free_port()))
        with (self.directory / "etcd.log").open("ab") as log:
            self.processes.append(
                subprocess.Popen(
                    [
                        "nsenter",
                        f"--net=/run/netns/{self.node}",
                        "etcd",
                        "--name=test",
                        f"--data-dir={self.directory / 'etcd'}",
                        f"--listen-client-urls={client}",
                        f"--advertise-client-urls={client}",
                        f"--listen-peer-urls={peer}",
                        f"--initial-advertise-peer-urls={peer}",
                        f"--initial-cluster=test={peer}",
                    ],
                    stdout=log,
                    stderr=log,
                )
            )
        eventually_now(
            lambda: "true" in self.on_node("curl", "-s", f"{client}/health", check=False), 20.0
        )

    def _etcdctl(self, *words: str, stdin: str = "") -> None:
        endpoints = f"--endpoints=http://127.0.0.1:{self.client_port}"
        environment = ("env", "ETCDCTL_API=3")
        self.on_node(*environment, "etcdctl", endpoints, *words, stdin=stdin)


def wep_name(pod: Pod) -> str:
    """The name of a pod's WorkloadEndpoint."""
    return endpoint_name(NODE, "k8s", pod.name, "eth0")


def _mac(address: str) -> str:
    return ":".join(f"{int(part):02x}" for part in address.split("."))
