"""A process that assigns and releases addresses until it is killed, keeping a journal as cnid does.

    python -m tests.support.ipam_process <etcd endpoint> <node> <journal file>

Each line of the journal is written before or after a call: `? handle` in doubt, `+ handle address`
told, `- handle` released. A new process first releases what is in doubt. Ended by SIGTERM it
settles what is in flight.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

from cymric.datastore.syncer import Syncer
from ipam.allocator import Allocator
from ipam.asking import Ask
from ipam.errors import NoAddress
from tests.support.datastore import client

CALLERS = 8
HELD_AT_MOST = 12


def told(journal: str) -> dict[str, set[str]]:
    """What is held according to a journal: handles, with no address for one in doubt."""
    held: dict[str, set[str]] = {}
    for line in journal.splitlines():
        sign, handle, *rest = line.split()
        if sign == "-":
            held.pop(handle, None)
        elif sign == "+":
            held.setdefault(handle, set()).update(rest)
        else:
            held[handle] = set()
    return held


class Worker:
    """Callers of one node's allocator."""

    def __init__(self, node: str, allocator: Allocator, journal: Path) -> None:
        self._node = node
        self._allocator = allocator
        self._journal = journal.open("a", buffering=1)  # a line is in the kernel when written
        self._held = told(journal.read_text())
        # No handle twice, also not by the next process.
        self._numbers = itertools.count(int(time.time() * 1000) * 1000 + os.getpid() % 1000)
        self.is_ending = False

    async def recover(self) -> None:
        """Release what a former process left in doubt."""
        for handle in [handle for handle, addresses in self._held.items() if not addresses]:
            await self._release(handle)

    async def call(self) -> None:
        """Assign and release until told to end."""
        while not self.is_ending:
            mine = [handle for handle, addresses in self._held.items() if addresses]
            if len(mine) > HELD_AT_MOST or (mine and random.random() < 0.4):
                handle = random.choice(mine)
                self._held[handle] = set()
                await self._release(handle)
            else:
                await self._assign(f"net.{self._node}-{next(self._numbers)}")

    async def _assign(self, handle: str) -> None:
        self._write(f"? {handle}")
        attributes = {"node": self._node, "timestamp": str(time.time_ns())}
        try:
            given = await self._allocator.assign(Ask(handle=handle, attributes=attributes, ipv4=1))
        except NoAddress:
            self._write(f"- {handle}")
            return
        self._write(f"+ {handle} {given[0].address}")
        self._held[handle] = {str(given[0].address)}

    async def _release(self, handle: str) -> None:
        self._write(f"? {handle}")
        await self._allocator.release_handle(handle)
        self._write(f"- {handle}")
        del self._held[handle]

    def _write(self, line: str) -> None:
        self._journal.write(line + "\n")


async def main(endpoint: str, node: str, journal: str) -> None:
    """Work until SIGTERM."""
    store = client(endpoint)
    allocator = Allocator(store, node)
    worker = Worker(node, allocator, Path(journal))

    def end() -> None:
        worker.is_ending = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)
    syncer = Syncer(store, allocator.prefixes, allocator.on_updates, allocator.on_in_sync)
    try:
        background = [asyncio.create_task(syncer.run()), asyncio.create_task(allocator.run())]
        await worker.recover()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(CALLERS):
                tasks.create_task(worker.call())
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
    finally:
        await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4]))
