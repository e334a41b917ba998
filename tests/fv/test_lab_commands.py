"""The lab as a person uses it: up again, summary, and down without a trace."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from labs import checks, network
from labs.lab import Lab
from labs.topology import Layout

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.peers]

ROOT = Path(__file__).resolve().parents[2]


def _lab(name: str, *words: str, timeout_s: float = 120) -> str:
    done = subprocess.run(
        [str(ROOT / "labs" / "lab"), "--name", name, *words],
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_up_again_changes_nothing_and_shows_everything(lab: Lab) -> None:
    """`up` on a standing lab starts nothing new, and prints every table as plain text."""
    before = {(p.group, p.name): p.pid for p in lab.supervisor.processes()}
    known = lab.records
    text = _lab(lab.layout.name, "up")
    assert {(p.group, p.name): p.pid for p in lab.supervisor.processes()} == before
    assert lab.records == known
    assert "\x1b" not in text, "no colours when not on a terminal"
    for title in ("Nodes", "Blocks", "BGP sessions", "Pod routes", "Pod to pod", "Pods and the"):
        assert f"\n{title}" in text
    for pod in known.pods:
        assert pod.address in text
    assert "Established" in text
    assert "WRONG" not in text


def test_check_names_what_is_wrong(lab: Lab) -> None:
    """`check` passes on a healthy lab, and fails with the process by name when one is stopped."""
    _lab(lab.layout.name, "check")
    _lab(lab.layout.name, "stop", "node2", "felix")
    try:
        done = subprocess.run(
            [str(ROOT / "labs" / "lab"), "--name", lab.layout.name, "check"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert "node2:felix is stopped" in done.stdout
    finally:
        _lab(lab.layout.name, "start", "node2", "felix")


def test_pods_by_command(lab: Lab) -> None:
    """`pod add` prints the address, `enter` runs a command in the pod, `pod del` takes it away."""
    address = _lab(lab.layout.name, "pod", "add", "control", "typed").splitlines()[-1]
    try:
        checks.wait_settled(lab)
        assert address in _lab(lab.layout.name, "enter", "typed", "ip", "-4", "addr", "show")
        assert "inet 198.19.0.2/20" in _lab(lab.layout.name, "enter", "node1", "ip", "addr")
    finally:
        _lab(lab.layout.name, "pod", "del", "typed")
    assert "typed" not in {pod.name for pod in lab.records.pods}


def _processes_mentioning(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended meanwhile; or is one that root may not read: not ours
            if text.encode() in words:
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


def _root_namespace() -> str:
    rules = network.run("iptables-save") + network.run("ipset", "save")
    links = network.run("ip", "-o", "link", "show") + network.run("ip", "-4", "route", "show")
    # Counters and dates change by themselves.
    kept = [line for line in rules.splitlines() if not line.startswith(("#", ":"))]
    return "\n".join([*kept, links])


@pytest.mark.slow
def test_down_leaves_no_trace(lab_layout: Layout) -> None:
    """A lab built and taken down leaves no namespace, process, file, link, route or rule."""
    lab = Lab(Layout(f"{lab_layout.name}d"))
    lab.down()
    before = _root_namespace()
    try:
        lab.up()
        checks.wait_settled(lab, patience_s=60)
        assert _root_namespace() == before, "nothing outside the namespaces while it stands"
    finally:
        _lab(lab.layout.name, "down")
    assert lab.remains() == ()
    assert [ns for ns in network.all_namespaces() if ns.startswith(lab.layout.name)] == []
    assert not lab.layout.state.exists()
    assert _processes_mentioning(str(lab.layout.state)) == []
    assert _root_namespace() == before


def test_down_without_records_still_finds_everything(lab_layout: Layout) -> None:
    """A lab whose files were lost is found by the names of its namespaces, and taken down."""
    lab = Lab(Layout(f"{lab_layout.name}r"))
    network.make_bridge(lab.layout.bridge_namespace)
    network.make_pod_namespace(lab.layout.pod_namespace("orphan"))
    assert len(lab.remains()) == 2
    lab.down()
    assert lab.remains() == ()
