"""A whole lab: built, changed and taken down.

    quickstart / labs/lab ─▶ Lab ─▶ network (namespaces) ─▶ supervisor (processes) ─▶ pods (CNI)
                                └─▶ records (what should be there)

Every step looks whether its work is done already, so `up` on a standing lab takes a moment and
`up` after a half-finished one completes it. The lab talks to Cymric only as a person or a runtime
would: environment, command line, CNI executables. What it did, `observe` reads back from outside.
"""

from __future__ import annotations

import platform
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from cymric.runtime.cni_executables import write_executables
from labs import network, records
from labs.network import CommandFailed, entering, run
from labs.pods import Cni
from labs.records import Records
from labs.router import Import, Router
from labs.supervisor import Program, Supervisor
from labs.topology import (
    CONTROL,
    DAEMONS,
    ETCD_PORT,
    HOST,
    HOST_ADDRESS,
    HTTP_PORT,
    NODES,
    PODS,
    Layout,
    Node,
    Pod,
    Unknown,
    address_for,
    check_name,
    container_id,
)

HERE = Path(__file__).resolve().parent
MANIFESTS = HERE / "manifests"
PROGRAMS = Path(sys.executable).parent
"""Where pip put the console scripts: beside the Python that runs the lab."""

DATASTORE = "datastore"
"""The supervisor's group of etcd. It runs in the control node's namespace, as k3s's would."""

Step = Callable[[str], AbstractContextManager[object]]
"""How progress is told: a context around the work that the text names."""


def silent(text: str) -> AbstractContextManager[object]:
    """A Step that says nothing."""
    return nullcontext(text)


class Lab:
    """One lab. Synchronous: every method has done its work when it returns."""

    def __init__(self, layout: Layout | None = None, step: Step = silent) -> None:
        self.layout = layout or Layout()
        self.supervisor = Supervisor(self.layout)
        self.router = Router(self.layout)
        self.cni = Cni(self.layout, self.layout.state / "cni" / "bin" / "cymric-cni")
        self.step = step

    @property
    def records(self) -> Records:
        """The lab as it should be, read anew."""
        return records.load(self.layout)

    # -- the whole ---------------------------------------------------------------------------

    def up(self) -> None:
        """Build whatever is missing of the lab, up to its pods; does not wait for routes."""
        if self.layout.state.exists() and not self.supervisor.alive():
            with self.step("Clear away what an earlier lab left"):
                self.down()
        if not self.supervisor.alive():
            self._save(Records(nodes=NODES))
            with self.step(f"Start the supervisor ({self.layout.state})"):
                self.supervisor.launch()
        if not self.cni.plugin.exists():
            with self.step("Install the CNI executables"):
                write_executables(self.cni.plugin.parent)
        bridge = self.layout.bridge_namespace
        if not network.exists(bridge):
            with self.step(f"Build the bridge (namespace {bridge})"):
                network.make_bridge(bridge)
        self._host_up()
        for node in self.records.nodes:
            self._machine_up(node)
            if node.name == CONTROL:
                self._etcd_up()
        for node in self.records.nodes:
            self._daemons_up(node)
        with self.step("Create the pools and the BGP peer (labs/manifests)"):
            for manifest in sorted(MANIFESTS.glob("*.yaml")):
                self.cymric(CONTROL, "apply", "-f", str(manifest))
        standing = {pod.name for pod in self.records.pods if pod.address}
        for pod in (*PODS, *self.records.pods):
            if pod.name not in standing and pod.node in {n.name for n in self.records.nodes}:
                self.add_pod(pod.node, pod.name, pools=pod.pools)
                standing.add(pod.name)

    def down(self) -> None:
        """Take everything away: processes, namespaces with all that is in them, files."""
        self.supervisor.shut_down()
        present = [ns for ns in network.all_namespaces() if self._is_ours(ns)]
        network.destroy(present)
        shutil.rmtree(self.layout.state, ignore_errors=True)
        if self.layout.state.exists():
            raise RuntimeError(f"{self.layout.state} could not be removed")

    def remains(self) -> tuple[str, ...]:
        """What is left of the lab on this machine; empty after `down`."""
        found = [f"namespace {ns}" for ns in network.all_namespaces() if self._is_ours(ns)]
        if self.layout.state.exists():
            found.append(f"files in {self.layout.state}")
        pid = self.supervisor.pid()
        return (*found, f"supervisor, process {pid}") if pid else tuple(found)

    # -- nodes -------------------------------------------------------------------------------

    def add_node(self, name: str) -> Node:
        """A further node; joins by itself, nobody else is told but host1's BIRD."""
        known = self.records
        if any(node.name == name for node in known.nodes):
            raise Unknown(f"there is a node {name} already")
        if check_name(name) == HOST or name in ("net", DATASTORE) or name.startswith("pod-"):
            raise Unknown(f"{name} is taken by the lab itself")
        node = Node(name, address_for(name, frozenset(n.address for n in known.nodes)))
        self._save(known.with_node(node))
        self._write_router(reconfigure=True)
        self._machine_up(node)
        self._daemons_up(node)
        return node

    def remove_node(self, name: str) -> None:
        """Take a node out of the cluster: its pods, its daemons, its blocks, its machine."""
        if name == CONTROL:
            raise Unknown("control holds etcd; take the whole lab down instead")
        node = self.records.node(name)
        for pod in self.records.pods_on(name):
            self.delete_pod(pod.name)
        with self.step(f"Stop the daemons of {name}"):
            self.supervisor.remove_group(name)
        with self.step(f"Release the blocks of {name} and delete it from the datastore"):
            self.cymric(CONTROL, "delete", "node", name)
        with self.step(f"Remove the machine {name}"):
            self._machine_down(node)
            shutil.rmtree(self.layout.node_dir(name), ignore_errors=True)
        self._save(self.records.without_node(name))
        self._write_router(reconfigure=True)

    def reboot_node(self, name: str) -> None:
        """Destroy the node's namespace and everything in it, then bring the same node back.

        As with a real machine, /run is empty afterwards, /var is not, and the runtime makes new
        sandboxes for its pods once the node is there again.
        """
        node = self.records.node(name)
        if name == CONTROL:
            raise Unknown("control holds etcd; reboot another node")
        pods = self.records.pods_on(name)
        with self.step(f"Destroy the machine {name}"):
            self.supervisor.remove_group(name)
            self._machine_down(node)
            for volatile in ("run", "endpoint-status"):
                shutil.rmtree(self.layout.node_dir(name) / volatile, ignore_errors=True)
        self._machine_up(node)
        self._daemons_up(node)
        for pod in pods:
            self.delete_pod(pod.name)
            self.add_pod(pod.node, pod.name, pools=pod.pools)

    # -- pods --------------------------------------------------------------------------------

    def add_pod(
        self, node: str, name: str, *, pools: tuple[str, ...] = (), patience_s: float = 60
    ) -> Pod:
        """A pod through the CNI executable, with its HTTP server running.

        Raises CniError if the plugin refused; then nothing of the pod is left.
        """
        check_name(name)
        machine = self.records.node(node)
        if any(pod.name == name and pod.address for pod in self.records.pods):
            raise Unknown(f"there is a pod {name} already")
        pod = Pod(name, node, pools, container_id(name, secrets.token_hex(8)))
        namespace = self.layout.pod_namespace(name)
        with self.step(f"Create the pod {name} on {node} (CNI ADD)"):
            self._save(self.records.with_pod(pod))
            network.destroy([namespace])
            network.make_pod_namespace(namespace)
            try:
                address = self.cni.add(machine, pod, patience_s=patience_s)
            except BaseException:
                # A runtime that gives up removes the sandbox; the plugin has cleaned up its own.
                network.destroy([namespace])
                self._save(self.records.without_pod(name))
                raise
            self._save(self.records.with_pod(replace(pod, address=address)))
            self.supervisor.write_group(f"pod-{name}", [server(namespace)])
            self.supervisor.update()
        return self.records.pod(name)

    def delete_pod(self, name: str) -> None:
        """End its server, CNI DEL, remove its namespace: the order of a container runtime."""
        pod = self.records.pod(name)
        node = self.records.node(pod.node)
        with self.step(f"Delete the pod {name} on {pod.node} (CNI DEL)"):
            self.supervisor.remove_group(f"pod-{name}")
            self.cni.delete(node, pod)
            network.destroy([self.layout.pod_namespace(name)])
            self._save(self.records.without_pod(name))

    # -- host1 and commands ------------------------------------------------------------------

    def set_import(self, imports: Import) -> None:
        """Change what host1 takes from the nodes; its sessions stay up."""
        self._save(replace(self.records, imports=imports))
        self._write_router(reconfigure=True)

    def cymric(self, node: str, *words: str) -> str:
        """Run the `cymric` command line on a node."""
        return self.on_node(node, str(PROGRAMS / "cymric"), *words)

    def etcdctl(self, *words: str) -> str:
        """Run etcdctl beside etcd."""
        return self.on_node(CONTROL, "etcdctl", *words)

    def on_node(self, name: str, *command: str, timeout_s: float = 60) -> str:
        """Run a program in a node's namespace with the environment of its daemons."""
        node = self.records.node(name)
        return run(
            *entering(self.layout.namespace(name)),
            *command,
            env=self.node_environment(node),
            timeout_s=timeout_s,
        )

    def node_environment(self, node: Node) -> Mapping[str, str]:
        """The environment of the daemons of `node`, with our programs first in PATH."""
        environment = self.layout.environment(node)
        return {
            **environment,
            "PATH": f"{PROGRAMS}:{environment['PATH']}",
            "ETCDCTL_API": "3",
            "ETCDCTL_ENDPOINTS": self.layout.etcd_url,
        }

    # -- parts -------------------------------------------------------------------------------

    def _host_up(self) -> None:
        namespace = self.layout.namespace(HOST)
        if network.exists(namespace):
            return
        with self.step(f"Build host1 {HOST_ADDRESS} and start its BIRD (AS 64512)"):
            network.make_machine(
                namespace,
                bridge_namespace=self.layout.bridge_namespace,
                port=HOST,
                address=HOST_ADDRESS,
                router=False,
            )
            self._write_router(reconfigure=False)
            self.supervisor.write_group(
                HOST, [Program("bird", self.router.command()), server(namespace)]
            )
            self.supervisor.update()

    def _machine_up(self, node: Node) -> None:
        if network.exists(self.layout.namespace(node.name)):
            return
        with self.step(f"Build the machine {node.name} {node.address}"):
            network.make_machine(
                self.layout.namespace(node.name),
                bridge_namespace=self.layout.bridge_namespace,
                port=node.name,
                address=node.address,
                router=True,
            )

    def _machine_down(self, node: Node) -> None:
        network.unplug(self.layout.bridge_namespace, node.name)
        network.destroy([self.layout.namespace(node.name)])

    def _etcd_up(self) -> None:
        data = self.layout.state / "etcd"
        if not data.exists():
            with self.step(f"Start etcd ({self.layout.etcd_url})"):
                data.mkdir(mode=0o700)
                self.supervisor.write_group(DATASTORE, [_etcd(self.layout, data)])
                self.supervisor.update()
        with self.step("Wait for etcd"):
            self.wait_for_etcd()

    def wait_for_etcd(self, *, patience_s: float = 30) -> None:
        """Return when etcd answers a read. Raises CommandFailed with its words if it never does."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self.etcdctl("get", "/", "--command-timeout=2s", "--dial-timeout=1s")
            except CommandFailed:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return

    def _daemons_up(self, node: Node) -> None:
        if any(process.group == node.name for process in self.supervisor.processes()):
            return
        home = self.layout.node_dir(node.name)
        for folder in ("run", "state", "endpoint-status"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        with self.step(f"Register {node.name} and start {', '.join(DAEMONS)} on it"):
            self.cymric(node.name, "node", "init")
            self.supervisor.write_group(
                node.name,
                [
                    Program(
                        daemon,
                        (
                            *entering(self.layout.namespace(node.name)),
                            str(PROGRAMS / f"cymric-{daemon}"),
                        ),
                        self.layout.environment(node),
                        stop_wait_s=10,
                    )
                    for daemon in DAEMONS
                ],
            )
            self.supervisor.update()

    def _write_router(self, *, reconfigure: bool) -> None:
        known = self.records
        self.router.write(known.nodes, known.imports)
        if reconfigure:
            self.router.reconfigure()

    def _is_ours(self, namespace: str) -> bool:
        known = self.records
        names = {
            self.layout.bridge_namespace,
            self.layout.namespace(HOST),
            *(self.layout.namespace(node.name) for node in known.nodes),
            *(self.layout.pod_namespace(pod.name) for pod in known.pods),
        }
        return namespace in names or self.layout.owns_namespace(namespace)

    def update_records(self, change: Callable[[Records], Records]) -> None:
        """Remember something else of the lab than before."""
        self._save(change(self.records))

    def _save(self, known: Records) -> None:
        records.save(self.layout, known)


def server(namespace: str) -> Program:
    """The HTTP server of a pod, of host1 or of a router."""
    script = str(HERE / "pod_server.py")
    words = (*entering(namespace), sys.executable, "-I", "-S", script, str(HTTP_PORT))
    return Program("http", words)


def _etcd(layout: Layout, data: Path) -> Program:
    """One member, on the control node's address and its loopback, data in the lab's folder."""
    local = f"http://127.0.0.1:{ETCD_PORT}"
    words = (
        *entering(layout.namespace(CONTROL)),
        "etcd",
        f"--name={layout.name}",
        f"--data-dir={data}",
        f"--listen-client-urls={layout.etcd_url},{local}",
        f"--advertise-client-urls={layout.etcd_url}",
        "--logger=zap",
        "--log-level=warn",
    )
    # Debian's etcd refuses to start elsewhere unless it is told that this is known.
    known = {"x86_64": {}, "aarch64": {"ETCD_UNSUPPORTED_ARCH": "arm64"}}
    return Program("etcd", words, known.get(platform.machine(), {}), stop_wait_s=10)
