"""The last thing before the speaker: what peers are told, given what they should be told.

    Router ─ whole Adj-RIB-Out per peer ─▶ Outgoing ─▶ Speaker.advertise
                                             ▲   ▲
                     felix' mark, or patience     drain (Node annotation, confirmations)

Two things stand between an Adj-RIB-Out and its peer. After a boot nothing is announced before felix
has the data plane up, because traffic that comes earlier would meet a node without policy. And a
node that is being drained says less, and says it differently (`drain`).

Invariants
- While it waits, the speaker is told nothing at all, not an empty set: so nothing is withdrawn that
  an earlier bgpd announced, and no End-of-RIB ends a peer's patience with our restart (RFC 4724).
- Once open, it stays open: felix may stop, its data plane stays.
- What was wanted last is kept by reference, in which the router follows changes, and told again
  whenever the drain's phase changes. Without a drain a change costs what changed, not the whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from bgpd.announcement import Announcement
from bgpd.drain import Drain, Role, Wish, advance, described, drained, is_told, resumed
from cymric.runtime.boot_mark import is_marked
from cymric.runtime.settings import Settings

log = structlog.get_logger()

LOOK_EVERY_S = 0.2
FOLLOW_EVERY_S = 0.5

Routes = Mapping[str, Announcement]
Changes = Mapping[str, Announcement | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What the drain looks at: the wish, or why it cannot be read, and (wanted, confirmed) of each
    peer whose session is up. `stored` is how far a drain was when it was last written down.
    """

    wish: Wish
    told_by_peer: Mapping[str, tuple[int, int]]
    complaint: str = ""
    stored: str = ""


class Outgoing:
    """Between the router and the speaker. `role` and `is_empty` are asked about prefixes."""

    def __init__(
        self,
        advertise: Callable[[str, Routes], None],
        *,
        advertise_changes: Callable[[str, Changes], None] | None = None,
        role: Callable[[str], Role] = lambda _: Role.BLOCK,
        is_empty: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.drain = Drain()
        self.complaint = ""
        self.is_open = False
        self.waits_for = ""
        self._advertise = advertise
        self._advertise_changes = advertise_changes
        self._role = role
        self._is_empty = is_empty
        self._wanted: dict[str, Routes] = {}
        self._told: dict[str, Routes] = {}

    def want(self, peer: str, routes: Routes) -> None:
        """The newest whole Adj-RIB-Out of a peer, as if there were no drain."""
        self._wanted[peer] = routes
        self._told.pop(peer, None)  # told again even if equal: whoever asks knows why
        self._tell(peer)

    def want_changes(self, peer: str, routes: Routes, changes: Changes) -> None:
        """What differs in `routes`, which is the mapping of the last `want`, changed in place."""
        told = self._told.get(peer)
        if self._advertise_changes is None or told is None or self._wanted.get(peer) is not routes:
            self.want(peer, routes)
        elif told is routes:  # no drain: what is told is what is wanted
            self._advertise_changes(peer, changes)
        else:
            self._told[peer] = self._drained(peer)
            left = {p: self._told[peer].get(p) for p in changes}
            self._advertise_changes(peer, left)

    def keep(self, peers: Mapping[str, object]) -> None:
        """Forget peers that are gone."""
        for known in (self._wanted, self._told):
            for peer in known.keys() - peers.keys():
                del known[peer]

    def told(self, peer: str) -> Routes:
        """What the speaker was last given for a peer."""
        return self._told.get(peer, {})

    def open(self) -> None:
        """Announce from now on, beginning with what was wanted meanwhile."""
        self.is_open, self.waits_for = True, ""
        for peer in self._wanted:
            self._tell(peer)

    async def run(
        self,
        settings: Settings,
        sight: Callable[[], Sight],
        on_phase: Callable[[Drain], None] = lambda _: None,
    ) -> None:
        """Wait for felix, open, and keep the drain in step with its wish, until cancelled.

        `on_phase` hears of each change of the drain.
        """
        await self._wait_for_felix(settings)
        loop = asyncio.get_running_loop()
        # Before the first word: a node that came back while it is drained attracts no traffic.
        seen = sight()
        self.drain = resumed(seen.wish, seen.stored, now_s=loop.time())
        if described(self.drain.wish, self.drain.phase) != seen.stored:
            on_phase(self.drain)
        self.open()
        while True:
            self.step(sight(), loop.time(), on_phase)
            await asyncio.sleep(FOLLOW_EVERY_S)

    async def _wait_for_felix(self, settings: Settings) -> None:
        """Until felix has marked its data plane as up, or patience ends."""
        patience_s = settings.announce_wait_s
        loop = asyncio.get_running_loop()
        until_s = loop.time() + patience_s
        self.waits_for = "felix, whose data plane is not up yet"
        is_up = is_marked(settings.felix_mark)
        while not is_up and loop.time() < until_s:
            await asyncio.sleep(LOOK_EVERY_S)
            is_up = is_marked(settings.felix_mark)
        if is_up or not patience_s:
            log.info("announcing", felix_is_up=is_up)
        else:
            log.warning("announcing although felix has no data plane yet", waited_s=patience_s)

    def step(
        self, seen: Sight, now_s: float, on_phase: Callable[[Drain], None] = lambda _: None
    ) -> None:
        """One look."""
        if seen.complaint != self.complaint:
            self.complaint = seen.complaint
            if seen.complaint:
                log.warning("the wish to drain is not understood", reason=seen.complaint)
        told = is_told(seen.told_by_peer, up=seen.told_by_peer)
        before, self.drain = self.drain, advance(self.drain, seen.wish, is_told=told, now_s=now_s)
        if self.drain.phase is not before.phase or self.drain.wish is not before.wish:
            log.info("drain", wish=self.drain.wish.value, phase=self.drain.phase.value)
            on_phase(self.drain)
        if self.drain.is_active or before.is_active:
            for peer in self._wanted:  # also because a block may have become empty
                self._tell(peer)

    def _tell(self, peer: str) -> None:
        if not self.is_open:
            return
        routes = self._drained(peer)
        if self._told.get(peer) != routes:
            self._told[peer] = routes
            self._advertise(peer, routes)

    def _drained(self, peer: str) -> Routes:
        return drained(self._wanted[peer], self._role, self.drain, is_empty=self._is_empty)

    @property
    def state(self) -> Mapping[str, str]:
        """For people: wish, phase, and what stands in the way."""
        return {
            "wish": self.drain.wish.value,
            "phase": self.drain.phase.value,
            "complaint": self.complaint,
            "waits_for": self.waits_for,
        }
