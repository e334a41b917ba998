"""Where addresses come from: the change that grants an `Ask`. Pure.

The order is Calico's (AutoAssign, AssignIP): the node's own blocks in key order; then, as long as
the node may own one more, a new block from a start that depends on the node's name, then an empty
block of another node that nobody used for a minute; then, unless strict affinity forbids it, an
address borrowed from any block of the pools. A node at its limit of blocks borrows nothing.

An ask is granted as a whole. What a family got before another failed is taken back by whoever runs
the change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cymric.model.ipam import HOST_AFFINITY, AllocationAttribute
from cymric.model.net import Address, Network
from cymric.model.resources import IPPool
from ipam.asking import Ask, Assignment
from ipam.block import record_of
from ipam.drafts import Drafts
from ipam.errors import (
    AddressOutsidePools,
    AddressRefused,
    AddressRouted,
    AddressTaken,
    BlockLimitReached,
    NoFreeAddresses,
    NotOurBlock,
)
from ipam.moments import SECOND_NS, from_rfc3339
from ipam.pools import block_of, block_order, claimable

DEFAULT_MAX_BLOCKS = 20
"""How many blocks a node may own when neither ask nor configuration says otherwise."""

RECLAIM_AGE_NS = 60 * SECOND_NS
"""How long ago another node must have claimed an empty block before it may be taken over."""


def grant(ask: Ask, drafts: Drafts) -> tuple[Assignment, ...]:
    """All that is asked for. Raises NoAddress, AddressRefused, Unseen."""
    record = record_of(ask.handle, ask.attributes)
    drafts.handle_for_taking(ask.handle)
    granted = [_by_name(address, record, drafts) for address in ask.addresses]
    for version in (4, 6):
        if count := ask.count(version):
            granted += _any(ask, version, count, record, drafts)
    return tuple(granted)


def block_limit(ask_limit: int, config_limit: int) -> int:
    """How many blocks of a family a node may own; 0 means not set."""
    return min((n for n in (ask_limit, config_limit) if n > 0), default=DEFAULT_MAX_BLOCKS)


def claim_next(pools: Sequence[IPPool], version: int, drafts: Drafts) -> Network | None:
    """Claim a block that does not exist yet; None if the pools are cut up. Raises Unseen."""
    existing = drafts.existing(version)
    for network in claimable(pools, drafts.node, existing, drafts.facts.reserved):
        if drafts.claim(network) is not None:
            return network
    return None


def _any(
    ask: Ask, version: int, count: int, record: AllocationAttribute, drafts: Drafts
) -> list[Assignment]:
    pools = drafts.facts.pools_for(ask, version)
    granted: list[Assignment] = []
    # What was full when this transaction was begun may have room again by a release in it; so
    # every block is looked at before anything is sought elsewhere, but mostly the first one does.
    mine: tuple[Network, ...] = ()
    for mine in (drafts.open_in(pools, version), drafts.affine_in(pools, version)):
        for network in mine:
            granted += _from_own(network, count - len(granted), record, drafts)
            if len(granted) == count:
                return granted
    if len(granted) < count:
        limit = block_limit(ask.max_blocks, drafts.facts.config.maxBlocksPerHost)
        wanted = count - len(granted)
        granted += _from_new(pools, version, wanted, (len(mine), limit), record, drafts)
    if len(granted) < count:
        granted += _borrowed(pools, version, count - len(granted), record, drafts)
    if len(granted) < count:
        cidrs = " ".join(pool.spec.cidr for pool in pools)
        raise NoFreeAddresses(
            f"Assigned {len(granted)} out of {count} requested IPv{version} addresses; "
            f"No IPs available in pools: [{cidrs}]"
        )
    return granted


def _from_own(
    network: Network, count: int, record: AllocationAttribute, drafts: Drafts
) -> list[Assignment]:
    if drafts.is_full(network) or drafts.facts.reserved.covers(network):
        return []
    mark = drafts.mark()
    draft = drafts.ready(network) or drafts.own(network)
    if draft is None:
        return []
    addresses = drafts.take(network, draft, count, record)
    if not addresses:
        drafts.undo(mark)
        return []
    drafts.confirm(network, draft)
    return [Assignment(address, network) for address in addresses]


def _from_new(
    pools: Sequence[IPPool],
    version: int,
    count: int,
    owned_and_limit: tuple[int, int],
    record: AllocationAttribute,
    drafts: Drafts,
) -> list[Assignment]:
    granted: list[Assignment] = []
    owned, limit = owned_and_limit
    new = _new_blocks(pools, version, drafts)
    while len(granted) < count:
        if owned >= limit:
            raise BlockLimitReached(
                f"node {drafts.node} owns {owned} blocks, which is its limit, and they are full"
            )
        if not drafts.facts.config.auto_allocate_blocks:
            raise NoFreeAddresses("failed to find or claim a block: auto_allocate_blocks is off")
        found = next(new, None)
        if found is None:
            break
        network, mark = found
        addresses = drafts.take(network, drafts.own_new(network), count - len(granted), record)
        if not addresses:
            drafts.undo(mark)  # all of it is reserved or routed: no reason to own it
            continue
        owned += 1
        granted += [Assignment(address, network) for address in addresses]
    return granted


def _new_blocks(
    pools: Sequence[IPPool], version: int, drafts: Drafts
) -> Iterator[tuple[Network, int]]:
    """Blocks as they are claimed, one after the other, each with the mark before its claim."""
    existing = drafts.existing(version)
    for network in claimable(pools, drafts.node, existing, drafts.facts.reserved):
        mark = drafts.mark()
        if drafts.claim(network) is not None:
            yield network, mark
    for network in _idle_of_others(pools, existing, drafts):
        mark = drafts.mark()
        if drafts.claim(network, take_over=True) is not None:
            yield network, mark


def _idle_of_others(
    pools: Sequence[IPPool], existing: set[Network], drafts: Drafts
) -> Iterator[Network]:
    """Blocks of other nodes, or of none, that are empty and were claimed a while ago."""
    for pool in pools:
        for network in block_order(pool, drafts.node):
            if network not in existing or drafts.facts.reserved.covers(network):
                continue
            if drafts.is_drafted(network):
                continue  # another ask of this very transaction has something of it
            block = drafts.look(network)
            if block is None or not block.is_empty or block.owner_host == drafts.node:
                continue
            if block.affinity is not None and block.owner_host is None:
                continue  # a virtual owner's
            claimed = block.affinity_claim_time
            claimed_ns = from_rfc3339(claimed) if isinstance(claimed, str) else None
            if claimed_ns is None or drafts.now_ns - claimed_ns > RECLAIM_AGE_NS:
                yield network


def _borrowed(
    pools: Sequence[IPPool], version: int, count: int, record: AllocationAttribute, drafts: Drafts
) -> list[Assignment]:
    if drafts.facts.config.strict_affinity:
        raise NoFreeAddresses("No more free affine blocks and strict affinity enabled")
    granted: list[Assignment] = []
    existing = drafts.existing(version)
    for pool in pools:
        for network in block_order(pool, drafts.node):
            if len(granted) >= count:
                return granted
            if network not in existing or drafts.facts.reserved.covers(network):
                continue
            if not drafts.free_count(network):
                continue
            draft = drafts.draft(network)
            if draft is None:
                continue
            is_borrowed = draft.affinity != HOST_AFFINITY + drafts.node
            addresses = drafts.take(network, draft, count - len(granted), record)
            granted += [Assignment(address, network, is_borrowed) for address in addresses]
    return granted


def _by_name(address: Address, record: AllocationAttribute, drafts: Drafts) -> Assignment:
    """The very address. Selectors, uses and reservations do not matter; the pool must be enabled.

    A block that does not exist yet becomes the node's own, whatever its limit of blocks.
    """
    pool = drafts.facts.pool_around(address)
    if pool is None:
        raise AddressOutsidePools(f"the provided IP address {address} is not in a configured pool")
    if drafts.is_routed is not None and drafts.is_routed(address):
        drafts.on_routed(address)
        raise AddressRouted(f"{address} is already routed to another workload of this node")
    network = block_around(address, block_of(pool, address), drafts)
    if network is None:
        network = block_of(pool, address)
        if drafts.claim(network) is None:
            raise AddressRefused(f"{address}: block {network} would overlap another one")
    ours = HOST_AFFINITY + drafts.node
    draft = drafts.draft(network)
    if draft is None:
        raise AddressRefused(f"{address}: block {network} cannot be read")
    is_borrowed = draft.affinity != ours
    if is_borrowed and drafts.facts.config.strict_affinity:
        raise NotOurBlock(f"{address} is in block {network} of {draft.affinity}")
    if not drafts.take_ordinal(network, draft, int(address) - int(network[0]), record):
        raise AddressTaken(f"{address} is already assigned")
    if not is_borrowed:
        drafts.confirm(network, draft)
    return Assignment(address, network, is_borrowed)


def block_around(address: Address, guess: Network | None, drafts: Drafts) -> Network | None:
    """The existing block that contains an address; None if there is none. Raises Unseen."""
    for network in drafts.affine(address.version):
        if address in network and drafts.exists(network):
            return network
    if guess is not None and drafts.exists(guess):
        return guess
    # The pool may be gone, or was cut into other sizes: look at every block.
    return next((n for n in drafts.existing(address.version) if address in n), None)
