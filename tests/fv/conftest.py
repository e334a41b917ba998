"""One whole lab for all tests that ask for it, built once, beside any lab that is standing.

A test leaves the lab as it found it; `settled` holds it to that. When a test with a lab fails, the
ends of the lab's logs are in its report.
"""

from __future__ import annotations

import socket
from collections.abc import Generator, Iterator

import pytest

from labs import checks, observe
from labs.lab import Lab
from labs.topology import EXTERNAL_POOL, Layout
from tests.support.lab_tools import wait_for

SETTLE_S = 60.0
LOG_LINES = 15


@pytest.fixture(scope="session")
def lab_layout() -> Iterator[Layout]:
    """A name that no other test run on this machine has now; ours until the end of the run."""
    for number in range(1, 20):
        name = f"cymtest{number}"
        claim = socket.socket(socket.AF_UNIX)
        try:
            claim.bind(f"\0cymric-lab-{name}")  # the kernel forgets it with us, however we end
        except OSError:
            claim.close()
            continue
        yield Layout(name)
        claim.close()
        return
    raise RuntimeError("twenty test runs at once on this machine?")


@pytest.fixture(scope="session")
def standing_lab(lab_layout: Layout) -> Iterator[Lab]:
    """The lab, built and settled; taken down at the end of the run."""
    lab = Lab(lab_layout)
    lab.down()  # what a run that was killed left behind
    try:
        lab.up()
        checks.wait_settled(lab, patience_s=SETTLE_S)
        yield lab
    finally:
        lab.down()


@pytest.fixture
def lab(standing_lab: Lab) -> Iterator[Lab]:
    """The lab, settled before the test and after it, with the machines and pods of the start."""
    before = standing_lab.records
    checks.wait_settled(standing_lab, patience_s=SETTLE_S)
    # A block that an earlier test left empty is given back in its own time: not in this test's.
    wait_for(
        lambda: all(
            block.used or not block.cidr.subnet_of(EXTERNAL_POOL)
            for block in observe.blocks(standing_lab)
        ),
        patience_s=SETTLE_S,
        what="no empty block of the pool that selects no node",
    )
    yield standing_lab
    after = standing_lab.records
    assert {n.name for n in after.nodes} == {n.name for n in before.nodes}
    assert {(p.name, p.node) for p in after.pods} == {(p.name, p.node) for p in before.pods}
    checks.wait_settled(standing_lab, patience_s=SETTLE_S)


@pytest.hookimpl(tryfirst=True)  # before `-m` looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that share the whole lab: they run in one process, by themselves."""
    for item in items:
        if "lab_layout" in getattr(item, "fixturenames", ()):
            item.add_marker("lab")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the ends of the lab's logs with a failure."""
    report = yield
    if report.failed and "lab_layout" in getattr(item, "funcargs", {}):
        layout: Layout = item.funcargs["lab_layout"]  # type: ignore[attr-defined]
        for path in sorted(layout.logs.glob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-LOG_LINES:]
            if lines:
                report.sections.append((path.name, "\n".join(lines)))
    return report
