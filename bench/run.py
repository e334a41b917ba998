"""The benchmarks' front door: every measurement, one table.

    sudo bench/run            all of it
    sudo bench/run routes     some of it, by module name
    sudo bench/run --json     for a machine

A measurement is a module in this folder with `measure()`, plain or async, that returns rows
(`row.py`). Each row has a figure of ours beside a peer's, taken in the same run on the same
machine, because figures of different machines say nothing; both are medians, and less is better.
A measurement that fails is told at the end, with exit code 1: no line goes missing in silence.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import click

from bench.row import Row
from cymric.cli import output

MEASUREMENTS = (
    "cni",
    "ipam",
    "claim",
    "routes",
    "mesh",
    "daemons",
    "felix_calc",
    "felix_start",
    "policy",
    "packets",
)
HEADINGS = ("WHAT", "CYMRIC", "PEER", "UNIT", "RATIO", "PEER IS")


def rows_of(name: str) -> Sequence[Row]:
    """Run one measurement."""
    module = importlib.import_module(f"bench.{name}")
    measure: Callable[[], Sequence[Row] | Awaitable[Sequence[Row]]] = module.measure
    measured = measure()
    if not inspect.isawaitable(measured):
        return measured

    async def awaited() -> Sequence[Row]:
        return await measured

    return asyncio.run(awaited())


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    peer = "" if row.peer is None else _figure(row.peer)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    return (row.what, _figure(row.cymric), peer, row.unit, ratio, row.peer_name)


def machine() -> str:
    """Where the figures are from."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    processor = names[0] if names else platform.machine()
    cores = len(os.sched_getaffinity(0))
    python = platform.python_version()
    return f"{cores} x {processor}, Linux {platform.release()}, Python {python}"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(MEASUREMENTS))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def main(names: tuple[str, ...], as_json: bool) -> None:
    """Measure, ours beside a peer's, and print one table."""
    if os.geteuid() != 0:
        raise click.ClickException("the measurements make network namespaces: run them as root")
    rows: list[Row] = []
    failed: list[str] = []
    for name in names or MEASUREMENTS:
        started = time.monotonic()
        output.note(f"measuring {name} ...")
        try:
            rows += rows_of(name)
        except Exception:
            # One broken measurement must not cost the others' figures; it is told below.
            traceback.print_exc()
            failed.append(name)
        output.note(f"measuring {name}: {time.monotonic() - started:.0f} s")
    if as_json:
        click.echo(json.dumps({"machine": machine(), "rows": [_tree(row) for row in rows]}))
    else:
        click.echo(f"{machine()}; medians, less is better, ratio is ours to the peer's\n")
        output.table(HEADINGS, [cells(row) for row in rows])
    if failed:
        output.note(f"failed: {', '.join(failed)}")
        sys.exit(1)


def _tree(row: Row) -> dict[str, object]:
    return {**asdict(row), "ratio": row.ratio}


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
