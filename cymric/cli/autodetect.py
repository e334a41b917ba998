"""Which of this machine's addresses is the node's: Calico's autodetection methods.

    10.0.0.11/24          this address, with this prefix length
    10.0.0.11             this address, with the prefix length its interface has
    autodetect            the same as first-found
    first-found           first global address of the first plausible interface
    interface=eth.*,ens3  the same, among interfaces matching one of these regular expressions
    skip-interface=docker the same, among those that match none
    cidr=10.0.0.0/8       the first address inside one of these prefixes
    can-reach=10.1.0.1    the address from which the kernel would send there

Interfaces are tried from the newest to the oldest; those of container runtimes and of Calico are
left out. Pure: what the kernel has comes in as `Seen`, the answer for can-reach as an argument.
Source: Calico 3.32 node startup, described in our own words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface

from cymric.model.net import Address, Interface, Network, parse_interface, parse_network

_NOT_A_NODE = re.compile(
    r"(docker|cbr|dummy|podman|virbr|lxcbr|veth|lo|br-|cali|tunl|flannel|kube-ipvs|cni|"
    r"vxlan\.calico|vxlan-v6\.calico|wireguard\.cali|wg-v6\.cali|nodelocaldns)"
)


class NoAddress(Exception):
    """No address of this machine fits; the message says what was looked for."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An interface that is up, and its addresses in the kernel's order."""

    name: str
    index: int
    addresses: tuple[Interface, ...]


def reached_through(method: str) -> str:
    """The destination of a can-reach method; empty for all others."""
    name, _, argument = method.partition("=")
    return argument if name == "can-reach" else ""


def choose(method: str, seen: Sequence[Seen], source: Address | None = None) -> Interface:
    """The node's IPv4 address with its prefix length. Raises NoAddress; ValueError if no method.

    `source` is the address from which the kernel would send to the destination of can-reach.
    """
    name, _, argument = method.partition("=")
    newest_first = sorted(seen, key=lambda interface: interface.index, reverse=True)
    plausible = [interface for interface in newest_first if not _NOT_A_NODE.match(interface.name)]
    if name == "can-reach":
        return _of_address(source, seen, method)
    if name in ("autodetect", "first-found"):
        return _first(_global(plausible), method)
    if name == "interface":
        patterns = _patterns(argument)
        chosen = [i for i in newest_first if any(p.fullmatch(i.name) for p in patterns)]
        return _first(_global(chosen), method)
    if name == "skip-interface":
        patterns = _patterns(argument)
        chosen = [i for i in plausible if not any(p.fullmatch(i.name) for p in patterns)]
        return _first(_global(chosen), method)
    if name == "cidr":
        networks = [parse_network(text.strip()) for text in argument.split(",")]
        return _first(_inside(_global(newest_first), networks), method)
    if "/" in method:
        return parse_interface(method)
    try:
        return _of_address(parse_interface(method).ip, seen, method)
    except NoAddress:
        return parse_interface(method)  # not here yet: a /32, as Calico reads a bare address


def _global(interfaces: Iterable[Seen]) -> Iterable[Interface]:
    for interface in interfaces:
        for address in interface.addresses:
            ip = address.ip
            is_local = ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified
            if isinstance(address, IPv4Interface) and not is_local:
                yield address


def _inside(addresses: Iterable[Interface], networks: Sequence[Network]) -> Iterable[Interface]:
    return (address for address in addresses if any(address.ip in n for n in networks))


def _of_address(wanted: Address | None, seen: Iterable[Seen], method: str) -> Interface:
    return _first((a for i in seen for a in i.addresses if a.ip == wanted), method)


def _first(addresses: Iterable[Interface], method: str) -> Interface:
    for address in addresses:
        return address
    raise NoAddress(f"no address of this machine fits {method!r}")


def _patterns(text: str) -> list[re.Pattern[str]]:
    try:
        return [re.compile(part.strip()) for part in text.split(",") if part.strip()]
    except re.error as error:
        raise ValueError(f"{text!r} is no list of regular expressions: {error}") from None
