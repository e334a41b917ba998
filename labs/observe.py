"""What is so in a lab, read from outside: etcdctl, ip, ss, birdc, iptables-save, ipset.

Nothing here asks Cymric, so that what it says of itself can be held against it.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from labs.lab import Lab
from labs.network import entering, run
from labs.probe import Answer, fetch_all
from labs.topology import HOST, HOST_ADDRESS

BLOCKS = "/calico/ipam/v2/assignment/ipv4/block/"
BGP_PORT = 179
LOCAL_TABLE = 255


@dataclass(frozen=True, slots=True)
class Block:
    """An IPAM block as etcd holds it. `owner` is empty for a block without affinity."""

    cidr: IPv4Network
    owner: str
    used: int
    """Addresses that are given away, reserved ones not counted."""


@dataclass(frozen=True, slots=True)
class Route:
    """A route of a node's main table."""

    prefix: IPv4Network
    kind: str
    via: IPv4Address | None
    device: str
    protocol: str
    hops: tuple[IPv4Address, ...] = ()
    """The gateways of a route with several."""

    def __str__(self) -> str:
        words = "blackhole " if self.kind == "blackhole" else ""
        words += str(self.prefix)
        words += f" via {self.via}" if self.via else ""
        words += "".join(f" via {hop}" for hop in self.hops)
        words += f" dev {self.device}" if self.device and not self.via else ""
        return f"{words} proto {self.protocol}"


@dataclass(frozen=True, slots=True)
class KernelState:
    """All that Cymric writes into a node's kernel, in a form that can be compared."""

    routes: tuple[str, ...]
    rules: tuple[str, ...]
    sets: tuple[str, ...]


def stored(lab: Lab, prefix: str) -> Mapping[str, Any]:
    """Every value under `prefix`, parsed as JSON, as etcdctl shows it."""
    answer = json.loads(lab.etcdctl("get", "--prefix", prefix, "-w", "json"))
    return {
        base64.b64decode(kv["key"]).decode(): json.loads(base64.b64decode(kv["value"]))
        for kv in answer.get("kvs", [])
    }


def stored_keys(lab: Lab, prefix: str = "/") -> tuple[str, ...]:
    """Every key under `prefix`."""
    text = lab.etcdctl("get", "--prefix", prefix, "--keys-only")
    return tuple(line for line in text.splitlines() if line)


def blocks(lab: Lab) -> tuple[Block, ...]:
    """The IPAM blocks, in the order of their addresses."""
    found = [read_block(value) for value in stored(lab, BLOCKS).values()]
    return tuple(sorted(found, key=lambda block: block.cidr))


def read_block(value: Mapping[str, Any]) -> Block:
    """A stored block (Calico's JSON)."""
    reserved = {
        index
        for index, attribute in enumerate(value.get("attributes") or [])
        if (attribute.get("handle_id") or "").startswith("windows-reserved")
    }
    given = [index for index in value["allocations"] if index is not None and index not in reserved]
    owner = (value.get("affinity") or "").removeprefix("host:")
    return Block(IPv4Network(value["cidr"]), owner, len(given))


def routes(lab: Lab, machine: str) -> tuple[Route, ...]:
    """The main table of a node or of host1."""
    namespace = lab.layout.namespace(machine)
    found = json.loads(run("ip", "-netns", namespace, "-j", "-N", "route", "show"))
    return tuple(_route(entry) for entry in found)


def _route(entry: Mapping[str, Any]) -> Route:
    text = "0.0.0.0/0" if entry["dst"] == "default" else entry["dst"]
    kind = str(entry.get("type", "unicast"))
    via = entry.get("gateway")
    return Route(
        prefix=IPv4Network(text),
        kind={"6": "blackhole", "1": "unicast"}.get(kind, kind),
        via=IPv4Address(via) if via else None,
        device=str(entry.get("dev", "")),
        # `ip` leaves out the one that stands for "nobody in particular".
        protocol=str(entry.get("protocol", "boot")),
        hops=tuple(sorted(IPv4Address(hop["gateway"]) for hop in entry.get("nexthops", ()))),
    )


def bgp_connections(lab: Lab, machine: str) -> Mapping[IPv4Address, frozenset[str]]:
    """Peer address to the established TCP connections on port 179, by both their ports.

    The ports are a connection's identity: equal ports later mean that it never broke.
    """
    text = run(
        *entering(lab.layout.namespace(machine)),
        "ss",
        *("-tnH", "state", "established"),
        f"( sport = :{BGP_PORT} or dport = :{BGP_PORT} )",
    )
    found: dict[IPv4Address, set[str]] = {}
    for line in text.splitlines():
        local, peer = line.split()[2:4]
        address, _, port = peer.rpartition(":")
        ports = f"{local.rpartition(':')[2]}-{port}"
        found.setdefault(IPv4Address(address.strip("[]").removeprefix("::ffff:")), set()).add(ports)
    return {peer: frozenset(ports) for peer, ports in found.items()}


def kernel_state(lab: Lab, node: str) -> KernelState:
    """Routes, iptables rules without counters, and IP sets of a node."""
    inside = entering(lab.layout.namespace(node))
    shown = run(*inside, "ip", "-4", "-N", "route", "show", "table", "all")
    kept = [line.strip() for line in shown.splitlines() if f" table {LOCAL_TABLE} " not in line]
    rules = run(*inside, "iptables-save").splitlines()
    sets = run(*inside, "ipset", "save").splitlines()
    return KernelState(
        routes=tuple(sorted(kept)),
        # Kept in order, which is meaning; comments hold a date, counters change.
        rules=tuple(re.sub(r"\[\d+:\d+\]", "", rule) for rule in rules if rule[:1] != "#"),
        # A member's place in a set means nothing, nor do the sizes the kernel chose.
        sets=tuple(sorted(re.sub(r" (bucketsize|initval) \S+", "", line) for line in sets)),
    )


def matrix(lab: Lab) -> Mapping[tuple[str, str], Answer]:
    """Every pod asks every pod (itself as well) by HTTP: what does the server see?"""
    pods = lab.records.pods
    asked = {
        (source.name, target.name): (lab.layout.pod_namespace(source.name), target.address)
        for source in pods
        for target in pods
    }
    answers = fetch_all(tuple(asked.values()))
    return {names: answers[request] for names, request in asked.items()}


def seen_outside(lab: Lab, pods: Sequence[str]) -> Mapping[str, Answer]:
    """The source address that host1 sees when each of `pods` asks it by HTTP."""
    asked = {pod: (lab.layout.pod_namespace(pod), str(HOST_ADDRESS)) for pod in pods}
    answers = fetch_all(tuple(asked.values()))
    return {pod: answers[request] for pod, request in asked.items()}


def seen_in_the_world(lab: Lab, world: IPv4Address) -> Mapping[str, Answer]:
    """The source address that a top-of-rack router sees when each pod asks the world by HTTP."""
    pods = [pod.name for pod in lab.records.pods]
    asked = {pod: (lab.layout.pod_namespace(pod), str(world)) for pod in pods}
    answers = fetch_all(tuple(asked.values()))
    return {pod: answers[request] for pod, request in asked.items()}


def reached_from_outside(lab: Lab) -> Mapping[str, Answer]:
    """host1 asks every pod by HTTP: which answer, and what source do they see?"""
    asked = {pod.name: (lab.layout.namespace(HOST), pod.address) for pod in lab.records.pods}
    answers = fetch_all(tuple(asked.values()))
    return {pod: answers[request] for pod, request in asked.items()}
