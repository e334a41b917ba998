"""Prefixes in bulk: the same values as `ipaddress` makes, cheap to make and to look up.

`ipaddress` computes the hash of a network anew, from two integers, at every look-up in a set or
dictionary, and tells whether one network lies in another by four comparisons of objects. For a few
prefixes that is nothing; a routing table asks a dozen times per route. Here the hash is kept, equal
texts give the same object, IPv4 texts in canonical form are read without the library's checks, and
many networks are asked at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Network
from typing import Generic, TypeVar

from cymric.model.net import Network, parse_network

REMEMBERED = 1 << 18
"""How many texts keep their object: two hundred bytes each, for twice the largest table we expect.

A cache smaller than the table is worse than none, since tables are walked from end to end.
"""

T = TypeVar("T")

_OCTETS = {str(number): number for number in range(256)}
_LENGTHS = {str(length): length for length in range(33)}
_NETMASKS = tuple(IPv4Network((0, length)).netmask for length in range(33))
_HOST_BITS = tuple((1 << (32 - length)) - 1 for length in range(33))


class HashedIPv4Network(IPv4Network):
    """An IPv4Network, equal to any other of the same prefix, that computes its hash once."""

    _kept_hash: int

    def __init__(self, address: object, strict: bool = True) -> None:
        super().__init__(address, strict)
        self._kept_hash = super().__hash__()

    def __hash__(self) -> int:
        return self._kept_hash


class HashedIPv6Network(IPv6Network):
    """As `HashedIPv4Network`."""

    _kept_hash: int

    def __init__(self, address: object, strict: bool = True) -> None:
        super().__init__(address, strict)
        self._kept_hash = super().__hash__()

    def __hash__(self) -> int:
        return self._kept_hash


def _ipv4(number: int, length: int) -> HashedIPv4Network:
    """What the constructor makes, without its checks; the test compares every attribute."""
    made = HashedIPv4Network.__new__(HashedIPv4Network)
    made.network_address = IPv4Address(number)
    made.netmask = netmask = _NETMASKS[length]
    made._prefixlen = length  # type: ignore[attr-defined]
    made._kept_hash = number ^ int(netmask)
    return made


@lru_cache(maxsize=REMEMBERED)
def prefix(text: str) -> Network:
    """The prefix of that text, mostly the same object as last time. Raises ValueError."""
    if ":" in text:
        return HashedIPv6Network(text)
    try:
        quad, _, length_text = text.partition("/")
        one, two, three, four = quad.split(".")
        number = _OCTETS[one] << 24 | _OCTETS[two] << 16 | _OCTETS[three] << 8 | _OCTETS[four]
        length = _LENGTHS[length_text]
    except (KeyError, ValueError):
        return HashedIPv4Network(text)  # some other spelling, or its own words for what is wrong
    if number & _HOST_BITS[length]:
        return HashedIPv4Network(text)  # raises
    return _ipv4(number, length)


@lru_cache(maxsize=REMEMBERED)
def prefix_at(version: int, address: int, length: int) -> Network:
    """The prefix at that numeric address. Raises ValueError."""
    if version == 4:
        return HashedIPv4Network((address, length))
    return HashedIPv6Network((address, length))


def prefixes_inside(network: Network) -> Iterator[Network]:
    """The network itself and every prefix inside it: twice as many as it has addresses."""
    start, bits = int(network.network_address), network.max_prefixlen
    for length in range(network.prefixlen, bits + 1):
        step = 1 << (bits - length)
        for number in range(start, start + network.num_addresses, step):
            yield prefix_at(network.version, number, length)


class PrefixMap(Generic[T]):
    """Values by network, asked which network holds a prefix; changed in place."""

    def __init__(self, values: Mapping[Network, T] | None = None) -> None:
        self._by_length: dict[int, dict[int, dict[int, tuple[Network, T]]]] = {4: {}, 6: {}}
        for network, value in (values or {}).items():
            self[network] = value

    def __setitem__(self, network: Network, value: T) -> None:
        length, number = network.prefixlen, _leading_bits(network)
        self._by_length[network.version].setdefault(length, {})[number] = (network, value)

    def get(self, network: Network) -> T | None:
        """The value of exactly this network."""
        held = self._by_length[network.version].get(network.prefixlen, {})
        found = held.get(_leading_bits(network))
        return None if found is None else found[1]

    def discard(self, network: Network) -> None:
        """Forget a network, if it is there."""
        lengths = self._by_length[network.version]
        held = lengths.get(network.prefixlen, {})
        held.pop(_leading_bits(network), None)
        if not held:
            lengths.pop(network.prefixlen, None)

    def holding(self, inner: Network) -> tuple[Network, T] | None:
        """The longest network that is `inner` or holds it, and its value."""
        number, length, bits = int(inner.network_address), inner.prefixlen, inner.max_prefixlen
        best_length, best = -1, None
        for outer_length, held in self._by_length[inner.version].items():
            if best_length < outer_length <= length:
                found = held.get(number >> (bits - outer_length))
                if found is not None:
                    best_length, best = outer_length, found
        return best


def _leading_bits(network: Network) -> int:
    return int(network.network_address) >> (network.max_prefixlen - network.prefixlen)


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
            found[network.version].setdefault(network.prefixlen, set()).add(_leading_bits(network))
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
