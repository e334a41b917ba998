"""One line of the benchmark's table: a figure of ours beside a peer's, from the same run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Medians of both sides in the same unit; less is better. `peer` None: nobody to compare."""

    what: str
    unit: str
    cymric: float
    peer_name: str = ""
    peer: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times the peer's figure ours is; below 1 we are better."""
        return self.cymric / self.peer if self.peer else None

    def __str__(self) -> str:
        if self.peer is None or self.ratio is None:
            return f"{self.what}: {self.cymric:.3g} {self.unit}"
        return (
            f"{self.what}: {self.cymric:.3g} {self.unit}, "
            f"{self.peer_name} {self.peer:.3g} {self.unit}, ratio {self.ratio:.2f}"
        )


def median(values: Sequence[float]) -> float:
    """The median, without a word about how it was spread."""
    return statistics.median(values)
