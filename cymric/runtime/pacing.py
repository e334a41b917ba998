"""When to work: wake-ups that say only that something changed, and pauses after failures."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass


class Kick:
    """A level, not an edge: any number of kicks while nobody looks are one wake-up."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def __call__(self) -> None:
        """Something changed."""
        self._event.set()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the next kick; False if `timeout_s` passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        self._event.clear()
        return True


@dataclass(slots=True)
class Backoff:
    """Pauses that double from `first_s` to `most_s`, each with up to half of itself as jitter."""

    first_s: float = 0.1
    most_s: float = 2.0
    failures: int = 0

    def succeeded(self) -> None:
        """Start again from `first_s`."""
        self.failures = 0

    def next_s(self) -> float:
        """The pause before the next try, in seconds."""
        pause_s: float = min(self.most_s, self.first_s * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return pause_s * random.uniform(0.5, 1.0)
