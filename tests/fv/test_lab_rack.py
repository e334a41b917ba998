"""The lab as a rack: reflectors, two top-of-rack routers with BFD, and what happens when one goes.

It is a lab of its own, with four nodes, and built for this file alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from labs import checks, observe
from labs.lab import Lab
from labs.probe import Dialer, Ping
from labs.rack import REFLECTORS, TORS, WORLD, Rack
from labs.topology import CONTROL, Layout
from tests.support.lab_tools import kill, wait_for

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.peers, pytest.mark.slow]

SETTLE_S = 120.0
NOTICED_S = 10.0
"""Far below the hold time of 90 s and more, far above the 0.9 s of BFD on a busy machine."""


@pytest.fixture(scope="module")
def standing_rack(lab_layout: Layout) -> Iterator[Rack]:
    """The rack, built and settled; taken down at the end of the file."""
    lab = Lab(Layout(f"{lab_layout.name}r"))
    lab.down()
    try:
        lab.up()
        rack = Rack(lab)
        rack.up()
        checks.wait_settled(lab, patience_s=SETTLE_S)
        yield rack
    finally:
        lab.down()


@pytest.fixture
def rack(standing_rack: Rack) -> Iterator[Rack]:
    """The rack, settled before the test and after it."""
    checks.wait_settled(standing_rack.lab, patience_s=SETTLE_S)
    yield standing_rack
    checks.wait_settled(standing_rack.lab, patience_s=SETTLE_S)


def ways_to_the_world(lab: Lab, node: str) -> tuple[IPv4Address, ...]:
    """The next hops of the route to the world on a node."""
    for route in observe.routes(lab, node):
        if route.prefix == WORLD:
            return route.hops or ((route.via,) if route.via else ())
    return ()


def test_sessions_of_the_rack(rack: Rack) -> None:
    """A node that does not reflect has sessions with reflectors and routers only."""
    status = json.loads(rack.lab.cymric("node3", "bgp", "peers", "-o", "json"))
    nodes = {node.name: str(node.address) for node in rack.lab.records.nodes}
    addresses = {peer["address"] for peer in status}
    assert {nodes[name] for name in REFLECTORS} <= addresses
    assert nodes["node2"] not in addresses
    assert {str(tor.address) for tor in TORS} <= addresses
    assert checks.failures(rack.lab) == ()


def test_silent_router(rack: Rack) -> None:
    """A router that drops everything, its link up, is noticed by BFD: every node goes on with the
    other router, and returns to both when it speaks again.
    """
    lab = rack.lab
    both = tuple(sorted(tor.address for tor in TORS))
    silent, other = TORS
    with Ping(lab.layout.pod_namespace("supplier"), str(WORLD.network_address)) as ping:
        rack.silence(silent.name)
        begun = time.monotonic()
        try:
            for name in [node.name for node in lab.records.nodes]:
                wait_for(
                    lambda name=name: ways_to_the_world(lab, name) == (other.address,),
                    patience_s=NOTICED_S,
                    what=f"{name} goes on with {other.name} alone",
                )
            noticed_s = time.monotonic() - begun
        finally:
            rack.restore(silent.name)
        for name in [node.name for node in lab.records.nodes]:
            wait_for(
                lambda name=name: ways_to_the_world(lab, name) == both,
                patience_s=SETTLE_S,
                what=f"{name} has both routers again",
            )
        loss = ping.stop()
    print(f"silence noticed by all nodes in {noticed_s:.2f} s; {loss}")
    assert loss.sent > 100


@pytest.mark.parametrize("daemon", ["bgpd", "exabgp"])
def test_reflector_dies(rack: Rack, daemon: str) -> None:
    """One of two reflectors is killed: between nodes that know each other only through reflectors
    no packet is lost.
    """
    lab = rack.lab
    here, there = "database", "supplier"
    assert {lab.records.pod(here).node, lab.records.pod(there).node} == {"node2", "node3"}
    target = lab.records.pod(there).address
    namespace = lab.layout.pod_namespace(here)
    with Ping(namespace, target) as ping, Dialer(namespace, target) as dialler:
        kill(lab, CONTROL, daemon)
        checks.wait_settled(lab, patience_s=SETTLE_S)
        losses = [probe.stop() for probe in (ping, dialler)]
    assert all(loss.sent >= 20 for loss in losses)
    assert [str(loss) for loss in losses if loss.missing] == []


def test_drain_keeps_pods(rack: Rack) -> None:
    """A drained node keeps its pods reachable; nothing is lost on the way there and back."""
    lab = rack.lab
    namespace = lab.layout.pod_namespace("supplier")
    with Ping(namespace, lab.records.pod("database").address) as ping:
        lab.cymric(CONTROL, "node", "drain", "node2")
        lab.cymric(CONTROL, "node", "undrain", "node2")
        loss = ping.stop()
    assert loss.sent >= 20
    assert not loss.missing, str(loss)


def test_drain_for_reboot(rack: Rack) -> None:
    """A node whose pods have moved withdraws its blocks and is told to be safe to reboot."""
    lab = rack.lab
    pods = lab.records.pods_on("node2")
    for pod in pods:
        lab.delete_pod(pod.name)
    try:
        said = lab.cymric(CONTROL, "node", "drain", "node2", "--for-reboot")
        assert "safe to reboot" in said.lower()
        via = lab.records.node("node2").address
        wait_for(
            lambda: all(route.via != via for route in observe.routes(lab, "node3")),
            patience_s=SETTLE_S,
            what="node3 has no route to blocks of node2",
        )
        lab.cymric(CONTROL, "node", "undrain", "node2")
    finally:
        for pod in pods:
            lab.add_pod("node2", pod.name, pools=pod.pools)
