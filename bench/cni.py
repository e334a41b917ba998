"""How long a pod waits for its network: our ADD beside Debian's `ptp` with `host-local`.

Both are called as a container runtime calls them, alternately, in the same namespace of its own:
executable started, result read, exit awaited. Ours includes an address from a real etcd, the
WorkloadEndpoint, and felix' word that chains and route are in the kernel; the peer writes a file,
makes the pair and sets routes, and has no policy to wait for. Ours is slow by what it does more
and by the start of a Python interpreter; the ratio says how much a pod notices of that.

`python -m bench.cni` as root makes namespaces `cycni-*` and removes them.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.row import Row, median
from tests.support.cni_node import CniNode, Pod, finished, netconf, node_with_etcd

ONE_BY_ONE = 20
BATCHES = 3
AT_ONCE = 20
PEER = "ptp + host-local"
DEBIAN = Path("/usr/lib/cni")

Begin = Callable[[str, Pod], subprocess.Popen[bytes]]


def measure() -> list[Row]:
    """Both rows, measured in the same run."""
    with (
        tempfile.TemporaryDirectory(prefix="cycni-bench-") as scratch,
        node_with_etcd(Path(scratch), wait_s=30.0) as node,
    ):
        felix = node.run("felix")
        try:
            node.start()
            return _rows(node)
        finally:
            felix.terminate()
            felix.wait(10)


def _rows(node: CniNode) -> list[Row]:
    beginners: dict[str, Begin] = {"cymric": _cymric(node), PEER: _ptp(node)}
    for begin in beginners.values():  # the first call of each pays for what later ones find
        _timed_batch(node, begin, 1)
    single: dict[str, list[float]] = {name: [] for name in beginners}
    batch: dict[str, list[float]] = {name: [] for name in beginners}
    for _ in range(ONE_BY_ONE):
        for name, begin in beginners.items():
            single[name].append(_timed_batch(node, begin, 1))
    for _ in range(BATCHES):
        for name, begin in beginners.items():
            batch[name].append(_timed_batch(node, begin, AT_ONCE))
    return [
        Row(
            what=what,
            unit="ms",
            cymric=median(taken["cymric"]),
            peer_name=PEER,
            peer=median(taken[PEER]),
        )
        for what, taken in (
            ("CNI ADD, one at a time", single),
            (f"CNI ADD, {AT_ONCE} at once, until the last", batch),
        )
    ]


def _timed_batch(node: CniNode, begin: Begin, count: int) -> float:
    """Milliseconds from the first start to the last end of `count` ADDs; all removed after."""
    pods = [node.pod(os.urandom(8).hex()) for _ in range(count)]
    began = time.perf_counter()
    processes = [begin("ADD", pod) for pod in pods]
    answers = [finished(process) for process in processes]
    taken_ms = (time.perf_counter() - began) * 1000
    for answer in answers:
        if answer.code != 0:
            raise RuntimeError(f"ADD failed: {answer.tree}")
    for pod in pods:
        gone = finished(begin("DEL", pod))
        if gone.code != 0:
            raise RuntimeError(f"DEL failed: {gone.tree}")
        node.remove(pod)
    return taken_ms


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
    for row in measure():
        print(row)
