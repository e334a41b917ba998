"""The changes that free addresses: by handle, or one by one. Pure.

Whatever is freed comes out of the counts of its handles in the same transaction. A handle that
counts more than its blocks hold (a crash of a Calico node leaves such) is mended on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

from cymric.model.keys import BlockKey, HandleKey
from cymric.model.net import Address, Network
from cymric.model.prefix import prefix
from ipam.asking import Release
from ipam.drafts import Drafts
from ipam.errors import StaleRelease
from ipam.pools import block_of
from ipam.search import block_around


def free_handle(handle: str, drafts: Drafts) -> tuple[Address, ...]:
    """Everything a handle holds, by its own count and by the node's blocks. Raises Unseen."""
    stored = drafts.handle(handle)
    networks = [prefix(cidr) for cidr in sorted(stored.block)] if stored else []
    if stored is None:
        # No count, but a block of ours may name it all the same.
        networks = [n for version in (4, 6) for n in drafts.affine(version)]
    drafts.need(*(BlockKey(network) for network in networks))
    freed: list[Address] = []
    for network in networks:
        draft = drafts.draft(network)
        ordinals = draft.ordinals_of_handle(handle) if draft is not None else ()
        if ordinals:
            freed += drafts.give_back(network, ordinals)
        elif stored is not None:
            drafts.recount(handle, network)
    return tuple(freed)


def free_addresses(wishes: Sequence[Release], drafts: Drafts) -> tuple[Address, ...]:
    """Each of the addresses; returns those that nobody held. Raises StaleRelease, Unseen.

    StaleRelease means that one of them is not what the caller thinks, and that none was freed.
    """
    unheld: list[Address] = []
    for wish in wishes:
        network = find_block(wish.address, drafts)
        draft = None if network is None else drafts.draft(network)
        if network is None or draft is None:
            unheld.append(wish.address)
            continue
        ordinal = int(wish.address) - int(network.network_address)
        holder = draft.holder_of(ordinal)
        if holder is None:
            unheld.append(wish.address)
            continue
        if wish.handle is not None and holder.handle != wish.handle:
            raise StaleRelease(f"{wish.address} is held by {holder.handle}, not by {wish.handle}")
        stored = draft.sequence_of(ordinal)
        if stored is not None and wish.sequence_number not in (None, stored):
            raise StaleRelease(f"{wish.address} was assigned anew since it was looked at")
        drafts.give_back(network, (ordinal,))
    return tuple(unheld)


def find_block(address: Address, drafts: Drafts) -> Network | None:
    """The existing block of an address, whatever pools there are. Raises Unseen."""
    pools = drafts.facts.pools
    pool = next((pool for pool in pools if address in pool.spec.network), None)
    return block_around(address, None if pool is None else block_of(pool, address), drafts)


def held(handle: str, drafts: Drafts) -> tuple[Address, ...]:
    """The addresses a handle holds, by what the blocks that it names say. Raises Unseen."""
    stored = drafts.handle(handle)
    networks = [prefix(cidr) for cidr in sorted(stored.block)] if stored else []
    drafts.need(HandleKey(handle), *(BlockKey(network) for network in networks))
    found: list[Address] = []
    for network in networks:
        draft = drafts.draft(network)
        if draft is not None:
            found += [network[n] for n in draft.ordinals_of_handle(handle)]
    return tuple(found)
