"""Addresses, prefixes and AS numbers as the data model writes them.

The standard library's `ipaddress` types are the values; this file adds only the strictness that
Calico's validation asks for and its two text forms of a prefix (with a slash in values, with a
dash in keys).
"""

from __future__ import annotations

from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import TypeGuard

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface

MAX_ASN = 2**32 - 1


def parse_address(text: str) -> Address:
    """One address. Raises ValueError that quotes the text."""
    return ip_address(text)


def parse_network(text: str) -> Network:
    """A prefix without host bits, `10.0.0.0/26`; a bare address is a /32 (/128)."""
    return ip_network(text, strict=True)


def parse_interface(text: str) -> Interface:
    """An address with its prefix length, host bits kept: `10.0.0.11/24`; bare means /32 (/128)."""
    return ip_interface(text)


def network_of(address: Address, prefix_length: int) -> Network:
    """The prefix of that length around `address`, whose host bits do not matter."""
    kind = IPv4Network if address.version == 4 else IPv6Network
    return kind((int(address), prefix_length), strict=False)


def host_network(address: Address) -> Network:
    """The /32 or /128 of one address."""
    return network_of(address, address.max_prefixlen)


def contains(outer: Network, inner: Network) -> bool:
    """Whether `inner` is `outer` or lies inside it; False across families."""
    if isinstance(outer, IPv4Network):
        return isinstance(inner, IPv4Network) and inner.subnet_of(outer)
    return isinstance(inner, IPv6Network) and inner.subnet_of(outer)


def to_dashed(network: Network) -> str:
    """The key form of a prefix: `192.168.10.0-26`."""
    return str(network).replace("/", "-", 1)


def from_dashed(text: str) -> Network:
    """The prefix behind its key form; the network address must already be masked."""
    return parse_network(text.replace("-", "/", 1))


def is_ipv4(network: Network) -> TypeGuard[IPv4Network]:
    """Whether the prefix is of the IPv4 family."""
    return network.version == 4


def parse_asn(value: int | str) -> int:
    """An AS number: a number, decimal text, or asdot (RFC 5396) such as `1.10`."""
    if isinstance(value, int):
        number = value
    elif "." in value:
        high, _, low = value.partition(".")
        if int(high) > 0xFFFF or int(low) > 0xFFFF:
            raise ValueError(f"AS number {value!r} has a half above 65535")
        number = int(high) * 65536 + int(low)
    else:
        number = int(value)
    if not 0 <= number <= MAX_ASN:
        raise ValueError(f"AS number {value!r} is not between 0 and {MAX_ASN}")
    return number
