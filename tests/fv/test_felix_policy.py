"""Policy on a real kernel: felix, etcd, namespaces as pods, and packets that get through or not."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import talk
from tests.support.eventually import eventually_now
from tests.support.felix_lab import NODE, NODE_ADDRESS, NODE_ADDRESS6, POOL, FelixLab, Pod, run

pytestmark = [pytest.mark.root, pytest.mark.etcd]

TALK = ("/usr/bin/python3", "-IS", str(Path(talk.__file__)))
PATIENCE_S = 30.0
CHANGES = 300
OPEN, SHUT = 9001, 9002
SELECTED = {"app": "web"}


@pytest.fixture(scope="module", params=["nft", "legacy"])
def lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FelixLab]:
    """A node with felix."""
    made = FelixLab(tmp_path_factory.mktemp("felix-policy"), request.param)
    try:
        made.open()
        made.put_pool("first", POOL, nat_outgoing=False)
        made.put("Tier", "tiers", "default", {"order": 1000000})
        made.start_felix()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def pods(lab: FelixLab) -> tuple[Pod, Pod, Pod]:
    """Web with servers, and two that call it, one of them labelled."""
    web = lab.add_pod("web", "198.19.16.2", "fd00:198:16::2")
    client = lab.add_pod("cl", "198.19.16.3", "fd00:198:16::3")
    other = lab.add_pod("ot", "198.19.16.4", "fd00:198:16::4")
    ports = [{"name": "http", "protocol": "TCP", "port": 8080}]
    lab.put_endpoint(web, labels=SELECTED, ports=ports)
    lab.put_endpoint(client, labels={"app": "client"})
    lab.put_endpoint(other)
    lab.wait_up(web, client, other)
    start(lab, web.namespace, "serve", "80", "8080", "9000")
    return web, client, other


def start(lab: FelixLab, namespace: str, *words: str) -> subprocess.Popen[bytes]:
    """Start a talker and wait until it is ready."""
    process = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{namespace}", *TALK, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    lab.processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def ask(process: subprocess.Popen[bytes]) -> str:
    """Send a line to a talker and return its answer."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"?\n")
    process.stdin.flush()
    return process.stdout.readline().decode().strip()


def reaches(namespace: str, address: str, port: int) -> bool:
    """Whether a TCP connection is accepted."""
    words = ["nsenter", f"--net=/run/netns/{namespace}", *TALK, "probe", address, str(port)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def becomes(expected: Mapping[tuple[str, str, int], bool]) -> None:
    """Wait until exactly these connections are possible."""

    def wrong() -> list[tuple[str, str, int]]:
        return [way for way, is_open in expected.items() if reaches(*way) is not is_open]

    eventually_now(lambda: not wrong(), PATIENCE_S, what=f"connections are as in {expected}")


def policy(lab: FelixLab, name: str, spec: Mapping[str, object], **more: Mapping[str, str]) -> None:
    """Store a NetworkPolicy (with a namespace in its name) or a GlobalNetworkPolicy."""
    kind = "NetworkPolicy" if "/" in name else "GlobalNetworkPolicy"
    lab.put(kind, plural(name), name, spec, **more)


def plural(name: str) -> str:
    """The word in the key."""
    return "networkpolicies" if "/" in name else "globalnetworkpolicies"


def allow(port: object = None, **source: object) -> dict[str, object]:
    """An Allow rule for TCP."""
    rule: dict[str, object] = {"action": "Allow", "protocol": "TCP", "source": source}
    return rule if port is None else {**rule, "destination": {"ports": [port]}}


def test_policy_lets_in_whom_it_selects(lab: FelixLab, pods: tuple[Pod, Pod, Pod]) -> None:
    """Only labelled pods, only on the port, in both families; a label that comes opens at once."""
    web, client, other = pods
    name = "default/web"
    spec = {"selector": "app == 'web'", "ingress": [allow(80, selector="app == 'client'")]}
    try:
        policy(lab, name, {**spec, "types": ["Ingress"]})
        becomes(
            {
                (client.namespace, web.address, 80): True,
                (client.namespace, web.address6, 80): True,
                (client.namespace, web.address, 8080): False,
                (other.namespace, web.address, 80): False,
                (other.namespace, web.address6, 80): False,
            }
        )
        lab.put_endpoint(other, labels={"app": "client"})
        becomes(
            {(other.namespace, web.address, 80): True, (other.namespace, web.address6, 80): True}
        )
        lab.put_endpoint(other)
        becomes({(other.namespace, web.address, 80): False})
    finally:
        lab.delete(plural(name), name)
    becomes({(other.namespace, web.address, 8080): True})
    eventually_now(lambda: "s:" not in lab.on_node("ipset", "list", "-n"), PATIENCE_S)


def test_tiers(lab: FelixLab, pods: tuple[Pod, Pod, Pod]) -> None:
    """The first tier decides or passes; what it passes, the next decides."""
    web, client, other = pods
    lab.put("Tier", "tiers", "security", {"order": 10})
    first, second = "security.first", "default/default.second"
    try:
        policy(
            lab,
            first,
            {
                "tier": "security",
                "selector": "app == 'web'",
                "types": ["Ingress"],
                "ingress": [
                    {"action": "Deny", "source": {"nets": [f"{other.address}/32"]}},
                    {"action": "Pass"},
                ],
            },
        )
        spec = {"selector": "app == 'web'", "types": ["Ingress"], "ingress": [allow(80)]}
        policy(lab, second, {**spec, "tier": "default"})
        becomes(
            {
                (client.namespace, web.address, 80): True,
                (client.namespace, web.address, 8080): False,
                (other.namespace, web.address, 80): False,
            }
        )
    finally:
        for name in (first, second):
            lab.delete(plural(name), name)
    becomes({(other.namespace, web.address, 8080): True})


def test_named_port(lab: FelixLab, pods: tuple[Pod, Pod, Pod]) -> None:
    """A port by the name that the pod gives it, beside one by number."""
    web, client, _ = pods
    name = "default/named"
    rule = {"action": "Allow", "protocol": "TCP", "destination": {"ports": ["http", 9000]}}
    try:
        spec = {"selector": "app == 'web'", "types": ["Ingress"], "ingress": [rule]}
        policy(lab, name, spec)
        becomes(
            {
                (client.namespace, web.address, 8080): True,
                (client.namespace, web.address6, 8080): True,
                (client.namespace, web.address, 9000): True,
                (client.namespace, web.address, 80): False,
            }
        )
    finally:
        lab.delete(plural(name), name)
    becomes({(client.namespace, web.address, 80): True})


def test_flushed_chains_are_back_at_once(lab: FelixLab, pods: tuple[Pod, Pod, Pod]) -> None:
    """The nft side of the kernel tells of it; with legacy the next reading finds it."""
    name = "default/closed"
    web, client, _ = pods
    try:
        policy(lab, name, {"selector": "app == 'web'", "types": ["Ingress"]})
        becomes({(client.namespace, web.address, 80): False})
        for _ in range(2):
            lab.on_node(f"iptables-{lab.backend}", "-F")
            eventually_now(lambda: "-A FORWARD" in "".join(lab.save("filter")), PATIENCE_S)
            eventually_now(
                lambda: any("Drop if no policies" in line for line in lab.save("filter")),
                PATIENCE_S,
            )
        if lab.backend == "nft":
            assert lab.log.count("table was changed by somebody else, repaired") >= 2
    finally:
        lab.delete(plural(name), name)
    becomes({(client.namespace, web.address, 80): True})


def test_host_endpoint(lab: FelixLab) -> None:
    """Own traffic by policy, failsafe ports always open; early and untracked policy."""
    world, host = lab.world, "globalhost"
    start(lab, lab.node, "serve", "22", "8081", "8082")
    before = {(world, NODE_ADDRESS, port): True for port in (22, 8081, 8082)}
    becomes(before)
    spec = {"node": NODE, "interfaceName": "up0", "expectedIPs": [NODE_ADDRESS]}
    rules = {"selector": "role == 'node'", "types": ["Ingress", "Egress"]}
    try:
        lab.put("HostEndpoint", "hostendpoints", "node1-up0", spec, {"role": "node"})
        becomes({way: way[2] == 22 for way in before})
        # Without it no neighbour finds another in IPv6.
        discovery = {"action": "Allow", "protocol": "ICMPv6"}
        ingress = [allow(8081), discovery]
        policy(lab, host, {**rules, "ingress": ingress, "egress": [{"action": "Allow"}]})
        becomes(
            {
                (world, NODE_ADDRESS, 22): True,
                (world, NODE_ADDRESS, 8081): True,
                (world, NODE_ADDRESS6, 8081): True,
                (world, NODE_ADDRESS, 8082): False,
                (world, NODE_ADDRESS6, 8082): False,
            }
        )
        early = {"action": "Deny", "protocol": "TCP", "destination": {"ports": [8081, 22]}}
        policy(lab, "early", {"selector": "role == 'node'", "types": ["Ingress"], "preDNAT": True,
                              "applyOnForward": True, "ingress": [early]})  # fmt: skip
        becomes({(world, NODE_ADDRESS, 22): True, (world, NODE_ADDRESS, 8081): False})
        lab.delete("globalnetworkpolicies", "early")
        untracked = {**rules, "doNotTrack": True, "applyOnForward": True}
        policy(
            lab,
            "untracked",
            {
                **untracked,
                "ingress": [allow(8082)],
                "egress": [{"action": "Allow", "protocol": "TCP", "source": {"ports": [8082]}}],
            },
        )
        becomes({(world, NODE_ADDRESS, 8081): True, (world, NODE_ADDRESS, 8082): True})
    finally:
        for name in (host, "early", "untracked"):
            lab.delete("globalnetworkpolicies", name)
        lab.delete("hostendpoints", "node1-up0")
    becomes(before)


def test_host_endpoint_follows_its_interface(lab: FelixLab) -> None:
    """One known by an address applies to the interface that has it, from the moment it has it."""
    address = "198.19.0.77"
    start(lab, lab.node, "serve", "8090")
    try:
        lab.put("HostEndpoint", "hostendpoints", "moving", {"node": NODE, "expectedIPs": [address]})
        becomes({(lab.world, NODE_ADDRESS, 8090): True})
        run("ip", "-n", lab.node, "address", "add", f"{address}/20", "dev", "up0")
        becomes({(lab.world, NODE_ADDRESS, 8090): False})
        run("ip", "-n", lab.node, "address", "del", f"{address}/20", "dev", "up0")
        becomes({(lab.world, NODE_ADDRESS, 8090): True})
    finally:
        lab.delete("hostendpoints", "moving")


def test_established_connections_end_only_where_a_policy_asks(
    lab: FelixLab, pods: tuple[Pod, Pod, Pod]
) -> None:
    """A connection goes on when policy denies it, until one asks: then it ends, and no other."""
    web, client, other = pods
    name = "default/later"
    held, kept = (start(lab, one.namespace, "hold", web.address, "80") for one in (client, other))
    source = {"nets": [f"{other.address}/32"]}
    spec = {"selector": "app == 'web'", "types": ["Ingress"], "ingress": [allow(80, **source)]}
    asking = {"cymric.io/reevaluate-established": "true"}
    try:
        policy(lab, name, spec)
        becomes({(client.namespace, web.address, 80): False})
        assert (ask(held), ask(kept)) == ("ok", "ok")
        ended = lab.metric("cymric_felix_connections_ended")
        policy(lab, name, spec, annotations=asking)
        # Silence until then: what web sends by itself begins a connection that nobody forbids.
        eventually_now(lambda: lab.metric("cymric_felix_connections_ended") > ended, PATIENCE_S)
        # What earlier questions left behind (TIME_WAIT) ends as well, maybe before the one held.
        eventually_now(lambda: ask(held) == "lost", PATIENCE_S)
        assert ask(kept) == "ok"
    finally:
        lab.delete(plural(name), name)
    becomes({(client.namespace, web.address, 80): True})


def test_no_packet_slips_through_changing_policy(lab: FelixLab, pods: tuple[Pod, Pod, Pod]) -> None:
    """While policies and labels change at random, what all of them allow arrives, all of it, and
    what all of them deny does not.
    """
    web, client, _ = pods
    chance, name, extra = random.Random(7), "default/changing", "changing-extra"
    colours = ("red", "blue")
    lab.put_endpoint(client, labels={"colour": "red"})
    policy(lab, name, selecting(VARIANTS[0]))
    becomes({(client.namespace, web.address, 80): False})
    eventually_now(lambda: client.address in lab.on_node("ipset", "list"), PATIENCE_S)
    receiver = start(lab, web.namespace, "receive", str(OPEN), str(SHUT))
    sender = start(lab, client.namespace, "flood", web.address, str(OPEN), str(SHUT))
    try:
        eventually_now(lambda: counted(receiver)[OPEN] > 50, PATIENCE_S)
        for _ in range(CHANGES):
            match chance.randrange(4):
                case 0 | 1:
                    policy(lab, name, selecting(chance.choice(VARIANTS)))
                case 2:
                    lab.put_endpoint(client, labels={"colour": chance.choice(colours)})
                case _ if chance.random() < 0.5:
                    order = {"order": chance.randrange(99)}
                    policy(lab, extra, {**selecting(chance.choice(VARIANTS)), **order})
                case _:
                    lab.delete(plural(extra), extra)
        sent = int(ask(sender))
        eventually_now(lambda: counted(receiver)[OPEN] >= sent, PATIENCE_S, what="all arrived")
        found = counted(receiver)
    finally:
        for one in (name, extra):
            lab.delete(plural(one), one)
        lab.put_endpoint(client, labels={"app": "client"})
    staged = lab.metric("cymric_felix_staged_changes")
    print(f"{CHANGES} changes, {staged:.0f} staged, {sent} datagrams each, {found}")
    assert found == {OPEN: sent, SHUT: 0}
    assert staged > 0


def udp(action: str, port: int, **source: object) -> dict[str, object]:
    """A rule for datagrams."""
    destination = {"ports": [port]}
    return {"action": action, "protocol": "UDP", "destination": destination, "source": source}


RED, BLUE = "colour == 'red'", "colour == 'blue'"
VARIANTS: tuple[list[dict[str, object]], ...] = (
    [udp("Allow", OPEN, selector=RED), udp("Allow", OPEN, selector=BLUE)],
    [
        udp("Deny", SHUT, selector=RED),
        udp("Deny", SHUT, selector=BLUE),
        {"action": "Allow", "protocol": "UDP"},
    ],
    [udp("Deny", SHUT), {"action": "Allow", "source": {"selector": "colour in {'red', 'blue'}"}}],
    [udp("Deny", SHUT, nets=["198.19.16.0/24", "198.19.17.0/24"]), {"action": "Pass"}],
    [
        {"action": "Deny", "source": {"notSelector": "has(colour)"}},
        udp("Allow", OPEN, selector="has(colour)"),
    ],
)
"""Whichever counts: datagrams to the open port are allowed, to the shut one denied."""


def selecting(rules: list[dict[str, object]]) -> dict[str, object]:
    """A policy for what web receives."""
    return {"selector": "app == 'web'", "types": ["Ingress"], "ingress": rules}


def counted(receiver: subprocess.Popen[bytes]) -> dict[int, int]:
    """How many datagrams arrived, by port."""
    words = list(map(int, ask(receiver).split()))
    return dict(zip(words[::2], words[1::2], strict=True))
