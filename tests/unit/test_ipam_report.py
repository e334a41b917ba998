"""Reports of audits: what they hold, what several agree on, when they may be acted on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ipam import report
from ipam.audit import audit
from tests.support.ipam_keys import BLOCK, CLUSTER_KEY, NOW_S, Stored, leaking, read, sound


def written(stored: Stored, version: str = "v") -> report.Report:
    seen = read(stored)
    tree = report.document(seen, audit(seen, now_s=NOW_S), version=version)
    return report.parse(json.dumps(tree).encode(), "r.json")


def test_report_has_calicos_fields() -> None:
    """The report has the fields of calicoctl's, with ours after them."""
    seen = read(leaking())
    tree = report.document(seen, audit(seen, now_s=NOW_S), version="v")
    assert list(tree) == [
        "version", "clusterGUID", "datastoreLocked", "clusterInformationRevision", "clusterType",
        "allocations", "leakedHandles", "revision", "problems", "notes",
    ]  # fmt: skip
    assert tree["datastoreLocked"] is True
    assert tree["clusterInformationRevision"] == "5"
    assert tree["leakedHandles"] == [{"ID": "old", "UID": None, "Revision": "5"}]
    assert tree["allocations"]["10.0.0.1"] == [
        {
            "ip": "10.0.0.1",
            "handle": "net.b",
            "sequenceNumber": 7,
            "pod": "p",
            "namespace": "ns",
            "node": "node1",
            "creationTimestamp": "2026-01-01 03:04:05.5 +0000 UTC",
            "inUse": False,
            "owners": None,
        }
    ]
    assert tree["allocations"]["10.0.0.0"][0]["owners"] == ["Workload(default/node1-cni-a-eth0)"]
    kinds = [finding["kind"] for finding in tree["problems"]]
    assert kinds == ["leaked-address", "missing-handle"]


def test_what_all_reports_agree_on() -> None:
    """Only what is unused in every report, under the same handle and write, is leaked."""
    first = written(leaking())
    assert [leak.ip for leak in report.leaked_addresses([first])] == ["10.0.0.1"]
    assert [leak.ip for leak in report.leaked_addresses([first, first])] == ["10.0.0.1"]
    assert report.leaked_addresses([first, written(sound())]) == ()
    anew = leaking()
    anew[BLOCK]["sequenceNumberForAllocation"]["1"] = 8
    assert report.leaked_addresses([first, written(anew)]) == ()
    assert [handle.ID for handle in report.leaked_handles([first, written(anew)])] == ["old"]
    assert report.leaked_handles([first, written(sound())]) == ()


@pytest.mark.parametrize(
    ("change", "is_forced", "said"),
    [
        pytest.param({}, False, "", id="locked and current"),
        pytest.param({"version": "w"}, False, "different version (w)", id="version"),
        pytest.param({"version": "w"}, True, "", id="version, forced"),
        pytest.param({"guid": "h"}, True, "mismatched cluster GUID", id="another cluster"),
        pytest.param({"revision": "4"}, True, "all stale", id="stale"),
        pytest.param({"locked": False}, False, "data store is not locked", id="not locked"),
        pytest.param({"locked": False}, True, "", id="not locked, forced"),
    ],
)
def test_when_reports_may_be_used(change: dict[str, Any], is_forced: bool, said: str) -> None:
    """Calicoctl's conditions: this cluster, this version, one current report, a locked store."""
    stored = leaking()
    made = written(stored, change.get("version", "v"))
    stored[CLUSTER_KEY]["spec"]["clusterGUID"] = change.get("guid", "g")
    stored[CLUSTER_KEY]["spec"]["datastoreReady"] = not change.get("locked", True)
    seen = read(stored)
    revision = change.get("revision", seen.cluster_revision)

    def use() -> tuple[str, ...]:
        reports = {"r.json": made}
        return report.check_use(reports, seen.cluster, revision, version="v", is_forced=is_forced)

    if said:
        with pytest.raises(report.BadReport, match=said.replace("(", r"\(").replace(")", r"\)")):
            use()
    else:
        assert bool(use()) is is_forced


def test_a_file_that_is_no_report() -> None:
    """Anything else than a report is refused by its name."""
    with pytest.raises(report.BadReport, match=r"x\.json is no report"):
        report.parse(b'{"allocations": 3}', "x.json")
