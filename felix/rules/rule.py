"""The vocabulary of rules: Match, Action, Rule, Chain, and the whole wanted content of a table.

Values only. A match is kept as the pieces of text that iptables-restore reads, in the order given:
the text is what rule hashes are made of (felix/iptables/render.py), so spelling and order here are
part of the format shared with Calico.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["source", "destination"]
"""The side of a packet that an address or port belongs to."""


@dataclass(frozen=True, slots=True)
class Match:
    """What a packet must be, built piece by piece: `Match().in_interface("cali+").mark_set(4)`."""

    fragments: tuple[str, ...] = ()

    def _and(self, fragment: str) -> Match:
        return Match((*self.fragments, fragment))

    def mark_set(self, bits: int) -> Match:
        """All `bits` of the packet mark are set."""
        return self._and(f"-m mark --mark {bits:#x}/{bits:#x}")

    def mark_clear(self, bits: int) -> Match:
        """All `bits` of the packet mark are clear."""
        return self._and(f"-m mark --mark 0/{bits:#x}")

    def in_interface(self, name: str) -> Match:
        """Came in through `name`; a final `+` stands for any ending."""
        return self._and(f"--in-interface {name}")

    def out_interface(self, name: str) -> Match:
        """Leaves through `name`; a final `+` stands for any ending."""
        return self._and(f"--out-interface {name}")

    def protocol(self, name_or_number: str) -> Match:
        """IP protocol, as `tcp` or as a number in text."""
        return self._and(f"-p {name_or_number}")

    def not_protocol(self, name_or_number: str) -> Match:
        """Any other IP protocol."""
        return self._and(f"! -p {name_or_number}")

    def source(self, cidr: str) -> Match:
        """Source address inside `cidr`."""
        return self._and(f"--source {cidr}")

    def destination(self, cidr: str) -> Match:
        """Destination address inside `cidr`."""
        return self._and(f"--destination {cidr}")

    def net(self, side: Side, cidr: str) -> Match:
        """Address of that side inside `cidr`."""
        return self._and(f"--{side} {cidr}")

    def not_net(self, side: Side, cidr: str) -> Match:
        """Address of that side outside `cidr`."""
        return self._and(f"! --{side} {cidr}")

    def ports(self, side: Side, ports: str) -> Match:
        """Port of that side among `80,8000:8080`, 15 slots at most (needs a protocol before)."""
        return self._and(f"-m multiport --{side}-ports {ports}")

    def not_ports(self, side: Side, ports: str) -> Match:
        """Port of that side not among these (needs a protocol before)."""
        return self._and(f"-m multiport ! --{side}-ports {ports}")

    def destination_ports(self, ports: str) -> Match:
        """Destination port among `80,8000:8080` (needs a protocol before)."""
        return self.ports("destination", ports)

    def icmp(self, ip_version: int, type_and_code: str, *, negated: bool = False) -> Match:
        """An ICMP message of type `8` or type and code `3/1` (needs the protocol before)."""
        name, option = ("icmp", "icmp-type") if ip_version == 4 else ("icmp6", "icmpv6-type")
        return self._and(f"-m {name} {'! ' if negated else ''}--{option} {type_and_code}")

    def icmpv6_type(self, number: int) -> Match:
        """An ICMPv6 message of that type (needs the protocol before)."""
        return self._and(f"-m icmp6 --icmpv6-type {number}")

    def conntrack_state(self, states: str) -> Match:
        """Connection state among `RELATED,ESTABLISHED`."""
        return self._and(f"-m conntrack --ctstate {states}")

    def not_conntrack_state(self, states: str) -> Match:
        """Connection state not among `states`."""
        return self._and(f"-m conntrack ! --ctstate {states}")

    def in_set(self, set_name: str, directions: str) -> Match:
        """`src`, `dst`, or address and port (`src,src`) are a member of the IP set."""
        return self._and(f"-m set --match-set {set_name} {directions}")

    def not_in_set(self, set_name: str, directions: str) -> Match:
        """They are no member of the IP set."""
        return self._and(f"-m set ! --match-set {set_name} {directions}")

    def source_set(self, set_name: str) -> Match:
        """Source address is a member of the IP set."""
        return self.in_set(set_name, "src")

    def not_destination_set(self, set_name: str) -> Match:
        """Destination address is no member of the IP set."""
        return self.not_in_set(set_name, "dst")

    def limit(self, rate: str, burst: int) -> Match:
        """Not more often than `rate` (`10/minute`), `burst` at once."""
        return self._and(f"-m limit --limit {rate} --limit-burst {burst}")

    def reverse_path_failed(self) -> Match:
        """The route back to the source does not leave through the interface it came from."""
        return self._and("-m rpfilter --invert --validmark")


@dataclass(frozen=True, slots=True)
class Jump:
    """Go on in `chain`, come back at its end."""

    chain: str


@dataclass(frozen=True, slots=True)
class Goto:
    """Go on in `chain`; its end returns to whoever jumped here."""

    chain: str


@dataclass(frozen=True, slots=True)
class Target:
    """A verdict without arguments: ACCEPT, DROP, RETURN, REJECT or NOTRACK."""

    name: str


ACCEPT = Target("ACCEPT")
DROP = Target("DROP")
REJECT = Target("REJECT")
RETURN = Target("RETURN")
NOTRACK = Target("NOTRACK")


@dataclass(frozen=True, slots=True)
class SetMark:
    """Set these bits of the packet mark."""

    bits: int


@dataclass(frozen=True, slots=True)
class ClearMark:
    """Clear these bits of the packet mark."""

    bits: int


@dataclass(frozen=True, slots=True)
class WriteMark:
    """Make the bits of `mask` in the packet mark equal to `bits`."""

    bits: int
    mask: int


@dataclass(frozen=True, slots=True)
class Log:
    """Report the packet to the kernel log."""

    prefix: str


@dataclass(frozen=True, slots=True)
class NFLog:
    """Hand the packet to whoever listens to that netlink group."""

    prefix: str
    group: int


LogAction = Log | NFLog


@dataclass(frozen=True, slots=True)
class SetDSCP:
    """Write the six bits by which routers sort packets (RFC 2474)."""

    value: int


@dataclass(frozen=True, slots=True)
class Masquerade:
    """Translate the source to the address of the leaving interface; `ports` as `min-max`."""

    ports: str = ""
    random_fully: bool = True


@dataclass(frozen=True, slots=True)
class SourceNAT:
    """Translate the source to `address` (and `ports`, as `min-max`)."""

    address: str
    ports: str = ""
    random_fully: bool = True


@dataclass(frozen=True, slots=True)
class DestinationNAT:
    """Translate the destination to `address`."""

    address: str


Action = (
    Jump
    | Goto
    | Target
    | SetMark
    | ClearMark
    | WriteMark
    | Log
    | NFLog
    | SetDSCP
    | Masquerade
    | SourceNAT
    | DestinationNAT
)


@dataclass(frozen=True, slots=True)
class Rule:
    """If `match`, then `action`; without an action only the comments count."""

    match: Match = Match()
    action: Action | None = None
    comments: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of ours and all of its rules."""

    name: str
    rules: tuple[Rule, ...] = ()

    @property
    def targets(self) -> frozenset[str]:
        """The chains this one jumps or goes to."""
        return frozenset(
            rule.action.chain for rule in self.rules if isinstance(rule.action, Jump | Goto)
        )


@dataclass(frozen=True, slots=True)
class TableContent:
    """All we want in one table.

    `inserts` and `appends` are our rules in chains of the kernel, at their top and at their end.
    Whoever makes a content leaves out chains that none of them leads to.
    """

    name: str
    chains: Mapping[str, Chain] = field(default_factory=dict)
    inserts: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)
    appends: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict)


def chains_by_name(*chains: Chain) -> dict[str, Chain]:
    """Index chains by name."""
    return {chain.name: chain for chain in chains}
