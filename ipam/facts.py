"""What decides where addresses come from: the node, pools, reservations and settings.

`Facts` is one moment of it, with what follows from it worked out once. `Watched` gathers it from a
Syncer's updates, `read` fetches it for one who comes and goes. Facts may be a little old: a pool
disabled a moment ago may still give an address. Everything that must not happen is guarded by the
transaction itself, not by facts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cymric.datastore.api import Datastore
from cymric.datastore.syncer import Update
from cymric.model import keys
from cymric.model.ipam import DEFAULT_IPAM_CONFIG, IPAMConfig
from cymric.model.keys import IPAMConfigKey, ResourceKey
from cymric.model.net import Address, Network
from cymric.model.resources import IPPool, IPReservation, Node
from ipam.asking import Ask
from ipam.errors import NoPool
from ipam.pools import Reserved, Wanted, eligible, pool_of, selects
from ipam.storage import get, list_values

POOLS = keys.resource_prefix("IPPool")
RESERVATIONS = keys.resource_prefix("IPReservation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One moment. `pools` are in the order of names; `node_labels` None: there is no such node."""

    node: str
    node_labels: Mapping[str, str] | None = None
    pools: tuple[IPPool, ...] = ()
    reserved: Reserved = field(default_factory=Reserved)
    config: IPAMConfig = DEFAULT_IPAM_CONFIG
    _eligible: dict[object, tuple[IPPool, ...]] = field(default_factory=dict, compare=False)
    _pool_by_block: dict[Network, IPPool | None] = field(default_factory=dict, compare=False)
    _is_in: dict[tuple[tuple[str, ...], Network], bool] = field(default_factory=dict, compare=False)
    _reserved_by_block: dict[Network, frozenset[int]] = field(default_factory=dict, compare=False)

    def pools_for(self, ask: Ask, version: int) -> tuple[IPPool, ...]:
        """The pools that may serve the ask, in the order they are tried. Raises NoPool."""
        if self.node_labels is None:
            raise NoPool(f"node {self.node} does not exist in the datastore")
        labels = ask.namespace_labels
        terms = None if labels is None else frozenset(labels.items())
        key = (version, ask.use, ask.pools(version), terms)
        found = self._eligible.get(key)
        if found is None:
            wanted = Wanted(
                host=self.node,
                node_labels=self.node_labels,
                version=version,
                use=ask.use,
                pools=ask.pools(version),
                namespace_labels=labels,
            )
            found = self._eligible[key] = eligible(self.pools, wanted)
        return found

    def pool_of(self, block: Network) -> IPPool | None:
        """The pool that contains all of a block, disabled or not."""
        if block not in self._pool_by_block:
            self._pool_by_block[block] = pool_of(self.pools, block)
        return self._pool_by_block[block]

    def is_in(self, pools: Sequence[IPPool], block: Network) -> bool:
        """Whether one of these pools contains all of a block."""
        key = (tuple(pool.metadata.name for pool in pools), block)
        found = self._is_in.get(key)
        if found is None:
            found = self._is_in[key] = pool_of(pools, block) is not None
        return found

    def pool_around(self, address: Address) -> IPPool | None:
        """The enabled pool that contains an address."""
        return next((p for p in self.pools if p.is_allocatable and address in p.spec.network), None)

    def reserved_ordinals(self, block: Network) -> frozenset[int]:
        """The ordinals of a block that are never given but by name."""
        found = self._reserved_by_block.get(block)
        if found is None:
            found = self._reserved_by_block[block] = self.reserved.ordinals(block)
        return found

    def is_unselected(self, block: Network) -> bool:
        """Whether the block's pool is enabled and offers itself to other nodes only."""
        pool = self.pool_of(block)
        if pool is None or not pool.is_allocatable or self.node_labels is None:
            return False
        # A namespace's selector says nothing about the node.
        any_namespace = pool.spec.namespace_selector == ""
        wanted = Wanted(host=self.node, node_labels=self.node_labels)
        return (
            any_namespace
            and pool.spec.assignment_mode in ("", "Automatic")
            and not selects(pool, wanted)
        )


class Watched:
    """Facts kept up to date by a Syncer; feed it updates, take `facts` when you need them."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._values: dict[object, object] = {}
        self._facts: Facts | None = None

    @property
    def prefixes(self) -> tuple[str, ...]:
        """What the Syncer must follow."""
        return (POOLS, RESERVATIONS, str(ResourceKey("Node", self._node)), keys.IPAM_CONFIG)

    @property
    def facts(self) -> Facts:
        """What is known now."""
        if self._facts is None:
            self._facts = self._made()
        return self._facts

    def on_updates(self, updates: Sequence[Update]) -> bool:
        """Note what changed; whether any of it was of interest."""
        noted = False
        for update in updates:
            if not self._is_of_interest(update.key):
                continue
            noted = True
            if update.value is None:
                self._values.pop(update.key, None)
            else:
                self._values[update.key] = update.value
        if noted:
            self._facts = None
        return noted

    def _is_of_interest(self, key: object) -> bool:
        match key:
            case ResourceKey(kind="IPPool" | "IPReservation") | IPAMConfigKey():
                return True
            case ResourceKey(kind="Node", name=name):
                return name == self._node
            case _:
                return False

    def _made(self) -> Facts:
        node = self._values.get(ResourceKey("Node", self._node))
        config = self._values.get(IPAMConfigKey())
        values = list(self._values.values())
        return Facts(
            node=self._node,
            node_labels=node.labels if isinstance(node, Node) else None,
            pools=in_order(value for value in values if isinstance(value, IPPool)),
            reserved=Reserved(value for value in values if isinstance(value, IPReservation)),
            config=config if isinstance(config, IPAMConfig) else DEFAULT_IPAM_CONFIG,
        )


def in_order(pools: Iterable[IPPool]) -> tuple[IPPool, ...]:
    """Pools as a listing has them: by name."""
    return tuple(sorted(pools, key=lambda pool: pool.metadata.name))


async def read(store: Datastore, node: str) -> Facts:
    """The facts as they are stored now."""
    # gather, not a TaskGroup: the caller sorts errors by class, and a group would wrap them.
    config, found_node, pools, reservations = await asyncio.gather(
        get(store, IPAMConfigKey(), IPAMConfig),
        get(store, ResourceKey("Node", node), Node) if node else _nothing(),
        list_values(store, POOLS, IPPool),
        list_values(store, RESERVATIONS, IPReservation),
    )
    return Facts(
        node=node,
        node_labels=None if found_node is None else found_node.labels,
        pools=in_order(pool for _, pool in pools),
        reserved=Reserved(reservation for _, reservation in reservations),
        config=config or DEFAULT_IPAM_CONFIG,
    )


async def _nothing() -> None:
    return None
