"""IPAM values as stored: allocation block, block affinity, handle, configuration.

Source: Calico's etcdv3 data model, `/calico/ipam/v2/`. Field order and which fields may be left
out follow what Calico 3.32 writes, so that values survive a round trip byte for byte; values of
older releases (null handle ids, no claim time) are read as well. Changes to blocks are in
`ipam.block`; here is only what a block says.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from functools import cached_property
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from cymric.model.net import Address, Network, parse_network

HOST_AFFINITY = "host:"
LOAD_BALANCER_AFFINITY = "virtual:load-balancer"
WINDOWS_RESERVED_HANDLE = "windows-reserved-ipam-handle"


class AffinityState(StrEnum):
    """Where a claim stands. EMPTY is the legacy spelling of CONFIRMED."""

    CONFIRMED = "confirmed"
    PENDING = "pending"
    PENDING_DELETION = "pendingDeletion"
    EMPTY = ""


class AllocationAttribute(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds one or more addresses of a block. `secondary` has node, pod, namespace, type …"""

    handle_id: str | UnsetType | None = UNSET
    secondary: dict[str, str] | UnsetType | None = UNSET
    alternateOwnerAttrs: dict[str, Any] | UnsetType | None = UNSET  # noqa: N815

    @property
    def handle(self) -> str | None:
        """The handle id, cut at the first carriage return as Calico does; None if there is none."""
        return self.handle_id.split("\r", 1)[0] if isinstance(self.handle_id, str) else None

    @property
    def attributes(self) -> dict[str, str]:
        """The secondary attributes, empty when none were stored."""
        return self.secondary if isinstance(self.secondary, dict) else {}


class AllocationBlock(msgspec.Struct, frozen=True, kw_only=True, rename="camel", dict=True):
    """One block: who owns it, which ordinal is held under which attribute record, what is free.

    `allocations[ordinal]` is an index in `attributes` or None; `unallocated` lists the free
    ordinals in the order they will be handed out.
    """

    cidr: str
    affinity: str | None = None
    affinity_claim_time: str | UnsetType = msgspec.field(default=UNSET, name="affinity_claim_time")
    allocations: tuple[int | None, ...]
    unallocated: tuple[int, ...]
    attributes: tuple[AllocationAttribute, ...] | None = None
    sequence_number: int = 0
    sequence_number_for_allocation: dict[str, int] | None = msgspec.field(default_factory=dict)
    deleted: bool = False
    host_affinity: str | UnsetType = UNSET

    def __post_init__(self) -> None:
        size = self.network.num_addresses
        if len(self.allocations) != size:
            raise ValueError(
                f"block {self.cidr} has {len(self.allocations)} allocations, not {size}"
            )
        records = len(self.attributes or ())
        if any(index is not None and not 0 <= index < records for index in self.allocations):
            raise ValueError(f"block {self.cidr} has an allocation without attribute record")
        free = set(self.unallocated)
        if len(free) != len(self.unallocated) or any(not 0 <= n < size for n in free):
            raise ValueError(f"block {self.cidr} lists a free ordinal twice or out of range")
        if any((index is None) != (n in free) for n, index in enumerate(self.allocations)):
            raise ValueError(f"block {self.cidr} has an ordinal both free and held, or neither")

    @cached_property
    def network(self) -> Network:
        """The block's prefix."""
        return parse_network(self.cidr)

    @property
    def owner_host(self) -> str | None:
        """The node that owns the block; None if nobody or a virtual owner does."""
        if self.affinity is None or not self.affinity.startswith(HOST_AFFINITY):
            return None
        return self.affinity[len(HOST_AFFINITY) :]

    @property
    def is_empty(self) -> bool:
        """Whether nobody holds an address, Windows' own reservations aside."""
        return all(
            (holder := self.holder_of(ordinal)) is None or holder.handle == WINDOWS_RESERVED_HANDLE
            for ordinal in range(len(self.allocations))
        )

    def address(self, ordinal: int) -> Address:
        """The address at `ordinal`."""
        return self.network[ordinal]

    def ordinal(self, address: Address) -> int:
        """The ordinal of `address`. Raises ValueError if it lies outside."""
        if address not in self.network:
            raise ValueError(f"{address} is not in block {self.cidr}")
        return int(address) - int(self.network.network_address)

    def holder_of(self, ordinal: int) -> AllocationAttribute | None:
        """The record of whoever holds `ordinal`; None if it is free."""
        index = self.allocations[ordinal]
        return None if index is None or self.attributes is None else self.attributes[index]

    def held(self) -> Iterator[tuple[int, AllocationAttribute]]:
        """Every held ordinal with its record."""
        for ordinal in range(len(self.allocations)):
            holder = self.holder_of(ordinal)
            if holder is not None:
                yield ordinal, holder


class BlockAffinity(msgspec.Struct, frozen=True, kw_only=True):
    """A host's claim on the block that the key names."""

    state: AffinityState = AffinityState.EMPTY
    deleted: bool = False

    @property
    def is_confirmed(self) -> bool:
        """Whether the claim is settled: confirmed, or the legacy empty state."""
        return self.state in (AffinityState.CONFIRMED, AffinityState.EMPTY)


class AllocationHandle(msgspec.Struct, frozen=True, kw_only=True):
    """How many addresses a handle holds in each block: `{"10.0.0.0/26": 1}`."""

    block: dict[str, int] = msgspec.field(default_factory=dict)
    deleted: bool = False


class IPAMConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Cluster-wide IPAM settings. As stored, an absent `auto_allocate_blocks` means False."""

    strict_affinity: bool = False
    auto_allocate_blocks: bool = False
    maxBlocksPerHost: int = 0  # noqa: N815
    kubeVirtVMAddressPersistence: str = ""  # noqa: N815

    def problem(self) -> str | None:
        """Why this must not be written, or None. Stored values are read as they are."""
        if not self.strict_affinity and not self.auto_allocate_blocks:
            return "strict_affinity and auto_allocate_blocks cannot both be false"
        if self.maxBlocksPerHost < 0:
            return "maxBlocksPerHost cannot be negative"
        if self.maxBlocksPerHost > 0 and not self.strict_affinity:
            return "maxBlocksPerHost needs strict_affinity"
        return None


DEFAULT_IPAM_CONFIG = IPAMConfig(auto_allocate_blocks=True, kubeVirtVMAddressPersistence="Enabled")
"""What a reader creates when the key is missing (Calico 3.32)."""
