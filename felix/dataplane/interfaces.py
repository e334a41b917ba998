"""The node's interfaces as the kernel reports them, and since when each has been known.

The monitor subscribes, lists everything, then follows events; when the kernel drops events it does
so again. Whoever is told looks the interface up here: only the latest state is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from cymric.kernel.links import EventsLost, Link, Links

OnChange = Callable[[str, Link | None, Link | None], None]
"""Called with the name, the link as it was and as it is; None where there is none."""

log = structlog.get_logger()


def _ignore(name: str, before: Link | None, link: Link | None) -> None:
    """Nobody listens yet."""


class Interfaces:
    """See the chapter. `clock` gives monotonic seconds."""

    def __init__(self, links: Links, *, clock: Callable[[], float]) -> None:
        self._links = links
        self._on_change: OnChange = _ignore
        self._clock = clock
        self._by_index: dict[int, Link] = {}
        self._by_name: dict[str, Link] = {}
        self._first_seen_s: dict[int, float] = {}

    def get(self, name: str) -> Link | None:
        """The interface of that name now."""
        return self._by_name.get(name)

    def name(self, index: int) -> str:
        """The name of the interface of that index now; empty if there is none."""
        link = self._by_index.get(index)
        return link.name if link else ""

    def all(self) -> tuple[Link, ...]:
        """Every interface."""
        return tuple(self._by_index.values())

    def age_s(self, name: str) -> float:
        """How long an interface has been known; 0 for one that is not there."""
        link = self._by_name.get(name)
        return self._clock() - self._first_seen_s[link.index] if link else 0.0

    def tell(self, on_change: OnChange) -> None:
        """Call `on_change` from now on."""
        self._on_change = on_change

    async def read(self) -> None:
        """List everything now."""
        listed = {link.index: link for link in await self._links.all()}
        for index in self._by_index.keys() - listed.keys():
            self._update(index, None)
        for index, link in listed.items():
            self._update(index, link)

    async def follow(self) -> None:
        """Follow changes until cancelled."""
        while True:
            changes = await self._links.watch()
            try:
                await self.read()
                async for change in changes:
                    self._update(change.index, change.link)
            except EventsLost:
                log.warning("link events were lost, listing again")
            finally:
                await changes.aclose()

    def _update(self, index: int, link: Link | None) -> None:
        before = self._by_index.get(index)
        if before == link:
            return
        if before is not None and self._by_name.get(before.name) is before:
            del self._by_name[before.name]
        if link is None:
            self._by_index.pop(index, None)
            self._first_seen_s.pop(index, None)
        else:
            self._by_index[index] = self._by_name[link.name] = link
            self._first_seen_s.setdefault(index, self._clock())
        if before is not None and link is not None and before.name == link.name:
            self._on_change(link.name, before, link)
            return
        if before is not None:
            self._on_change(before.name, before, None)
        if link is not None:
            self._on_change(link.name, None, link)
