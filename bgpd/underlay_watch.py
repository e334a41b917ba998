"""Keeps the router's knowledge of the underlay: read at the start, and again when it may differ.

    kernel events ─▶ does it concern a next hop in use? ─▶ read all ─▶ Router.on_underlay
                     └─ a device or address went ─▶ Fib.doubt (its routes went along, untold)

Pods come and go by the dozen and each has a route; such events are looked at and forgotten. Where
they do matter, a burst of them is one reading, and reading takes at most a tenth of the time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import structlog

from bgpd.next_hops import Resolver
from cymric.kernel.underlay import OtherRoute, Underlay
from cymric.runtime.pacing import Backoff, Kick

log = structlog.get_logger()

GATHER_S = 0.05
"""What happens to a link is several events; they are waited for."""
READ_EVERY_S = 60.0
"""Read even though nothing was told."""


class UnderlayWatch:
    """`ready` is set once the underlay was read. Without an underlay it is, and nothing is done."""

    def __init__(
        self,
        underlay: Underlay | None,
        resolver: Resolver,
        on_routes: Callable[[Sequence[OtherRoute]], None],
        on_doubt: Callable[[], None] = lambda: None,
    ) -> None:
        self.ready = asyncio.Event()
        self._underlay = underlay
        self._resolver = resolver
        self._on_routes = on_routes
        self._on_doubt = on_doubt
        self._kick = Kick()
        if underlay is None:
            self.ready.set()

    async def run(self) -> None:
        """Follow the underlay, until cancelled."""
        if self._underlay is None:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(self._underlay), name="underlay: listen")
            tasks.create_task(self._read(self._underlay), name="underlay: read")

    async def _listen(self, underlay: Underlay) -> None:
        async for change in underlay.changes():
            if self._resolver.concerns(change):
                if change.prefix is None:
                    self._on_doubt()
                self._kick()

    async def _read(self, underlay: Underlay) -> None:
        loop, backoff = asyncio.get_running_loop(), Backoff(first_s=0.1, most_s=5.0)
        while True:
            started_s = loop.time()
            try:
                self._on_routes(await underlay.read())
            except (OSError, TimeoutError) as error:
                log.warning("underlay not read, will try again", error=repr(error))
                await asyncio.sleep(backoff.next_s())
                continue
            backoff.succeeded()
            self.ready.set()
            await asyncio.sleep(10 * (loop.time() - started_s))
            await self._kick.wait(READ_EVERY_S)
            await asyncio.sleep(GATHER_S)
