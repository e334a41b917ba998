"""A policy that cuts off the operator, felix, or both, on trial: the node undoes it by itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import talk
from tests.support.eventually import eventually_now
from tests.support.felix_lab import NODE, NODE_ADDRESS, POOL, FelixLab

pytestmark = [pytest.mark.root, pytest.mark.etcd]

TALK = ("/usr/bin/python3", "-IS", str(Path(talk.__file__)))
PATIENCE_S = 40.0
PORT = 22
NO_FAILSAFES: dict[str, object] = {"failsafeInboundHostPorts": [], "failsafeOutboundHostPorts": []}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FelixLab]:
    """A node with felix, and a port on it by which the operator comes."""
    made = FelixLab(tmp_path_factory.mktemp("felix-trial"), "nft")
    try:
        made.open()
        made.put_pool("first", POOL, nat_outgoing=False)
        made.put("Tier", "tiers", "default", {"order": 1000000})
        made.start_felix()
        server = made.start_in(made.node, *TALK, "serve", str(PORT))
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield made
    finally:
        made.close()


def is_in(lab: FelixLab) -> bool:
    """Whether the operator gets to the node."""
    words = ["nsenter", f"--net=/run/netns/{lab.world}", *TALK, "probe", NODE_ADDRESS, str(PORT)]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def cymric(lab: FelixLab, *words: str, stdin: object = None) -> str:
    """The command line, on the node; what it printed."""
    etcd = f"CYMRIC_ETCD_ENDPOINTS=http://127.0.0.1:{lab.client_port}"
    return lab.on_node(
        "env", etcd, sys.executable, "-m", "cymric.cli.main", *words, stdin=json.dumps(stdin)
    )


def wall(interface: str) -> list[dict[str, object]]:
    """A host endpoint without any policy that allows, and no ports that are open all the same."""

    def tree(kind: str, name: str, spec: dict[str, object]) -> dict[str, object]:
        api_version = "projectcalico.org/v3"
        return {"kind": kind, "apiVersion": api_version, "metadata": {"name": name}, "spec": spec}

    return [
        tree("HostEndpoint", "wall", {"node": NODE, "interfaceName": interface}),
        tree("FelixConfiguration", "default", dict(NO_FAILSAFES)),
    ]


def is_walled(lab: FelixLab, interface: str) -> bool:
    """Whether the rules are there."""
    return f"-A cali-fh-{interface} " in "\n".join(lab.save("filter"))


def clean(lab: FelixLab) -> None:
    """What a test may have left, and who is as before."""
    lab.delete("hostendpoints", "wall")
    lab.delete("felixconfigurations", "default")
    eventually_now(lambda: is_in(lab), PATIENCE_S, what="the operator is in")


def test_operator_cut_off_and_etcd_silent(lab: FelixLab) -> None:
    """Nobody can confirm, nobody can be asked: when the time is up, the node lets in again."""
    assert is_in(lab)
    etcd = lab.processes[0]
    try:
        cymric(lab, "policy", "apply", "-f", "-", "--confirm", "8s", stdin=wall("up0"))
        eventually_now(lambda: not is_in(lab), PATIENCE_S, what="the operator is out")
        etcd.send_signal(signal.SIGSTOP)
        eventually_now(lambda: is_in(lab), PATIENCE_S, what="the operator is in again")
        assert "not confirmed in time, undone" in lab.log
    finally:
        etcd.send_signal(signal.SIGCONT)
    assert "undone" in cymric(lab, "policy", "trials")
    clean(lab)


def test_confirmed_policy_stays(lab: FelixLab) -> None:
    """Past its time, and for a felix that starts later."""
    try:
        cymric(lab, "policy", "apply", "-f", "-", "--confirm", "30s", stdin=wall("up0"))
        eventually_now(lambda: not is_in(lab), PATIENCE_S, what="the operator is out")
        cymric(lab, "policy", "confirm")
        eventually_now(
            lambda: not (lab.directory / "policy-trial").exists(), PATIENCE_S, what="confirmed"
        )
        lab.kill_felix()
        lab.start_felix()
        assert not is_in(lab)
    finally:
        clean(lab)


def test_felix_is_away_when_the_time_is_up(lab: FelixLab) -> None:
    """The next one knows by what is stored."""
    cymric(lab, "policy", "apply", "-f", "-", "--confirm", "5s", stdin=wall("up0"))
    eventually_now(lambda: not is_in(lab), PATIENCE_S, what="the operator is out")
    lab.kill_felix()
    lab.start_felix()
    eventually_now(lambda: is_in(lab), PATIENCE_S, what="the operator is in again")
    clean(lab)


def test_felix_itself_cut_off_and_killed(lab: FelixLab) -> None:
    """One that starts behind the wall opens the way to etcd alone, hears it, and undoes all."""
    cymric(lab, "policy", "apply", "-f", "-", "--confirm", "8s", stdin=wall("lo"))
    eventually_now(lambda: is_walled(lab, "lo"), PATIENCE_S, what="nothing passes lo")
    lab.kill_felix()
    # Else the connections that it left would be known to conntrack.
    lab.on_node("conntrack", "-F")
    assert not lab.on_node(
        "curl", "-s", "--max-time", "1", f"http://127.0.0.1:{lab.client_port}/health", check=False
    )
    lab.start_felix()
    assert "A TRIAL IS OVER" in lab.log
    eventually_now(lambda: not is_walled(lab, "lo"), PATIENCE_S, what="the wall is gone")
    eventually_now(
        lambda: f"dport {lab.client_port}" not in "\n".join(lab.save("filter")),
        PATIENCE_S,
        what="what was opened is closed again",
    )
    clean(lab)
