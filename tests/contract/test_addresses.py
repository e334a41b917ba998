"""The addresses of interfaces are those that `ip` shows."""

from __future__ import annotations

import secrets
import subprocess
import sys

import pytest

PROGRAM = """
from cymric.kernel.addresses import ipv4_by_interface
for name, addresses in sorted(ipv4_by_interface().items()):
    print(name, *sorted(map(str, addresses)))
"""


@pytest.mark.root
def test_all_addresses_of_all_interfaces() -> None:
    """Several on one link, labelled ones, and more than fit the first buffer."""
    namespace = f"cyflx-i-{secrets.token_hex(3)}"
    batch = ["link set lo up", "link add a0 type veth peer name b0"]
    batch += [f"address add 198.19.0.{last}/20 dev a0" for last in range(1, 101)]
    batch += ["address add 198.19.1.1/24 dev a0 label a0:x"]
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        subprocess.run(
            ["ip", "-n", namespace, "-batch", "-"], input="\n".join(batch), text=True, check=True
        )
        printed = subprocess.run(
            ["ip", "netns", "exec", namespace, sys.executable, "-c", PROGRAM],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)
    found = {line.split()[0]: set(line.split()[1:]) for line in printed.splitlines()}
    every = {f"198.19.0.{last}" for last in range(1, 101)} | {"198.19.1.1"}
    assert found == {"lo": {"127.0.0.1"}, "a0": every}


@pytest.mark.root
def test_addresses_of_both_families_without_link_local_ones() -> None:
    """Several on one link; an interface may have either family alone."""
    namespace = f"cyflx-a-{secrets.token_hex(3)}"
    program = PROGRAM.replace("ipv4_by_interface", "by_interface")
    commands = (
        "link set lo up",
        "link add one type veth peer name two",
        "link set one up",
        "link set two up",
        "address add 198.19.0.1/20 dev one",
        "address add fd00:1::1/64 dev one nodad",
        "address add fd00:2::1/64 dev two nodad",
    )
    subprocess.run(["ip", "netns", "add", namespace], check=True)
    try:
        for words in commands:
            subprocess.run(["ip", "-n", namespace, *words.split()], check=True)
        printed = subprocess.run(
            ["ip", "netns", "exec", namespace, sys.executable, "-c", program],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    finally:
        subprocess.run(["ip", "netns", "del", namespace], check=True)
    assert printed.splitlines() == [
        "lo 127.0.0.1 ::1",
        "one 198.19.0.1 fd00:1::1",
        "two fd00:2::1",
    ]
