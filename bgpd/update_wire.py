"""BGP UPDATE messages as they are on the wire: which are plain, and what a plain one says. Pure.

Place in the flow: ExaBGP reads a message ▶ `is_plain` (in ExaBGP's process, exabgp_speed.py) ▶ its
bytes in one short line ▶ `decode` (in bgpd). Whatever is not plain goes ExaBGP's own way, which
knows RFC 7606 (a broken attribute withdraws its prefixes), four-octet AS numbers in disguise, and
all other families.

Invariants:

- Plain is what leaves no choice: IPv4 or IPv6 unicast, known attributes, once each, with their
  usual flags and a possible length and content, all mandatory ones there, prefixes to the last
  byte. For a plain message `decode` never fails; for any bytes `is_plain` never raises.
- Equal attributes are one object, so that whoever groups routes may compare by identity.

Source: RFC 4271 §4.3, §5; RFC 4760; RFC 2545 §3; RFC 4456 §8; RFC 1997, 4360, 8092; RFC 6793.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from bgpd.announcement import AsPathSegment, Origin, PathAttributes, SegmentKind

NO_ATTRIBUTES = PathAttributes()
REMEMBERED_ATTRIBUTES = 4096
REMEMBERED_PREFIXES = 1 << 18

ORIGIN, AS_PATH, NEXT_HOP, MED, LOCAL_PREF, ATOMIC, AGGREGATOR = 1, 2, 3, 4, 5, 6, 7
COMMUNITIES, ORIGINATOR_ID, CLUSTER_LIST, MP_REACH, MP_UNREACH = 8, 9, 10, 14, 15
EXTENDED, LARGE = 16, 32
_EXTENDED_LENGTH, _PARTIAL = 0x10, 0x20

_FLAGS = {
    ORIGIN: 0x40,
    AS_PATH: 0x40,
    NEXT_HOP: 0x40,
    MED: 0x80,
    LOCAL_PREF: 0x40,
    ATOMIC: 0x40,
    AGGREGATOR: 0xC0,
    COMMUNITIES: 0xC0,
    ORIGINATOR_ID: 0x80,
    CLUSTER_LIST: 0x80,
    MP_REACH: 0x80,
    MP_UNREACH: 0x80,
    EXTENDED: 0xC0,
    LARGE: 0xC0,
}
_LENGTHS = {
    ORIGIN: 1,
    NEXT_HOP: 4,
    MED: 4,
    LOCAL_PREF: 4,
    ATOMIC: 0,
    AGGREGATOR: 8,
    ORIGINATOR_ID: 4,
}
_MULTIPLES = {COMMUNITIES: 4, CLUSTER_LIST: 4, EXTENDED: 8, LARGE: 12}
_ORIGINS = (Origin.IGP, Origin.EGP, Origin.INCOMPLETE)
_SEGMENTS = {1: SegmentKind.SET, 2: SegmentKind.SEQUENCE}
_IPV6_UNICAST = b"\x00\x02\x01"


class NotPlain(Exception):
    """The message is for somebody who knows more."""


@dataclass(frozen=True, slots=True)
class WireUpdate:
    """What a plain UPDATE says; withdrawals apply first."""

    withdrawn: tuple[str, ...] = ()
    announced: tuple[str, ...] = ()
    next_hop: str = ""
    attributes: PathAttributes = NO_ATTRIBUTES


@dataclass(frozen=True, slots=True)
class _Said:
    """The attributes of one message, checked; `reach`, `unreach`: the prefixes in MP attributes."""

    items: tuple[tuple[int, bytes], ...]
    next_hop: str
    has_mandatory: bool
    mp_next_hop: str = ""
    reach: bytes = b""
    unreach: bytes = b""


def is_plain(body: bytes) -> bool:
    """Whether `decode` can read this UPDATE (without the BGP header) and nobody needs to judge it.

    AS numbers are taken to have four octets: the session must have agreed on that.
    """
    try:
        withdrawn, said, announced = _parts(body)
        for prefixes, bits in (
            (withdrawn, 32), (announced, 32), (said.reach, 128), (said.unreach, 128),
        ):  # fmt: skip
            _check_prefixes(prefixes, bits)
    except (NotPlain, IndexError, struct.error):
        return False
    if not (withdrawn or announced or said.reach or said.unreach):
        return False  # End-of-RIB, or nothing at all
    if announced and said.reach:
        return False  # two next hops in one message: legal, and nobody's habit
    if announced:
        return said.has_mandatory and bool(said.next_hop)
    if said.reach:
        return said.has_mandatory
    return True


def decode(body: bytes) -> WireUpdate:
    """What a plain UPDATE says. Raises NotPlain, IndexError or struct.error for another."""
    withdrawn, said, announced = _parts(body)
    if said.reach or said.unreach:
        return WireUpdate(
            withdrawn=(*_ipv4_texts(withdrawn), *_ipv6_texts(said.unreach)),
            announced=tuple(_ipv6_texts(said.reach) if said.reach else _ipv4_texts(announced)),
            next_hop=said.mp_next_hop if said.reach else said.next_hop,
            attributes=_path_attributes(said.items),
        )
    return WireUpdate(
        withdrawn=tuple(_ipv4_texts(withdrawn)) if withdrawn else (),
        announced=tuple(_ipv4_texts(announced)),
        next_hop=said.next_hop,
        attributes=_path_attributes(said.items),
    )


def _parts(body: bytes) -> tuple[bytes, _Said, bytes]:
    withdrawn_end = 2 + int.from_bytes(body[:2])
    attributes_at = withdrawn_end + 2
    attributes_end = attributes_at + int.from_bytes(body[withdrawn_end:attributes_at])
    if len(body) < 4 or attributes_at > len(body) or attributes_end > len(body):
        raise NotPlain("lengths")
    said = _said(body[attributes_at:attributes_end])
    return body[2:withdrawn_end], said, body[attributes_end:]


# --- prefixes -------------------------------------------------------------------------------------


def _check_prefixes(data: bytes, bits: int) -> None:
    at, end = 0, len(data)
    while at < end:
        length = data[at]
        if length > bits:
            raise NotPlain("prefix length")
        at += 1 + (length + 7 >> 3)
    if at != end:
        raise NotPlain("half a prefix")


def _ipv4_texts(data: bytes) -> Iterator[str]:
    at, end = 0, len(data)
    while at < end:
        after = at + 1 + (data[at] + 7 >> 3)
        yield _ipv4_text(data[at:after])
        at = after


def _ipv6_texts(data: bytes) -> Iterator[str]:
    at, end = 0, len(data)
    while at < end:
        after = at + 1 + (data[at] + 7 >> 3)
        yield _ipv6_text(data[at:after])
        at = after


@lru_cache(maxsize=REMEMBERED_PREFIXES)
def _ipv4_text(packed: bytes) -> str:
    """Bits beyond the length mean nothing (RFC 4271 §4.3) and are cleared."""
    length = packed[0]
    number = int.from_bytes(packed[1:].ljust(4, b"\0")) & (0xFFFFFFFF << 32 - length)
    return f"{number >> 24 & 255}.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}/{length}"


@lru_cache(maxsize=REMEMBERED_PREFIXES)
def _ipv6_text(packed: bytes) -> str:
    length = packed[0]
    number = int.from_bytes(packed[1:].ljust(16, b"\0")) >> 128 - length << 128 - length
    return f"{_ipv6(number.to_bytes(16))}/{length}"


def _ipv6(packed: bytes) -> str:
    """The text `ipaddress` gives, which differs from the library's for addresses with IPv4 in."""
    text = socket.inet_ntop(socket.AF_INET6, packed)
    if "." not in text:
        return text
    high, low = struct.unpack(">HH", packed[12:])
    return f"{text[: text.rindex(':')]}:{high:x}:{low:x}"


# --- attributes -----------------------------------------------------------------------------------


@lru_cache(maxsize=REMEMBERED_ATTRIBUTES)
def _said(data: bytes) -> _Said:
    values = _values(data)
    reach, unreach = values.pop(MP_REACH, None), values.pop(MP_UNREACH, None)
    mp_next_hop, reached = "", b""
    if reach is not None:
        mp_next_hop, reached = _reach(reach)
    if unreach is not None and (len(unreach) <= 3 or unreach[:3] != _IPV6_UNICAST):
        raise NotPlain("another family, or End-of-RIB")
    if values.get(ORIGIN, b"\0")[0] >= len(_ORIGINS):
        raise NotPlain("origin")
    _check_segments(values.get(AS_PATH, b""))
    next_hop = values.get(NEXT_HOP)
    return _Said(
        items=tuple(sorted(values.items())),
        next_hop="" if next_hop is None else socket.inet_ntoa(next_hop),
        has_mandatory=ORIGIN in values and AS_PATH in values,
        mp_next_hop=mp_next_hop,
        reach=reached,
        unreach=b"" if unreach is None else unreach[3:],
    )


def _values(data: bytes) -> dict[int, bytes]:
    """Attributes by type, each with its usual flags and a possible length."""
    values: dict[int, bytes] = {}
    at, end = 0, len(data)
    while at < end:
        flags, kind, length = data[at], data[at + 1], data[at + 2]
        at += 3
        if flags & _EXTENDED_LENGTH:
            length = length << 8 | data[at]
            at += 1
        usual = _FLAGS.get(kind)
        if usual is None or kind in values:
            raise NotPlain("an attribute that is unknown, or there twice")
        unusual = (flags & ~_EXTENDED_LENGTH) ^ usual
        if unusual and not (unusual == _PARTIAL and usual == 0xC0):
            raise NotPlain("flags")
        if _LENGTHS.get(kind, length) != length or at + length > end:
            raise NotPlain("length")
        if kind in _MULTIPLES and (not length or length % _MULTIPLES[kind]):
            raise NotPlain("length")
        values[kind] = data[at : at + length]
        at += length
    return values


def _reach(value: bytes) -> tuple[str, bytes]:
    """Next hop and prefixes of MP_REACH_NLRI. A second, link-local next hop is left out."""
    size = value[3]
    if value[:3] != _IPV6_UNICAST or size not in (16, 32) or len(value) < 5 + size:
        raise NotPlain("another family or kind of next hop")
    return _ipv6(value[4:20]), value[5 + size :]


@lru_cache(maxsize=REMEMBERED_ATTRIBUTES)
def _path_attributes(items: tuple[tuple[int, bytes], ...]) -> PathAttributes:
    values = dict(items)

    def number(kind: int) -> int | None:
        return int.from_bytes(values[kind]) if kind in values else None

    def parts(kind: int, form: str) -> tuple[tuple[int, ...], ...]:
        return tuple(sorted(struct.iter_unpack(form, values.get(kind, b""))))

    aggregator = values.get(AGGREGATOR)
    originator, clusters = values.get(ORIGINATOR_ID), values.get(CLUSTER_LIST, b"")
    return PathAttributes(
        origin=_ORIGINS[values.get(ORIGIN, b"\0")[0]],
        as_path=tuple(_segments(values.get(AS_PATH, b""))),
        local_pref=number(LOCAL_PREF),
        med=number(MED),
        atomic_aggregate=ATOMIC in values,
        aggregator=None
        if aggregator is None
        else f"{int.from_bytes(aggregator[:4])}:{socket.inet_ntoa(aggregator[4:])}",
        communities=parts(COMMUNITIES, ">HH"),  # type: ignore[arg-type]
        large_communities=parts(LARGE, ">III"),  # type: ignore[arg-type]
        extended_communities=tuple(one for (one,) in parts(EXTENDED, ">Q")),
        originator_id=None if originator is None else socket.inet_ntoa(originator),
        cluster_list=tuple(
            socket.inet_ntoa(clusters[at : at + 4]) for at in range(0, len(clusters), 4)
        ),
    )


def _check_segments(data: bytes) -> None:
    at, end = 0, len(data)
    while at < end:
        if data[at] not in _SEGMENTS or not data[at + 1]:
            raise NotPlain("AS_PATH")
        at += 2 + 4 * data[at + 1]
    if at != end:
        raise NotPlain("AS_PATH")


def _segments(data: bytes) -> Iterator[AsPathSegment]:
    at, end = 0, len(data)
    while at < end:
        kind, count = data[at], data[at + 1]
        yield AsPathSegment(_SEGMENTS[kind], struct.unpack_from(f">{count}I", data, at + 2))
        at += 2 + 4 * count
