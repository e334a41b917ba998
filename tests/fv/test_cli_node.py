"""`cymric node init` as a process, in a network namespace with a real etcd.

The namespace is `cycli-*`; etcd listens on its loopback, and a veth pair plays the node's card.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.eventually import eventually_now

pytestmark = [pytest.mark.root, pytest.mark.etcd]

ENDPOINT = "http://127.0.0.1:2379"
NODE = "/calico/resources/v3/projectcalico.org/nodes/node1"
INIT = [sys.executable, "-m", "cymric.cli.main", "node", "init"]


class Machine:
    """A namespace with an etcd that can come and go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.name = f"cycli-{secrets.token_hex(3)}"
        self._etcd: subprocess.Popen[bytes] | None = None
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        for command in (
            "link set lo up",
            "link add eth0 type veth peer name wire",
            "address add 203.0.113.9/24 dev eth0",
            "address add 198.19.0.2/20 dev eth0",
            "link set eth0 up",
            "link set wire up",
        ):
            self.run("ip", *command.split())

    def start_etcd(self) -> None:
        """Start etcd, if it does not run yet, and wait until it answers."""
        command = [
            "etcd",
            f"--data-dir={self.directory / 'etcd'}",
            f"--listen-client-urls={ENDPOINT}",
            f"--advertise-client-urls={ENDPOINT}",
        ]
        if self._etcd is not None:
            return
        with (self.directory / "etcd.log").open("wb") as log:
            self._etcd = subprocess.Popen(self._inside(command), stdout=log, stderr=log)
        eventually_now(self._answers, 20, what="etcd answers")

    def close(self) -> None:
        """End etcd and remove the namespace."""
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait()
        subprocess.run(["ip", "netns", "delete", self.name], check=True)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside, to its end."""
        return subprocess.run(
            self._inside(command), env=self.environ, capture_output=True, text=True, check=check,
            timeout=60,
        )  # fmt: skip

    def begin(self, *command: str) -> subprocess.Popen[str]:
        """Start a command inside."""
        return subprocess.Popen(
            self._inside(command), env=self.environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def stored(self, key: str) -> Any:
        """The object under a key."""
        return json.loads(self.run("etcdctl", "get", "--print-value-only", key).stdout)

    @property
    def environ(self) -> dict[str, str]:
        """What commands inside see."""
        return {
            **os.environ,
            "CYMRIC_NODE_NAME": "node1",
            "CYMRIC_STATE_DIR": str(self.directory / "state"),
            "ETCD_ENDPOINTS": ENDPOINT,
            "ETCDCTL_API": "3",
        }

    def _inside(self, command: list[str] | tuple[str, ...]) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}", *command]

    def _answers(self) -> bool:
        return self.run("etcdctl", "endpoint", "health", check=False).returncode == 0


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine of our own, without etcd yet."""
    made = Machine(tmp_path_factory.mktemp("node"))
    yield made
    made.close()


def test_init_gives_up(machine: Machine) -> None:
    """Without etcd, init ends after the time it was given, with the datastore's exit code."""
    done = machine.run(*INIT, "--wait", "1", check=False)
    assert done.returncode == 3
    assert f"etcd does not answer at {ENDPOINT}" in done.stderr
    assert not (machine.directory / "state").exists()


def test_init_waits_for_etcd(machine: Machine) -> None:
    """Started before etcd, init waits for it, says so, and then does its work."""
    init = machine.begin(*INIT)
    assert init.stdout is not None
    assert "Waiting up to 60 s for etcd" in init.stdout.readline()
    machine.start_etcd()
    rest, _ = init.communicate(timeout=60)
    assert init.returncode == 0, rest
    assert "Node node1: created" in rest


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        ([], "203.0.113.9/24"),
        (["--ip", "cidr=198.19.0.0/20"], "198.19.0.2/20"),
        (["--ip", "can-reach=198.19.15.254"], "198.19.0.2/20"),
        (["--ip", "198.19.0.2"], "198.19.0.2/20"),
    ],
)
def test_init_finds_the_address(machine: Machine, arguments: list[str], address: str) -> None:
    """Init writes the node with the address that the kernel has, and keeps the node's name."""
    machine.start_etcd()
    machine.run("etcdctl", "del", "--prefix", "/calico/")
    machine.run(*INIT, *arguments)
    assert machine.stored(NODE)["spec"]["bgp"] == {"ipv4Address": address}
    assert (machine.directory / "state" / "nodename").read_text() == "node1"
