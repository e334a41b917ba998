"""Forgetting the connections of an address that left: they must not reach its next owner.

Deletions run beside everything else; before an address gets a route again, its deletion is waited
for. The kernel does it on one message each way (`cymric.kernel.conntrack`); where it is too old for
that, the conntrack program lists and deletes, at some ten milliseconds an address. Best effort: a
node that has neither keeps the entries until they time out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import structlog

from cymric.kernel.command import CommandFailed, Commands
from cymric.kernel.conntrack import Connections, Unsupported
from cymric.kernel.links import KernelError
from cymric.model.net import Address

ATTEMPTS = 4
NOTHING_FOUND = "0 flow entries"

log = structlog.get_logger()


class Conntrack:
    """Deletes entries by address; run `forget` inside the task group that owns the data plane.

    `connections` None: there is only the program.
    """

    def __init__(self, commands: Commands, connections: Connections | None = None) -> None:
        self._commands = commands
        self._connections = connections
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
            if not self._is_forgotten(address):
                await self._delete_both(address)
        finally:
            del self._running[address]

    def _is_forgotten(self, address: Address) -> bool:
        """Whether the kernel could be asked itself, well or in vain."""
        if self._connections is None:
            return False
        try:
            self._connections.forget([address])
        except Unsupported as error:
            log.info("connections are forgotten by program", why=str(error))
            self._connections = None
            return False
        except KernelError as error:
            log.warning("connections not forgotten", address=str(address), error=str(error))
        return True

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
