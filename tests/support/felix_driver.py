"""Felix' calculation and real drivers as a program that is told what is stored, line by line.

Run in a node's network namespace: `python -m tests.support.felix_driver <directory>`, parameters as
`FELIX_…` in the environment. A line of stdin is a JSON object: specs by `Kind [namespace/]name`,
null for what is deleted; all of it is one batch. When the kernel is as wanted, `applied` is
printed, and how many changes were staged so far. Nothing is read from etcd, so a change costs what
felix itself needs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import structlog

from cymric.kernel.command import HostCommands
from cymric.model.keys import Key, ResourceKey
from cymric.runtime.pacing import Kick
from cymric.runtime.settings import Settings
from felix.calc.state import Calculation
from felix.calc.values import Desired
from felix.daemon import build_drivers
from felix.dataplane.loop import Dataplane
from felix.iptables.backend import find
from felix.metrics import STAGED
from tests.support.felix_places import NODE
from tests.support.felix_policy import update


class Watched(Dataplane):
    """One that tells what is in the kernel."""

    done: Desired | None = None
    on_done: Callable[[], None]

    async def _apply(self, desired: Desired, tasks: asyncio.TaskGroup) -> bool:
        is_done = await super()._apply(desired, tasks)
        if is_done:
            self.done = desired
            self.on_done()
        return is_done


async def main(directory: Path) -> None:
    """Until stdin ends."""
    kick, done = Kick(), asyncio.Event()
    calculation = Calculation(NODE, os.environ)
    config = calculation.desired().config
    commands = HostCommands()
    found = await find(commands, config.iptables_backend)
    settings = Settings(node_name=NODE, endpoint_status_dir=directory / "status")
    plane = Watched(
        build_drivers(config, found.backend, settings, commands, lambda _: None),
        calculation.desired,
        kick,
        clock=time.monotonic,
        on_applied=lambda: None,
        on_host_interfaces=calculation.on_host_interfaces,
    )
    plane.on_done = done.set
    told = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(told), sys.stdin
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(plane.run())
        while line := await told.readline():
            for name, spec in json.loads(line).items():
                calculation.on_update(*_update(name, spec))
            kick()
            while plane.done is not calculation.desired():
                done.clear()
                await done.wait()
            print("applied", int(next(iter(STAGED.collect())).samples[0].value), flush=True)
        running.cancel()


def _update(name: str, spec: dict[str, object] | None) -> tuple[Key, object]:
    if spec is not None:
        return update(name, spec)
    kind, _, full = name.partition(" ")
    namespace, _, short = full.rpartition("/")
    return ResourceKey(kind, short, namespace), None


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(Path(sys.argv[1])))
