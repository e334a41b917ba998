"""A felix among many: a large cluster in a real etcd, one node with its pods, the real program.

    sender ─ cali0000000 ┐
    receiver ─ cali……    ├ node (etcd, felix, the measurement itself)
    the rest ─ cali……    ┘

The cluster is that of `felix_calc.py`. Every pod of the node has its interface; only sender and
receiver have a namespace of their own, the others' far ends share one. A measurement runs inside
the node's namespace, as a process of its own (`inside`), because the datastore client opens its
sockets in threads that stay where they were born. Namespaces are called `cyfb-…` and removed.

Processor time is all that the kernel has charged to a process' threads, in seconds.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench import felix_calc
from bench.felix_calc import NAMESPACES, NODE, Stored
from bench.row import Row
from cymric.datastore.api import Put, Transaction
from cymric.datastore.etcd import EtcdDatastore
from tests.support.datastore import client
from tests.support.etcd import EtcdServer

GATEWAY = "169.254.1.1"
HOST_MAC, POD_MAC = "02:00:00:00:00:01", "ee:ee:ee:ee:ee:ee"
"""The pod's is what the cluster has stored."""
SENDER = 0
START_S = 120.0
MOST_OPERATIONS, MOST_BYTES = 120, 1_000_000
ROWS = "--rows"
_TAG = "CYMRIC_BENCH_TAG"

Measured = Callable[..., Coroutine[None, None, Sequence[Row]]]


def inside(module: str, *sizes: int) -> list[Row]:
    """The rows that `python -m module` prints as JSON, run in a namespace made for it."""
    tag = secrets.token_hex(2)
    node = f"cyfb-{tag}-node"
    _run("ip", "netns", "add", node)
    try:
        _run("ip", "-n", node, "link", "set", "lo", "up")
        done = subprocess.run(
            [
                "nsenter",
                f"--net=/run/netns/{node}",
                sys.executable,
                "-m",
                module,
                ROWS,
                *map(str, sizes),
            ],
            env={**os.environ, _TAG: tag},
            stdout=subprocess.PIPE,
            check=True,
        )
    finally:
        for name in _run("ip", "netns", "list").split():
            if name.startswith(f"cyfb-{tag}-"):
                _run("ip", "netns", "del", name)
    return [Row(**tree) for tree in json.loads(done.stdout)]


def main(module: str, measured: Measured, measure: Callable[[], Sequence[Row]]) -> None:
    """The program of a module: told `--rows` it measures here, else as `measure` says.

    Arguments are the sizes of another cluster: endpoints, of these here, policies.
    """
    if sys.argv[1:2] == [ROWS]:
        rows = asyncio.run(measured(*map(int, sys.argv[2:])))
        print(json.dumps([asdict(row) for row in rows]))
        return
    print(f"load before: {os.getloadavg()[0]:.2f}")
    sizes = [*map(int, sys.argv[1:])]
    for row in inside(module, *sizes) if sizes else measure():
        print(row)
    print(f"load after: {os.getloadavg()[0]:.2f}")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used: processor time of itself, of ended children, and memory."""

    cpu_s: float
    children_s: float
    rss_mib: float
    peak_mib: float


@dataclass
class World:
    """See the chapter."""

    directory: Path
    count: int = felix_calc.ENDPOINTS
    local: int = felix_calc.LOCAL
    policies: int = felix_calc.POLICIES
    tag: str = field(default_factory=lambda: os.environ[_TAG])
    felix: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.etcd = EtcdServer(self.directory / "etcd")

    @property
    def receiver(self) -> int:
        """The number of the endpoint that is sent to; in the sender's namespace."""
        return NAMESPACES

    def namespace(self, word: str) -> str:
        """The name of one of the namespaces."""
        return f"cyfb-{self.tag}-{word}"

    def address(self, number: int) -> str:
        """The address of an endpoint."""
        return f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"

    def interface(self, number: int) -> str:
        """The node's interface of an endpoint of this node."""
        return f"cali{number:07x}"

    def client(self) -> EtcdDatastore:
        """A connection to the datastore."""
        return client(self.etcd.endpoint, call_s=30.0)

    async def fill(self) -> None:
        """Store the cluster."""
        async with self.client() as store:
            await write(store, felix_calc.cluster(self.count, self.local, self.policies))

    def wire(self) -> None:
        """Make the interfaces of this node's pods, and the two namespaces that talk."""
        rest = self.namespace("rest")
        _run("ip", "netns", "add", rest)
        lines = []
        for number in range(self.local):
            name, there = self.interface(number), rest
            far, talks = f"p{number}", number in (SENDER, self.receiver)
            if talks:
                there, far = self.namespace(f"pod{number}"), "eth0"
                _run("ip", "netns", "add", there)
            lines += [
                f"link add {name} address {HOST_MAC} type veth peer name {far} address {POD_MAC}"
                f" netns {there}",
                f"link set {name} up",
            ]
        _run("ip", "-batch", "-", stdin="\n".join(lines))
        _run(
            "ip",
            "-n",
            rest,
            "-batch",
            "-",
            stdin="\n".join(
                f"link set p{number} up"
                for number in range(self.local)
                if number not in (SENDER, self.receiver)
            ),
        )
        for number in (SENDER, self.receiver):
            self._wire_pod(number)

    def _wire_pod(self, number: int) -> None:
        lines = (
            "link set lo up",
            "link set eth0 up",
            f"address add {self.address(number)}/32 dev eth0",
            f"route add {GATEWAY} dev eth0 scope link",
            f"route add default via {GATEWAY} dev eth0",
            f"neigh replace {GATEWAY} lladdr {HOST_MAC} dev eth0 nud permanent",
        )
        # MACs are the same everywhere: each is alone on its link.
        _run("ip", "-n", self.namespace(f"pod{number}"), "-batch", "-", stdin="\n".join(lines))

    def run_felix(self, **environment: str) -> float:
        """Start felix; seconds until every pod of the node is complete."""
        status = self.directory / "status"
        for file in status.glob("*"):
            file.unlink()
        began = time.perf_counter()
        with (self.directory / "felix.log").open("ab") as log:
            self.felix = subprocess.Popen(
                [sys.executable, "-m", "felix.daemon"],
                env=os.environ | self._environment(status) | environment,
                stdout=log,
                stderr=log,
            )
        deadline = began + START_S
        while sum(1 for _ in status.glob("*")) < self.local:
            if self.felix.poll() is not None or time.perf_counter() > deadline:
                raise RuntimeError(f"felix is not ready: {self.log[-3000:]}")
            time.sleep(0.01)
        return time.perf_counter() - began

    def _environment(self, status: Path) -> dict[str, str]:
        return {
            "CYMRIC_NODE_NAME": NODE,
            "CYMRIC_ETCD_ENDPOINTS": self.etcd.endpoint,
            "CYMRIC_RUN_DIR": str(self.directory / "run"),
            "CYMRIC_STATE_DIR": str(self.directory / "state"),
            "CYMRIC_ENDPOINT_STATUS_DIR": str(status),
        }

    def stop_felix(self) -> None:
        """End felix; the kernel stays as it is."""
        if self.felix is not None:
            self.felix.send_signal(signal.SIGTERM)
            self.felix.wait(20)
            self.felix = None

    @property
    def log(self) -> str:
        """What felix said."""
        return (self.directory / "felix.log").read_text()

    def usage(self) -> Usage:
        """What felix has used so far."""
        assert self.felix is not None
        process = Path(f"/proc/{self.felix.pid}")
        threads = (process / "task").iterdir()
        cpu_ns = sum(int((one / "schedstat").read_text().split()[0]) for one in threads)
        words = (process / "stat").read_text().rpartition(")")[2].split()
        children_s = (int(words[13]) + int(words[14])) / os.sysconf("SC_CLK_TCK")
        lines = (process / "status").read_text().splitlines()
        sizes = {line.split()[0]: line.split()[1] for line in lines if line.startswith("VmR")}
        peaks = {line.split()[0]: line.split()[1] for line in lines if line.startswith("VmHWM")}
        return Usage(
            cpu_ns / 1e9, children_s, int(sizes["VmRSS:"]) / 1024, int(peaks["VmHWM:"]) / 1024
        )

    def on_node(self, *words: str, stdin: str = "") -> str:
        """Run a program in the node's namespace, which is ours."""
        return _run(*words, stdin=stdin)


@contextmanager
def world(
    count: int = felix_calc.ENDPOINTS,
    local: int = felix_calc.LOCAL,
    policies: int = felix_calc.POLICIES,
) -> Iterator[World]:
    """A world with a running etcd, empty, and wired pods; felix is ended with it."""
    with tempfile.TemporaryDirectory(prefix="cyfb-") as scratch:
        made = World(Path(scratch), count, local, policies)
        (made.directory / "run").mkdir()
        (made.directory / "state").mkdir()
        made.etcd.start()
        try:
            made.wire()
            yield made
        finally:
            try:
                made.stop_felix()
            finally:
                made.etcd.kill()


async def write(store: EtcdDatastore, stored: Iterable[Stored]) -> None:
    """Put all of it, in transactions as large as etcd takes."""
    for puts in batches(stored):
        await store.commit(Transaction((), puts))


def batches(stored: Iterable[Stored]) -> Iterator[tuple[Put, ...]]:
    """Puts in groups that fit into one transaction."""
    group: dict[str, Put] = {}
    size = 0
    for key, value in stored:
        if key in group or len(group) == MOST_OPERATIONS or size + len(value) > MOST_BYTES:
            yield tuple(group.values())
            group, size = {}, 0
        group[key] = Put(key, value)
        size += len(key) + len(value)
    if group:
        yield tuple(group.values())


def _run(*words: str, stdin: str = "") -> str:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr}{done.stdout}")
    return done.stdout
