"""How long a pod waits for its network: our ADD beside Debian's `ptp` with `host-local`.

Both are called as a container runtime calls them, in turn, in the same namespace of its own:
executable started, result read, exit awaited. Ours includes an address from a real etcd and the
WorkloadEndpoint, and in the rows "wait on" felix' word that chains and route are in the kernel; the
peer writes a file, makes the pair and sets routes, and has no policy to wait for. What the start of
the executables alone takes, compiled and as Python, has rows of its own.

`python -m bench.cni` as root makes namespaces `cycni-*` and removes them; it prints the machine's
load before and after, and what each import would add to the executable.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.row import Row, median
from cymric.runtime.cni_executables import SYSTEM_PYTHON
from tests.support.cni_node import CniNode, Pod, finished, netconf, node_with_etcd
from tests.support.eventually import eventually_now

ONE_BY_ONE = 20
BATCHES = 3
AT_ONCE = 20
MANY = 110
"""What kubelet allows on a node unless told otherwise."""
WAIT_S = 30.0
PEER = "ptp + host-local"
DEBIAN = Path("/usr/lib/cni")
IMPORTS = ("", "_socket", "_json", "socket", "json", "os", "subprocess", "asyncio")

Begin = Callable[[str, Pod], "subprocess.Popen[bytes]"]


def measure() -> list[Row]:
    """All rows, ours and the peer's measured in turn."""
    with (
        tempfile.TemporaryDirectory(prefix="cycni-bench-") as scratch,
        node_with_etcd(Path(scratch)) as node,
    ):
        beginners: dict[str, Begin] = {"cymric": _cymric(node), PEER: _ptp(node)}
        node.start()
        rows = [_single(node, beginners, "wait off"), *_start_of_executables(node)]
        node.stop()
        node.wait_s = WAIT_S
        with _felix(node):
            node.start()
            rows += [
                _single(node, beginners, "wait on"),
                _together(node, beginners),
                *_many(node, beginners["cymric"]),
            ]
        return rows


def _single(node: CniNode, beginners: dict[str, Begin], how: str) -> Row:
    for begin in beginners.values():  # the first call of each pays for what later ones find
        _timed_batch(node, begin, 1)
    taken = _in_turn(node, beginners, times=ONE_BY_ONE, count=1)
    return _row(f"CNI ADD, one at a time, {how}", "ms", taken)


def _together(node: CniNode, beginners: dict[str, Begin]) -> Row:
    taken = _in_turn(node, beginners, times=BATCHES, count=AT_ONCE)
    return _row(f"CNI ADD, {AT_ONCE} at once, wait on, until the last", "ms", taken)


def _many(node: CniNode, begin: Begin) -> list[Row]:
    each = _each_of_batch(node, begin, MANY)
    what = f"CNI ADD, {MANY} at once, wait on"
    return [
        Row(what=f"{what}, until the last", unit="ms", cymric=max(each)),
        Row(what=f"{what}, p99", unit="ms", cymric=statistics.quantiles(each, n=100)[98]),
        Row(what=f"{what}, p50", unit="ms", cymric=median(each)),
    ]


def _start_of_executables(node: CniNode) -> list[Row]:
    """Ours asked about a cnid that answers at once, the peer about its versions: no work in it."""
    found: dict[str, list[float]] = {"cymric-cni": [], "cymric-cni.py": [], PEER: []}
    with _answering_at_once(node.directory / "at-once.sock") as path:
        config = json.dumps(netconf(path)).encode()
        for _ in range(ONE_BY_ONE):
            for name in ("cymric-cni", "cymric-cni.py"):
                found[name].append(_started([str(node.directory / "bin" / name)], "ADD", config))
            found[PEER].append(_started([str(DEBIAN / "ptp")], "VERSION"))
    texts = {"cymric-cni": "compiled", "cymric-cni.py": "in Python"}
    return [
        Row(
            what=f"CNI executable alone, {text}",
            unit="ms",
            cymric=median(found[name]),
            peer_name="ptp",
            peer=median(found[PEER]),
        )
        for name, text in texts.items()
    ]


@contextmanager
def _answering_at_once(path: Path) -> Iterator[Path]:
    """A process that answers every request with nothing, as soon as it is there."""
    script = f"""
import socket
listener = socket.socket(socket.AF_UNIX)
listener.bind({str(path)!r})
listener.listen()
while True:
    connection, _ = listener.accept()
    connection.recv(1 << 20)
    connection.sendall(b"cymric-cni 2 0\\n")
    connection.close()
"""
    process = subprocess.Popen([SYSTEM_PYTHON, "-c", script])
    try:
        eventually_now(path.exists, 15, what="the stand-in listens")
        yield path
    finally:
        process.terminate()
        process.wait(10)


def import_costs() -> list[tuple[str, float]]:
    """Milliseconds that the interpreter takes with each import, started as the executable is."""
    found = []
    for module in IMPORTS:
        script = f"import {module}" if module else "pass"
        command = [str(SYSTEM_PYTHON), "-IS", "-c", script]
        taken = [_started(command, "VERSION") for _ in range(15)]
        found.append((module or "nothing", median(taken)))
    return found


def _started(command: Sequence[str], asked: str, config: bytes = b"") -> float:
    began = time.perf_counter()
    subprocess.run(
        command, env={"CNI_COMMAND": asked}, input=config, capture_output=True, check=True
    )
    return (time.perf_counter() - began) * 1000


def _in_turn(
    node: CniNode, beginners: dict[str, Begin], *, times: int, count: int
) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in beginners}
    for _ in range(times):
        for name, begin in beginners.items():
            taken[name].append(_timed_batch(node, begin, count))
    return taken


def _row(what: str, unit: str, taken: dict[str, list[float]]) -> Row:
    return Row(
        what=what,
        unit=unit,
        cymric=median(taken["cymric"]),
        peer_name=PEER,
        peer=median(taken[PEER]),
    )


def _timed_batch(node: CniNode, begin: Begin, count: int) -> float:
    """Milliseconds from the first start to the last end of `count` ADDs; all removed after."""
    return max(_each_of_batch(node, begin, count))


def _each_of_batch(node: CniNode, begin: Begin, count: int) -> list[float]:
    """Milliseconds from the first start to the end of each of `count` ADDs; all removed after."""
    pods = [node.pod(os.urandom(8).hex()) for _ in range(count)]
    began = time.perf_counter()
    processes = [begin("ADD", pod) for pod in pods]
    answers, taken_ms = [], []
    for process in processes:
        answers.append(finished(process))
        taken_ms.append((time.perf_counter() - began) * 1000)
    for answer in answers:
        if answer.code != 0:
            raise RuntimeError(f"ADD failed: {answer.tree}")
    for process in [begin("DEL", pod) for pod in pods]:
        gone = finished(process)
        if gone.code != 0:
            raise RuntimeError(f"DEL failed: {gone.tree}")
    for pod in pods:
        node.remove(pod)
    return taken_ms


@contextmanager
def _felix(node: CniNode) -> Iterator[None]:
    felix = node.run("felix")
    try:
        yield
    finally:
        felix.terminate()
        felix.wait(10)


def _cymric(node: CniNode) -> Begin:
    config = json.dumps(netconf(node.socket))
    return lambda command, pod: _begin(node.directory / "bin" / "cymric-cni", config, command, pod)


def _ptp(node: CniNode) -> Begin:
    config = json.dumps(
        {
            "cniVersion": "1.0.0",
            "name": "bench",
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "subnet": "198.19.24.0/24",
                "dataDir": str(node.directory / "host-local"),
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
    )
    return lambda command, pod: _begin(DEBIAN / "ptp", config, command, pod)


def _begin(executable: Path, config: str, command: str, pod: Pod) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [executable],
        env={
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod.container_id,
            "CNI_IFNAME": "eth0",
            "CNI_NETNS": str(pod.path),
            "CNI_PATH": str(DEBIAN),
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(config.encode())
    process.stdin.close()
    process.stdin = None
    return process


if __name__ == "__main__":
    print(f"load before: {os.getloadavg()[0]:.2f}")
    for row in measure():
        print(row)
    for module, taken_ms in import_costs():
        print(f"python3 -IS importing {module}: {taken_ms:.1f} ms")
    print(f"load after: {os.getloadavg()[0]:.2f}")
