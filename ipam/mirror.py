"""What IPAM keys held when last seen, typed: the allocator's memory.

It is filled by what a listing showed, by what a transaction wrote, and by what a refused one said
is there instead. It may be wrong at any time, which costs a lost try: nothing is written without
comparing revisions, and nothing is concluded ("no free address") from what was not read for this
very purpose (`is_fresh`).

A value that cannot be read is logged by key once; the key exists, its value is None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

import structlog

from cymric.datastore.api import KeyValue, Listing
from cymric.model.codec import Malformed, decode
from cymric.model.ipam import AllocationBlock
from cymric.model.keys import (
    BLOCKS,
    HANDLES,
    AffinityKey,
    BlockKey,
    HandleKey,
    Key,
    MalformedKey,
    parse_key,
)
from cymric.model.net import Network
from cymric.model.prefix import prefix

FAMILIES = (4, 6)

OnBlock = Callable[[Network, AllocationBlock | None], None]
"""Told of blocks that name this node whenever they change; None: gone, or unreadable."""

V = TypeVar("V")

log = structlog.get_logger()


def text_of(key: Key) -> str:
    """The text of a key, which for a block takes longer to make than to look up."""
    return str(key) if isinstance(key, HandleKey) else _kept_text(key)


@lru_cache(maxsize=65_536)
def _kept_text(key: Key) -> str:
    return str(key)


@lru_cache(maxsize=65_536)
def block_text(network: Network) -> str:
    """The text of a block's key."""
    return str(BlockKey(network))


@lru_cache(maxsize=65_536)
def key_of(text: str) -> Key | None:
    """The key behind a text; None if it is none that we know, or broken (which is logged).

    Its network is the one object of that prefix, which is found in a set without comparing.
    """
    try:
        key = parse_key(text)
    except MalformedKey as error:
        log.warning("key cannot be read and counts as absent", key=text, why=str(error))
        return None
    if isinstance(key, BlockKey | AffinityKey):
        return replace(key, cidr=prefix(str(key.cidr)))
    return key


class Mirror:
    """The memory of one process for `node`, which is empty for one who acts for no node."""

    def __init__(self, node: str, on_block: OnBlock | None = None) -> None:
        self.node = node
        self._on_block = on_block
        self._naming_us: set[Network] = set()
        self._pairs: dict[str, KeyValue | None] = {}
        self._values: dict[str, object | None] = {}
        self._fresh: set[str] = set()
        self._affine: dict[int, set[Network]] = {version: set() for version in FAMILIES}
        self._in_order: dict[int, tuple[Network, ...]] = {}
        self._listed: dict[int, tuple[int, set[Network]]] = {}
        self._loaded: set[int] = set()

    # --- what is known ---

    def knows(self, key: Key) -> bool:
        """Whether it was ever seen, or seen to be missing."""
        return text_of(key) in self._pairs

    def is_fresh(self, text: str) -> bool:
        """Whether it was seen since `grow_old`."""
        return text in self._fresh

    def pair(self, text: str) -> KeyValue | None:
        """The key as last seen; None if it is missing or was never seen."""
        return self._pairs.get(text)

    def has(self, key: Key) -> bool:
        """Whether the key exists, readable or not."""
        return self._pairs.get(text_of(key)) is not None

    def value(self, key: Key, kind: type[V]) -> V | None:
        """What a key holds; None if it is missing or cannot be read."""
        text = text_of(key)
        if text not in self._values:
            self._values[text] = _decoded(self._pairs.get(text))
        value = self._values[text]
        return value if isinstance(value, kind) else None

    def affine(self, version: int) -> tuple[Network, ...]:
        """The blocks that are the node's by the block or by its affinity, in key order."""
        found = self._in_order.get(version)
        if found is None:
            found = tuple(sorted(self._affine[version], key=str))
            self._in_order[version] = found
        return found

    def is_loaded(self, version: int) -> bool:
        """Whether `affine` was ever read; who acts for no node has none."""
        return version in self._loaded or not self.node

    def is_listed(self, version: int) -> bool:
        """Whether all blocks of the family are known, as of `listing_revision`."""
        return version in self._listed

    def listing_revision(self, version: int) -> int:
        """The revision of that listing."""
        return self._listed[version][0]

    def existing(self, version: int) -> set[Network]:
        """All blocks of the family, as far as known."""
        return self._listed[version][1]

    # --- what was seen ---

    def see(self, pairs: Mapping[str, KeyValue | None]) -> None:
        """Keys as they were read, or as a refused transaction found them."""
        for text, pair in pairs.items():
            self._see(text, pair)

    def see_written(self, text: str, pair: KeyValue | None, value: object | None) -> None:
        """A key as we wrote it."""
        self._see(text, pair, value)

    def see_blocks(self, version: int, listing: Listing) -> None:
        """All blocks of a family."""
        present = {pair.key: pair for pair in listing.items}
        networks = set()
        for text, pair in present.items():
            key = key_of(text)
            if isinstance(key, BlockKey):
                networks.add(key.cidr)
                self._see(text, pair)
        for network in self._affine[version] - networks:
            self._see(text_of(BlockKey(network)), None)
        self._listed[version] = (listing.revision, networks)

    def see_affinities(self, version: int, listing: Listing) -> None:
        """All affinities of this node, of one family."""
        self._loaded.add(version)
        present = {pair.key for pair in listing.items}
        self.see({pair.key: pair for pair in listing.items})
        for network in tuple(self._affine[version]):
            text = text_of(AffinityKey(self.node, network))
            if text not in present:
                self._see(text, None)

    # --- what is forgotten ---

    def grow_old(self) -> None:
        """From now on nothing is fresh, and the listings have to be made anew."""
        self._fresh.clear()
        self._listed.clear()

    def unlist(self) -> None:
        """The listings turned out to be old."""
        self._listed.clear()

    def forget(self, texts: Iterable[str]) -> None:
        """Know nothing of these keys any more."""
        for text in tuple(texts):
            self._pairs.pop(text, None)
            self._values.pop(text, None)
            self._fresh.discard(text)

    def forget_others(self) -> None:
        """Keep the node's own keys, and the handles that exist."""
        ours = {
            text_of(key)
            for version in FAMILIES
            for network in self._affine[version]
            for key in (BlockKey(network), AffinityKey(self.node, network))
        }
        self.forget(
            text
            for text, pair in self._pairs.items()
            if text not in ours and (pair is None or text.startswith(BLOCKS))
        )

    def _see(self, text: str, pair: KeyValue | None, value: object | None = None) -> None:
        known = self._pairs.get(text)
        self._fresh.add(text)
        if text in self._pairs and known == pair:
            return
        self._pairs[text] = pair
        if value is None:
            self._values.pop(text, None)
        else:
            self._values[text] = value
        if text.startswith(HANDLES):
            return
        match key_of(text):
            case BlockKey(cidr=network):
                if network.version in self._listed:
                    networks = self._listed[network.version][1]
                    networks.add(network) if pair else networks.discard(network)
                self._note_affine(network)
                self._tell(network, pair)
            case AffinityKey(owner=owner, cidr=network, owner_type="host") if owner == self.node:
                self._note_affine(network)

    def _note_affine(self, network: Network) -> None:
        """Whether the block is the node's own by either key."""
        affine, was = self._affine[network.version], network in self._affine[network.version]
        is_ours = bool(self.node) and (
            self._pairs.get(text_of(AffinityKey(self.node, network))) is not None
            or self._names_us(BlockKey(network))
        )
        if is_ours != was:
            affine.add(network) if is_ours else affine.discard(network)
            self._in_order.pop(network.version, None)

    def _tell(self, network: Network, pair: KeyValue | None) -> None:
        """Tell of a block that names this node, as owner or holder, or did so far."""
        if self._on_block is None:
            return
        names_us = pair is not None and self.node.encode() in pair.value
        if names_us or network in self._naming_us:
            (self._naming_us.add if names_us else self._naming_us.discard)(network)
            self._on_block(network, self.value(BlockKey(network), AllocationBlock))

    def _names_us(self, key: BlockKey) -> bool:
        pair = self._pairs.get(text_of(key))
        # Decoding every block of a large cluster takes seconds; looking for a name does not.
        if pair is None or self.node.encode() not in pair.value:
            return False
        block = self.value(key, AllocationBlock)
        return block is not None and block.owner_host == self.node


def _decoded(pair: KeyValue | None) -> object | None:
    if pair is None:
        return None
    try:
        decoded = decode(pair.key, pair.value)
    except Malformed as error:
        log.warning("value cannot be read and is passed over", key=pair.key, why=error.reason)
        return None
    return None if decoded is None else decoded[1]
