"""host1: the router outside the cluster. Its BIRD configuration as text, and what BIRD answers.

AS 64512, one iBGP session to each node, exports nothing, puts what it accepts in its kernel. The
strict import is the operator course's: service ranges and the external pool, no default-pool
block. The permissive one takes the default pool too, so that the host reaches every pod.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv4Network

from labs.network import UPLINK, entering, run
from labs.topology import (
    AS_NUMBER,
    DEFAULT_POOL,
    EXTERNAL_POOL,
    EXTERNAL_SERVICE_RANGE,
    HOST,
    HOST_ADDRESS,
    SERVICE_RANGE,
    Layout,
    Node,
)


class Import(StrEnum):
    """What host1 takes from the nodes."""

    STRICT = "strict"
    PERMISSIVE = "permissive"


@dataclass(frozen=True, slots=True)
class Session:
    """One BGP session as BIRD tells it. `since` is BIRD's text; it changes at every transition."""

    name: str
    neighbour: IPv4Address
    state: str
    since: str

    @property
    def established(self) -> bool:
        """RFC 4271's last state."""
        return self.state == "Established"


def render(nodes: Sequence[Node], imports: Import) -> str:
    """BIRD 2 configuration with a session to every node of `nodes`."""
    taken = [f"{EXTERNAL_SERVICE_RANGE}", f"{SERVICE_RANGE}+", f"{EXTERNAL_POOL}+"]
    if imports is Import.PERMISSIVE:
        taken.append(f"{DEFAULT_POOL}+")
    text = f"""\
# host1, {imports} import. Written by the lab.
router id {HOST_ADDRESS};
log stderr {{ warning, error, fatal, bug, auth, remote }};
timeformat protocol iso long;

protocol device {{ scan time 2; }}

# Next hops of the nodes are resolved through the subnet of the bridge.
protocol direct {{ ipv4; interface "{UPLINK}"; }}

protocol kernel {{
  learn; persist; scan time 2; merge paths on; graceful restart on;
  ipv4 {{ import all; export where source = RTS_BGP; }};
}}

filter from_nodes {{
  if net ~ [ {", ".join(taken)} ] then accept;
  reject;
}}

template bgp node {{
  local {HOST_ADDRESS} as {AS_NUMBER};
  multihop;
  graceful restart on;
  connect retry time 5; connect delay time 2; error wait time 2, 10;
  ipv4 {{ import keep filtered; import filter from_nodes; export none; add paths on; }};
}}
"""
    for node in nodes:
        text += (
            f"\nprotocol bgp {protocol_name(node.name)} from node"
            f" {{ neighbor {node.address} as {AS_NUMBER}; }}\n"
        )
    return text


def protocol_name(node: str) -> str:
    """BIRD's names are words."""
    return "to_" + node.replace("-", "_")


def parse_sessions(text: str) -> tuple[Session, ...]:
    """The BGP sessions in the answer to `show protocols all`."""
    found = []
    name = since = ""
    for line in text.splitlines():
        if words := re.match(r"(\S+)\s+BGP\s+\S+\s+\S+\s+(\S+ \S+)", line):
            name, since = words[1], words[2]
            state = "down"
        elif re.match(r"\S", line):
            name = ""
        elif name and (words := re.match(r"\s+BGP state:\s+(\S+)", line)):
            state = words[1]
        elif name and (words := re.match(r"\s+Neighbor address:\s+(\S+)", line)):
            found.append(Session(name, IPv4Address(words[1]), state, since))
    return tuple(found)


def parse_paths(text: str) -> Mapping[IPv4Network, tuple[IPv4Address, ...]]:
    """Prefix to next hops, in the answer to `show route` for BGP routes, filtered ones or not."""
    hops: dict[IPv4Network, list[IPv4Address]] = {}
    prefix: IPv4Network | None = None
    for line in text.splitlines():
        if words := re.match(r"(\d+\.\d+\.\d+\.\d+/\d+)\s", line):
            prefix = IPv4Network(words[1])
        if prefix is not None and (words := re.search(r"\bvia (\d+\.\d+\.\d+\.\d+) on", line)):
            hops.setdefault(prefix, []).append(IPv4Address(words[1]))
    return {prefix: tuple(found) for prefix, found in hops.items()}


class Router:
    """host1's BIRD, over its control socket."""

    def __init__(self, layout: Layout) -> None:
        self._socket = layout.state / HOST / "bird.ctl"
        self.config = layout.state / HOST / "bird.conf"
        self._layout = layout

    def command(self) -> tuple[str, ...]:
        """How the supervisor starts it."""
        return (
            *entering(self._layout.namespace(HOST)),
            "bird",
            "-f",
            "-c",
            str(self.config),
            "-s",
            str(self._socket),
        )

    def write(self, nodes: Sequence[Node], imports: Import) -> None:
        """Write the configuration; BIRD reads it at its start or at `reconfigure`."""
        self.config.parent.mkdir(parents=True, exist_ok=True)
        self.config.write_text(render(nodes, imports))

    def reconfigure(self) -> None:
        """Make BIRD read the file again; sessions that did not change stay up."""
        answer = self.ask("configure")
        if "Reconfigured" not in answer and "Reconfiguration in progress" not in answer:
            raise RuntimeError(f"BIRD refused its configuration: {answer}")

    def sessions(self) -> tuple[Session, ...]:
        """Its sessions to the nodes."""
        return parse_sessions(self.ask("show", "protocols", "all"))

    def announced(self) -> Mapping[IPv4Network, tuple[IPv4Address, ...]]:
        """Everything the nodes announce to it, taken or not."""
        taken = parse_paths(self.ask("show", "route", "where", "source", "=", "RTS_BGP"))
        refused = parse_paths(self.ask("show", "route", "filtered"))
        return {**refused, **taken}

    def ask(self, *words: str) -> str:
        """What birdc prints."""
        return run("birdc", "-s", str(self._socket), *words, timeout_s=10)
