"""Pods, made the way a container runtime makes them: a namespace, then the CNI executable.

The executable gets its parameters in the environment and the network configuration on standard
input, runs in the node's namespace, and answers JSON (CNI specification 1.0.0). "Try again later"
(code 11) is tried again, as kubelet does; everything else is raised with the plugin's own words.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labs.network import NAMED, entering
from labs.topology import Layout, Node, Pod

CNI_VERSION = "1.0.0"
TRY_AGAIN_LATER = 11
PLUGIN_DIRS = ("/opt/cni/bin", "/usr/lib/cni")
CALL_TIMEOUT_S = 30


class CniError(RuntimeError):
    """The plugin's answer to a call that failed: code, message and details as in its JSON."""

    def __init__(self, command: str, code: int, message: str, details: str) -> None:
        super().__init__(f"CNI {command}: code {code}: {message} {details}".rstrip())
        self.code = code
        self.message = message
        self.details = details


@dataclass(frozen=True, slots=True)
class Cni:
    """One CNI network of the lab, and the executable that serves it."""

    layout: Layout
    plugin: Path

    def netconf(self, node: Node, pools: Sequence[str] = ()) -> dict[str, Any]:
        """The network configuration that a runtime on `node` would have in /etc/cni/net.d."""
        ipam: dict[str, Any] = {"type": "cymric-cni-ipam", "assign_ipv4": "true"}
        if pools:
            ipam["ipv4_pools"] = list(pools)
        return {
            "cniVersion": CNI_VERSION,
            "name": "cymric",
            "type": "cymric-cni",
            "socket": str(self.layout.node_dir(node.name) / "run" / "cni.sock"),
            "ipam": ipam,
        }

    def environment(self, command: str, pod: Pod, namespace: str) -> dict[str, str]:
        """What the specification says a runtime passes; CNI_ARGS as kubelet's runtimes fill it."""
        return {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod.container_id,
            "CNI_NETNS": namespace,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": ":".join((str(self.plugin.parent), *PLUGIN_DIRS)),
            "CNI_ARGS": (
                f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod.name}"
                f";K8S_POD_INFRA_CONTAINER_ID={pod.container_id}"
            ),
        }

    def call(
        self, command: str, node: Node, pod: Pod, *, config: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """One call of the executable. Raises CniError with its answer if it fails."""
        namespace = str(NAMED / self.layout.pod_namespace(pod.name))
        done = subprocess.run(
            (*entering(self.layout.namespace(node.name)), str(self.plugin)),
            input=json.dumps(config or self.netconf(node, pod.pools)),
            env=self.environment(command, pod, namespace),
            capture_output=True,
            text=True,
            timeout=CALL_TIMEOUT_S,
        )
        if done.returncode == 0:
            return json.loads(done.stdout) if done.stdout.strip() else {}
        try:
            answer = json.loads(done.stdout)
        except json.JSONDecodeError:
            answer = {"code": -1, "msg": "no JSON answer", "details": done.stdout + done.stderr}
        raise CniError(
            command, answer.get("code", -1), answer.get("msg", ""), answer.get("details", "")
        )

    def add(self, node: Node, pod: Pod, *, patience_s: float = 30) -> str:
        """ADD, tried again while the plugin asks for it; the pod's IPv4 address without length."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                result = self.call("ADD", node, pod)
            except CniError as failure:
                if failure.code != TRY_AGAIN_LATER or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return str(result["ips"][0]["address"]).partition("/")[0]

    def delete(self, node: Node, pod: Pod, *, patience_s: float = 30) -> None:
        """DEL, tried again while the plugin asks for it."""
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self.call("DEL", node, pod)
            except CniError as failure:
                if failure.code != TRY_AGAIN_LATER or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
            else:
                return
