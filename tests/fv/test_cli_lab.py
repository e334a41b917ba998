"""`cymric ipam check` on a whole cluster: what three nodes store, and what this one advertises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from labs.lab import Lab
from labs.network import CommandFailed

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.peers, pytest.mark.slow]

CLAIM = "/calico/ipam/v2/host/node1/ipv4/block/198.19.23.192-26"


@pytest.mark.parametrize("node", ["control", "node1", "node2"])
def test_a_working_cluster_is_sound(lab: Lab, node: str, tmp_path: Path) -> None:
    """On every node of a settled lab the check finds nothing, its announcements among it."""
    report = tmp_path / "report.json"
    said = lab.cymric(node, "ipam", "check", "--show-problem-ips", "-o", str(report))
    assert f"Comparing blocks with announcements... of this node only ({node}).\n" in said
    assert said.endswith("Check complete; found 0 problems.\n")
    tree = json.loads(report.read_text())
    assert tree["problems"] == []
    in_use = {ip for ip, found in tree["allocations"].items() if found[0]["inUse"]}
    assert {pod.address for pod in lab.records.pods} <= in_use


def test_a_claim_on_nothing_is_a_problem(lab: Lab) -> None:
    """A claim whose block does not exist is told, and the exit code says so to a monitor."""
    lab.etcdctl("put", CLAIM, '{"state":"confirmed","deleted":false}')
    try:
        with pytest.raises(CommandFailed, match="Check complete; found 1 problems"):
            lab.cymric("node2", "ipam", "check")
    finally:
        lab.etcdctl("del", CLAIM)
    lab.cymric("node2", "ipam", "check")
