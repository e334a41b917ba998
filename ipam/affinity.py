"""Claiming and releasing blocks: which node owns which, alone and in bulk.

A claim is one transaction: block and affinity are created together, the affinity already
confirmed, if neither exists. So there is never one without the other, and of two nodes that race
for a block exactly one wins. The states that Calico leaves on its way (an affinity that is pending
or pendingDeletion, one whose block is gone or belongs to another) are read and put in order as
Calico would; the block names its owner, the affinity key only follows.
"""

from __future__ import annotations

import time
from enum import StrEnum

import structlog

from cymric.datastore.api import Datastore, delete
from cymric.model import keys
from cymric.model.ipam import HOST_AFFINITY, AllocationBlock
from cymric.model.keys import AffinityKey, BlockKey
from cymric.model.net import Network, contains
from ipam.commit import land_one
from ipam.drafts import Drafts
from ipam.facts import Facts
from ipam.mirror import FAMILIES, key_of
from ipam.moments import Clock, go_time, rfc3339
from ipam.storage import list_values

__all__ = ["Released", "claim", "go_time", "release", "remove_host", "rfc3339"]

log = structlog.get_logger()


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

    Creates it if it does not exist, repairs an unsettled affinity, removes a stale one. None also
    when it would overlap another block. Raises Contended.
    """

    def change(drafts: Drafts) -> AllocationBlock | None:
        draft = drafts.own(network) if drafts.exists(network) else drafts.claim(network)
        if draft is None:
            return None
        drafts.confirm(network, draft)
        return draft.finish()

    return await land_one(store, change, facts=Facts(node=host), clock=clock)


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

    def change(drafts: Drafts) -> Released:
        return released(drafts, host, network, require_empty, sequence_number)

    return await land_one(store, change, facts=Facts(node=""), clock=time.time_ns)


def released(
    drafts: Drafts,
    host: str,
    network: Network,
    require_empty: bool = True,
    sequence_number: int | None = None,
) -> Released:
    """The change that gives up a claim. Pure; raises Unseen."""
    key = AffinityKey(host, network)
    drafts.need(BlockKey(network), key)
    block = drafts.look(network)
    if block is None and drafts.exists(network):
        return Released.NOT_OURS  # unreadable: not ours to judge
    if block is None or block.owner_host != host:
        if drafts.mirror.has(key):
            drafts.drop_affinity(key)
        return Released.NOT_OURS
    if sequence_number is not None and block.sequence_number != sequence_number:
        return Released.CHANGED
    draft = drafts.draft(network)
    if draft is None or draft.affinity != block.affinity:
        return Released.CHANGED
    if require_empty and not draft.is_empty:
        return Released.NOT_EMPTY
    drafts.disown(host, network)
    return Released.DELETED if draft.is_empty else Released.ORPHANED


# --- in bulk ---


async def release_all(
    store: Datastore, host: str, cidr: Network | None = None, *, require_empty: bool = False
) -> dict[Network, Released]:
    """Give up every claim of a host (inside `cidr`), by its affinities and by what blocks say."""
    return {
        network: await release(store, host, network, require_empty=require_empty)
        for network in await owned_by(store, host)
        if cidr is None or contains(cidr, network)
    }


async def release_pool(
    store: Datastore, pool: Network, *, require_empty: bool = False
) -> dict[Network, Released]:
    """Give up every node's claims inside a pool: empty blocks go, the others lose their owner."""
    found = {}
    for _, block in await list_values(store, keys.block_prefix(pool.version), AllocationBlock):
        if block.owner_host is not None and contains(pool, block.network):
            found[block.network] = await release(
                store, block.owner_host, block.network, require_empty=require_empty
            )
    return found


async def remove_host(store: Datastore, host: str) -> dict[Network, Released]:
    """What is left of a node: all its claims, in use or not, and its legacy key."""
    outcome = await release_all(store, host)
    await delete(store, keys.HOSTS + host)
    return outcome


async def owned_by(store: Datastore, host: str) -> tuple[Network, ...]:
    """The blocks of a host, by its affinities and by what the blocks say, in key order."""
    found: set[Network] = set()
    for version in FAMILIES:
        for _, block in await list_values(store, keys.block_prefix(version), AllocationBlock):
            if block.affinity == HOST_AFFINITY + host:
                found.add(block.network)
        for pair in (await store.list(keys.affinity_prefix(host, version))).items:
            key = key_of(pair.key)
            if isinstance(key, AffinityKey):
                found.add(key.cidr)
    return tuple(sorted(found, key=str))
