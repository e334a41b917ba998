"""One node among many: how long until all is learned, what it costs to sit there, and reflectors.

    a mesh of 2, 20, 60 nodes      one session with each, a block from each
    2,000 nodes, two reflectors    two sessions, 2,000 blocks from each, every block twice
    a reflector of 20, 60 clients  a block from each, told to all others

Everybody else is simulated (`simulated.py`), in a namespace of their own; the node itself is real:
etcd, confd, ExaBGP, bgpd. The clock runs from the start of ExaBGP and bgpd until the last block is
in the kernel, and for the reflector until the last client has heard of every other. Then the
machine is left alone and what the node's processes use is read from /proc. The peer is BIRD, with
the same sessions, in the place of confd, ExaBGP and bgpd.

`python -m bench.mesh` as root makes namespaces `cybm-*` and removes them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from bench.row import Row
from cymric.kernel.namespace import opened, visiting
from cymric.model.codec import encode
from tests.support.etcd import EtcdServer
from tests.support.routing import configuration, key_of, node, peer, pool
from tests.support.underlay import Host, Underlay, run

US = 9
ASN = 64512
POOL = IPv4Network("10.0.0.0/8")
FAR = 2000
IDLE_S = 10.0
PATIENCE_S = 180.0
TICK_HZ = os.sysconf("SC_CLK_TCK")
PEER = "BIRD"
CLUSTER_ID = "244.0.0.1"

Start = Callable[[], list[int]]
"""Starts what is measured; its process ids."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is around the node. `peers` are addresses; `is_reflector` is about the node itself."""

    name: str
    peers: tuple[str, ...]
    simulated: list[dict[str, Any]]
    blocks: int
    by_reflectors: bool = False
    is_reflector: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """What one run of one scene took."""

    converged_s: float
    reflected_s: float
    cpu_percent: float
    resident_mib: float


def measure() -> list[Row]:
    """All rows."""
    rows = []
    for scene in (*map(_mesh, (2, 20, 60)), _far(), *map(_reflector, (20, 60))):
        ours, theirs = _seen(scene, _cymric), _seen(scene, _bird)
        figures = [
            ("until all blocks are in the kernel", "s", ours.converged_s, theirs.converged_s)
        ]
        if scene.is_reflector:
            what = "until each client has all others' blocks"
            figures.append((what, "s", ours.reflected_s, theirs.reflected_s))
        figures.append(("idle, of one core", "%", ours.cpu_percent, theirs.cpu_percent))
        figures.append(("resident, all processes", "MiB", ours.resident_mib, theirs.resident_mib))
        for what, unit, mine, peers in figures:
            text = f"{scene.name}: {what}"
            rows.append(Row(what=text, unit=unit, cymric=mine, peer_name=PEER, peer=peers))
    return rows


def _mesh(count: int) -> Scene:
    peers = tuple(f"198.19.0.{10 + n}" for n in range(count))
    simulated = [_announcing(peer, [(peer, n)]) for n, peer in enumerate(peers)]
    return Scene(f"mesh with {count} others", peers, simulated, count)


def _far() -> Scene:
    reflectors = ("198.19.0.10", "198.19.0.11")
    nodes = [(str(IPv4Address("198.19.1.0") + n), n) for n in range(FAR)]
    simulated = [_announcing(peer, nodes, is_reflected=True) for peer in reflectors]
    return Scene(f"{FAR} nodes behind two reflectors", reflectors, simulated, FAR, True)


def _reflector(count: int) -> Scene:
    scene = _mesh(count)
    name = f"reflector of {count} clients"
    return Scene(name, scene.peers, scene.simulated, count, is_reflector=True)


def _announcing(
    peer: str, nodes: list[tuple[str, int]], *, is_reflected: bool = False
) -> dict[str, Any]:
    routes = []
    for address, number in nodes:
        block = str(IPv4Network((int(POOL.network_address) + number * 64, 26)))
        route = {"prefixes": [block], "next_hop": address}
        routes.append({**route, "originator": address} if is_reflected else route)
    return {"address": peer, "asn": ASN, "routes": routes}


def _seen(scene: Scene, begin: Callable[..., Start]) -> Seen:
    with tempfile.TemporaryDirectory(prefix="cybm-") as text:
        underlay = Underlay(Path(text), prefix="cybm-")
        try:
            us, others = underlay.host("us", US), underlay.host("others", 250)
            for peer in scene.peers:
                run(*others.enter, "ip", "address", "add", f"{peer}/20", "dev", "eth0")
            crowd = _crowd(underlay, others, scene)
            with visited(us), ExitStack() as stack:
                start = begin(stack, underlay, us, scene)
                begun = time.monotonic()
                pids = start()
                _wait(lambda: _routes(us) >= scene.blocks, crowd)
                converged_s = time.monotonic() - begun
                reflected_s = 0.0
                if scene.is_reflector:
                    _wait(lambda: _heard(others) >= scene.blocks - 1, crowd)
                    reflected_s = time.monotonic() - begun
                time.sleep(5)  # let what follows the routes (end markers, status) be over
                pids = _family(pids)
                before = sum(map(_ticks, pids))
                time.sleep(IDLE_S)
                used = (sum(map(_ticks, pids)) - before) / TICK_HZ / IDLE_S * 100
                resident = sum(map(_resident_mib, pids))
                return Seen(converged_s, reflected_s, used, resident)
        finally:
            underlay.close()


def _crowd(underlay: Underlay, others: Host, scene: Scene) -> subprocess.Popen[bytes]:
    path = others.directory / "peers.json"
    path.write_text(json.dumps(scene.simulated))
    crowd = underlay.start(others, sys.executable, "-m", "bench.simulated", str(path))
    _wait(lambda: _heard(others) == 0, crowd)
    return crowd


def _cymric(
    stack: ExitStack, underlay: Underlay, us: Host, scene: Scene
) -> Callable[[], list[int]]:
    """Confd and a datastore that knows the scene; what starts ExaBGP and bgpd."""
    etcd = EtcdServer(us.directory / "etcd").start()
    stack.callback(etcd.kill)
    for value in _objects(us, scene):
        etcd.etcdctl("put", str(key_of(value)), encode(value).decode())
    environment = {
        "CYMRIC_NODE_NAME": "us",
        "CYMRIC_ETCD_ENDPOINTS": etcd.endpoint,
        "CYMRIC_RUN_DIR": str(us.directory / "run"),
        "CYMRIC_STATE_DIR": str(us.directory / "state"),
        "CYMRIC_ANNOUNCE_WAIT_S": "0",
    }

    def program(module: str) -> int:
        command = (sys.executable, "-m", module)
        return underlay.start(us, *command, environment=environment).pid

    confd = program("confd.daemon")
    configuration = us.directory / "run" / "exabgp.conf"
    _wait(configuration.exists, None)
    return lambda: [confd, program("bgpd.launcher"), program("bgpd.daemon")]


def _objects(us: Host, scene: Scene) -> Iterator[object]:
    yield pool(str(POOL))
    own = node("us", f"{us.v4}/20")
    if scene.is_reflector:
        assert own.spec.bgp is not None
        bgp = replace(own.spec.bgp, route_reflector_cluster_id=CLUSTER_ID)
        own = replace(own, spec=replace(own.spec, bgp=bgp))
    yield own
    if not (scene.by_reflectors or scene.is_reflector):
        for address in scene.peers:
            yield node(f"n-{address}", f"{address}/20")
        return
    yield configuration(nodeToNodeMeshEnabled=False)
    for address in scene.peers:
        yield peer(address, ASN, name=f"p-{address}")


def _bird(stack: ExitStack, underlay: Underlay, us: Host, scene: Scene) -> Start:
    reflecting = f"rr client; rr cluster id {CLUSTER_ID};" if scene.is_reflector else ""
    sessions = "".join(
        f"protocol bgp p{n} {{ local {us.v4} as {ASN}; neighbor {peer} as {ASN}; {reflecting}\n"
        "  connect delay time 1; ipv4 { import all; export where source = RTS_BGP; }; }\n"
        for n, peer in enumerate(scene.peers)
    )
    path = us.directory / "bird.conf"
    path.write_text(
        f"router id {us.v4};\nprotocol device {{}}\nprotocol direct {{ ipv4; }}\n"
        "protocol kernel { ipv4 { import none; export where source = RTS_BGP; }; }\n" + sessions
    )
    control = str(us.directory / "bird.ctl")
    return lambda: [underlay.start(us, "bird", "-f", "-c", str(path), "-s", control).pid]


@contextmanager
def visited(host: Host) -> Iterator[None]:
    """Everything started meanwhile is in the host's namespace."""
    with opened(f"/run/netns/{host.namespace}") as descriptor, visiting(descriptor):
        yield


def _wait(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if process is not None and process.poll() is not None:
            raise RuntimeError("the simulated peers ended")
        if time.monotonic() > deadline:
            raise RuntimeError("it did not converge")
        time.sleep(0.02)


def _routes(us: Host) -> int:
    shown = run(*us.enter, "ip", "-4", "route", "show", "root", str(POOL))
    return sum(" via " in line for line in shown.splitlines())


def _heard(others: Host) -> int:
    """What the peer that heard least has heard; -1 before the first word."""
    log = others.directory / f"{Path(sys.executable).name}.log"
    parts = log.read_text().split("\n\n")
    if len(parts) < 2:
        return -1
    return min(int(line.split()[1]) for line in parts[-2].splitlines())


def _family(pids: list[int]) -> list[int]:
    """The processes and their children."""
    found = list(pids)
    for pid in pids:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found += map(int, children)
    return found


def _ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    for row in measure():
        print(row)
