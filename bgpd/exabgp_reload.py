"""Keeps the running ExaBGP on the file confd installed: when to reload, and whether it worked.

Place in the flow: confd renames a new file into place ▶ `Reloader` sees it ▶ peers that vanish are
withdrawn from ▶ commands pause and those in flight settle ▶ `reload` ▶ `show neighbor
configuration` must then name exactly the labels of the file's header.

Invariants:

- ExaBGP answers `done` to a reload that fails or is dropped, so only what it says it runs counts.
- A peer is removed after our withdrawals were written to it: under graceful restart it would keep
  our routes for its full restart time.
- Waiting for quiet is bounded: a peer that does not read must not hold back all others.
- A reload without effect is tried again with growing pauses, and at once when the file changes.
- After `RELOADS_BEFORE_RESTART` reloads in a row without effect ExaBGP is told to start anew, under
  graceful restart, but only if it would accept the file: else it would not come back.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import structlog
from prometheus_client import Counter

from bgpd.exabgp_link import Reply
from bgpd.speaker_file import Header, read_header, running_labels
from cymric.runtime.pacing import Backoff

POLL_S = 0.25
QUIET_S = 5.0
LEAVE_S = 5.0
EFFECT_S = 5.0
RELOADS_BEFORE_RESTART = 5
CHECK_S = 30.0
RECHECK_S = 300.0
"""Nothing but a reload changes what runs, and ExaBGP's answer is long: some 60 lines a peer."""

log = structlog.get_logger()

RESTARTS = Counter(
    "cymric_bgp_exabgp_restarts", "Times bgpd had ExaBGP start anew, because reloads had no effect."
)

Ask = Callable[..., Awaitable[Reply]]


class Peers(Protocol):
    """What the reloader needs of the speaker's peers."""

    def leave(self, peers: Iterable[str]) -> None:
        """Withdraw everything from these, and want everything as usual from all others."""
        ...

    def is_settled(self, peers: Iterable[str]) -> bool:
        """Whether nothing more is to be written to these (peers that are down: nothing is)."""
        ...

    def pause(self) -> None:
        """Command nothing new."""
        ...

    def is_quiet(self) -> bool:
        """Whether nothing is in flight to any peer."""
        ...

    def resume(self) -> None:
        """Go on commanding."""
        ...


@dataclass(slots=True)
class ReloadStatus:
    """For people: what the file wants against what runs. Labels by peer."""

    wanted: dict[str, str]
    running: dict[str, str]
    failures: int = 0
    restarts: int = 0

    def __str__(self) -> str:
        if self.wanted == self.running:
            return f"{len(self.running)} sessions, as confd wrote them"
        added = len(self.wanted.keys() - self.running.keys())
        removed = len(self.running.keys() - self.wanted.keys())
        changed = sum(
            label != self.running[peer]
            for peer, label in self.wanted.items()
            if peer in self.running
        )
        return f"reload pending: {added} to add, {removed} to remove, {changed} to change"


class Reloader:
    """Watches the file while one connection to ExaBGP lasts."""

    def __init__(
        self,
        path: Path,
        ask: Ask,
        peers: Peers,
        *,
        restart: Callable[[], None],
        is_accepted: Callable[[Path], Awaitable[bool]],
    ) -> None:
        self._path = path
        self._ask = ask
        self._peers = peers
        self._restart = restart
        self._is_accepted = is_accepted
        self._backoff = Backoff(first_s=0.5, most_s=30.0)
        self.status = ReloadStatus({}, {})

    async def run(self) -> None:
        """Follow the file until cancelled."""
        self.status.running = await self._running()
        seen: tuple[int, ...] = ()
        not_before_s = 0.0
        clock = asyncio.get_running_loop().time
        while True:
            now = fingerprint(self._path)
            if now and (now != seen or clock() >= not_before_s):
                if now != seen:
                    self._backoff.succeeded()
                seen = now
                is_done = await self._follow(read_header(self._path))
                not_before_s = clock() + (RECHECK_S if is_done else self._backoff.next_s())
                self.status.failures = self._backoff.failures
                if self.status.failures >= RELOADS_BEFORE_RESTART:
                    await self._start_anew()
            await asyncio.sleep(POLL_S)

    async def _follow(self, header: Header) -> bool:
        """Make the file's labels run; False if that did not work this time."""
        self.status.wanted = dict(header.label_by_peer)
        self.status.running = await self._running()
        if header.listen is None or self.status.running == self.status.wanted:
            return True
        leaving = self.status.running.keys() - self.status.wanted.keys()
        self._peers.leave(leaving)
        await self._until(lambda: self._peers.is_settled(leaving), LEAVE_S)
        self._peers.pause()
        try:
            if not await self._until(self._peers.is_quiet, QUIET_S):
                log.info("reloading although not quiet: a peer does not read")
            await self._ask("reload", alone=True)
            return await self._verify()
        finally:
            self._peers.resume()
            self._peers.leave(())

    async def _start_anew(self) -> None:
        """Reloading is no use: have a new process read the file, if it can."""
        if not await self._is_accepted(self._path):
            log.error("exabgp refuses the file, so it is not restarted", path=str(self._path))
            return
        log.error(
            "restarting exabgp: reloads have no effect",
            reloads=self.status.failures,
            wanted=self.status.wanted,
            running=self.status.running,
        )
        self.status.restarts += 1
        RESTARTS.inc()
        self._backoff.succeeded()
        self._restart()

    async def _verify(self) -> bool:
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + EFFECT_S
        while True:
            self.status.running = await self._running()
            if self.status.running == self.status.wanted:
                log.info("configuration reloaded", peers=sorted(self.status.running))
                return True
            if clock() > deadline_s:
                log.error(
                    "reload had no effect",
                    wanted=self.status.wanted,
                    running=self.status.running,
                )
                return False
            await asyncio.sleep(POLL_S)

    async def _running(self) -> dict[str, str]:
        reply = await self._ask("show neighbor configuration")
        return running_labels(list(reply.lines))

    async def _until(self, is_true: Callable[[], bool], timeout_s: float) -> bool:
        clock = asyncio.get_running_loop().time
        deadline_s = clock() + timeout_s
        while not is_true():
            if clock() > deadline_s:
                return False
            await asyncio.sleep(0.01)
        return True


async def is_accepted(path: Path) -> bool:
    """Whether ExaBGP, as a process of its own, can read the file."""
    words = ("-m", "exabgp", "validate", "-n", str(path))
    try:
        async with asyncio.timeout(CHECK_S):
            checking = await asyncio.create_subprocess_exec(
                sys.executable,
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
            try:
                return await checking.wait() == 0
            finally:
                if checking.returncode is None:
                    checking.kill()
    except (OSError, TimeoutError):
        return False


def fingerprint(path: Path) -> tuple[int, ...]:
    """Differs when the file does; empty when there is none."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ()
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size)
