"""What an operator can ask of a felix that runs: counts, pictures, reasons, logs, status."""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import talk
from tests.support.eventually import eventually_now
from tests.support.felix_lab import NODE, POOL, FelixLab, Pod

pytestmark = [pytest.mark.root, pytest.mark.etcd]

TALK = ("/usr/bin/python3", "-IS", str(Path(talk.__file__)))
PATIENCE_S = 30.0
POLICY = "NetworkPolicy default/web"


@pytest.fixture(scope="module", params=["nft", "legacy"])
def lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FelixLab]:
    """A node with felix that reports its endpoints, and is not ready after a moment of silence."""
    made = FelixLab(tmp_path_factory.mktemp("felix-questions"), request.param)
    before = pytest.MonkeyPatch()
    before.setenv("CYMRIC_FELIX_STALE_AFTER_S", "12")
    try:
        made.open()
        made.put_pool("first", POOL, nat_outgoing=False)
        made.put("Tier", "tiers", "default", {"order": 1000000})
        configure(made)
        made.start_felix()
        yield made
    finally:
        before.undo()
        made.close()


def configure(lab: FelixLab, **more: object) -> None:
    """The parameters of all nodes."""
    spec = {"endpointReportingEnabled": True, "reportingInterval": "5s", **more}
    wish = {"cymric.io/log-action": "nflog:7"}
    place = ("FelixConfiguration", "felixconfigurations", "default")
    lab.put(*place, spec, annotations=wish)


@pytest.fixture(scope="module")
def pods(lab: FelixLab) -> tuple[Pod, Pod]:
    """Web with a policy, and a client of it."""
    web, client = lab.add_pod("web", "198.19.16.2"), lab.add_pod("cl", "198.19.16.3")
    lab.put_endpoint(web, labels={"app": "web"})
    lab.put_endpoint(client, labels={"app": "client"})
    lab.wait_up(web, client)
    server = lab.start_in(web.namespace, *TALK, "serve", "80", "81")
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    rules = [
        {"action": "Log", "protocol": "TCP"},
        {
            "action": "Allow",
            "protocol": "TCP",
            "source": {"selector": "app == 'client'"},
            "destination": {"ports": [80]},
        },
        {"action": "Deny", "protocol": "TCP", "destination": {"ports": [81]}},
    ]
    spec = {"selector": "app == 'web'", "types": ["Ingress"], "ingress": rules}
    lab.put("NetworkPolicy", "networkpolicies", "default/web", spec)
    eventually_now(lambda: "NFLOG" in "\n".join(lab.save("filter")), PATIENCE_S)
    return web, client


def reaches(client: Pod, address: str, port: int) -> bool:
    """Whether a TCP connection is accepted."""
    words = ["nsenter", f"--net=/run/netns/{client.namespace}", *TALK, "probe", address, str(port)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def cymric(lab: FelixLab, *words: str) -> Any:
    """What the command line on the node says, as JSON."""
    directory = f"CYMRIC_RUN_DIR={lab.directory}"
    program = (sys.executable, "-m", "cymric.cli.main")
    return json.loads(lab.on_node("env", directory, *program, *words, "-o", "json"))


def counts(lab: FelixLab) -> dict[int, int]:
    """Packets by rule of the policy."""
    rows = cymric(lab, "policy", "counters", "default/web")
    assert {row["policy"] for row in rows} == {POLICY}
    return {row["rule"]: row["packets"] for row in rows if row["direction"] == "ingress"}


def test_counters(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """One packet for each connection allowed, each attempt that is denied; a restart keeps them."""
    web, client = pods
    before = counts(lab)
    for _ in range(3):
        assert reaches(client, web.address, 80)
    assert not reaches(client, web.address, 81)
    after = counts(lab)
    assert after[2] - before[2] == 3
    assert after[3] - before[3] >= 1
    assert after[1] - before[1] == (after[2] - before[2]) + (after[3] - before[3])
    lab.kill_felix()
    lab.start_felix()
    assert counts(lab) == after


def test_logged_packets_carry_the_name_of_the_policy(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """To the group that was asked for."""
    web, client = pods
    capture = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{lab.node}", "timeout", "20", "tcpdump", "-i", "nflog:7",
         "-U", "-c", "1", "-w", "-"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    lab.processes.append(capture)
    assert capture.stderr is not None
    while b"listening" not in (line := capture.stderr.readline()):
        assert line, "tcpdump ended"
    assert reaches(client, web.address, 80)
    packets, _ = capture.communicate(timeout=30)
    assert b"NetworkPolicy default/web: " in packets


def test_dump_and_explain(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """The picture is that of the kernel; explanations agree with the packets."""
    web, client = pods
    picture = cymric(lab, "felix", "dump")
    tiers = {one["endpoint"]: one["tiers"] for one in picture["endpoints"]}
    assert tiers["k8s/default/web/eth0"][0]["ingress"] == ["np/default/web"]
    assert picture["problems"] == []
    for port in (80, 81, 82):
        words = ("--from", "default/cl", "--to", "default/web", "--port", str(port))
        answer = cymric(lab, "policy", "explain", *words)
        assert (answer["verdict"] == "allowed") is reaches(client, web.address, port)
    assert answer["decisions"][-1]["by"] == "end of tier default"


def test_denied_connections_may_be_refused(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """Other actions take effect without a restart, and what is allowed still is."""
    web, client = pods
    connect = (
        "import socket; s = socket.socket(); s.settimeout(1);"
        f" print(s.connect_ex(('{web.address}', 81)))"
    )

    def is_refused() -> bool:
        return client.run("python3", "-IS", "-c", connect).strip() == str(errno.ECONNREFUSED)

    assert not is_refused()
    felix = lab.felix
    actions = {"iptablesFilterDenyAction": "Reject", "iptablesFilterAllowAction": "Return"}
    try:
        configure(lab, **actions, iptablesMangleAllowAction="Return")
        eventually_now(is_refused, PATIENCE_S, what="refused")
        assert reaches(client, web.address, 80)
    finally:
        configure(lab)
    eventually_now(lambda: not is_refused(), PATIENCE_S, what="dropped again")
    assert reaches(client, web.address, 80)
    assert lab.felix is felix
    assert felix is not None
    assert felix.poll() is None


def stored(lab: FelixLab) -> dict[str, Any]:
    """What felix wrote of itself, without times."""
    words = ("env", "ETCDCTL_API=3", "etcdctl", f"--endpoints=http://127.0.0.1:{lab.client_port}")
    text = lab.on_node(*words, "get", "--prefix", "/calico/felix/")
    lines = text.splitlines()
    return dict(zip(lines[::2], map(json.loads, lines[1::2]), strict=True))


def test_status_keys(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """Endpoints as they are, and felix itself, under Calico's keys."""
    own = f"/calico/felix/v2/no-region/host/{NODE}/"
    workload = f"{own}workload/k8s/default%2fcl/endpoint/eth0"

    def says(status: str) -> bool:
        return stored(lab).get(workload) == {"status": status}

    eventually_now(lambda: says("up"), PATIENCE_S, what="reported up")
    eventually_now(lambda: f"{own}status" in stored(lab), PATIENCE_S, what="felix reports itself")
    assert stored(lab)[f"{own}status"]["uptime"] > 0
    lab.on_node("ip", "link", "set", pods[1].interface, "down")
    eventually_now(lambda: says("down"), PATIENCE_S, what="reported down")
    lab.on_node("ip", "link", "set", pods[1].interface, "up")
    eventually_now(lambda: says("up"), PATIENCE_S, what="reported up again")


def test_a_silent_datastore_makes_not_ready(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """The age of what is known is a metric; rules and packets are as before."""
    web, client = pods
    etcd = lab.processes[0]
    url = f"http://127.0.0.1:{lab.metrics_port}/readiness"

    def is_ready() -> bool:
        return "not ready" not in lab.on_node("curl", "-s", "--max-time", "2", url)

    assert is_ready()
    etcd.send_signal(signal.SIGSTOP)
    try:
        eventually_now(lambda: not is_ready(), 60.0, what="not ready")
        assert lab.metric("cymric_felix_knowledge_age_seconds") > 12
        assert reaches(client, web.address, 80)
        assert not reaches(client, web.address, 81)
    finally:
        etcd.send_signal(signal.SIGCONT)
    eventually_now(is_ready, 60.0, what="ready again")
