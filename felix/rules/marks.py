"""Packet mark bits, taken lowest first from the configured mask (Calico 3.32, felix/rules)."""

from __future__ import annotations

from dataclasses import dataclass

BITS_NEEDED = 5


@dataclass(frozen=True, slots=True)
class Marks:
    """What each bit says about a packet while it crosses our chains."""

    accept: int
    passed: int
    drop: int
    scratch0: int
    scratch1: int

    @property
    def all_but_accept(self) -> int:
        """What is cleared where an earlier verdict must survive (the drop bit never is)."""
        return self.passed | self.scratch0 | self.scratch1

    @property
    def all(self) -> int:
        """What is cleared where a packet starts anew."""
        return self.accept | self.all_but_accept


def allocate(mask: int) -> Marks:
    """The bits inside `mask`. Raises ValueError if it holds fewer than five."""
    bits = [1 << position for position in range(32) if mask & (1 << position)]
    if len(bits) < BITS_NEEDED:
        raise ValueError(f"mark mask {mask:#x} has fewer than {BITS_NEEDED} bits")
    return Marks(*bits[:BITS_NEEDED])
