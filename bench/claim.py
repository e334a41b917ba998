"""From a claimed block to the route in another node's kernel: etcd, bgpd, ExaBGP, BGP, netlink.

A whole lab with real processes; a block and its affinity are written for node1 in one transaction,
as cnid does, and the clock stops when node2's kernel tells of the route. The peer is the shortest
way there is: two BIRDs, a static route enabled in one, seen in the kernel of the other. It has no
datastore, so its clock starts at the announcement.

`python -m bench.claim` as root. It makes a lab named `cymbench` and removes it.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Network
from pathlib import Path

import structlog

from bench.row import Row, median
from cymric.datastore.api import ABSENT, Compare, Datastore, Delete, Put, Transaction
from cymric.datastore.etcd import open_datastore
from cymric.kernel.namespace import opened, visiting
from cymric.model.codec import encode
from cymric.model.keys import AffinityKey, BlockKey
from cymric.runtime.settings import Settings
from labs import checks
from labs.lab import Lab
from labs.topology import Layout
from tests.support.eventually import eventually_now
from tests.support.routing import affinity, block
from tests.support.underlay import Host, Underlay, run

TIMES = 40
PAUSE_S = 0.15
PATIENCE_S = 10.0
PEER = "BIRD to BIRD"
BLOCKS = list(IPv4Network("198.19.22.0/24").subnets(new_prefix=29))
BIRDS_PREFIX = IPv4Network("198.19.23.0/26")
_RTMGRP_IPV4_ROUTE = 0x40


def measure() -> list[Row]:
    """Ours and the peer's, in turn."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    lab = Lab(Layout("cymbench"))
    lab.down()
    with tempfile.TemporaryDirectory(prefix="cybc-") as scratch:
        try:
            lab.up()
            checks.wait_settled(lab, patience_s=120)
            with _birds(Path(scratch)) as birds:
                ours, theirs = asyncio.run(_in_turn(lab, birds))
        finally:
            lab.down()
    what = "a block claimed, from its transaction to the route in another node's kernel"
    slowest = "the same, the slowest"
    return [
        Row(what=what, unit="ms", cymric=median(ours), peer_name=PEER, peer=median(theirs)),
        Row(what=slowest, unit="ms", cymric=max(ours), peer_name=PEER, peer=max(theirs)),
    ]


async def _in_turn(lab: Lab, birds: tuple[Host, Host]) -> tuple[list[float], list[float]]:
    ours, theirs = list[float](), list[float]()
    control = f"/run/netns/{lab.layout.namespace('control')}"
    seen_by_node = _route_events(f"/run/netns/{lab.layout.namespace('node2')}")
    seen_by_bird = _route_events(f"/run/netns/{birds[1].namespace}")
    with opened(control) as descriptor, visiting(descriptor):  # threads made here stay here
        async with open_datastore(Settings(etcd_endpoints=(lab.layout.etcd_url,))) as store:
            await store.get("/calico/ready")
            for number in range(TIMES):
                network = BLOCKS[number % len(BLOCKS)]
                ours.append(await _claimed(store, network, seen_by_node))
                await _given_back(store, network, seen_by_node)
                theirs.append(_announced(birds[0], seen_by_bird))
                await asyncio.sleep(PAUSE_S)
    return ours, theirs


async def _claimed(store: Datastore, network: IPv4Network, events: socket.socket) -> float:
    key, claim = str(BlockKey(network)), str(AffinityKey("node1", network))
    value = block(str(network), "node1")
    _drain(events)
    begun = time.perf_counter()
    await store.commit(
        Transaction(
            (Compare(key, ABSENT), Compare(claim, ABSENT)),
            (Put(key, encode(value)), Put(claim, encode(affinity()))),
        )
    )
    _await_route(events, network)
    return (time.perf_counter() - begun) * 1000


async def _given_back(store: Datastore, network: IPv4Network, events: socket.socket) -> None:
    gone = (Delete(str(BlockKey(network))), Delete(str(AffinityKey("node1", network))))
    await store.commit(Transaction((), gone))
    _await_route(events, network)


def _announced(bird: Host, events: socket.socket) -> float:
    _drain(events)
    control = socket.socket(socket.AF_UNIX)
    with control:
        control.connect(str(bird.directory / "bird.ctl"))
        control.recv(4096)
        begun = time.perf_counter()
        control.sendall(b"enable claimed\n")
        _await_route(events, BIRDS_PREFIX)
        taken = (time.perf_counter() - begun) * 1000
        control.recv(4096)
        control.sendall(b"disable claimed\n")
        _await_route(events, BIRDS_PREFIX)
    return taken


def _route_events(namespace: str) -> socket.socket:
    with opened(namespace) as descriptor, visiting(descriptor):
        events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    events.bind((0, _RTMGRP_IPV4_ROUTE))
    events.settimeout(PATIENCE_S)
    return events


def _drain(events: socket.socket) -> None:
    events.setblocking(False)
    try:
        while events.recv(65536):
            pass
    except BlockingIOError:
        events.settimeout(PATIENCE_S)


def _await_route(events: socket.socket, network: IPv4Network) -> None:
    """Return at the next event about a prefix; a message holds its address as bytes."""
    while network.network_address.packed not in events.recv(65536):
        pass


@contextmanager
def _birds(directory: Path) -> Iterator[tuple[Host, Host]]:
    """Two BIRDs with a session; the first has a static route that is disabled."""
    underlay = Underlay(directory, prefix="cybc-")
    try:
        one, two = underlay.host("one", 1), underlay.host("two", 2)
        for host, other in ((one, two), (two, one)):
            path = host.directory / "bird.conf"
            path.write_text(
                f"router id {host.v4};\nprotocol device {{}}\nprotocol direct {{ ipv4; }}\n"
                "protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }\n"
                "protocol static claimed { disabled; ipv4; "
                f"route {BIRDS_PREFIX} blackhole; }}\n"
                f"protocol bgp session {{ local {host.v4} as 64512; neighbor {other.v4} as 64512;\n"
                "  connect delay time 1;"
                " ipv4 { import all; export where source = RTS_STATIC; }; }\n"
            )
            control = str(host.directory / "bird.ctl")
            underlay.start(host, "bird", "-f", "-c", str(path), "-s", control)
        eventually_now(lambda: "Established" in _asked(one), 60, what="the BIRDs' session is up")
        yield one, two
    finally:
        underlay.close()


def _asked(host: Host) -> str:
    control = str(host.directory / "bird.ctl")
    return run("birdc", "-s", control, "show", "protocols", "session", check=False)


if __name__ == "__main__":
    for row in measure():
        print(row)
