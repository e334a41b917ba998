"""The audit of what IPAM itself stores, in memory and on a real etcd; and of what breaks it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from cymric.cli.ipam_check import look
from cymric.datastore.api import Datastore
from ipam.audit import audit
from ipam.client import IPAM
from ipam.snapshot import Snapshot
from tests.support.cymric_cli import RESOURCES, Cymric, populate

IPAM_KEYS = "/calico/ipam/v2"


def kinds(cymric: Cymric) -> list[str]:
    """What the audit finds."""
    seen = cymric.run(look)
    return [finding.kind.value for finding in audit(seen, now_s=1e10).findings]


def test_what_ipam_stores_is_sound(cymric: Cymric) -> None:
    """Addresses that IPAM gave to endpoints leave nothing to find."""
    populate(cymric)
    assert kinds(cymric) == []
    said = cymric.ok("ipam", "check")
    assert "Found 2 IPAM blocks.\n" in said
    assert "IPAM blocks record 4 allocations.\n" in said
    assert said.endswith("Check complete; found 0 problems.\n")


def test_one_revision(cymric: Cymric) -> None:
    """All that is compared stood in etcd at one moment."""
    populate(cymric)
    seen: Snapshot = cymric.run(look)
    assert seen.revision >= max(seen.revisions.values())
    key = f"{RESOURCES}/nodes/n1"
    assert (
        str(seen.revisions[key])
        == json.loads(cymric.ok("get", "node", "n1", "-o", "json"))["metadata"]["resourceVersion"]
    )


def releasing(handle: str) -> Callable[[Datastore], Awaitable[object]]:
    return lambda store: IPAM(store).release_handle(handle)


def test_faults_are_problems(cymric: Cymric) -> None:
    """A leak, a used free address and a stale claim end the check with exit code 1."""
    given = populate(cymric)
    cymric.ok("delete", "wep", "n1-cni-a-eth0")
    cymric.run(releasing("net.c"))
    key = f"{IPAM_KEYS}/host/n9/ipv4/block/10.244.0.252-30"
    cymric.raw.put(key, '{"state":"confirmed","deleted":false}')
    assert sorted(kinds(cymric)) == [
        "affinity-without-block",
        "dead-node",
        "leaked-address",
        "not-allocated",
    ]
    result = cymric("ipam", "check", "--settle=0", "--show-problem-ips")
    assert result.exit_code == 1
    assert f"  {given['a']} leaked; attrs Main:net.a Extra:node=n1," in result.stdout
    assert (
        f"  {given['c']} in use by Workload(default/n2-cni-c-eth0) and in active IPAM pool "
        "but has no IPAM allocation\n"
    ) in result.stdout
    assert "  10.244.0.252/30 host:n9 claims it, but there is no such block\n" in result.stdout
    assert result.stdout.endswith("Check complete; found 3 problems.\n")
