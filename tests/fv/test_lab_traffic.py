"""What packets do in a whole lab: flat between pods, translated only where a pool says so."""

from __future__ import annotations

import socket
import subprocess
from ipaddress import IPv4Address

import pytest

from labs import observe
from labs.lab import Lab
from labs.network import entering, inside, run
from labs.probe import fetch_all
from labs.router import Import
from labs.topology import (
    DEFAULT_POOL,
    DEFAULT_POOL_NAME,
    EXTERNAL_POOL,
    EXTERNAL_POOL_NAME,
    HOST,
    HOST_ADDRESS,
    POD_RANGE,
)
from tests.support.lab_tools import (
    Capture,
    changed,
    pool_key,
    wait_equal,
    wait_for,
    wait_seen,
    with_nat_outgoing,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.peers]

TCP, UDP, ICMP = 6, 17, 1
ENCAPSULATIONS = {4: "IPIP", 41: "IPv6 in IPv4", 47: "GRE", 50: "ESP", 51: "AH"}
TUNNEL_PORTS = {4789: "VXLAN", 8472: "VXLAN", 6081: "Geneve", 51820: "WireGuard"}


def test_pods_see_each_other_under_their_own_address(lab: Lab) -> None:
    """Every pod reaches every pod on every node; the server sees the client's own address."""
    own = {pod.name: pod.address for pod in lab.records.pods}
    seen = {pair: answer.seen for pair, answer in observe.matrix(lab).items()}
    assert seen == {(source, target): own[source] for source in own for target in own}
    assert len({pod.node for pod in lab.records.pods}) == 3


def test_no_encapsulation_on_the_wire(lab: Lab) -> None:
    """A capture of the bridge shows pod to pod traffic with one header, and no tunnel at all."""
    customer, database = lab.records.pod("customer"), lab.records.pod("database")
    assert customer.node != database.node
    with Capture(lab) as capture:
        answer = fetch_all([(lab.layout.pod_namespace("customer"), database.address)])
        run(*entering(lab.layout.pod_namespace("customer")), "ping", "-c1", database.address)
        packets = capture.packets()
    assert all(one.ok for one in answer.values())
    ours = {IPv4Address(customer.address), IPv4Address(database.address)}
    between = [packet for packet in packets if {packet.source, packet.target} == ours]
    assert {packet.protocol for packet in between} == {TCP, ICMP}
    assert {packet.source for packet in between} == ours, "both directions were captured"
    for packet in packets:
        assert packet.protocol not in ENCAPSULATIONS, packet
        if packet.protocol == UDP:
            assert not TUNNEL_PORTS.keys() & set(packet.ports), packet


def test_the_capture_would_see_a_tunnel(lab: Lab) -> None:
    """The capture is no blind witness: a packet of IP in IP sent on purpose is in it."""
    with inside(lab.layout.namespace("node1")):
        tunnel = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IPIP)
    with tunnel, Capture(lab) as capture:
        tunnel.sendto(b"\x45" + bytes(19), (str(lab.records.node("node2").address), 0))
        seen = wait_for(capture.packets, what="anything at all")
    assert [ENCAPSULATIONS.get(packet.protocol) for packet in seen if packet.protocol == 4]


def test_nat_outgoing_shows_the_node(lab: Lab) -> None:
    """A pod of a natOutgoing pool is seen outside as its node, from whichever node."""
    nodes = {node.name: str(node.address) for node in lab.records.nodes}
    pods = [pod for pod in lab.records.pods if IPv4Address(pod.address) in DEFAULT_POOL]
    seen = observe.seen_outside(lab, [pod.name for pod in pods])
    assert {pod.name: seen[pod.name].seen for pod in pods} == {
        pod.name: nodes[pod.node] for pod in pods
    }


def test_nat_outgoing_off_shows_the_pod(lab: Lab) -> None:
    """A pod of a pool without natOutgoing is seen outside under its own address."""
    nginx = lab.records.pod("nginx")
    assert IPv4Address(nginx.address) in EXTERNAL_POOL
    assert observe.seen_outside(lab, ["nginx"])["nginx"].seen == nginx.address


def test_nat_outgoing_follows_the_pool(lab: Lab) -> None:
    """Switching natOutgoing of a pool changes what host1 sees, for running pods, both ways."""
    nginx = lab.records.pod("nginx")
    node = str(lab.records.node(nginx.node).address)
    with changed(lab, pool_key(EXTERNAL_POOL_NAME), with_nat_outgoing(True)):
        wait_seen(lab, "nginx", node)
    wait_seen(lab, "nginx", nginx.address)
    customer = lab.records.pod("customer")
    lab.set_import(Import.PERMISSIVE)
    try:
        wait_for(lambda: observe.reached_from_outside(lab)["customer"].ok, what="route at host1")
        with changed(lab, pool_key(DEFAULT_POOL_NAME), with_nat_outgoing(False)):
            wait_seen(lab, "customer", customer.address)
        wait_seen(lab, "customer", str(lab.records.node(customer.node).address))
    finally:
        lab.set_import(Import.STRICT)


@pytest.mark.parametrize("on", [False, True])
def test_traffic_between_pools_is_never_translated(lab: Lab, on: bool) -> None:
    """From pool to pool the server sees the pod's own address, whatever natOutgoing says."""
    customer, nginx = lab.records.pod("customer"), lab.records.pod("nginx")
    remote = lab.records.pod("database")
    with changed(lab, pool_key(EXTERNAL_POOL_NAME), with_nat_outgoing(on)):
        expected = str(lab.records.node(nginx.node).address) if on else nginx.address
        wait_seen(lab, "nginx", expected)  # the change has arrived
        answers = observe.matrix(lab)
    assert answers[("nginx", "customer")].seen == nginx.address
    assert answers[("nginx", "database")].seen == nginx.address
    assert answers[("customer", "nginx")].seen == customer.address
    assert answers[("database", "nginx")].seen == remote.address


def test_the_host_outside_reaches_an_announced_pod_untranslated(lab: Lab) -> None:
    """host1 opens a connection to a pod of the external pool; the pod sees host1 itself."""
    assert observe.reached_from_outside(lab)["nginx"].seen == str(HOST_ADDRESS)


def _taken_by_host(lab: Lab) -> set[str]:
    return {str(r.prefix) for r in observe.routes(lab, HOST) if r.prefix.subnet_of(POD_RANGE)}


def test_host_takes_default_pool_blocks_only_when_permissive(lab: Lab) -> None:
    """Default-pool blocks reach host1's kernel with the permissive import, and only with it."""
    blocks = observe.blocks(lab)
    external = {str(block.cidr) for block in blocks if block.cidr.subnet_of(EXTERNAL_POOL)}
    assert external
    assert _taken_by_host(lab) == external
    since = {session.name: session.since for session in lab.router.sessions()}
    lab.set_import(Import.PERMISSIVE)
    try:
        wait_equal(lambda: _taken_by_host(lab), {str(b.cidr) for b in blocks if b.owner})
        reached = observe.reached_from_outside(lab)
        assert {answer.seen for answer in reached.values()} == {str(HOST_ADDRESS)}
    finally:
        lab.set_import(Import.STRICT)
    wait_equal(lambda: _taken_by_host(lab), external)
    assert {session.name: session.since for session in lab.router.sessions()} == since


def test_each_node_announces_exactly_its_blocks(lab: Lab) -> None:
    """What host1 is told, taken or refused, is each block from the node that owns it, no more."""
    nodes = {node.name: node.address for node in lab.records.nodes}
    told = {prefix: set(hops) for prefix, hops in lab.router.announced().items()}
    assert told == {block.cidr: {nodes[block.owner]} for block in observe.blocks(lab)}


def test_unused_address_of_a_block_ends_in_the_blackhole(lab: Lab) -> None:
    """A packet for an unused address of a node's own block is dropped there, and never leaves."""
    customer = lab.records.pod("customer")
    block = next(b for b in observe.blocks(lab) if IPv4Address(customer.address) in b.cidr)
    used = {IPv4Address(pod.address) for pod in lab.records.pods}
    unused = next(address for address in list(block.cidr)[::-1] if address not in used)
    with Capture(lab) as capture:
        ping = subprocess.run(
            (
                *entering(lab.layout.pod_namespace("customer")),
                *("ping", "-c2", "-i0.2", "-W1", str(unused)),
            ),
            capture_output=True,
        )
        packets = capture.packets()
    assert ping.returncode != 0
    assert not [packet for packet in packets if packet.target == unused]


def test_a_pod_cannot_send_with_a_foreign_address(lab: Lab) -> None:
    """A packet whose source is not the pod's own never gets past the pod's node."""
    customer, database = lab.records.pod("customer"), lab.records.pod("database")
    stolen = "198.19.23.77"
    sandbox = lab.layout.pod_namespace("customer")
    run("ip", "-netns", sandbox, "address", "add", f"{stolen}/32", "dev", "eth0")
    try:
        with Capture(lab) as capture:
            for source in (stolen, customer.address):
                subprocess.run(
                    (
                        *entering(sandbox),
                        *("ping", "-c2", "-i0.2", "-W1", "-I", source, database.address),
                    ),
                    capture_output=True,
                )
            sources = {p.source for p in capture.packets() if p.protocol == ICMP}
    finally:
        run("ip", "-netns", sandbox, "address", "delete", f"{stolen}/32", "dev", "eth0")
    assert IPv4Address(customer.address) in sources
    assert IPv4Address(stolen) not in sources
