"""`cymric ipam check`: whether what etcd says about addresses agrees with itself.

One listing at one revision, one pure calculation, and, where this node's bgpd answers, its own
announcements beside it. What looks wrong is looked at twice: between the writes of a workload that
goes, its address looks leaked. It writes nothing into etcd, and needs no Kubernetes.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import msgspec

import cymric
from cymric.cli import check_text
from cymric.cli.bgpd_socket import NotRunning, ask
from cymric.cli.session import Session
from cymric.datastore.api import Datastore
from cymric.model.net import parse_network
from ipam import report, snapshot
from ipam.audit import Advertised, Audit, audit, confirmed
from ipam.snapshot import Snapshot

REPORT_VERSION = f"cymric-{cymric.__version__}"
PROBLEMS_FOUND = 1

SETTLE_S = 1.0
"""How long what is only passing may take to pass."""


@click.command("check")
@click.option("--show-all-ips", is_flag=True, help="Print all IPs that are checked.")
@click.option(
    "--show-problem-ips",
    is_flag=True,
    help="Print all IPs that are leaked or not allocated properly, and what was noted.",
)
@click.option(
    "-o",
    "--output",
    "report_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Path to output report file.",
)
@click.option(
    "--settle",
    "settle_s",
    type=click.FloatRange(0),
    default=SETTLE_S,
    show_default=True,
    help="With problems, look again after so many seconds and tell what is still so; 0: look once.",
)
@click.pass_obj
def check(
    session: Session,
    show_all_ips: bool,
    show_problem_ips: bool,
    report_file: Path | None,
    settle_s: float,
) -> None:
    """Check that blocks, affinities, handles, endpoints and announcements agree.

    The exit code is 0 if they do and 1 if there are problems.
    """
    seen, found, told = _examine(session)
    if found.problems and settle_s:
        time.sleep(settle_s)
        earlier = found
        seen, found, told = _examine(session)
        found = confirmed(earlier, found)
    shown = check_text.Shown(all_ips=show_all_ips, problem_ips=show_problem_ips)
    for line in check_text.lines(seen, found, shown, advertising=told):
        click.echo(line)
    if report_file is not None:
        tree = report.document(seen, found, version=REPORT_VERSION)
        report_file.write_bytes(msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n")
    if found.problems:
        raise SystemExit(PROBLEMS_FOUND)


def _examine(session: Session) -> tuple[Snapshot, Audit, str]:
    """One look and its audit, and a line about the announcements."""
    seen = session.run(look)
    advertised, told = _advertised(session, seen)
    return seen, audit(seen, now_s=time.time(), advertised=advertised), told


async def look(store: Datastore) -> Snapshot:
    """Everything that bears on addresses, at one revision."""
    listing = await store.list(snapshot.PREFIX)
    return snapshot.read(listing.items, listing.revision)


def _advertised(session: Session, seen: Snapshot) -> tuple[Advertised | None, str]:
    """What this node's bgpd advertises, and a line that says so or why it is not known."""
    if not session.settings().bgpd_socket.exists():
        return None, "not done: bgpd does not run here."
    try:
        answer = ask(session, "status")
    except NotRunning as error:
        return None, f"not done: {error}."
    if not answer["in_sync"]:
        return None, "not done: bgpd is not in sync with etcd yet."
    if answer["node"] not in seen.nodes:
        return None, f"not done: bgpd here is of {answer['node']}, which is not in this etcd."
    prefixes = frozenset(map(parse_network, answer["advertising"]))
    return Advertised(answer["node"], prefixes), f"of this node only ({answer['node']})."
