"""When the next block is claimed, and when one is given back: changes, pure.

A block is claimed before the last address is taken, so that it is advertised, and known to every
router, before a pod needs it. That is when what is left in all blocks of the node is less than a
part of one block. It is given back after it was empty for a while, if what is left without it is
not less than that part; so the two never chase each other. A node without blocks claims none ahead,
and keeps its last one. Nothing is claimed ahead beyond the limit of blocks, by taking over another
node's block, or (nor given back) where blocks are handed out by hand.
"""

from __future__ import annotations

from collections.abc import Sequence

from cymric.model.ipam import BlockAffinity
from cymric.model.keys import AffinityKey, BlockKey
from cymric.model.net import Network
from cymric.model.resources import IPPool
from ipam.affinity import Released, released
from ipam.asking import Ask
from ipam.drafts import Drafts
from ipam.errors import BlockLimitReached, NoFreeAddresses, NoPool
from ipam.search import block_limit, claim_next

PART = 0.25
"""The part of a block that shall be left at any time."""


def claim_ahead(version: int, part: float, drafts: Drafts) -> Network | None:
    """Claim the next block if little is left; None if that is not so.

    Raises NoAddress when there is none to claim, and Unseen.
    """
    pools = _pools(version, drafts)
    mine = [n for n in drafts.affine(version) if drafts.facts.is_in(pools, n)]
    if not is_short(mine, part, drafts):
        return None
    if len(mine) >= block_limit(0, drafts.facts.config.maxBlocksPerHost):
        raise BlockLimitReached("no block can be claimed ahead: the node is at its limit")
    network = claim_next(pools, version, drafts)
    if network is None:
        raise NoFreeAddresses("no block can be claimed ahead: the pools are cut up")
    return network


def is_short(mine: Sequence[Network], part: float, drafts: Drafts) -> bool:
    """Whether less than `part` of a block is left in all of them. False without any block."""
    if not mine or not drafts.facts.config.auto_allocate_blocks:
        return False
    return _left(mine, drafts) < part * mine[0].num_addresses


def give_back(network: Network, part: float, drafts: Drafts) -> Released:
    """Give up an empty block if enough is left without it; raises Unseen."""
    pools = _pools(network.version, drafts)
    others = [
        n
        for n in drafts.affine(network.version)
        if n != network and drafts.facts.is_in(pools, n) == drafts.facts.is_in(pools, network)
    ]
    if not others or not drafts.facts.config.auto_allocate_blocks or is_short(others, part, drafts):
        return Released.NOT_EMPTY
    return released(drafts, drafts.node, network)


def put_in_order(network: Network, drafts: Drafts) -> None:
    """Settle one claim of the node that a crash elsewhere left half way; raises Unseen.

    What has no block is no claim: we never leave one so, and would claim the block anew.
    """
    key = AffinityKey(drafts.node, network)
    drafts.need(BlockKey(network), key)
    if not drafts.exists(network):
        drafts.drop_affinity(key)
        return
    draft = drafts.own(network)
    if draft is not None:
        stored = drafts.mirror.value(key, BlockAffinity)
        if stored is None or not stored.is_confirmed:
            drafts.confirm(network, draft)


def leave_unselected(network: Network, drafts: Drafts) -> Released:
    """Give up an empty block whose pool offers itself to other nodes only, as Calico does."""
    if not drafts.facts.is_unselected(network):
        return Released.NOT_EMPTY
    return released(drafts, drafts.node, network)


def _pools(version: int, drafts: Drafts) -> tuple[IPPool, ...]:
    """The pools that serve workloads of this node without being named."""
    ask = Ask(handle="ahead", ipv4=int(version == 4), ipv6=int(version == 6))
    try:
        return drafts.facts.pools_for(ask, version)
    except NoPool:
        return ()


def _left(networks: Sequence[Network], drafts: Drafts) -> int:
    """How many addresses could still be given, reserved ones aside."""
    left = 0
    for network in networks:
        free = drafts.free_count(network)
        reserved = drafts.facts.reserved_ordinals(network)
        if free and reserved:
            block = drafts.look(network)
            free = 0 if block is None else len(set(block.unallocated) - reserved)
        left += free
    return left
