"""What the lab remembers of itself between two commands: nodes, pods, host1's import, the rack.

One JSON file, replaced by rename. It is written before the thing it speaks of is made and after
it is gone, so that whatever exists can be found and taken down.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from ipaddress import IPv4Address
from typing import Self

from labs.router import Import
from labs.topology import Layout, Node, Pod, Unknown


@dataclass(frozen=True, slots=True)
class Records:
    """The lab as it should be."""

    nodes: tuple[Node, ...] = ()
    pods: tuple[Pod, ...] = ()
    imports: Import = Import.STRICT
    rack: bool = False
    """Whether it was made a rack (rack.py)."""

    def node(self, name: str) -> Node:
        """Raises Unknown for a name that the lab does not have."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise Unknown(f"no node {name}; there are {', '.join(n.name for n in self.nodes)}")

    def pod(self, name: str) -> Pod:
        """Raises Unknown for a name that the lab does not have."""
        for pod in self.pods:
            if pod.name == name:
                return pod
        raise Unknown(f"no pod {name}; there are {', '.join(p.name for p in self.pods)}")

    def with_node(self, node: Node) -> Self:
        """`node` added, or put in the place of the one with its name."""
        return replace(self, nodes=(*(n for n in self.nodes if n.name != node.name), node))

    def without_node(self, name: str) -> Self:
        """Nothing changes if it is not there."""
        return replace(self, nodes=tuple(n for n in self.nodes if n.name != name))

    def with_pod(self, pod: Pod) -> Self:
        """`pod` added, or put in the place of the one with its name."""
        return replace(self, pods=(*(p for p in self.pods if p.name != pod.name), pod))

    def without_pod(self, name: str) -> Self:
        """Nothing changes if it is not there."""
        return replace(self, pods=tuple(p for p in self.pods if p.name != name))

    def pods_on(self, node: str) -> tuple[Pod, ...]:
        """The pods of one node."""
        return tuple(pod for pod in self.pods if pod.node == node)


def load(layout: Layout) -> Records:
    """Empty if the lab was never built."""
    try:
        text = (layout.state / "lab.json").read_text()
    except FileNotFoundError:
        return Records()
    stored = json.loads(text)
    return Records(
        nodes=tuple(Node(n["name"], IPv4Address(n["address"])) for n in stored["nodes"]),
        pods=tuple(Pod(**{**pod, "pools": tuple(pod["pools"])}) for pod in stored["pods"]),
        imports=Import(stored["imports"]),
        rack=bool(stored.get("rack")),
    )


def save(layout: Layout, records: Records) -> None:
    """Replace the file in one step."""
    layout.state.mkdir(parents=True, exist_ok=True)
    target = layout.state / "lab.json"
    fresh = target.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(records), default=str, indent=1))
    fresh.rename(target)
