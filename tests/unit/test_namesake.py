"""A process that bears a name for as long as another lives."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.support.eventually import eventually_now

NAME = "calico-felix"
BEAR = (
    f"import asyncio; from cymric.runtime.namesake import namesake; asyncio.run(namesake('{NAME}'))"
)


def bearers(parent: int) -> list[int]:
    """Living children of `parent` whose argv[0] is exactly the name."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, IndexError, ValueError):
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            first = (entry / "cmdline").read_bytes().split(b"\0")[0]
            if int(stat[1]) == parent and stat[0] != "Z" and first == NAME.encode():
                found.append(int(entry.name))
    return found


def lives(process: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_name_ends_with_its_owner() -> None:
    """The bearer is there while its owner lives, and goes when that is killed outright."""
    owner = subprocess.Popen([sys.executable, "-c", BEAR])
    try:
        (bearer,) = eventually_now(lambda: bearers(owner.pid), 60)
    finally:
        owner.kill()
        owner.wait()
    eventually_now(lambda: not lives(bearer), 60)


def test_a_bearer_that_dies_is_replaced() -> None:
    """Somebody ends the bearer: another takes its place."""
    owner = subprocess.Popen([sys.executable, "-c", BEAR])
    try:
        (first,) = eventually_now(lambda: bearers(owner.pid), 60)
        subprocess.run(["kill", str(first)], check=True)
        eventually_now(lambda: set(bearers(owner.pid)) - {first}, 60)
    finally:
        owner.kill()
        owner.wait()
