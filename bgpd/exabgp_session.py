"""One peer: what is known of it, and the task that keeps its Adj-RIB-Out as wanted.

    up ▶ `show adj-rib out` ▶ difference to wanted ▶ End-of-RIB ▶ wait for a kick ▶ difference ...

Invariants:

- Commands go only to a session that is up, and not while a reload is about to happen (`running`).
- What was commanded before the session (by us, or by a bgpd that was killed) is read from ExaBGP,
  never from memory or disk. See docs/design/speaker.md.
- A command that ExaBGP refuses is not repeated at full speed.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from math import inf

import structlog

from bgpd import exabgp_commands
from bgpd import exabgp_events as lines
from bgpd.exabgp_answers import held_prefixes
from bgpd.exabgp_link import Link
from bgpd.exabgp_peer import AdjRibOut, Changes
from bgpd.speaker import PeerProof, PeerStatus, SessionState, SessionUp
from cymric.runtime.pacing import Kick

FENCE_AFTER_S = 15.0
"""How long a change may be in flight before End-of-RIB is sent behind it to settle it."""
REFUSED_PAUSE_S = 1.0
NAMED_PREFIXES = 20
"""How many prefixes are named of those that differ."""

log = structlog.get_logger()


@dataclass(slots=True)
class PeerSession:
    """What is known of one peer, also while its session is down."""

    name: str
    rib: AdjRibOut = field(default_factory=AdjRibOut)
    kick: Kick = field(default_factory=Kick)
    up: SessionUp | None = None
    opened: lines.Open | None = None
    since_s: float = 0.0
    reason: str = ""
    refresh_wanted: bool = False
    task: asyncio.Task[None] | None = None
    held_until_s: float = -inf
    """Monotonic time until which `hold_session` keeps it down."""
    is_ending: bool = False
    """We ended it and said so; ExaBGP's own word that it is down is still to come."""
    repaired: int = 0
    repaired_last: tuple[str, ...] = ()
    checked_s: float = 0.0

    async def serve(self, link: Link, running: asyncio.Event) -> None:
        """Make the session's Adj-RIB-Out what is wanted, for as long as the session is up."""
        await running.wait()
        reply = await link.ask(f"show adj-rib out {self.name}")
        self.rib.learn(held_prefixes(self.name, reply.lines))
        while True:
            await running.wait()
            if self.refresh_wanted:
                self.refresh_wanted = False
                await self._refresh(link)
            if changes := self.rib.take():
                await self._command(link, changes)
            elif self.rib.is_fence_due or not await self._woken():
                await self._fence(link)

    async def _woken(self) -> bool:
        """Wait for something to do; False if changes are in flight for suspiciously long."""
        is_waiting = bool(self.rib.in_flight) and not self.rib.is_fenced
        return await self.kick.wait(FENCE_AFTER_S if is_waiting else None)

    async def _command(self, link: Link, changes: Changes) -> None:
        async def one(command: str, prefixes: tuple[str, ...]) -> None:
            reply = await link.ask(command)
            if not reply.ok and self.up is not None:
                self.rib.unsettle(prefixes)
                await asyncio.sleep(REFUSED_PAUSE_S)
                self.kick()

        async with asyncio.TaskGroup() as commands:
            for command, prefixes in exabgp_commands.withdraw(self.name, changes.withdraw):
                commands.create_task(one(command, prefixes))
            for command, prefixes in exabgp_commands.announce(self.name, changes.announce):
                commands.create_task(one(command, prefixes))

    async def _fence(self, link: Link) -> None:
        for family in sorted(self.rib.fence()):
            await link.ask(exabgp_commands.end_of_rib(self.name, family))

    async def _refresh(self, link: Link) -> None:
        if self.up is None or not self.up.route_refresh:
            log.info("peer cannot refresh its routes", peer=self.name)
            return
        for family in sorted(self.up.families):
            await link.ask(exabgp_commands.route_refresh(self.name, family))

    def on_sent(self, update: lines.Update) -> None:
        """ExaBGP writes this UPDATE to the peer."""
        may_go_on = False
        for prefix in update.withdrawn:
            may_go_on |= self.rib.sent(prefix, None)
        for route in update.announced:
            may_go_on |= self.rib.sent(route.prefix, route)
        if may_go_on or self.rib.is_fence_due:
            self.kick()

    def end(self) -> None:
        """The session is not up any more, whoever found out."""
        self.up = self.opened = None
        self.rib.stop()
        if self.task is not None:
            self.task.cancel()
            self.task = None

    def status(self, *, now_s: float, is_connected: bool) -> PeerStatus:
        """For people. `now_s` is monotonic, as for `held_until_s`."""
        state = SessionState.UP if self.up is not None else SessionState.DOWN
        retry_in_s = max(0.0, self.held_until_s - now_s) or None
        if self.up is None and retry_in_s is not None:
            state = SessionState.HELD
        return PeerStatus(
            peer=self.name,
            state=state if is_connected else SessionState.UNKNOWN,
            since_s=self.since_s,
            reason=self.reason,
            retry_in_s=retry_in_s,
            wanted=len(self.rib.wanted or {}),
            commanded=len(self.rib.held),
            confirmed=self.rib.confirmed,
            end_of_rib_sent=self.rib.end_of_rib_sent,
        )

    def proof(self) -> PeerProof:
        """See `Speaker.proof`."""
        desired, confirmed, pending = (
            len(self.rib.wanted or {}), self.rib.confirmed, self.rib.pending
        )  # fmt: skip
        is_done = confirmed == desired and not pending
        return PeerProof(
            desired=desired,
            confirmed=confirmed,
            pending=pending,
            missing=self.rib.missing,
            unconfirmed=() if is_done else self.rib.unconfirmed(NAMED_PREFIXES),
            repaired_last=self.repaired_last,
            repaired=self.repaired,
            checked_s=self.checked_s,
        )
