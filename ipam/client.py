"""Addresses for those who ask: assign one, release it, find its holder.

A block and the handles that count its addresses change in one transaction, so they never disagree.
The order of the search is Calico's: blocks the node owns, then a new block as long as the node may
own one more, then (unless strict affinity forbids it) an address borrowed from any block of the
pools. All state is in the datastore; `IPAM` keeps nothing between calls and may be thrown away.

Assignments of one process wait for each other: racing with ourselves for one block would only lose
compare-and-swap rounds. Other processes and nodes are guarded against by the revisions.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import structlog

from cymric.datastore.api import Datastore, KeyValue, Operation
from cymric.model import keys
from cymric.model.codec import Malformed
from cymric.model.ipam import (
    DEFAULT_IPAM_CONFIG,
    HOST_AFFINITY,
    AllocationAttribute,
    AllocationBlock,
    AllocationHandle,
    IPAMConfig,
)
from cymric.model.keys import AffinityKey, BlockKey, HandleKey, IPAMConfigKey, Key, ResourceKey
from cymric.model.net import Address, Network, parse_network
from cymric.model.resources import IPPool, IPReservation, Node
from ipam import affinity
from ipam import block as blocks
from ipam.asking import Assignment, Release
from ipam.errors import (
    AddressOutsidePools,
    AddressTaken,
    BlockLimitReached,
    NoFreeAddresses,
    NoPool,
    NotOurBlock,
    StaleRelease,
)
from ipam.freeing import free
from ipam.pools import (
    Reserved,
    Wanted,
    block_of,
    borrowable,
    claimable,
    eligible,
    pool_of,
    selects,
)
from ipam.storage import View, get, land, list_values, put

DEFAULT_MAX_BLOCKS = 20
"""How many blocks a node may own when neither request nor configuration says otherwise."""

__all__ = ["IPAM", "Assignment", "Release", "Request"]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Who asks for an address, and from where it may come.

    `handle` names the holder for a later release; `attributes` are stored beside it (node, pod,
    namespace, timestamp). `pools` are CIDRs or names of pools; none means by selectors.
    """

    host: str
    handle: str
    attributes: Mapping[str, str] = field(default_factory=dict)
    pools: tuple[str, ...] = ()
    use: str = "Workload"
    namespace_labels: Mapping[str, str] | None = None
    max_blocks: int = 0


@dataclass(frozen=True, slots=True)
class _Situation:
    """Everything read at the start of an assignment."""

    config: IPAMConfig
    pools: tuple[IPPool, ...]
    wanted: Wanted
    reserved: Reserved
    owned: tuple[Network, ...]

    def is_of(self, request: Request) -> bool:
        """Whether this is the situation of another request with the same terms, too."""
        wanted = self.wanted
        return (wanted.host, wanted.use, wanted.pools, wanted.namespace_labels) == (
            request.host,
            request.use,
            request.pools,
            request.namespace_labels,
        )


Choose = Callable[[AllocationBlock], tuple[AllocationBlock, tuple[int, ...]]]
"""What to take from a block: the block without it, and the ordinals; none leaves it as it is."""


class IPAM:
    """Assigns and releases addresses. `clock` gives nanoseconds since 1970."""

    def __init__(self, store: Datastore, *, clock: Callable[[], int] = time.time_ns) -> None:
        self._store = store
        self._clock = clock
        self._assigning = asyncio.Lock()
        self._moments = itertools.count(1)
        self._last_look: tuple[int, _Situation] | None = None
        self._own_blocks: dict[str, KeyValue | None] = {}

    async def assign(self, request: Request) -> Assignment:
        """One IPv4 address for `request.handle`. Raises NoAddress, Contended.

        The address is recorded when this returns. Asking twice with equal handle and attributes
        may give two addresses: whoever repeats a request looks at `held_by` first.
        """
        record = blocks.record_of(request.handle, request.attributes)
        asked_at = next(self._moments)
        async with self._assigning:
            situation = await self._look_since(asked_at, request)
            allowed = eligible(situation.pools, situation.wanted)
            mine = [n for n in situation.owned if pool_of(allowed, n) is not None]
            await self._give_up_unselected(situation, mine)
            for network in mine:
                if assignment := await self._from_own(network, record, request, situation):
                    return assignment
            self._last_look = None  # what we own is about to change
            return await self._from_elsewhere(allowed, len(mine), record, request, situation)

    async def assign_address(self, address: Address, request: Request) -> Assignment:
        """The very address asked for. Raises AddressRefused, Contended.

        Selectors, uses and reservations do not matter; the pool must be enabled. A block that does
        not exist yet becomes the host's own.
        """
        record = blocks.record_of(request.handle, request.attributes)
        config = await self.config()
        pools = [p for _, p in await list_values(self._store, _POOLS, IPPool) if p.is_allocatable]
        network = await self._block_around(address, pools)
        if network is None:
            raise AddressOutsidePools(
                f"the provided IP address {address} is not in a configured pool"
            )
        await affinity.claim(self._store, request.host, network, clock=self._clock)

        def choose(block: AllocationBlock) -> tuple[AllocationBlock, tuple[int, ...]]:
            if config.strict_affinity and block.affinity != HOST_AFFINITY + request.host:
                raise NotOurBlock(f"{address} is in block {network} of {block.affinity}")
            ordinal = block.ordinal(address)
            changed = blocks.take_ordinal(block, ordinal, record)
            if changed is None:
                raise AddressTaken(f"{address} is already assigned")
            return changed, (ordinal,)

        assignment = await self._take(network, record, request, choose)
        if assignment is None:
            raise NoFreeAddresses(f"block {network} vanished while {address} was assigned")
        return assignment

    async def release_handle(self, handle: str) -> tuple[Address, ...]:
        """Free everything a handle holds, and tell what it was; an unknown handle holds nothing."""
        key = HandleKey(handle)
        found = await get(self._store, key, AllocationHandle)
        freed: list[Address] = []
        for cidr in sorted(found.block) if found else ():
            network = parse_network(cidr)

            def everything(block: AllocationBlock) -> tuple[int, ...]:
                return blocks.ordinals_of_handle(block, handle)

            freed += await free(self._store, network, everything, handles={key})
        return tuple(freed)

    async def release(self, releases: Iterable[Release]) -> tuple[Address, ...]:
        """Free addresses, block by block; returns those that nobody held.

        Raises StaleRelease, with nothing of that block freed, when a handle or sequence number is
        not what the caller says.
        """
        unheld: list[Address] = []
        pools = [pool for _, pool in await list_values(self._store, _POOLS, IPPool)]
        by_block: dict[Network, list[Release]] = {}
        for release in releases:
            network = await self._existing_block_around(release.address, pools)
            if network is None:
                unheld.append(release.address)
            else:
                by_block.setdefault(network, []).append(release)
        for network, wishes in by_block.items():

            def asked(
                block: AllocationBlock, wishes: Sequence[Release] = wishes
            ) -> tuple[int, ...]:
                return tuple(_checked(block, wish) for wish in wishes)

            freed = await free(self._store, network, asked)
            unheld += [wish.address for wish in wishes if wish.address not in freed]
        return tuple(unheld)

    async def held_by(self, handle: str) -> tuple[Address, ...]:
        """The addresses a handle holds, by what the blocks say."""
        found = await get(self._store, HandleKey(handle), AllocationHandle)
        held: list[Address] = []
        for cidr in sorted(found.block) if found else ():
            block = await get(self._store, BlockKey(parse_network(cidr)), AllocationBlock)
            if block is not None:
                held += [block.address(n) for n in blocks.ordinals_of_handle(block, handle)]
        return tuple(held)

    async def config(self) -> IPAMConfig:
        """The cluster's settings; as Calico does, a missing key is created with the default."""
        key = IPAMConfigKey()

        def change(view: View) -> tuple[IPAMConfig, Sequence[Operation]]:
            found = view.get(key, IPAMConfig)
            if found is not None:
                return found, []
            return DEFAULT_IPAM_CONFIG, [put(key, DEFAULT_IPAM_CONFIG)]

        return await land(self._store, (key,), change)

    # --- how an address is found ---

    async def _look_since(self, moment: int, request: Request) -> _Situation:
        """What is stored now, or what a look showed that began after `moment`.

        Of many requests that wait for each other, only some have to read everything anew.
        """
        if self._last_look is not None:
            began, situation = self._last_look
            if began > moment and situation.is_of(request):
                return situation
        began = next(self._moments)
        situation = await self._look(request)
        self._last_look = began, situation
        return situation

    async def _look(self, request: Request) -> _Situation:
        # gather, not a TaskGroup: the caller sorts errors by class, and a group would wrap them.
        config, found_node, pools, reservations, owned = await asyncio.gather(
            self.config(),
            get(self._store, ResourceKey("Node", request.host), Node),
            list_values(self._store, _POOLS, IPPool),
            list_values(self._store, _RESERVATIONS, IPReservation),
            self._store.list(keys.affinity_prefix(request.host, 4)),
        )
        if found_node is None:
            raise NoPool(f"node {request.host} does not exist in the datastore")
        return _Situation(
            config=config,
            pools=tuple(pool for _, pool in pools),
            wanted=Wanted(
                host=request.host,
                node_labels=found_node.labels,
                use=request.use,
                pools=request.pools,
                namespace_labels=request.namespace_labels,
            ),
            reserved=Reserved(reservation for _, reservation in reservations),
            owned=tuple(_claimed_networks(pair.key for pair in owned.items)),
        )

    async def _give_up_unselected(self, situation: _Situation, mine: Sequence[Network]) -> None:
        """Release empty blocks of pools that do not select this node any more, as Calico does."""
        enabled = [pool for pool in situation.pools if pool.is_allocatable]
        for network in situation.owned:
            pool = pool_of(enabled, network)
            if network not in mine and pool is not None and not selects(pool, situation.wanted):
                outcome = await affinity.release(self._store, situation.wanted.host, network)
                log.info("block of an unselected pool", block=str(network), outcome=outcome.name)

    async def _from_own(
        self,
        network: Network,
        record: AllocationAttribute,
        request: Request,
        situation: _Situation,
    ) -> Assignment | None:
        if situation.reserved.covers(network):
            return None
        try:
            take = partial(
                blocks.take,
                count=1,
                record=record,
                reserved=situation.reserved.ordinals(network),
            )
            return await self._take(network, record, request, take, is_own=True)
        except Malformed as error:
            log.warning("block cannot be read and is passed over", key=error.key, why=error.reason)
            return None

    async def _from_elsewhere(
        self,
        allowed: Sequence[IPPool],
        owned_count: int,
        record: AllocationAttribute,
        request: Request,
        situation: _Situation,
    ) -> Assignment:
        host, config = request.host, situation.config
        limits = [n for n in (request.max_blocks, config.maxBlocksPerHost) if n > 0]
        limit = min(limits, default=DEFAULT_MAX_BLOCKS)
        if owned_count >= limit:
            raise BlockLimitReached(
                f"node {host} owns {owned_count} blocks, which is its limit, and they are full"
            )
        if not config.auto_allocate_blocks:
            raise NoFreeAddresses("failed to find or claim a block: auto_allocate_blocks is off")
        existing = {
            block.network: block
            for _, block in await list_values(self._store, keys.block_prefix(4), AllocationBlock)
        }
        reserved_in = situation.reserved.ordinals
        for network in claimable(allowed, host, existing, situation.reserved):
            if assignment := await self._from_own(network, record, request, situation):
                return assignment
        if config.strict_affinity:
            raise NoFreeAddresses("No more free affine blocks and strict affinity enabled")
        for network in borrowable(allowed, host, existing):
            take = partial(blocks.take, count=1, record=record, reserved=reserved_in(network))
            if assignment := await self._take(network, record, request, take):
                return assignment
        cidrs = " ".join(pool.spec.cidr for pool in allowed)
        raise NoFreeAddresses(f"No IPs available in pools: [{cidrs}]")

    async def _take(
        self,
        network: Network,
        record: AllocationAttribute,
        request: Request,
        choose: Choose,
        *,
        is_own: bool = False,
    ) -> Assignment | None:
        """Take what `choose` picks from the block, and count it in the handle, in one go.

        With `is_own` the block is claimed in the same transaction if it does not exist yet, and is
        left alone if it turns out not to be ours.
        """
        block_key, handle_key = BlockKey(network), HandleKey(request.handle)
        affinity_key = AffinityKey(request.host, network)

        def change(view: View) -> tuple[Assignment | None, Sequence[Operation]]:
            block, repairs = view.get(block_key, AllocationBlock), list[Operation]()
            if is_own:
                is_new = block is None
                block, repairs = affinity.claimed(view, request.host, network, self._clock())
                if is_new and block is not None and not choose(block)[1]:
                    return None, []  # all of it is reserved: no reason to own it
            if block is None:
                return None, repairs
            is_borrowed = block.affinity != HOST_AFFINITY + request.host
            if view.is_in_doubt:
                for ordinal in blocks.ordinals_of_record(block, record)[:1]:
                    return Assignment(block.address(ordinal), network, is_borrowed), repairs
            changed, ordinals = choose(block)
            if not ordinals:
                return None, repairs
            handle = view.get(handle_key, AllocationHandle) or AllocationHandle()
            count = len(blocks.ordinals_of_handle(changed, request.handle))
            counted = AllocationHandle(block={**handle.block, str(network): count})
            assignment = Assignment(block.address(ordinals[0]), network, is_borrowed)
            writes = [write for write in repairs if write.key != str(block_key)]
            return assignment, [*writes, put(block_key, changed), put(handle_key, counted)]

        if not is_own:
            return await land(self._store, (block_key, handle_key), change)
        involved = (block_key, handle_key, affinity_key)
        try:
            return await land(self._store, involved, change, memory=self._own_blocks)
        finally:
            self._own_blocks.pop(str(handle_key), None)  # handles are rarely met again

    async def _block_around(self, address: Address, pools: Sequence[IPPool]) -> Network | None:
        """The block of `address`, existing or as its pool would cut it."""
        for pool in pools:
            if address in pool.spec.network:
                existing = await self._existing_block_around(address, pools)
                return existing or block_of(pool, address)
        return None

    async def _existing_block_around(
        self, address: Address, pools: Sequence[IPPool]
    ) -> Network | None:
        for pool in pools:
            if address in pool.spec.network:
                network = block_of(pool, address)
                if await self._store.get(str(BlockKey(network))) is not None:
                    return network
        # The pool may be gone, or was cut into other sizes: look at every block.
        listing = await self._store.list(keys.block_prefix(address.version))
        for pair in listing.items:
            key = _parsed(pair.key)
            if isinstance(key, BlockKey) and address in key.cidr:
                return key.cidr
        return None


_POOLS = keys.resource_prefix("IPPool")
_RESERVATIONS = keys.resource_prefix("IPReservation")


def _parsed(text: str) -> Key | None:
    try:
        return keys.parse_key(text)
    except keys.MalformedKey as error:
        log.warning("key cannot be read and counts as absent", key=text, why=str(error))
        return None


def _claimed_networks(texts: Iterable[str]) -> Iterator[Network]:
    for text in texts:
        key = _parsed(text)
        if isinstance(key, AffinityKey):
            yield key.cidr


def _checked(block: AllocationBlock, wish: Release) -> int:
    """The ordinal to free. Raises StaleRelease if it is not held as the caller thinks."""
    ordinal = block.ordinal(wish.address)
    holder = block.holder_of(ordinal)
    if holder is None:
        return ordinal
    if wish.handle is not None and holder.handle != wish.handle:
        raise StaleRelease(f"{wish.address} is held by {holder.handle}, not by {wish.handle}")
    sequences = block.sequence_number_for_allocation or {}
    if wish.sequence_number not in (None, sequences.get(str(ordinal), wish.sequence_number)):
        raise StaleRelease(f"{wish.address} was assigned anew since it was looked at")
    return ordinal
