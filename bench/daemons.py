"""How long each daemon takes to be ready, and how much memory it then holds.

The clock runs from the start of the process to the first 200 of its /readiness (ExaBGP, which has
none: to the moment its relay listens). Memory is what `VmRSS` says right then, children included.
The daemons are real ones, on a real etcd with one node in it, in a namespace of their own.

Whom to compare with? BIRD stands beside bgpd and ExaBGP together: it does the work of both. Beside
felix, confd and cnid there is no like program on a bare Debian machine, so the peer is the floor,
`python -c pass`: what any Python program pays. The floor is no competitor, and the ratio to it
only says how much of the cost is ours.

`python -m bench.daemons` as root makes a namespace `cycli-bench-*` and removes it.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.row import Row, median

ROUNDS = 5
READY_WITHIN_S = 30.0
POLL_S = 0.002
NODE, ADDRESS, PEER_ADDRESS = "node1", "198.19.0.2", "198.19.0.9"
FLOOR = "python -c pass (floor, no competitor)"
PORTS = {"felix": 9099, "bgpd": 9191, "confd": 9192, "cnid": 9193}
PROGRAMS = {
    "felix": "felix.daemon",
    "confd": "confd.daemon",
    "cnid": "cni.daemon",
    "bgpd": "bgpd.daemon",
    "exabgp": "bgpd.launcher",
}
OBJECTS = [
    ("IPPool", "pool", {"cidr": "198.19.16.0/21", "natOutgoing": True}),
    ("BGPPeer", "peer", {"peerIP": PEER_ADDRESS, "asNumber": 64900}),
]


@dataclass(frozen=True, slots=True)
class Start:
    """One start of one program."""

    ready_s: float
    resident_mib: float


def measure() -> list[Row]:
    """All rows, measured inside a namespace made for it."""
    namespace = f"cycli-bench-{secrets.token_hex(2)}"
    _run("ip", "netns", "add", namespace)
    try:
        done = subprocess.run(
            [
                "nsenter",
                f"--net=/run/netns/{namespace}",
                sys.executable,
                "-m",
                "bench.daemons",
                "inside",
            ],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        _run("ip", "netns", "delete", namespace)
    return [Row(**tree) for tree in json.loads(done.stdout)]


def _inside() -> list[Row]:
    """What runs in the namespace."""
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "wire")
    for link in ("eth0", "wire"):
        _run("ip", "link", "set", link, "up")
    _run("ip", "address", "add", f"{ADDRESS}/20", "dev", "eth0")
    with tempfile.TemporaryDirectory(prefix="cycli-bench-") as text, _etcd(Path(text)) as endpoint:
        directory = Path(text)
        environ = _environment(directory, endpoint)
        _fill(environ)
        starts = _starts(directory, environ)
    return _rows(starts)


def _starts(directory: Path, environ: dict[str, str]) -> dict[str, list[Start]]:
    """Every program, started in turn, round after round: what else the machine does hits all."""
    relay, control = directory / "run" / "speaker.sock", directory / "bird.ctl"
    configuration = directory / "bird.conf"
    configuration.write_text(_BIRD)
    signs: dict[str, Callable[[], bool]] = {
        "floor": lambda: False,
        "confd": lambda: _answers(PORTS["confd"]),
        "exabgp": relay.is_socket,  # after confd, which writes its configuration
        "bgpd": lambda: _answers(PORTS["bgpd"]),
        "felix": lambda: _answers(PORTS["felix"]),
        "cnid": lambda: _answers(PORTS["cnid"]),
        "BIRD": lambda: _bird_answers(control),
    }
    commands = {name: [sys.executable, "-m", module] for name, module in PROGRAMS.items()}
    commands["floor"] = [sys.executable, "-c", "pass"]
    commands["BIRD"] = ["bird", "-f", "-c", str(configuration), "-s", str(control)]
    starts: dict[str, list[Start]] = {name: [] for name in signs}
    for _ in range(ROUNDS):
        for name, is_ready in signs.items():
            for left_behind in (relay, control):
                left_behind.unlink(missing_ok=True)
            log = directory / f"{name}.log"
            starts[name].append(_once(commands[name], environ, is_ready, log))
    return starts


_BIRD = f"""router id {ADDRESS};
protocol device {{}}
protocol direct {{ ipv4; }}
protocol kernel {{ ipv4 {{ import none; export where source = RTS_BGP; }}; }}
protocol bgp peer {{
  local {ADDRESS} as 64512;
  neighbor {PEER_ADDRESS} as 64900;
  graceful restart on;
  ipv4 {{ import all; export none; }};
}}
"""


def _rows(starts: dict[str, list[Start]]) -> list[Row]:
    def ready_s(name: str) -> float:
        return median([start.ready_s for start in starts[name]])

    def resident_mib(name: str) -> float:
        return median([start.resident_mib for start in starts[name]])

    rows = [
        Row(
            what="bgpd: start to ready",
            unit="s",
            cymric=ready_s("bgpd"),
            peer_name="BIRD: start to answering",
            peer=ready_s("BIRD"),
        ),
        Row(
            what="exabgp with our relay: start to listening",
            unit="s",
            cymric=ready_s("exabgp"),
            peer_name="BIRD: start to answering",
            peer=ready_s("BIRD"),
        ),
        Row(
            what="bgpd and exabgp: resident memory",
            unit="MiB",
            cymric=resident_mib("bgpd") + resident_mib("exabgp"),
            peer_name="BIRD",
            peer=resident_mib("BIRD"),
        ),
    ]
    for name in ("felix", "confd", "cnid"):
        rows.append(
            Row(
                what=f"{name}: start to ready",
                unit="s",
                cymric=ready_s(name),
                peer_name=FLOOR,
                peer=ready_s("floor"),
            )
        )
        rows.append(
            Row(
                what=f"{name}: resident memory",
                unit="MiB",
                cymric=resident_mib(name),
                peer_name=FLOOR,
                peer=resident_mib("floor"),
            )
        )
    return rows


def _once(
    command: Sequence[str], environ: dict[str, str], is_ready: Callable[[], bool], log: Path
) -> Start:
    """Start a program, wait until it is ready, weigh it, end it."""
    with log.open("ab") as written:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environ, stdout=written, stderr=written)
        try:
            return _watched(process, started, is_ready, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _watched(
    process: subprocess.Popen[bytes], started: float, is_ready: Callable[[], bool], log: Path
) -> Start:
    deadline, most_mib = started + READY_WITHIN_S, 0.0
    while not is_ready():
        most_mib = max(most_mib, _resident_mib(process.pid))
        if process.poll() == 0:  # the floor: it is done when it is over
            return Start(time.monotonic() - started, most_mib)
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{process.args!r} did not become ready:\n{tail}")
        time.sleep(POLL_S)
    ready_s = time.monotonic() - started
    return Start(ready_s, _resident_mib(process.pid))


def _resident_mib(pid: int) -> float:
    """What a process and its children hold, in MiB; 0 for one that ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0.0
    own = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return sum(map(int, own)) / 1024 + sum(_resident_mib(int(child)) for child in children)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readiness", timeout=2) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False  # up, and not ready yet
    except OSError:
        return False


def _bird_answers(control: Path) -> bool:
    done = subprocess.run(
        ["birdc", "-s", str(control), "show", "status"], capture_output=True, check=False
    )
    return b"Daemon is up and running" in done.stdout


def _environment(directory: Path, endpoint: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CYMRIC_")}
    return {
        **kept,
        "CYMRIC_NODE_NAME": NODE,
        "CYMRIC_NODE_IP": f"{ADDRESS}/20",
        "CYMRIC_ETCD_ENDPOINTS": endpoint,
        "CYMRIC_RUN_DIR": str(directory / "run"),
        "CYMRIC_STATE_DIR": str(directory / "state"),
        "CYMRIC_ENDPOINT_STATUS_DIR": str(directory / "status"),
        "CYMRIC_LOG_FORMAT": "json",
    }


def _fill(environ: dict[str, str]) -> None:
    """One node, one pool, one peer: enough for every daemon to have something to do."""
    objects = [
        {
            "kind": kind,
            "apiVersion": "projectcalico.org/v3",
            "metadata": {"name": name},
            "spec": spec,
        }
        for kind, name, spec in OBJECTS
    ]
    cymric = [sys.executable, "-m", "cymric.cli.main"]
    apply = [*cymric, "apply", "-f", "-"]
    init = [*cymric, "node", "init"]
    for command, text in ((apply, json.dumps(objects)), (init, "")):
        subprocess.run(
            command, env=environ, input=text, text=True, check=True, stdout=subprocess.DEVNULL
        )


@contextmanager
def _etcd(directory: Path) -> Iterator[str]:
    """A real etcd on the namespace's loopback."""
    endpoint = "http://127.0.0.1:2379"
    command = [
        "etcd",
        f"--data-dir={directory / 'etcd'}",
        f"--listen-client-urls={endpoint}",
        f"--advertise-client-urls={endpoint}",
    ]
    with (directory / "etcd.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield endpoint
    finally:
        process.terminate()
        process.wait(timeout=15)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


def main() -> None:
    """Print the rows; with `inside`, as JSON from within the namespace."""
    if sys.argv[1:] == ["inside"]:
        print(json.dumps([asdict(row) for row in _inside()]))
        return
    for row in measure():
        print(row)


if __name__ == "__main__":
    main()
