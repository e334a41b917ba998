"""A list of CNI plugins, called in their order as a runtime calls them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.support.cni_node import CniNode, Pod, netconf

DEBIAN = "/usr/lib/cni"


@dataclass(eq=False)
class Refused(Exception):
    """A plugin of the chain failed."""

    plugin: str
    tree: dict[str, Any]


@dataclass
class Chain:
    """A network of several plugins. The first with type cymric-cni gets the node's socket."""

    node: CniNode
    plugins: Sequence[dict[str, Any]]
    version: str = "1.0.0"
    name: str = "pod-network"

    def add(self, pod: Pod, args: str = "") -> dict[str, Any]:
        """ADD of all, in order; the last result. Raises Refused."""
        result: dict[str, Any] | None = None
        for plugin in self.plugins:
            result = self._call("ADD", plugin, pod, args, result)
        assert result is not None
        return result

    def check(self, pod: Pod, result: dict[str, Any], args: str = "", *, but: str = "") -> None:
        """CHECK of all, in order, but for one. Raises Refused."""
        for plugin in self.plugins:
            if plugin["type"] != but:
                self._call("CHECK", plugin, pod, args, result)

    def delete(self, pod: Pod, result: dict[str, Any] | None, args: str = "") -> None:
        """DEL of all, last first. Raises Refused."""
        for plugin in reversed(self.plugins):
            self._call("DEL", plugin, pod, args, result)

    def _call(
        self,
        command: str,
        plugin: dict[str, Any],
        pod: Pod,
        args: str,
        previous: dict[str, Any] | None,
    ) -> dict[str, Any]:
        config = {"cniVersion": self.version, "name": self.name, **plugin}
        if plugin["type"] == "cymric-cni":
            config = netconf(self.node.socket, **config)
        if previous is not None:
            config["prevResult"] = previous
        directory = self.node.directory / "bin"
        executable = directory / plugin["type"]
        if not executable.exists():
            executable = executable.__class__(DEBIAN) / plugin["type"]
        done = subprocess.run(
            [executable],
            env={
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": pod.container_id,
                "CNI_IFNAME": "eth0",
                "CNI_NETNS": str(pod.path),
                "CNI_ARGS": args,
                "CNI_PATH": f"{directory}:{DEBIAN}",
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            },
            input=json.dumps(config),
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )
        tree: dict[str, Any] = json.loads(done.stdout) if done.stdout.strip() else {}
        if done.returncode:
            raise Refused(plugin["type"], tree or {"msg": done.stderr})
        return tree
