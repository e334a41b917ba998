"""Restart is the ordinary case: whatever is killed, packets go on and the same state comes back.

Sessions are compared by the ports of their TCP connections in the kernel, which do not ask our own
programs, and by the time of the last transition that host1's BIRD tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv4Address

import pytest

from labs import checks, observe
from labs.lab import DATASTORE, Lab
from labs.network import entering, run
from labs.probe import Dialer, Ping
from labs.router import protocol_name
from labs.topology import CONTROL, DAEMONS, HOST, POD_RANGE
from tests.support.lab_tools import kill, pod, wait_equal, wait_for

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.peers, pytest.mark.slow]

NODE = "node1"
ROUTES_BACK_S = 15.0

Sessions = Mapping[str, Mapping[IPv4Address, frozenset[str]]]


def sessions(lab: Lab) -> Sessions:
    """Every BGP connection of every node, by its identity."""
    return {node.name: observe.bgp_connections(lab, node.name) for node in lab.records.nodes}


def kernels(lab: Lab) -> Mapping[str, observe.KernelState]:
    """What is in the kernel of every node."""
    return {node.name: observe.kernel_state(lab, node.name) for node in lab.records.nodes}


@contextmanager
def no_packet_lost(lab: Lab) -> Iterator[None]:
    """Between pods on two nodes: a ping every 5 ms each way, and new connections; none lost."""
    customer, database = lab.records.pod("customer"), lab.records.pod("database")
    assert customer.node == NODE != database.node
    here, there = lab.layout.pod_namespace("customer"), lab.layout.pod_namespace("database")
    with (
        Ping(here, database.address) as out,
        Ping(there, customer.address) as back,
        Dialer(here, database.address) as dialled_out,
        Dialer(there, customer.address) as dialled_in,
    ):
        yield
        losses = [probe.stop() for probe in (out, back, dialled_out, dialled_in)]
    assert all(loss.sent >= 20 for loss in losses), "the probes ran all the time"
    assert [str(loss) for loss in losses if loss.missing] == []


def starts_finished(lab: Lab) -> int:
    """How often bgpd of the node has ended its start, which is when it may remove old routes."""
    return (lab.layout.logs / f"{NODE}-bgpd.log").read_text().count("start is over")


def test_the_probes_would_notice_a_break(lab: Lab) -> None:
    """Forwarding stopped for half a second: packets are missed, so nothing hides a loss."""
    customer, database = lab.records.pod("customer"), lab.records.pod("database")
    namespace = lab.layout.namespace(NODE)
    with (
        Ping(lab.layout.pod_namespace("customer"), database.address) as ping,
        Dialer(lab.layout.pod_namespace("database"), customer.address, interval_s=0.01) as dialer,
    ):
        rule = ("-w", "-t", "mangle", "-d", str(POD_RANGE), "-j", "DROP")
        run(*entering(namespace), "iptables", "-I", "FORWARD", *rule)
        run("sleep", "0.5")
        run(*entering(namespace), "iptables", "-D", "FORWARD", *rule)
        pings, dials = ping.stop(), dialer.stop()
    assert 10 < len(pings.missing) < 400
    assert dials.missing


@pytest.mark.parametrize("daemon", [d for d in DAEMONS if d != "exabgp"])
def test_a_killed_daemon_costs_no_packet_and_no_session(lab: Lab, daemon: str) -> None:
    """Kill -9 a daemon of a node: no packet lost, no session lost, the same kernel state."""
    before, kernel = sessions(lab), kernels(lab)
    since = {session.name: session.since for session in lab.router.sessions()}
    started = starts_finished(lab)
    with no_packet_lost(lab):
        kill(lab, NODE, daemon)
        checks.wait_settled(lab)
        if daemon == "bgpd":
            wait_for(lambda: starts_finished(lab) > started, what="end of bgpd's start")
    assert sessions(lab) == before
    assert {session.name: session.since for session in lab.router.sessions()} == since
    wait_equal(lambda: kernels(lab), kernel)


def test_a_killed_exabgp_loses_only_its_own_sessions(lab: Lab) -> None:
    """Kill -9 ExaBGP: no packet lost, only its node's sessions go, its routes are back soon."""
    address = lab.records.node(NODE).address
    before, kernel = sessions(lab), kernels(lab)
    since = {session.name: session.since for session in lab.router.sessions()}
    with no_packet_lost(lab):
        kill(lab, NODE, "exabgp")
        checks.wait_settled(lab, patience_s=ROUTES_BACK_S)
    after = sessions(lab)
    for node, connections in before.items():
        if node == NODE:
            assert all(after[NODE][peer] != ports for peer, ports in connections.items())
        else:
            others = {peer: ports for peer, ports in connections.items() if peer != address}
            assert others == {p: ports for p, ports in after[node].items() if p != address}
    changed = {
        session.name for session in lab.router.sessions() if session.since != since[session.name]
    }
    assert changed == {protocol_name(NODE)}
    told = lab.router.announced()
    assert {block.cidr for block in observe.blocks(lab)} == set(told)
    wait_equal(lambda: kernels(lab), kernel)


def test_killed_etcd_costs_no_packet_and_no_session(lab: Lab) -> None:
    """Kill -9 etcd: traffic and sessions go on, and the daemons follow changes made afterwards."""
    before, kernel = sessions(lab), kernels(lab)
    with no_packet_lost(lab):
        kill(lab, DATASTORE, "etcd")
        lab.wait_for_etcd()
        checks.wait_settled(lab)
    assert sessions(lab) == before
    wait_equal(lambda: kernels(lab), kernel)
    with pod(lab, NODE, "after-etcd"):  # a deaf watch would not see this one
        checks.wait_settled(lab, patience_s=20)


def test_everything_of_a_node_killed_at_once(lab: Lab) -> None:
    """Kill -9 all daemons of a node together: no packet lost, the same state comes back."""
    kernel, started = kernels(lab), starts_finished(lab)
    with no_packet_lost(lab):
        for daemon in DAEMONS:
            lab.supervisor.kill(NODE, daemon)
        wait_for(
            lambda: all(p.running for p in lab.supervisor.processes()),
            what="all started again",
            patience_s=30,
        )
        checks.wait_settled(lab, patience_s=30)
        wait_for(lambda: starts_finished(lab) > started, what="end of bgpd's start")
    wait_equal(lambda: kernels(lab), kernel)


def _counters(lab: Lab, node: str) -> Mapping[str, int]:
    """Packets counted by each of our rules that has counted any."""
    saved = run(*entering(lab.layout.namespace(node)), "iptables-save", "-c")
    found = re.findall(r"^\[(\d+):\d+\] (-A cali-.*)$", saved, re.MULTILINE)
    return {rule: int(count) for count, rule in found if int(count) > 0}


def test_a_restarted_felix_writes_no_rule(lab: Lab) -> None:
    """After a restart with nothing changed felix rewrites no chain: its rules keep counting."""
    before = _counters(lab, NODE)
    assert len(before) > 5
    kill(lab, NODE, "felix")
    checks.wait_settled(lab)
    after = _counters(lab, NODE)
    assert {rule: after.get(rule, 0) >= count for rule, count in before.items()} == dict.fromkeys(
        before, True
    )


def test_a_daemon_that_stays_away_costs_no_packet(lab: Lab) -> None:
    """With every daemon but exabgp stopped, as in an upgrade, pods keep talking."""
    before = sessions(lab)
    away = [daemon for daemon in DAEMONS if daemon != "exabgp"]
    with no_packet_lost(lab):
        for daemon in away:
            lab.supervisor.stop(NODE, daemon)
        assert not [answer for answer in observe.matrix(lab).values() if not answer.ok], (
            "all pods still answer each other"
        )
        for daemon in away:
            lab.supervisor.start(NODE, daemon)
        checks.wait_settled(lab)
    assert sessions(lab) == before


def test_a_restarted_router_gets_its_routes_back(lab: Lab) -> None:
    """host1's BIRD restarts: the nodes' sessions with it return, and with them the routes."""
    kill(lab, HOST, "bird")
    checks.wait_settled(lab, patience_s=45)
    nodes = {node.name: node.address for node in lab.records.nodes}
    assert {prefix: set(hops) for prefix, hops in lab.router.announced().items()} == {
        block.cidr: {nodes[block.owner]} for block in observe.blocks(lab)
    }
    assert CONTROL in nodes
