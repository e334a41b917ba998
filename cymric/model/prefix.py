"""Prefixes in bulk: the same values as `ipaddress` makes, cheap to look up by the ten thousand.

`ipaddress` computes the hash of a network anew, from two integers, at every look-up in a set or
dictionary, and tells whether one network lies in another by four comparisons of objects. For a few
prefixes that is nothing; a routing table asks a dozen times per route. Here the hash is kept, equal
texts give the same object, and many networks are asked at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Network, IPv6Network

from cymric.model.net import Network, parse_network


class HashedIPv4Network(IPv4Network):
    """An IPv4Network, equal to any other of the same prefix, that computes its hash once."""

    _kept_hash: int | None = None

    def __hash__(self) -> int:
        if self._kept_hash is None:
            self._kept_hash = super().__hash__()
        return self._kept_hash


class HashedIPv6Network(IPv6Network):
    """As `HashedIPv4Network`."""

    _kept_hash: int | None = None

    def __hash__(self) -> int:
        if self._kept_hash is None:
            self._kept_hash = super().__hash__()
        return self._kept_hash


@lru_cache(maxsize=65_536)
def prefix(text: str) -> Network:
    """The prefix of that text, mostly the same object as last time. Raises ValueError."""
    if ":" in text:
        return HashedIPv6Network(text)
    return HashedIPv4Network(text)


@lru_cache(maxsize=65_536)
def prefix_at(version: int, address: int, length: int) -> Network:
    """The prefix at that numeric address. Raises ValueError."""
    if version == 4:
        return HashedIPv4Network((address, length))
    return HashedIPv6Network((address, length))


@dataclass(frozen=True, slots=True)
class PrefixSet:
    """A set of networks that is asked what lies inside it."""

    networks: frozenset[Network]
    _numbers: dict[int, tuple[tuple[int, frozenset[int]], ...]] = field(
        init=False, compare=False, repr=False
    )
    """By IP version: each prefix length, the shortest first, with the leading bits of its nets."""

    def __post_init__(self) -> None:
        found: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for network in self.networks:
            length = network.prefixlen
            number = int(network.network_address) >> (network.max_prefixlen - length)
            found[network.version].setdefault(length, set()).add(number)
        numbers = {
            version: tuple((length, frozenset(nets)) for length, nets in sorted(lengths.items()))
            for version, lengths in found.items()
        }
        object.__setattr__(self, "_numbers", numbers)

    @classmethod
    def of(cls, networks: Iterable[Network]) -> PrefixSet:
        """The set of these networks."""
        return cls(frozenset(networks))

    @classmethod
    def parse(cls, *texts: str) -> PrefixSet:
        """The set of the networks with these texts."""
        return cls.of(map(parse_network, texts))

    def covers(self, inner: Network) -> bool:
        """Whether `inner` is one of the networks or lies inside one."""
        number, length, bits = int(inner.network_address), inner.prefixlen, inner.max_prefixlen
        for outer_length, numbers in self._numbers[inner.version]:
            if outer_length > length:
                return False
            if number >> (bits - outer_length) in numbers:
                return True
        return False
