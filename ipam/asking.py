"""What is asked of IPAM and what it answers: values only.

An `Ask` is one container's wish: how many addresses of each family, or which very ones. It is
granted as a whole or refused as a whole. Everything that is stored with an address is in
`attributes`; the `handle` is the name under which all of it is released again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cymric.model.net import Address, Network

USE_WORKLOAD = "Workload"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Addresses for `handle`: `ipv4` and `ipv6` of any kind, and `addresses` by name.

    `handle` must not contain a slash. `attributes` are stored beside it (node, pod, namespace,
    timestamp). `ipv4_pools` and `ipv6_pools` are CIDRs or names of pools; none means by selectors.
    `namespace_labels` None means that there is no namespace object. `max_blocks` 0 means the
    cluster's limit. Explicit addresses need an enabled pool around them and nothing else.
    """

    handle: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    ipv4: int = 0
    ipv6: int = 0
    ipv4_pools: tuple[str, ...] = ()
    ipv6_pools: tuple[str, ...] = ()
    addresses: tuple[Address, ...] = ()
    namespace_labels: Mapping[str, str] | None = None
    use: str = USE_WORKLOAD
    max_blocks: int = 0

    def __post_init__(self) -> None:
        if min(self.ipv4, self.ipv6, self.max_blocks) < 0:
            raise ValueError("a number of addresses or blocks cannot be negative")
        if not (self.ipv4 or self.ipv6 or self.addresses):
            raise ValueError("nothing is asked for")
        if not self.handle or "/" in self.handle:
            raise ValueError(f"handle {self.handle!r} is empty or contains a slash")

    def count(self, version: int) -> int:
        """How many addresses of that family are wanted, whichever."""
        return self.ipv4 if version == 4 else self.ipv6

    def pools(self, version: int) -> tuple[str, ...]:
        """The pools that were asked for, of that family."""
        return self.ipv4_pools if version == 4 else self.ipv6_pools


@dataclass(frozen=True, slots=True)
class Assignment:
    """An address and the block it is from. `is_borrowed` when another node owns that block."""

    address: Address
    block: Network
    is_borrowed: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """An address to free; a `handle` or `sequence_number` given must still be what is stored."""

    address: Address
    handle: str | None = None
    sequence_number: int | None = None
