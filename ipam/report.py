"""The report of an audit as JSON: written for monitoring, read back to release what leaked. Pure.

    audit ─▶ document ─▶ file ─▶ parse ─▶ refusal? ─▶ leaks: what all reports agree on

The fields that calicoctl's report has come first and mean the same, so either tool reads the
other's files; ours follow. What a report calls leaked may be in use by now. So several reports,
made at different times, are laid over each other: an address counts only if every report has it
unused, under the same handle and since the same write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from cymric.model.resources import ClusterInformation
from ipam.audit import Allocation, Audit, Finding, Kind
from ipam.snapshot import Snapshot, handle_key

T = TypeVar("T")


class BadReport(ValueError):
    """A report that cannot be read, or must not be acted on; the message names it."""


class Reported(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """One allocation as a report has it."""

    ip: str
    handle: str = ""
    sequence_number: int | None = None
    in_use: bool = False


class ReportedHandle(msgspec.Struct, frozen=True, kw_only=True):
    """A handle without addresses, and the revision that last wrote it."""

    ID: str
    Revision: str


class Report(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """What `release --from-report` needs of a report; other fields are ignored."""

    version: str = ""
    cluster_guid: str = msgspec.field(default="", name="clusterGUID")
    cluster_information_revision: str = ""
    allocations: dict[str, tuple[Reported, ...]] | None = None
    leaked_handles: tuple[ReportedHandle, ...] | None = None


def document(snapshot: Snapshot, audit: Audit, *, version: str) -> dict[str, Any]:
    """The report as a tree. `version` is that of the program."""
    spec = None if snapshot.cluster is None else snapshot.cluster.spec
    leaked_addresses = frozenset(audit.subjects(Kind.LEAKED_ADDRESS))
    by_address: dict[str, list[dict[str, Any]]] = {}
    for allocation in audit.allocations:
        address = str(allocation.address)
        described = _allocation(allocation, is_leaked=address in leaked_addresses)
        by_address.setdefault(address, []).append(described)
    tree: dict[str, Any] = {
        "version": version,
        "clusterGUID": spec.clusterGUID if spec else "",
        "datastoreLocked": snapshot.is_locked,
        "clusterInformationRevision": snapshot.cluster_revision,
        "clusterType": spec.clusterType if spec else "",
        "allocations": by_address,
    }
    if leaked := audit.subjects(Kind.LEAKED_HANDLE):
        tree["leakedHandles"] = [
            {"ID": name, "UID": None, "Revision": str(snapshot.revisions[handle_key(name)])}
            for name in leaked
        ]
    return {
        **tree,
        "revision": snapshot.revision,
        "problems": [_finding(finding) for finding in audit.problems],
        "notes": [_finding(finding) for finding in audit.notes],
    }


def parse(text: bytes, name: str) -> Report:
    """A report as written by `ipam check`. Raises BadReport, naming it."""
    try:
        return msgspec.json.decode(text, type=Report)
    except msgspec.MsgspecError as error:
        raise BadReport(f"{name} is no report of `ipam check`: {error}") from None


def check_use(
    reports: Mapping[str, Report],
    cluster: ClusterInformation | None,
    cluster_revision: str,
    *,
    version: str,
    is_forced: bool,
) -> tuple[str, ...]:
    """Whether these reports (by name) may be acted on, by calicoctl's rules; what to warn of.

    Raises BadReport. Another cluster's report, or none that is current, is refused even if forced.
    """
    spec = None if cluster is None else cluster.spec
    warnings: list[str] = []
    for name, report in reports.items():
        if spec is None or report.cluster_guid != spec.clusterGUID:
            raise BadReport(
                f"cluster does not match the provided report ({name}): mismatched cluster GUID. "
                "Refusing to release"
            )
        if report.version != version and not is_forced:
            raise BadReport(
                f"the provided report ({name}) was produced using a different version "
                f"({report.version}). Refusing to release"
            )
        if report.version != version:
            warnings.append(
                f"Report {name} was produced using a different version ({report.version}). "
                "Ignoring due to --force option"
            )
    if all(r.cluster_information_revision != cluster_revision for r in reports.values()):
        raise BadReport(
            "the provided reports are all stale - at least one should be up-to-date. "
            "Please generate a new report while the data store is locked and try again"
        )
    if spec is None or spec.datastoreReady is not False:
        if not is_forced:
            raise BadReport(
                "data store is not locked. Either lock the data store, or re-run with --force"
            )
        warnings.append("Data store is not locked. Ignoring due to --force option")
    return tuple(warnings)


def leaked_addresses(reports: Sequence[Report]) -> tuple[Reported, ...]:
    """The allocations that every report has, unchanged and unused."""
    return _common([_unused(report) for report in reports])


def leaked_handles(reports: Sequence[Report]) -> tuple[ReportedHandle, ...]:
    """The handles that every report has without addresses, at the same revision."""
    return _common([list(report.leaked_handles or ()) for report in reports])


def _unused(report: Report) -> list[Reported]:
    groups = (report.allocations or {}).values()
    return [item for group in groups for item in group if not item.in_use]


def _common(seen: Sequence[Sequence[T]]) -> tuple[T, ...]:
    first, *others = seen
    sets = [frozenset(other) for other in others]
    return tuple(item for item in first if all(item in other for other in sets))


def _allocation(allocation: Allocation, *, is_leaked: bool) -> dict[str, Any]:
    """`inUse` is false only for what is surely nobody's: it may be released by this report."""
    attributes = allocation.attributes
    described = {
        "ip": str(allocation.address),
        "handle": allocation.handle,
        "sequenceNumber": allocation.sequence_number,
        "pod": attributes.get("pod"),
        "namespace": attributes.get("namespace"),
        "node": allocation.node,
        "type": attributes.get("type"),
        "creationTimestamp": attributes.get("timestamp"),
    }
    tree: dict[str, Any] = {
        name: said for name, said in described.items() if said not in (None, "")
    }
    tree["inUse"] = bool(allocation.users) or not is_leaked
    if allocation.is_borrowed:
        tree["borrowed"] = True
    return {**tree, "owners": list(allocation.users) or None}


def _finding(finding: Finding) -> dict[str, str]:
    return {"kind": finding.kind.value, "subject": finding.subject, "message": finding.text}
