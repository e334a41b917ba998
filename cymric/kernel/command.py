"""Programs of the host, run with text on stdin and bounded in time; the same in memory.

Used by the iptables and ipset drivers and by delegated CNI plugins. A program that does not end in
its time is killed and reported; nothing here retries. Invariant: when `run` returns or raises (also
when cancelled), no child of it is left. `feed` is for a program that takes one piece of input after
another; it stays until `close` (feeder.py).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from cymric.kernel.feeder import Feeder, FeedFailed

DEFAULT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended: exit code (negative: killed by that signal) and what it printed."""

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str

    @property
    def ok(self) -> bool:
        """Whether the exit code is 0."""
        return self.code == 0

    def checked(self) -> Finished:
        """Itself. Raises CommandFailed unless the exit code is 0."""
        if not self.ok:
            raise CommandFailed(self.argv, f"exit code {self.code}: {self.stderr.strip()[-2000:]}")
        return self


class CommandFailed(Exception):
    """A program was missing, failed or took too long; the message says which and how."""

    def __init__(self, argv: Sequence[str], reason: str) -> None:
        super().__init__(f"{' '.join(argv)}: {reason}")
        self.argv = tuple(argv)
        self.reason = reason


class Commands(Protocol):
    """Runs programs."""

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        env: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run `argv` with `stdin` until it ends; `env` replaces the environment if given.

        Raises CommandFailed if it cannot be started or does not end within `timeout_s`; a non-zero
        exit code is an answer, not an error (see `Finished.checked`).
        """
        ...

    async def feed(
        self, argv: Sequence[str], text: str, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """Have `argv` work on `text` as its next input; it may be kept running for more.

        Returns when it was worked on. Raises CommandFailed if the program refuses it (then it ends,
        and the next piece meets a new one), cannot be started or takes too long.
        """
        ...


class HostCommands:
    """The real programs, in the process's own namespaces."""

    def __init__(self) -> None:
        self._feeders: dict[tuple[str, ...], Feeder] = {}

    def has_fed(self, pid: int) -> bool:
        """Whether that process was fed lately."""
        return any(pid in feeder.recent_pids for feeder in self._feeders.values())

    def close(self) -> None:
        """Let the programs that were fed end."""
        for feeder in self._feeders.values():
            feeder.close()
        self._feeders.clear()

    async def feed(
        self, argv: Sequence[str], text: str, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """See Commands.feed."""
        feeder = self._feeders.setdefault(tuple(argv), Feeder(argv))
        try:
            await feeder.feed(text, timeout_s)
        except FeedFailed as error:
            raise CommandFailed(argv, str(error)) from None

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        env: Mapping[str, str] | None = None,
    ) -> Finished:
        """See Commands.run."""
        try:
            process = await asyncio.create_subprocess_exec(
                *argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                # C locale: messages are matched by their text.
                env={**(os.environ if env is None else env), "LC_ALL": "C"},
            )
        except OSError as error:
            raise CommandFailed(argv, f"cannot be started: {error}") from error
        try:
            async with asyncio.timeout(timeout_s):
                stdout, stderr = await process.communicate(stdin.encode())
        except TimeoutError:
            raise CommandFailed(argv, f"did not end within {timeout_s} s") from None
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
                await asyncio.shield(process.wait())
        assert process.returncode is not None
        return Finished(
            tuple(argv),
            process.returncode,
            stdout.decode(errors="replace"),
            stderr.decode(errors="replace"),
        )


@dataclass(frozen=True, slots=True)
class Call:
    """One run as the fake saw it."""

    argv: tuple[str, ...]
    stdin: str


Program = Callable[[Sequence[str], str], Finished]
"""A program in memory: arguments and stdin to its end."""


class FakeCommands:
    """Programs in memory by name (the last part of `argv[0]`); an unknown one cannot be started."""

    def __init__(self, programs: Mapping[str, Program]) -> None:
        self._programs = dict(programs)
        self.calls: list[Call] = []

    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        env: Mapping[str, str] | None = None,
    ) -> Finished:
        """See Commands.run; ends at once, so the time limit never bites."""
        self.calls.append(Call(tuple(argv), stdin))
        program = self._programs.get(argv[0].rpartition("/")[2])
        if program is None:
            raise CommandFailed(argv, "cannot be started: no such program")
        await asyncio.sleep(0)
        return program(argv, stdin)

    async def feed(
        self, argv: Sequence[str], text: str, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        """See Commands.feed; the program in memory meets each piece anew."""
        (await self.run(argv, stdin=text)).checked()
