"""Forgetting the connections of an address that left: they must not reach its next owner.

Deletions run beside everything else; before an address gets a route again, its deletion is waited
for. Best effort: a node without the conntrack program keeps the entries until they time out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from cymric.kernel.command import CommandFailed, Commands
from cymric.model.net import Address

ATTEMPTS = 4
NOTHING_FOUND = "0 flow entries"

log = structlog.get_logger()


class Conntrack:
    """Deletes entries by address; run `forget` inside the task group that owns the data plane."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._running: dict[Address, asyncio.Task[None]] = {}

    def forget(self, tasks: asyncio.TaskGroup, addresses: Iterable[Address]) -> None:
        """Start deleting the connections of `addresses`."""
        for address in addresses:
            if address not in self._running:
                task = tasks.create_task(self._delete(address), name=f"conntrack {address}")
                self._running[address] = task

    async def wait_for(self, addresses: Iterable[Address]) -> None:
        """Wait until no deletion of these addresses is under way."""
        running = [self._running[one] for one in addresses if one in self._running]
        if running:
            await asyncio.wait(running)

    async def _delete(self, address: Address) -> None:
        try:
            await self._delete_both(address)
        finally:
            del self._running[address]

    async def _delete_both(self, address: Address) -> None:
        for direction in ("--orig-src", "--reply-src"):
            argv = (
                "conntrack",
                "--family",
                f"ipv{address.version}",
                "--delete",
                direction,
                str(address),
            )
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    done = await self._commands.run(argv, timeout_s=10.0)
                except CommandFailed as error:
                    log.warning("connections not forgotten", address=str(address), error=str(error))
                    return
                if done.ok or NOTHING_FOUND in done.stderr:
                    break
                if attempt == ATTEMPTS:
                    text = done.stderr.strip()
                    log.warning("connections not forgotten", address=str(address), error=text)
