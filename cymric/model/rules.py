"""One rule of a policy or profile, as stored: every field, each checked once when it is read.

A rule with anything in it that is not understood does not become a value: reading it without that
part could match more, and so allow more, than was written. That goes for fields that are unknown
here as well. What stands in for such a rule is told in `strictest`.
Source: Calico 3.32 api/pkg/apis/projectcalico/v3 and its validator, in our own words.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from cymric.model.net import Network, parse_interface
from cymric.model.resources import Spec
from cymric.model.selector import parse as parse_selector

ACTIONS = frozenset({"allow", "deny", "log", "pass"})
PROTOCOL_NAMES = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "sctp": 132, "udplite": 136}
"""IANA's numbers of the protocols that have a name, in lower case."""
PORT_PROTOCOLS = frozenset({6, 17, 132})
"""The protocols that numeric ports are allowed with."""

_PORT_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_PORT_RANGE = re.compile(r"(\d{1,5}):(\d{1,5})")
_ACTION_BY_OLD_NAME = {"": "allow", "next-tier": "pass"}


def parse_action(text: str) -> str:
    """The action in lower case; nothing means allow. Raises ValueError."""
    action = _ACTION_BY_OLD_NAME.get(text.lower(), text.lower())
    if action not in ACTIONS:
        raise ValueError(f"action {text!r} is not Allow, Deny, Log or Pass")
    return action


def parse_protocol(value: int | str) -> int | str:
    """A number, or one of the names in lower case. Raises ValueError."""
    if isinstance(value, str) and value.lower() in PROTOCOL_NAMES:
        return value.lower()
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        raise ValueError(f"{value!r} is no protocol")
    number = int(value)
    if not 0 <= number <= 255:
        raise ValueError(f"protocol {value} is not between 0 and 255")
    return number


def protocol_number(value: int | str) -> int:
    """IANA's number of a protocol. Raises ValueError."""
    parsed = parse_protocol(value)
    return PROTOCOL_NAMES[parsed] if isinstance(parsed, str) else parsed


def parse_port(value: int | str) -> tuple[int, int] | str:
    """First and last port of a number or range; a port's name as it is. Raises ValueError."""
    if isinstance(value, str):
        if match := _PORT_RANGE.fullmatch(value):
            first, last = int(match[1]), int(match[2])
        elif value.isascii() and value.isdigit():
            first = last = int(value)
        elif _PORT_NAME.fullmatch(value):
            return value
        else:
            raise ValueError(f"{value!r} is no port, range of ports or name of a port")
    else:
        first = last = value
    if not 0 <= first <= last <= 65535:
        raise ValueError(f"port {value!r} is not between 0 and 65535")
    return first, last


def parse_net(text: str) -> Network:
    """A prefix or an address; host bits are cut, as Calico does. Raises ValueError."""
    return parse_interface(text).network


class Icmp(Spec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A type, and perhaps a code of it."""

    type: int | None = None
    code: int | None = None

    def __post_init__(self) -> None:
        if self.type is None and self.code is not None:
            raise ValueError("an ICMP code needs a type")
        if not 0 <= (self.type or 0) <= 254 or not 0 <= (self.code or 0) <= 255:
            raise ValueError(f"there is no ICMP type {self.type} code {self.code}")


class ServiceMatch(Spec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The addresses behind a Kubernetes service."""

    name: str = ""
    namespace: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("services needs a name")


class ServiceAccountMatch(Spec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Endpoints by service account: one of the names (if any), and labels of the account."""

    names: tuple[str, ...] = ()
    selector: str = ""

    def __post_init__(self) -> None:
        parse_selector(self.selector)


class EntityRule(Spec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One side of a rule. Everything that is given must hold."""

    nets: tuple[str, ...] = ()
    selector: str = ""
    namespace_selector: str = ""
    services: ServiceMatch | None = None
    ports: tuple[int | str, ...] = ()
    not_nets: tuple[str, ...] = ()
    not_selector: str = ""
    not_ports: tuple[int | str, ...] = ()
    service_accounts: ServiceAccountMatch | None = None

    def __post_init__(self) -> None:
        for net in (*self.nets, *self.not_nets):
            parse_net(net)
        for selector in (self.selector, self.namespace_selector, self.not_selector):
            parse_selector(selector)
        for port in (*self.ports, *self.not_ports):
            parse_port(port)

    @property
    def has_numeric_ports(self) -> bool:
        """Whether a port is given by number, in either list."""
        ports = (*self.ports, *self.not_ports)
        return any(not isinstance(parse_port(port), str) for port in ports)


class RuleMetadata(Spec, frozen=True, kw_only=True):
    """Remarks that travel with a rule."""

    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class Rule(Spec, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See the chapter. An absent `action` allows, as in Calico."""

    action: str = ""
    ip_version: int | None = None
    protocol: int | str | None = None
    icmp: Icmp | None = None
    not_protocol: int | str | None = None
    not_icmp: Icmp | None = msgspec.field(default=None, name="notICMP")
    source: EntityRule = EntityRule()
    destination: EntityRule = EntityRule()
    http: dict[str, Any] | None = None
    metadata: RuleMetadata | None = None

    def __post_init__(self) -> None:
        parse_action(self.action)
        if self.ip_version not in (None, 4, 6):
            raise ValueError(f"ipVersion {self.ip_version} is neither 4 nor 6")
        number = None if self.protocol is None else protocol_number(self.protocol)
        if self.not_protocol is not None:
            parse_protocol(self.not_protocol)
        if (self.icmp or self.not_icmp) and number not in (1, 58):
            raise ValueError("icmp and notICMP need protocol ICMP or ICMPv6")
        for side in (self.source, self.destination):
            if side.has_numeric_ports and number not in PORT_PROTOCOLS:
                raise ValueError("numbers of ports need protocol TCP, UDP or SCTP")
        if (number, self.ip_version) in ((1, 6), (58, 4)):
            raise ValueError(f"protocol {self.protocol} does not exist in IPv{self.ip_version}")
