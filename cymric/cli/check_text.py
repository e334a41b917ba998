"""What `ipam check` prints, in calicoctl's words where it has them. Pure.

Addresses are listed only when asked for, as calicoctl does. What is wrong with blocks and with
announcements is always listed: it is rare, and a number alone would help nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from ipam.audit import Audit, Finding, Kind, describe
from ipam.snapshot import Snapshot

TOP_NODES = 20

_BLOCKS = (
    Kind.TWO_OWNERS,
    Kind.STALE_AFFINITY,
    Kind.AFFINITY_WITHOUT_BLOCK,
    Kind.BLOCK_WITHOUT_AFFINITY,
    Kind.OVERLAP,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What to list besides the numbers."""

    all_ips: bool = False
    problem_ips: bool = False


def lines(snapshot: Snapshot, audit: Audit, shown: Shown, *, advertising: str) -> Iterator[str]:
    """The whole output. `advertising` says whose announcements were compared, or why none."""
    lists_problems = shown.all_ips or shown.problem_ips
    yield from ("Checking IPAM for inconsistencies...", "")
    yield from _loaded(snapshot, audit, shown)
    yield from _top_nodes(audit)
    yield from _addresses(audit, lists_problems=lists_problems)
    yield from _handles(audit, shown, lists_problems=lists_problems)
    yield "Scanning for blocks with more or less than one owner, and blocks that overlap..."
    found = [finding for finding in audit.findings if finding.kind in _BLOCKS]
    yield from _listed(found)
    yield f"Found {len(found)} contradictions between blocks and affinities."
    yield f"Comparing blocks with announcements... {advertising}"
    kinds = (Kind.NOT_ADVERTISED, Kind.ADVERTISED_IN_VAIN)
    yield from _listed([finding for finding in audit.findings if finding.kind in kinds])
    if unreadable := [f for f in audit.findings if f.kind is Kind.UNREADABLE]:
        yield f"Found {len(unreadable)} values that cannot be read:"
        yield from _listed(unreadable)
    yield ""
    if audit.notes:
        counts = Counter(finding.kind.value for finding in audit.notes)
        told = ", ".join(f"{number} {kind}" for kind, number in counts.items())
        yield f"Noted, and harmless: {told}."
        if lists_problems:
            yield from (f"  {f.kind.value}: {f.subject} {f.text}" for f in audit.notes)
    yield f"Check complete; found {len(audit.problems)} problems."


def _loaded(snapshot: Snapshot, audit: Audit, shown: Shown) -> Iterator[str]:
    yield "Loading all IPAM blocks..."
    yield f"Found {len(snapshot.blocks)} IPAM blocks."
    by_block: dict[str, list[str]] = {}
    for allocation in audit.allocations:
        line = f"  {allocation.address} allocated; {describe(allocation)}"
        by_block.setdefault(str(allocation.block), []).append(line)
    for network, block in snapshot.blocks.items():
        yield f" IPAM block {network} affinity={block.affinity or '<none>'}:"
        if shown.all_ips:
            yield from by_block.get(str(network), ())
    yield from (f"IPAM blocks record {len(audit.allocations)} allocations.", "")
    yield "Loading all IPAM pools..."
    active = [pool.spec.cidr for pool in snapshot.pools.values() if not pool.spec.disabled]
    yield from (f"  {cidr}" for cidr in active)
    yield from (f"Found {len(active)} active IP pools.", "")
    for title, what, user in (
        ("Loading all nodes.", "node tunnel IPs", "Node("),
        ("Loading all workload endpoints.", "workload IPs", "Workload("),
    ):
        yield title
        uses = [use for use in snapshot.uses if use.user.startswith(user)]
        if shown.all_ips:
            yield from (f"  {use.address} belongs to {use.user}" for use in uses)
        yield f"Found {len(uses)} {what}."
        if user == "Node(":
            yield ""
    in_use = len({use.address for use in snapshot.uses})
    yield from (f"Workloads and nodes are using {in_use} IPs.", "")


def _top_nodes(audit: Audit) -> Iterator[str]:
    yield f"Looking for top (up to {TOP_NODES}) nodes by allocations..."
    counts = Counter(allocation.node for allocation in audit.allocations).most_common()
    yield from (f"  {node} has {number} allocations" for node, number in counts[:TOP_NODES])
    if counts:
        most, median = counts[0][1], counts[len(counts) // 2][1]
        yield f"Node with most allocations has {most}; median is {median}"
    yield ""


def _addresses(audit: Audit, *, lists_problems: bool) -> Iterator[str]:
    def of(*kinds: Kind) -> list[Finding]:
        return [finding for finding in audit.findings if finding.kind in kinds]

    yield "Scanning for IPs that are allocated but not actually in use..."
    leaked = of(Kind.LEAKED_ADDRESS)
    if lists_problems:
        yield from _listed(leaked)
    yield f"Found {len(leaked)} IPs that are allocated in IPAM but not actually in use."
    yield ("Scanning for IPs that are in use by a workload or node but not allocated in IPAM...")
    foreign, missing = of(Kind.FOREIGN_ADDRESS), of(Kind.NOT_ALLOCATED)
    if lists_problems:
        yield from _listed([*foreign, *missing])
    yield f"Found {len(foreign)} in-use IPs that are not in active IP pools."
    yield (
        f"Found {len(missing)} in-use IPs that are in active IP pools but have no corresponding "
        "IPAM allocation."
    )
    yield "Scanning for IPs with more than one owner, or with another than IPAM knows..."
    contested = of(Kind.ALLOCATED_TWICE, Kind.SHARED_ADDRESS, Kind.WRONG_NODE)
    if lists_problems:
        yield from _listed(contested)
    yield from (f"Found {len(contested)} IPs whose owner is not clear.", "")


def _handles(audit: Audit, shown: Shown, *, lists_problems: bool) -> Iterator[str]:
    yield "Scanning for IPAM handles with no matching IPs..."
    leaked = audit.subjects(Kind.LEAKED_HANDLE)
    if shown.all_ips:
        yield from (f"  {handle} doesn't have any active IPs." for handle in leaked)
    used = {allocation.handle for allocation in audit.allocations if allocation.handle}
    missing = audit.subjects(Kind.MISSING_HANDLE)
    yield (
        f"Found {len(leaked)} handles with no matching IPs "
        f"(and {len(used) - len(missing)} handles with matches)."
    )
    yield "Scanning for IPs with missing handle..."
    wrong = [f for f in audit.findings if f.kind in (Kind.MISSING_HANDLE, Kind.HANDLE_TOO_LOW)]
    if lists_problems:
        yield from _listed(wrong)
    yield f"Found {len(missing)} handles mentioned in blocks with no matching handle resource."
    if low := audit.subjects(Kind.HANDLE_TOO_LOW):
        yield f"Found {len(low)} handles that count fewer IPs than they hold."


def _listed(findings: list[Finding]) -> Iterator[str]:
    return (f"  {finding.subject} {finding.text}" for finding in findings)
