"""Whether what is so should be so: one function per promise, each a list of what is wrong.

`failures` runs them all; empty means that the lab is as it should be. The same checks wait for a
lab to settle, are run by `labs/lab check`, and by the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from labs import observe
from labs.lab import Lab
from labs.network import CommandFailed
from labs.rack import REFLECTORS, TORS, WORLD
from labs.router import Import
from labs.supervisor import NotRunning
from labs.topology import (
    DEFAULT_POOL,
    EXTERNAL_POOL,
    HOST,
    HOST_ADDRESS,
    POD_RANGE,
    Node,
    Pod,
)

Promise = Callable[[Lab], list[str]]


class NotSettled(RuntimeError):
    """The lab did not become as it should be in time; the text lists what is wrong."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise and what is wrong with it; nothing if it holds."""

    promise: str
    wrong: tuple[str, ...]


def every_process_runs(lab: Lab) -> list[str]:
    """Every process runs under the supervisor."""
    return [
        f"{process.group}:{process.name} is {process.state.lower()} ({process.why})"
        for process in lab.supervisor.processes()
        if not process.running
    ]


def every_session_is_established(lab: Lab) -> list[str]:
    """Every node has its BGP sessions: the mesh or reflectors, host1, routers; and no others."""
    wrong = [
        f"host1: {session.name} ({session.neighbour}) is {session.state}"
        for session in lab.router.sessions()
        if not session.established
    ]
    nodes = lab.records.nodes
    for node in nodes:
        connected = observe.bgp_connections(lab, node.name)
        expected = {
            other.address: other.name
            for other in nodes
            if other != node and peers(lab, node, other)
        }
        expected[HOST_ADDRESS] = HOST
        if lab.records.rack:
            expected |= {tor.address: tor.name for tor in TORS}
        for address, name in expected.items():
            count = len(connected.get(address, ()))
            if count != 1:
                wrong.append(f"{node.name}: {count} BGP connections with {name}, not 1")
        wrong += [
            f"{node.name}: a BGP connection with {address}, which is no peer"
            for address in connected.keys() - expected.keys()
        ]
    return wrong


def routes_follow_blocks(lab: Lab) -> list[str]:
    """Each node has a blackhole for each block of its own and a route to each other's block."""
    nodes = {node.name: node.address for node in lab.records.nodes}
    blocks = observe.blocks(lab)
    wrong = []
    for node in nodes:
        expected: dict[tuple[IPv4Network, str, IPv4Address | None], str] = {}
        for block in blocks:
            if block.owner == node:
                expected[(block.cidr, "blackhole", None)] = "blackhole of its own block"
            elif block.owner in nodes:
                via = nodes[block.owner]
                expected[(block.cidr, "unicast", via)] = f"route to the block of {block.owner}"
        present = {
            (route.prefix, route.kind, route.via)
            for route in observe.routes(lab, node)
            if route.prefix.subnet_of(POD_RANGE) and not route.device.startswith("cali")
        }
        wrong += [f"{node}: no {expected[key]}: {key[0]}" for key in expected.keys() - present]
        wrong += [
            f"{node}: {kind} route to {prefix} via {via}, which no block explains"
            for prefix, kind, via in present - expected.keys()
        ]
    return wrong


def every_pod_has_its_route(lab: Lab) -> list[str]:
    """Each node has a /32 on a cali interface for each pod of its own, and no other."""
    wrong = []
    for node in lab.records.nodes:
        expected = {IPv4Network(pod.address) for pod in lab.records.pods_on(node.name)}
        local = {
            route.prefix
            for route in observe.routes(lab, node.name)
            if route.device.startswith("cali")
        }
        wrong += [f"{node.name}: no route to its pod {pod}" for pod in expected - local]
        wrong += [f"{node.name}: a route to {pod}, which is no pod" for pod in local - expected]
    return wrong


def host_takes_what_its_filter_says(lab: Lab) -> list[str]:
    """host1's kernel has the blocks that its import lets through, and no others."""
    imports = lab.records.imports
    nodes = {node.name: node.address for node in lab.records.nodes}
    taken = [EXTERNAL_POOL, *([DEFAULT_POOL] if imports is Import.PERMISSIVE else [])]
    expected = {
        (block.cidr, nodes[block.owner])
        for block in observe.blocks(lab)
        if block.owner in nodes and any(block.cidr.subnet_of(pool) for pool in taken)
    }
    present = {
        (route.prefix, route.via)
        for route in observe.routes(lab, HOST)
        if route.prefix.subnet_of(POD_RANGE)
    }
    wrong = [f"host1: no route to {prefix} via {via}" for prefix, via in expected - present]
    wrong += [
        f"host1: a route to {prefix} via {via}, against its {imports} import"
        for prefix, via in present - expected
    ]
    return wrong


def pods_see_each_other_flat(lab: Lab) -> list[str]:
    """Every pod reaches every pod, and the server sees the client's own address."""
    address = {pod.name: pod.address for pod in lab.records.pods}
    return [
        f"{source} -> {target}: {answer.error or f'seen as {answer.seen}'}"
        for (source, target), answer in observe.matrix(lab).items()
        if answer.seen != address[source]
    ]


def host_sees_the_right_source(lab: Lab) -> list[str]:
    """host1 sees a natOutgoing pod as its node, and any other that it has a route to as itself."""
    nat = nat_outgoing(lab)
    pods = [pod for pod in lab.records.pods if is_expected_outside(lab, pod, nat)]
    nodes = {node.name: str(node.address) for node in lab.records.nodes}
    wrong = []
    for name, answer in observe.seen_outside(lab, [pod.name for pod in pods]).items():
        pod = lab.records.pod(name)
        expected = nodes[pod.node] if translates(pod, nat) else pod.address
        if answer.seen != expected:
            wrong.append(f"{name}: {answer.error or f'seen as {answer.seen}'}, not {expected}")
    return wrong


def world_has_two_ways(lab: Lab) -> list[str]:
    """Each node reaches the world through both routers, by one route with two next hops."""
    wanted = tuple(sorted(tor.address for tor in TORS))
    wrong = []
    for node in lab.records.nodes:
        found = [route for route in observe.routes(lab, node.name) if route.prefix == WORLD]
        if [route.hops for route in found] != [wanted]:
            wrong.append(f"{node.name}: {', '.join(map(str, found)) or 'no route'} to {WORLD}")
    return wrong


def pods_reach_the_world(lab: Lab) -> list[str]:
    """Every pod reaches the world behind the routers, under its own address or its node's."""
    nat = nat_outgoing(lab)
    nodes = {node.name: str(node.address) for node in lab.records.nodes}
    wrong = []
    for name, answer in observe.seen_in_the_world(lab, WORLD.network_address).items():
        pod = lab.records.pod(name)
        expected = nodes[pod.node] if translates(pod, nat) else pod.address
        if answer.seen != expected:
            wrong.append(f"{name}: {answer.error or f'seen as {answer.seen}'}, not {expected}")
    return wrong


def peers(lab: Lab, node: Node, other: Node) -> bool:
    """Whether two nodes should have a session: in the mesh all, in a rack one that reflects."""
    return not lab.records.rack or node.name in REFLECTORS or other.name in REFLECTORS


PROMISES: tuple[Promise, ...] = (
    every_process_runs,
    every_session_is_established,
    routes_follow_blocks,
    every_pod_has_its_route,
    host_takes_what_its_filter_says,
    pods_see_each_other_flat,
    host_sees_the_right_source,
)
RACK_PROMISES: tuple[Promise, ...] = (world_has_two_ways, pods_reach_the_world)


def nat_outgoing(lab: Lab) -> Mapping[IPv4Network, bool]:
    """What natOutgoing is for every pool, as etcd holds it."""
    pools = observe.stored(lab, "/calico/resources/v3/projectcalico.org/ippools/")
    return {
        IPv4Network(pool["spec"]["cidr"]): bool(pool["spec"].get("natOutgoing", False))
        for pool in pools.values()
    }


def translates(pod: Pod, nat: Mapping[IPv4Network, bool]) -> bool:
    """True if the pod's pool translates what leaves the cluster."""
    return any(on for cidr, on in nat.items() if IPv4Address(pod.address) in cidr)


def is_expected_outside(lab: Lab, pod: Pod, nat: Mapping[IPv4Network, bool]) -> bool:
    """True if host1's answers find back to the pod: translated, or its block is taken by host1."""
    known_outside = IPv4Address(pod.address) in EXTERNAL_POOL
    return translates(pod, nat) or known_outside or lab.records.imports is Import.PERMISSIVE


def findings(lab: Lab) -> tuple[Finding, ...]:
    """Every promise with what is wrong with it now."""
    found = []
    for promise in (*PROMISES, *(RACK_PROMISES if lab.records.rack else ())):
        text = (promise.__doc__ or promise.__name__).splitlines()[0]
        try:
            wrong = promise(lab)
        except (CommandFailed, NotRunning) as failure:
            wrong = [str(failure)]
        found.append(Finding(text, tuple(wrong)))
    return tuple(found)


def failures(lab: Lab) -> tuple[str, ...]:
    """What is wrong now; empty if every promise holds."""
    return tuple(text for finding in findings(lab) for text in finding.wrong)


def wait_settled(
    lab: Lab, *, patience_s: float = 60, on_wrong: Callable[[int], None] | None = None
) -> None:
    """Return when every promise holds; raise NotSettled with what is wrong if it takes too long."""
    deadline = time.monotonic() + patience_s
    while wrong := failures(lab):
        if on_wrong is not None:
            on_wrong(len(wrong))
        if time.monotonic() > deadline:
            raise NotSettled(f"after {patience_s:.0f} s:\n  " + "\n  ".join(wrong))
        time.sleep(0.2)
