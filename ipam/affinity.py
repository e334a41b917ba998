"""Claiming and releasing blocks: which node owns which.

A claim is one transaction: block and affinity are created together, the affinity already
confirmed, if neither exists. So there is never one without the other, and of two nodes that race
for a block exactly one wins. The states that Calico leaves on its way (an affinity that is pending
or pendingDeletion, one whose block is gone or belongs to another) are read and put in order as
Calico would; the block names its owner, the affinity key only follows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from enum import StrEnum

from cymric.datastore.api import Datastore, Operation
from cymric.model.ipam import HOST_AFFINITY, AffinityState, AllocationBlock, BlockAffinity
from cymric.model.keys import AffinityKey, BlockKey
from cymric.model.net import Network
from ipam import block as blocks
from ipam.storage import View, delete, land, put

CONFIRMED = BlockAffinity(state=AffinityState.CONFIRMED)

Clock = Callable[[], int]
"""Nanoseconds since 1970."""


class Released(StrEnum):
    """What became of a wish to release an affinity."""

    DELETED = "the block was empty and is gone"
    ORPHANED = "the block has no owner any more, its addresses stay"
    NOT_EMPTY = "the block is in use and stays ours"
    CHANGED = "the block changed since it was looked at"
    NOT_OURS = "the block is missing or belongs to another"


async def claim(
    store: Datastore, host: str, network: Network, *, clock: Clock = time.time_ns
) -> AllocationBlock | None:
    """The block as `host`'s own, ready for use; None if it belongs to another or to nobody.

    Creates it if it does not exist, repairs an unsettled affinity, removes a stale one. Raises
    Contended, Malformed.
    """
    keys = (BlockKey(network), AffinityKey(host, network))
    return await land(store, keys, lambda view: claimed(view, host, network, clock()))


def claimed(
    view: View, host: str, network: Network, now_ns: int
) -> tuple[AllocationBlock | None, list[Operation]]:
    """The block as `host`'s own, and the writes that make it so; pure.

    None if it belongs to another or to nobody. The view holds the block's key and the affinity's.
    """
    block_key, affinity_key = BlockKey(network), AffinityKey(host, network)
    found = view.get(block_key, AllocationBlock)
    if found is None:
        fresh = blocks.new_block(
            network,
            affinity=HOST_AFFINITY + host,
            claimed_at=rfc3339(now_ns),
            sequence_number=now_ns,
        )
        return fresh, [put(block_key, fresh), put(affinity_key, CONFIRMED)]
    if found.affinity != HOST_AFFINITY + host:
        return None, [delete(affinity_key)] if view.has(affinity_key) else []
    affinity = view.get(affinity_key, BlockAffinity)
    if affinity is not None and affinity.is_confirmed:
        return found, []
    # Writing the block as well makes a releaser that is half way fail.
    touched = blocks.touch(found)
    return touched, [put(block_key, touched), put(affinity_key, CONFIRMED)]


async def release(
    store: Datastore,
    host: str,
    network: Network,
    *,
    require_empty: bool = True,
    sequence_number: int | None = None,
) -> Released:
    """Give up `host`'s claim on a block, in one transaction; an empty block goes with it.

    With `sequence_number` only if the block was not written since.
    """
    block_key, affinity_key = BlockKey(network), AffinityKey(host, network)

    def change(view: View) -> tuple[Released, Sequence[Operation]]:
        found = view.get(block_key, AllocationBlock)
        drop_affinity = [delete(affinity_key)] if view.has(affinity_key) else []
        if found is None or found.affinity != HOST_AFFINITY + host:
            return Released.NOT_OURS, drop_affinity
        if sequence_number is not None and found.sequence_number != sequence_number:
            return Released.CHANGED, []
        if found.is_empty:
            return Released.DELETED, [*drop_affinity, delete(block_key)]
        if require_empty:
            return Released.NOT_EMPTY, []
        return Released.ORPHANED, [*drop_affinity, put(block_key, blocks.disown(found))]

    return await land(store, (block_key, affinity_key), change)


def rfc3339(now_ns: int) -> str:
    """RFC 3339 UTC text of a moment, to the second."""
    return datetime.fromtimestamp(now_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def go_time(now_ns: int) -> str:
    """A moment as Go prints it, which is how Calico stores an allocation's time."""
    seconds, nanoseconds = divmod(now_ns, 1_000_000_000)
    fraction = f".{nanoseconds:09d}".rstrip("0").rstrip(".")
    return datetime.fromtimestamp(seconds, UTC).strftime(f"%Y-%m-%d %H:%M:%S{fraction} +0000 UTC")
