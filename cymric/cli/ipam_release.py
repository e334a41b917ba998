"""`cymric ipam release`: addresses given back by hand, or those that reports agree are leaked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import click

from cymric.cli import output
from cymric.cli.ipam_check import REPORT_VERSION, look
from cymric.cli.objects import ObjectError
from cymric.cli.releasing import release_seen
from cymric.cli.session import Session
from cymric.datastore import api
from cymric.datastore.api import Datastore
from cymric.model.keys import HandleKey, MalformedKey
from cymric.model.net import Address, parse_address
from ipam import report
from ipam.audit import Allocation, Kind, audit
from ipam.report import BadReport, Report, ReportedHandle
from ipam.snapshot import Snapshot


@click.command("release")
@click.option("--ip", default="", help="IP address to release.")
@click.option("--handle", default="", help="Release every address that this handle holds.")
@click.option(
    "--from-report",
    "report_files",
    multiple=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="Release what this report of `ipam check` calls leaked; given several times, only what "
    "all of them do. At least one should be newly made.",
)
@click.option("--force", is_flag=True, help="With an unlocked datastore or another's report, too.")
@click.pass_obj
def release(
    session: Session, ip: str, handle: str, report_files: tuple[Path, ...], force: bool
) -> None:
    """Release addresses, so that they may be assigned again.

    It does not take them from workloads that use them: only use it for what was not cleaned up.
    """
    if sum(map(bool, (ip, handle, report_files))) != 1:
        raise click.UsageError("give one of --ip, --handle and --from-report")
    if ip:
        try:
            address = parse_address(ip)
        except ValueError as error:
            raise click.UsageError(f"--ip: {error}") from None
        session.run(lambda store: _release_address(store, address))
    elif handle:
        session.run(lambda store: _release_handle(store, handle))
    else:
        try:
            reports = {
                str(path): report.parse(path.read_bytes(), str(path)) for path in report_files
            }
            session.run(lambda store: _release_leaked(store, reports, is_forced=force))
        except BadReport as error:
            raise ObjectError(str(error)) from None


async def _release_address(store: Datastore, address: Address) -> None:
    from ipam.client import IPAM, Release

    if await IPAM(store).release([Release(address)]):
        raise ObjectError(f"IP address {address} is not assigned")
    click.echo(f"Successfully released IP address {address}")


async def _release_handle(store: Datastore, handle: str) -> None:
    from ipam.client import IPAM

    try:
        freed = await IPAM(store).release_handle(handle)
    except MalformedKey as error:
        raise ObjectError(str(error)) from None
    if not freed:
        raise ObjectError(f"handle {handle} holds no IP address")
    for address in freed:
        click.echo(f"Successfully released IP address {address}")


async def _release_leaked(
    store: Datastore, reports: Mapping[str, Report], *, is_forced: bool
) -> None:
    seen = await look(store)
    for warning in report.check_use(
        reports, seen.cluster, seen.cluster_revision, version=REPORT_VERSION, is_forced=is_forced
    ):
        output.note(f"WARNING: {warning}")
    refuse_if_blind(seen)
    await _release_addresses(store, seen, tuple(reports.values()))
    await _delete_handles(store, report.leaked_handles(tuple(reports.values())))
    if seen.is_locked:
        click.echo("You may now unlock the data store.")


def refuse_if_blind(seen: Snapshot) -> None:
    """Raises ObjectError if endpoints or nodes exist whose addresses nobody can tell."""
    if seen.blind:
        names = ", ".join(sorted(seen.blind))
        raise ObjectError(f"which addresses are in use is not known, these cannot be read: {names}")


async def _release_addresses(store: Datastore, seen: Snapshot, reports: tuple[Report, ...]) -> None:
    """Free what the reports call leaked, as far as it still looks leaked."""
    told = {
        (leak.ip, leak.handle, leak.sequence_number) for leak in report.leaked_addresses(reports)
    }
    if not told:
        click.echo("Report didn't contain any leaked IPs to clean up.")
        return
    now = audit(seen, now_s=time.time())
    leaked = set(now.subjects(Kind.LEAKED_ADDRESS))
    still = [
        allocation
        for allocation in now.allocations
        if str(allocation.address) in leaked and _identity(allocation) in told
    ]
    held = {_identity(allocation) for allocation in now.allocations}
    click.echo(f"Releasing {len(told)} old IPs...")
    outcome = await release_seen(store, still)
    click.echo(f"Released {len(outcome.released)} IPs successfully")
    if gone := len(told - held) + len(outcome.unheld):
        click.echo(f"{gone} addresses marked as leaked in the report had already been cleaned up.")
    if kept := len(told & held) - len(still) + len(outcome.changed):
        click.echo(f"{kept} addresses marked as leaked in the report are in use by now, and stay.")


def _identity(allocation: Allocation) -> tuple[str, str, int]:
    return str(allocation.address), allocation.handle or "", allocation.sequence_number


async def _delete_handles(store: Datastore, handles: tuple[ReportedHandle, ...]) -> None:
    if not handles:
        click.echo("Report didn't contain any handles to clean up.")
        return
    click.echo(f"Deleting {len(handles)} handles...")
    released = skipped = 0
    for handle in handles:
        try:
            key, revision = str(HandleKey(handle.ID)), int(handle.Revision)
            await api.delete(store, key, if_revision=revision)
        except (api.Conflict, MalformedKey, ValueError):
            skipped += 1  # it is gone, or counts something again
        else:
            released += 1
    click.echo(f"Released {released} handles; {skipped} skipped; 0 errors.")
