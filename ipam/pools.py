"""Which pools may serve a request, in which order their blocks are tried, what is reserved.

Pure: everything comes in as values. Source: Calico's pool selection (ipam.go determinePools) and
its block generator. Selectors decide for requests that name no pool; a request that names pools
gets exactly those, whatever their selectors say, as long as they are enabled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cymric.model import selector
from cymric.model.net import Address, Network, contains, parse_network
from cymric.model.prefix import prefix_at
from cymric.model.resources import IPPool, IPReservation
from ipam.asking import USE_WORKLOAD
from ipam.errors import NoPool

AUTOMATIC = "Automatic"

_FNV_OFFSET = 2166136261
_FNV_PRIME = 16777619
_GOLDEN_RATIO = 2654435769
_MASK32 = 0xFFFFFFFF


class Reserved:
    """The addresses that are never assigned automatically."""

    def __init__(self, reservations: Iterable[IPReservation] = ()) -> None:
        self._networks = tuple(
            parse_network(cidr)
            for reservation in reservations
            for cidr in reservation.spec.reserved_cidrs
        )

    def covers(self, block: Network) -> bool:
        """Whether all of the block is reserved by one range."""
        return any(contains(network, block) for network in self._networks)

    def ordinals(self, block: Network) -> frozenset[int]:
        """The reserved ordinals of a block."""
        first = int(block.network_address)
        last = first + block.num_addresses - 1
        found: set[int] = set()
        for network in self._networks:
            if network.version == block.version:
                low = max(first, int(network.network_address))
                high = min(last, int(network.broadcast_address))
                found.update(range(low - first, high - first + 1))
        return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a request says about pools. `pools` are CIDRs or names; none means by selectors.

    `namespace_labels` None means that there is no namespace object: only pools that select no
    namespace fit.
    """

    host: str
    node_labels: Mapping[str, str]
    version: int = 4
    use: str = USE_WORKLOAD
    pools: tuple[str, ...] = ()
    namespace_labels: Mapping[str, str] | None = None


def eligible(pools: Iterable[IPPool], wanted: Wanted) -> tuple[IPPool, ...]:
    """The pools that may serve the request, in the order they are tried. Raises NoPool."""
    enabled = [
        pool
        for pool in pools
        if pool.is_allocatable and pool.spec.network.version == wanted.version
    ]
    if wanted.pools:
        chosen = [_requested(text, enabled) for text in wanted.pools]
    else:
        chosen = [pool for pool in enabled if selects(pool, wanted)]
        if not chosen:
            raise NoPool(f"no configured Calico pools for node {wanted.host}")
    fitting = tuple(pool for pool in chosen if wanted.use in pool.spec.allowed_uses)
    if not fitting:
        names = ", ".join(pool.metadata.name for pool in chosen)
        raise NoPool(f"no pool for use {wanted.use!r}: {names} may not be used for it")
    return fitting


def selects(pool: IPPool, wanted: Wanted) -> bool:
    """Whether the pool offers itself to this node and namespace."""
    if pool.spec.assignment_mode not in ("", AUTOMATIC):
        return False
    if not selector.parse(pool.spec.node_selector).matches(wanted.node_labels):
        return False
    if not pool.spec.namespace_selector:
        return True
    return wanted.namespace_labels is not None and selector.parse(
        pool.spec.namespace_selector
    ).matches(wanted.namespace_labels)


def pool_of(pools: Iterable[IPPool], network: Network) -> IPPool | None:
    """The pool that contains the whole of `network`, disabled or not."""
    return next((pool for pool in pools if contains(pool.spec.network, network)), None)


def block_of(pool: IPPool, address: Address) -> Network:
    """The block of `pool` that `address` belongs to."""
    length = pool.spec.block_prefix_length
    first = int(address) >> (address.max_prefixlen - length) << (address.max_prefixlen - length)
    return prefix_at(address.version, first, length)


def block_order(pool: IPPool, host: str) -> Iterator[Network]:
    """Every block of the pool once, from a start that differs by host, ascending, wrapping."""
    network, prefix_length = pool.spec.network, pool.spec.block_prefix_length
    bits = prefix_length - network.prefixlen
    if bits < 0:
        return
    count = 1 << bits
    step = 1 << (network.max_prefixlen - prefix_length)
    start = _spread(host, bits)
    base = int(network.network_address)
    for offset in range(count):
        number = base + (start + offset) % count * step
        yield prefix_at(network.version, number, prefix_length)


def claimable(
    pools: Iterable[IPPool], host: str, existing: Collection[Network], reserved: Reserved
) -> Iterator[Network]:
    """Blocks to try to claim: those that do not exist and overlap none that does."""
    for pool in pools:
        length = pool.spec.block_prefix_length
        others = [n for n in existing if n.overlaps(pool.spec.network) and n.prefixlen != length]
        for network in block_order(pool, host):
            if network in existing or reserved.covers(network):
                continue
            if not any(network.overlaps(other) for other in others):
                yield network


def _requested(text: str, enabled: Sequence[IPPool]) -> IPPool:
    for pool in enabled:
        if text in (pool.metadata.name, pool.spec.cidr):
            return pool
    raise NoPool(f"the requested pool {text} does not exist, or is not enabled")


def _spread(host: str, bits: int) -> int:
    """A number of `bits` bits that depends on the host's name alone: FNV-1, then mixed."""
    digest = _FNV_OFFSET
    for byte in host.encode():
        digest = (digest * _FNV_PRIME & _MASK32) ^ byte
    mixed = digest * _GOLDEN_RATIO & _MASK32
    return mixed >> 32 - bits if bits <= 32 else mixed << bits - 32
