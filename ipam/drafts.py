"""Blocks, affinities and handles while changes are gathered, and the transaction that stores them.

A change is a pure function over `Drafts`: it looks at what the mirror knows, takes, frees, claims,
and returns what its caller shall be told. When it needs to know more it raises `Unseen`, and runs
again from the start once that was read. When it raises anything else, or does not fit any more, its
traces are taken back. What remains of all changes becomes one transaction: every key that a written
value rests on is compared, so all of it is right or none of it happens.

A handle's count for a block is made what the block says, for every handle and block that change
together; that also mends counts that a crash of another left too high.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cymric.datastore.api import MAX_OPERATIONS, Compare, NoneCreated
from cymric.model.codec import Malformed
from cymric.model.ipam import (
    HOST_AFFINITY,
    AffinityState,
    AllocationAttribute,
    AllocationBlock,
    AllocationHandle,
    BlockAffinity,
)
from cymric.model.keys import AffinityKey, BlockKey, HandleKey, Key
from cymric.model.net import Address, Network
from cymric.model.resources import IPPool
from ipam import block as blocks
from ipam.block import Draft, Undo
from ipam.changes import Changes
from ipam.facts import Facts
from ipam.mirror import Mirror, block_text, text_of
from ipam.moments import rfc3339
from ipam.overlap import guards

CONFIRMED = BlockAffinity(state=AffinityState.CONFIRMED)


@dataclass(eq=False)
class Unseen(Exception):
    """The change needs to know these keys, all blocks of `versions`, our own ones of `owned`."""

    keys: frozenset[str] = frozenset()
    versions: frozenset[int] = frozenset()
    owned: frozenset[int] = frozenset()


@dataclass(slots=True)
class Claim:
    """A block to be created: what must not exist meanwhile."""

    around: list[Compare]
    inside: list[NoneCreated]


@dataclass(eq=False)
class Drafts:
    """See the chapter. `is_routed` None: there is no kernel to ask."""

    mirror: Mirror
    facts: Facts
    now_ns: int
    is_routed: Callable[[Address], bool] | None = None
    on_routed: Callable[[Address], None] = lambda _: None
    looked: set[str] = field(default_factory=set)
    """Keys that changes looked at; cleared by whoever wants to know about one change."""

    def __post_init__(self) -> None:
        self._undo: Undo = []
        self._drafts: dict[Network, Draft] = {}
        self._claims: dict[Network, Claim] = {}
        self._affinities: dict[AffinityKey, BlockAffinity | None] = {}
        self._compared: set[str] = set()
        self._handles: set[str] = set()
        self._recounted: set[Network] = set()
        self._ready: dict[Network, Draft] = {}
        self._open_in: dict[tuple[int, tuple[str, ...]], list[Network]] = {}
        self._affine_in: dict[tuple[int, tuple[str, ...]], tuple[Network, ...]] = {}

    # --- what a change may look at ---

    @property
    def node(self) -> str:
        """For whom addresses are assigned."""
        return self.mirror.node

    def affine(self, version: int) -> tuple[Network, ...]:
        """The node's own blocks, those claimed just now among them. Raises Unseen."""
        if not self.mirror.is_loaded(version):
            raise Unseen(owned=frozenset({version}))
        known = self.mirror.affine(version)
        new = [n for n in self._claims if n.version == version and n not in known]
        return (*known, *new) if new else known

    def affine_in(self, pools: Sequence[IPPool], version: int) -> tuple[Network, ...]:
        """The node's own blocks inside these pools. Raises Unseen."""
        key = (version, tuple(pool.metadata.name for pool in pools))
        found = self._affine_in.get(key)
        if found is None:
            own = self.affine(version)
            found = self._affine_in[key] = tuple(n for n in own if self.facts.is_in(pools, n))
        return found

    def open_in(self, pools: Sequence[IPPool], version: int) -> tuple[Network, ...]:
        """Those of `affine_in` that have something free by memory; to begin with. Raises Unseen."""
        key = (version, tuple(pool.metadata.name for pool in pools))
        found = self._open_in.get(key)
        if found is None:
            own = self.affine_in(pools, version)
            found = [n for n in own if not self.exists(n) or self.free_count(n)]
            self._open_in[key] = found
        return tuple(found)

    def existing(self, version: int) -> set[Network]:
        """All blocks of a family. Raises Unseen."""
        if not self.mirror.is_listed(version):
            raise Unseen(versions=frozenset({version}))
        known = self.mirror.existing(version)
        return known.union(self._claims) if self._claims else known

    def need(self, *keys: Key) -> None:
        """Look at keys. Raises Unseen if any was never seen."""
        texts = [text_of(key) for key in keys]
        self.looked.update(texts)
        unseen = [text for text, key in zip(texts, keys, strict=True) if not self.mirror.knows(key)]
        if unseen:
            raise Unseen(frozenset(unseen))

    def exists(self, network: Network) -> bool:
        """Whether the block exists, readable or not. Raises Unseen."""
        if network in self._claims:
            return True
        self.need(BlockKey(network))
        return self.mirror.has(BlockKey(network))

    def look(self, network: Network) -> AllocationBlock | None:
        """The block as it was before any change; None: missing or unreadable. Raises Unseen."""
        self.need(BlockKey(network))
        return self.mirror.value(BlockKey(network), AllocationBlock)

    def draft(self, network: Network) -> Draft | None:
        """The block to be changed; None: missing or unreadable. Raises Unseen."""
        self.looked.add(block_text(network))
        found = self._drafts.get(network)
        if found is not None:
            return found
        block = self.look(network)
        if block is None:
            return None
        found = self._drafts[network] = Draft(block, self._undo)
        return found

    def free_count(self, network: Network) -> int:
        """How much of a block is free, as far as known, without making a draft of it."""
        draft = self._drafts.get(network)
        if draft is not None:
            return draft.free_count
        block = self.look(network)
        return 0 if block is None else len(block.unallocated)

    def is_drafted(self, network: Network) -> bool:
        """Whether an earlier change claimed the block, or may have changed it."""
        return network in self._claims or network in self._drafts

    def ready(self, network: Network) -> Draft | None:
        """The draft of an own block from which was taken already, its claim in order."""
        return self._ready.get(network)

    def is_full(self, network: Network) -> bool:
        """Whether a block that exists has nothing free. Raises Unseen."""
        self.looked.add(block_text(network))
        draft = self._drafts.get(network)
        if draft is not None:
            return not draft.free_count
        return self.exists(network) and not self.free_count(network)

    def handle(self, handle: str) -> AllocationHandle | None:
        """What a handle counts; None: missing or unreadable. Raises Unseen."""
        self.need(HandleKey(handle))
        return self.mirror.value(HandleKey(handle), AllocationHandle)

    # --- what a change may do ---

    def mark(self) -> int:
        """A point to go back to."""
        return len(self._undo)

    def undo(self, mark: int) -> None:
        """Take back everything since `mark`."""
        while len(self._undo) > mark:
            self._undo.pop()()

    def own(self, network: Network) -> Draft | None:
        """The block as the node's own, its claim in order; None if it is not ours after all.

        A block that is missing although we have the affinity is claimed; an affinity that stands
        beside another's block is dropped. Raises Unseen.
        """
        key = AffinityKey(self.node, network)
        if network in self._claims:
            return self._drafts[network]
        self.need(BlockKey(network), key)
        if not self.mirror.has(BlockKey(network)):
            return self.claim(network)
        draft = self.draft(network)
        if draft is None:
            return None
        if draft.affinity != HOST_AFFINITY + self.node:
            if self.mirror.has(key):
                self._set_affinity(key, None)
            return None
        return draft

    def own_new(self, network: Network) -> Draft:
        """The block that was claimed just now."""
        return self._drafts[network]

    def handle_for_taking(self, handle: str) -> None:
        """Look at a handle that shall hold more. One never seen counts as missing: it mostly is.

        Raises Malformed if it cannot be read.
        """
        key = HandleKey(handle)
        text = text_of(key)
        self.looked.add(text)
        if self.mirror.pair(text) and self.mirror.value(key, AllocationHandle) is None:
            raise Malformed(text, "the handle cannot be read, so nothing can be added")

    def confirm(self, network: Network, draft: Draft) -> None:
        """Make the claim of an own block settled, if it is not; it is compared in any case."""
        if network in self._ready:
            return
        self._ready[network] = draft
        self._undo.append(lambda: self._ready.__delitem__(network))
        key = AffinityKey(self.node, network)
        self._compare(text_of(key))
        if network in self._claims or key in self._affinities:
            return
        stored = self.mirror.value(key, BlockAffinity)
        if stored is None or not stored.is_confirmed:
            # Writing the block as well makes a releaser that is half way fail.
            draft.touch()
            self._set_affinity(key, CONFIRMED)

    def claim(self, network: Network, *, take_over: bool = False) -> Draft | None:
        """A new block of the node; None if it would overlap another. Raises Unseen.

        With `take_over` an existing block is replaced, its owner's affinity with it.
        """
        version = network.version
        if any(other.overlaps(network) for other in self.existing(version) if other != network):
            return None
        claim = Claim([], [])
        if take_over:
            assert not self.is_drafted(network), "what another change took would be lost"
            former = self.look(network)
            if former is not None and former.owner_host not in (None, self.node):
                key = AffinityKey(str(former.owner_host), network)
                self.need(key)
                if self.mirror.has(key):
                    self._set_affinity(key, None)
        else:
            claim = Claim(*guards(network, self.mirror.listing_revision(version)))
        fresh = blocks.new_block(
            network,
            affinity=HOST_AFFINITY + self.node,
            claimed_at=rfc3339(self.now_ns),
            sequence_number=self.now_ns,
        )
        self._affine_in.clear()
        self._open_in.clear()
        former_draft = self._drafts.get(network)
        draft = self._drafts[network] = Draft(fresh, self._undo)
        self._claims[network] = claim

        def undo() -> None:
            self._affine_in.clear()
            self._open_in.clear()
            del self._claims[network]
            if former_draft is None:
                del self._drafts[network]
            else:
                self._drafts[network] = former_draft

        self._undo.append(undo)
        self._compare(block_text(network))
        self._set_affinity(AffinityKey(self.node, network), CONFIRMED)
        return draft

    def take(
        self, network: Network, draft: Draft, count: int, record: AllocationAttribute
    ) -> tuple[Address, ...]:
        """Up to `count` addresses of a block for `record`; its handle counts them."""
        refused = None
        if (is_routed := self.is_routed) is not None:

            def refused(ordinal: int) -> bool:
                address = network[ordinal]
                if not is_routed(address):
                    return False
                self.on_routed(address)
                return True

        reserved = self.facts.reserved_ordinals(network)
        ordinals = draft.take(count, record, reserved, refused)
        if ordinals:
            self._written(network, (record,))
        return tuple(network[ordinal] for ordinal in ordinals)

    def take_ordinal(
        self, network: Network, draft: Draft, ordinal: int, record: AllocationAttribute
    ) -> bool:
        """One address by name; False if somebody holds it."""
        if not draft.take_ordinal(ordinal, record):
            return False
        self._written(network, (record,))
        return True

    def give_back(self, network: Network, ordinals: Iterable[int]) -> tuple[Address, ...]:
        """Free ordinals of a block; returns the addresses that were held. Raises Unseen."""
        draft = self.draft(network)
        if draft is None:
            return ()
        wanted = tuple(dict.fromkeys(ordinals))
        holders = [holder for n in wanted if (holder := draft.holder_of(n)) is not None]
        # A handle with a slash has no key that could be read back: nothing counts it.
        counted = [h for h in holders if h.handle and "/" not in h.handle]
        self.need(*(HandleKey(str(holder.handle)) for holder in counted))
        freed = draft.give_back(wanted)
        if freed:
            self._written(network, counted)
        return tuple(network[ordinal] for ordinal in freed)

    def recount(self, handle: str, network: Network) -> None:
        """Make a handle's count for a block what the block says; the block stays as it is."""
        self.need(HandleKey(handle), BlockKey(network))
        self._compare(block_text(network))
        self._count_handle(handle)
        if network not in self._recounted:
            self._recounted.add(network)
            self._undo.append(lambda: self._recounted.discard(network))

    def disown(self, owner: str, network: Network) -> None:
        """Take the owner from a block, and its affinity away."""
        key = AffinityKey(owner, network)
        self.need(key)
        draft = self.draft(network)
        assert draft is not None
        draft.disown()
        self._written(network, ())
        if self.mirror.has(key):
            self._set_affinity(key, None)

    def drop_affinity(self, key: AffinityKey) -> None:
        """Delete an affinity whose block is not its owner's; the block stays as it is."""
        self.need(key, BlockKey(key.cidr))
        self._compare(block_text(key.cidr))
        self._set_affinity(key, None)

    # --- what becomes of it ---

    @property
    def is_overfull(self) -> bool:
        """Whether more is gathered than one transaction may hold."""
        written = sum(1 for draft in self._drafts.values() if draft.is_changed)
        around = sum(len(claim.around) + len(claim.inside) for claim in self._claims.values())
        operations = max(written, len(self._claims)) + len(self._affinities) + len(self._handles)
        compares = len(self._compared) + len(self._handles) + around
        return max(operations, compares) > MAX_OPERATIONS

    def changes(self) -> Changes:
        """Everything that was gathered."""
        after = {
            network: draft.finish()
            for network, draft in self._drafts.items()
            if draft.is_changed or network in self._claims
        }
        values: dict[str, object | None] = {}
        for network, block in after.items():
            is_over = block.affinity is None and block.is_empty
            values[block_text(network)] = None if is_over else block
        for key, affinity in self._affinities.items():
            if affinity is not None or self.mirror.has(key):
                values[text_of(key)] = affinity
        values.update(self._counted(after))
        compared = self._compared.union(values, (text_of(HandleKey(h)) for h in self._handles))
        around, inside = set[Compare](), set[NoneCreated]()
        for claim in self._claims.values():
            around.update(claim.around)
            inside.update(claim.inside)
        return Changes(self.mirror, values, compared, around, inside)

    def _counted(
        self, after: Mapping[Network, AllocationBlock]
    ) -> Iterator[tuple[str, AllocationHandle | None]]:
        involved: dict[Network, AllocationBlock | None] = dict(after)
        for network in self._recounted - after.keys():
            block = self.mirror.value(BlockKey(network), AllocationBlock)
            if block is not None or not self.mirror.has(BlockKey(network)):
                involved[network] = block
        counts = {
            str(network): Counter[str]() if block is None else blocks.counts_by_handle(block)
            for network, block in involved.items()
        }
        for handle in self._handles:
            key = HandleKey(handle)
            stored = self.mirror.value(key, AllocationHandle)
            if stored is None and self.mirror.has(key):
                continue  # unreadable: not ours to destroy
            before = {} if stored is None else stored.block
            now = {**before, **{cidr: count[handle] for cidr, count in counts.items()}}
            now = {cidr: count for cidr, count in now.items() if count}
            if now != before:
                yield text_of(key), AllocationHandle(block=now) if now else None

    def _written(self, network: Network, holders: Iterable[AllocationAttribute]) -> None:
        self._compare(block_text(network))
        for holder in holders:
            if holder.handle is not None:
                self._count_handle(holder.handle)

    def _count_handle(self, handle: str) -> None:
        if handle not in self._handles:
            self._handles.add(handle)
            self._undo.append(lambda: self._handles.discard(handle))

    def _compare(self, text: str) -> None:
        self.looked.add(text)
        if text not in self._compared:
            self._compared.add(text)
            self._undo.append(lambda: self._compared.discard(text))

    def _set_affinity(self, key: AffinityKey, value: BlockAffinity | None) -> None:
        had, before = key in self._affinities, self._affinities.get(key)
        self._affinities[key] = value

        def undo() -> None:
            if had:
                self._affinities[key] = before
            else:
                del self._affinities[key]

        self._undo.append(undo)
        self._compare(text_of(key))
