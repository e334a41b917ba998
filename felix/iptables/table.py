"""One table of the kernel kept as wanted: read, compare, write the difference, check again later.

`want` states the whole content, `apply` writes the difference against what is known to be there,
`check` reads the table and repairs what others broke. Reading costs more than writing, so a fresh
`apply` trusts what was read or written before; checks come after writes (5 s, doubling while
nothing is written) and every refresh interval.

Invariants: nothing is written when nothing differs, also after a restart; a failed write is
followed by a read; after `ATTEMPTS` failures TableFailed is raised, for the process to start anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from cymric.kernel.command import DEFAULT_TIMEOUT_S, CommandFailed, Commands
from felix import metrics
from felix.iptables.backend import Backend
from felix.iptables.plan import RenderedTable, plan, render_again
from felix.iptables.saved import SavedTable, Unreadable, is_our_chain, parse
from felix.rules.rule import TableContent

ATTEMPTS = 10
FIRST_PAUSE_S = 0.001
LONGEST_CHECK_INTERVAL_S = 3600.0
MOST_S_PER_LINE = 0.005
"""Slower than that, added to what any program may take, a restore counts as stuck."""

log = structlog.get_logger()


class TableFailed(Exception):
    """A table could not be written, however often it was read anew."""


@dataclass(frozen=True, slots=True)
class CheckIntervals:
    """When to look again, in seconds; 0 means never."""

    refresh_s: float = 180.0
    post_write_s: float = 5.0


class Table:
    """See the chapter. `clock` gives monotonic seconds."""

    def __init__(
        self,
        name: str,
        backend: Backend,
        commands: Commands,
        *,
        clock: Callable[[], float],
        intervals: CheckIntervals | None = None,
    ) -> None:
        self.name = name
        self._backend = backend
        self._commands = commands
        self._clock = clock
        self._intervals = intervals or CheckIntervals()
        self._content = TableContent(name)
        self._wanted = RenderedTable(name)
        self._actual: SavedTable | None = None
        self._is_settled = False
        self._doubts = 0
        self._is_doubted = False
        self._read_at_s = clock()
        self._post_write_check_s = 0.0

    def want(self, content: TableContent) -> None:
        """State the whole wanted content; chains that are the same objects cost next to nothing."""
        if content is self._content:
            return
        self._wanted = render_again(content, self._content, self._wanted)
        self._content, self._is_settled = content, False
        chains = self._wanted.chains
        rules = sum(len(chain.hashes) for chain in chains.values())
        hooks = sum(len(hook.hashes) for hook in self._wanted.hooks.values())
        metrics.TABLE_CHAINS.labels(self._version, self.name).set(len(chains))
        metrics.TABLE_RULES.labels(self._version, self.name).set(rules + hooks)

    @property
    def _labels(self) -> dict[str, str]:
        return {"table": self.name, "ip_version": self._version}

    @property
    def _version(self) -> str:
        return str(self._backend.ip_version)

    @property
    def is_pending(self) -> bool:
        """Whether `apply` has something to do."""
        return not self._is_settled

    @property
    def check_due_s(self) -> float:
        """When, on the clock, `check` should be called next."""
        due = [
            self._read_at_s + interval
            for interval in (self._intervals.refresh_s, self._post_write_check_s)
            if interval
        ]
        return min(due, default=float("inf"))

    def concerns(self, chain: str) -> bool:
        """Whether what happens in `chain` (empty: in the whole table) can concern us."""
        return not chain or chain in self._wanted.hooks or is_our_chain(chain)

    def doubt(self) -> None:
        """Somebody else changed the table: the next `apply` reads it anew."""
        self._doubts += 1
        self._actual, self._is_settled, self._is_doubted = None, False, True

    async def apply(self) -> bool:
        """Make the table as wanted; whether anything was written. Raises TableFailed."""
        if self._is_settled:
            return False
        doubts, was_doubted = self._doubts, self._is_doubted
        pause_s, problem = FIRST_PAUSE_S, ""
        for attempt in range(ATTEMPTS):
            if attempt:
                await asyncio.sleep(pause_s)
                pause_s *= 2
            # Until the answer is in, what the kernel has is not known (cancellation, errors).
            actual, self._actual = self._actual, None
            try:
                if actual is None:
                    actual = await self._read()
                step = plan(actual, self._wanted)
                if step.lines:
                    await self._write(step.text(self.name), len(step.lines))
            except (CommandFailed, Unreadable) as error:
                problem = str(error)
                log.warning("table not written, reading it anew", **self._labels, error=problem)
                continue
            if self._doubts == doubts:  # nobody meddled meanwhile
                self._actual, self._is_settled, self._is_doubted = step.after, True, False
            if step.lines and was_doubted:
                log.warning("table was changed by somebody else, repaired", **self._labels)
                metrics.REPAIRS.inc()
            if step.lines:
                self._read_at_s = self._clock()
                self._post_write_check_s = self._intervals.post_write_s
            return bool(step.lines)
        raise TableFailed(f"IPv{self._version} table {self.name}: {problem}")

    async def check(self) -> bool:
        """Read the table and repair it; whether that was needed. Raises TableFailed."""
        self._actual, self._is_settled = None, False
        was_repaired = await self.apply()
        if was_repaired:
            log.warning("table was not as left, repaired", **self._labels)
        else:
            self._read_at_s = self._clock()
            doubled = 2 * self._post_write_check_s
            self._post_write_check_s = doubled if doubled < LONGEST_CHECK_INTERVAL_S else 0.0
        return was_repaired

    async def _read(self) -> SavedTable:
        metrics.SAVES.inc()
        try:
            done = (await self._commands.run(self._backend.save(self.name))).checked()
        except CommandFailed:
            metrics.SAVE_ERRORS.inc()
            raise
        return parse(done.stdout).get(self.name, SavedTable())

    async def _write(self, text: str, lines: int) -> None:
        metrics.RESTORES.inc()
        metrics.TABLE_LINES.labels(self._version, self.name).inc(lines)
        try:
            within_s = DEFAULT_TIMEOUT_S + lines * MOST_S_PER_LINE
            await self._commands.feed(self._backend.restore(), text, timeout_s=within_s)
        except CommandFailed:
            metrics.RESTORE_ERRORS.inc()
            log.debug("refused transaction", **self._labels, text=text)
            raise
