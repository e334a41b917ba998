"""UPDATEs off the wire: ours against what was meant, and against ExaBGP's own decoder."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address
from types import SimpleNamespace
from typing import Any

import pytest
from exabgp.bgp.message import Update
from exabgp.bgp.message.direction import Direction
from exabgp.bgp.message.notification import Notify
from exabgp.bgp.message.update.attribute import Attribute
from exabgp.logger.option import option
from exabgp.protocol.family import AFI, SAFI
from exabgp.reactor.api.response.json import JSON
from hypothesis import given
from hypothesis import strategies as st

from bgpd import exabgp_events
from bgpd.announcement import (
    Announcement,
    AsPathSegment,
    Origin,
    PathAttributes,
    SegmentKind,
    as_sequence,
)
from bgpd.update_wire import WireUpdate, decode, is_plain

NEXT_HOP = "192.0.2.1"


def attribute(kind: int, flags: int, value: bytes) -> bytes:
    """One path attribute; a long one gets the long length."""
    if len(value) > 255:
        return bytes([flags | 0x10, kind]) + struct.pack(">H", len(value)) + value
    return bytes([flags, kind, len(value)]) + value


def packed(prefixes: Iterable[str]) -> bytes:
    """Prefixes as NLRI."""
    parts = []
    for text in prefixes:
        network: IPv4Network | IPv6Network = IPv6Network(text) if ":" in text else IPv4Network(text)
        size = network.prefixlen + 7 >> 3
        parts.append(bytes([network.prefixlen]) + network.network_address.packed[:size])
    return b"".join(parts)


def body(attributes: bytes, announced: bytes = b"", withdrawn: bytes = b"") -> bytes:
    """An UPDATE without the BGP header."""
    lengths = struct.pack(">H", len(withdrawn)), struct.pack(">H", len(attributes))
    return lengths[0] + withdrawn + lengths[1] + attributes + announced


def mandatory(next_hop: str | None = NEXT_HOP) -> bytes:
    """Origin, an AS_PATH and a next hop."""
    said = attribute(1, 0x40, b"\0") + attribute(2, 0x40, bytes([2, 1, 0, 0, 0xFD, 0xE8]))
    return said if next_hop is None else said + attribute(3, 0x40, ip_address(next_hop).packed)


def encoded(said: PathAttributes, next_hop: str) -> bytes:
    """All attributes in the order of their types."""
    segments = b"".join(
        struct.pack(f">BB{len(one.asns)}I", 1 + (one.kind is SegmentKind.SEQUENCE),
                    len(one.asns), *one.asns)
        for one in said.as_path
    )  # fmt: skip
    parts: Mapping[tuple[int, int], bytes | None] = {
        (1, 0x40): bytes([list(Origin).index(said.origin)]),
        (2, 0x40): segments,
        (3, 0x40): ip_address(next_hop).packed,
        (4, 0x80): None if said.med is None else struct.pack(">I", said.med),
        (5, 0x40): None if said.local_pref is None else struct.pack(">I", said.local_pref),
        (6, 0x40): b"" if said.atomic_aggregate else None,
        (8, 0xC0): b"".join(struct.pack(">HH", *one) for one in said.communities) or None,
        (9, 0x80): None if said.originator_id is None else ip_address(said.originator_id).packed,
        (10, 0x80): b"".join(ip_address(one).packed for one in said.cluster_list) or None,
        (16, 0xC0): b"".join(struct.pack(">Q", one) for one in said.extended_communities) or None,
        (32, 0xC0): b"".join(struct.pack(">III", *one) for one in said.large_communities) or None,
    }
    return b"".join(
        attribute(kind, flags, value) for (kind, flags), value in parts.items() if value is not None
    )


numbers = st.integers(0, 2**32 - 1)
addresses = st.ip_addresses(v=4).map(str)
segments = st.builds(
    AsPathSegment,
    st.sampled_from([SegmentKind.SEQUENCE, SegmentKind.SET]),
    st.lists(numbers, min_size=1, max_size=5).map(tuple),
)
path_attributes = st.builds(
    PathAttributes,
    origin=st.sampled_from(Origin),
    as_path=st.lists(segments, max_size=3).map(tuple),
    local_pref=st.none() | numbers,
    med=st.none() | numbers,
    atomic_aggregate=st.booleans(),
    communities=st.lists(st.tuples(*[st.integers(0, 65535)] * 2), unique=True, max_size=70).map(
        lambda some: tuple(sorted(some))
    ),
    large_communities=st.lists(st.tuples(numbers, numbers, numbers), unique=True, max_size=3).map(
        lambda some: tuple(sorted(some))
    ),
    extended_communities=st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=3).map(
        lambda some: tuple(sorted(some))
    ),
    originator_id=st.none() | addresses,
    cluster_list=st.lists(addresses, max_size=3).map(tuple),
)
ipv4_prefixes = st.lists(
    st.builds(
        lambda number, length: str(IPv4Network((number, length), strict=False)),
        numbers,
        st.integers(0, 32),
    ),
    unique=True,
    max_size=6,
)


@given(path_attributes, addresses, ipv4_prefixes.filter(bool), ipv4_prefixes)
def test_what_was_meant_is_read(
    said: PathAttributes, next_hop: str, announced: list[str], withdrawn: list[str]
) -> None:
    """Every known attribute and prefix is read as it was written."""
    message = body(encoded(said, next_hop), packed(announced), packed(withdrawn))
    assert is_plain(message)
    read = decode(message)
    assert read == WireUpdate(tuple(withdrawn), tuple(announced), next_hop, said)
    assert decode(message).attributes is read.attributes, "equal attributes are one object"


class Negotiated:
    """What ExaBGP's decoder asks of a session: four-octet AS numbers, no path ids."""

    def __init__(self) -> None:
        self.asn4, self.aigp = True, False
        self.families, self.nexthop = [(AFI.ipv4, SAFI.unicast)], []
        self.cached_attributes, self.cached_wire = None, b""
        self.local_as, self.peer_as = 1, 2
        self.neighbor = {"capability": {"aigp": False}}
        self.addpath = SimpleNamespace(receive=lambda *_: False, send=lambda *_: False)

    @staticmethod
    def required(*_: object) -> bool:
        return False


@pytest.fixture(autouse=True)
def _logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """ExaBGP logs wherever it goes, and has no logger before it runs."""
    monkeypatch.setattr(option, "logger", logging.getLogger("exabgp"))


class Neighbor(dict[str, Any]):
    uid = "1"


def as_exabgp_reads(message: bytes) -> exabgp_events.Line | None:
    """The event of a stock ExaBGP for this message; None if it refuses or mistrusts it."""
    try:
        update = Update.unpack_message(message, Direction.IN, Negotiated())
    except Notify:
        return None
    marks = (Attribute.CODE.INTERNAL_TREAT_AS_WITHDRAW, Attribute.CODE.INTERNAL_DISCARD)
    if any(mark in getattr(update, "attributes", ()) for mark in marks):
        return None
    neighbor = Neighbor({
        "local-address": "192.0.2.9", "peer-address": "192.0.2.2",
        "local-as": 1, "peer-as": 2, "router-id": "192.0.2.9",
    })  # fmt: skip
    line = JSON("5").update(neighbor, "receive", update, None, b"", b"")
    return exabgp_events.parse(line.encode())


def as_we_read(message: bytes) -> exabgp_events.Line:
    """The event of ours for the same message."""
    return exabgp_events.parse(b"!r 192.0.2.2 " + message.hex().encode())


def same(line: exabgp_events.Line | None) -> object:
    """What two readings must agree in; the order of prefixes says nothing."""
    if not isinstance(line, exabgp_events.Update):
        return line
    announced = {(one.prefix, one.next_hop, one.attributes) for one in line.announced}
    return line.peer, line.sent, announced, set(line.withdrawn)


@given(
    path_attributes.filter(lambda said: said.as_path),
    ipv4_prefixes.filter(bool),
    st.integers(0),
    st.integers(0, 255),
)
def test_one_wrong_byte(said: PathAttributes, announced: list[str], place: int, value: int) -> None:
    """Whatever one byte of a message becomes: if we take it, ExaBGP takes it too, and alike."""
    message = bytearray(body(encoded(said, NEXT_HOP), packed(announced)))
    message[place % len(message)] = value
    if is_plain(bytes(message)):
        theirs = as_exabgp_reads(bytes(message))
        assert theirs is not None
        prefixes = [one.prefix for one in theirs.announced]  # type: ignore[union-attr]
        if len(set(prefixes)) == len(prefixes) and not _has_host_bits(theirs):
            assert same(as_we_read(bytes(message))) == same(theirs)


def _has_host_bits(line: exabgp_events.Line) -> bool:
    """ExaBGP prints bits beyond the prefix length, which mean nothing."""
    assert isinstance(line, exabgp_events.Update)
    texts = [one.prefix for one in line.announced] + list(line.withdrawn)
    return any(str(IPv4Network(text, strict=False)) != text for text in texts)


@given(st.binary(max_size=80))
def test_any_bytes_are_judged(message: bytes) -> None:
    """Noise is not plain, or can be decoded; it never raises anything else."""
    if is_plain(message):
        decode(message)


V6 = bytes([0, 2, 1])
GLOBAL, LINK_LOCAL = "2001:db8::1", "fe80::1"


@pytest.mark.parametrize("link_local", [b"", IPv6Address(LINK_LOCAL).packed], ids=["one", "two"])
def test_ipv6(link_local: bytes) -> None:
    """IPv6 travels in MP_REACH_NLRI; a second, link-local next hop is left out."""
    hops = IPv6Address(GLOBAL).packed + link_local
    reach = V6 + bytes([len(hops)]) + hops + b"\0" + packed(["fd00:0:0:1::/64", "::/0"])
    unreach = V6 + packed(["fd00::/122", "::ffff:0:0/96"])
    message = body(
        mandatory(next_hop=None) + attribute(14, 0x80, reach) + attribute(15, 0x80, unreach)
    )
    assert is_plain(message)
    assert decode(message) == WireUpdate(
        withdrawn=("fd00::/122", "::ffff:0:0/96"),
        announced=("fd00:0:0:1::/64", "::/0"),
        next_hop=GLOBAL,
        attributes=PathAttributes(as_path=as_sequence(65000)),
    )


@given(st.ip_addresses(v=6))
def test_ipv6_texts_are_canonical(address: IPv6Address) -> None:
    """The text of a prefix is the one every other part of the program uses."""
    text = f"{address}/128"
    unreach = attribute(15, 0x80, V6 + packed([text]))
    assert decode(body(unreach)).withdrawn == (text,)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(body(b""), id="End-of-RIB of IPv4"),
        pytest.param(body(attribute(15, 0x80, V6)), id="End-of-RIB of IPv6"),
        pytest.param(b"", id="nothing"),
        pytest.param(body(mandatory(None), packed(["10.0.0.0/8"])), id="no next hop"),
        pytest.param(body(attribute(3, 0x40, b"\1\2\3\4"), packed(["10.0.0.0/8"])), id="no origin"),
        pytest.param(body(mandatory() + attribute(4, 0x80, b"\0"), packed(["10.0.0.0/8"])),
                     id="short MED"),
        pytest.param(body(mandatory() + attribute(99, 0xC0, b"\0"), packed(["10.0.0.0/8"])),
                     id="unknown attribute"),
        pytest.param(body(mandatory() + attribute(8, 0x80, bytes(4)), packed(["10.0.0.0/8"])),
                     id="community that is not transitive"),
        pytest.param(body(mandatory() + mandatory(), packed(["10.0.0.0/8"])), id="all twice"),
        pytest.param(body(mandatory() + attribute(17, 0xC0, bytes([2, 1, 0, 1, 0, 0])),
                          packed(["10.0.0.0/8"])), id="AS4_PATH"),
        pytest.param(body(mandatory(), b"\x21" + bytes(5)), id="prefix of 33 bits"),
        pytest.param(body(mandatory(), b"\x18\x0a"), id="half a prefix"),
        pytest.param(body(b"", withdrawn=b"\x21" + bytes(5)), id="withdrawn prefix of 33 bits"),
        pytest.param(body(mandatory(), packed(["10.0.0.0/8"]))[:-4] + b"\xff", id="cut"),
        pytest.param(body(attribute(14, 0x80, bytes([0, 1, 1, 4, 1, 2, 3, 4, 0, 8, 10]))
                          + mandatory()), id="IPv4 in MP_REACH_NLRI"),
    ],
)  # fmt: skip
def test_what_takes_judgement_is_left_to_exabgp(message: bytes) -> None:
    """RFC 7606, other families and ends of RIB go ExaBGP's own way."""
    assert not is_plain(message)


def test_bits_beyond_the_prefix_mean_nothing() -> None:
    """RFC 4271 §4.3: trailing bits are irrelevant; the prefix has one text."""
    assert decode(body(mandatory(), b"\x09\x0a\xff")).announced == ("10.128.0.0/9",)


def test_line_of_a_whole_update() -> None:
    """Lines from ExaBGP's process become events; one that is no UPDATE is reported, not raised."""
    message = body(mandatory(), packed(["10.0.0.0/26"]), packed(["10.0.0.64/26"]))
    for mark, sent in ((b"!r", False), (b"!s", True)):
        line = exabgp_events.parse(mark + b" 192.0.2.2 " + message.hex().encode())
        assert line == exabgp_events.Update(
            peer="192.0.2.2",
            sent=sent,
            announced=(
                Announcement("10.0.0.0/26", NEXT_HOP, PathAttributes(as_path=as_sequence(65000))),
            ),
            withdrawn=("10.0.0.64/26",),
        )
    for broken in (b"!r", b"!r 192.0.2.2 zz", b"!r 192.0.2.2 00", b"!r 192.0.2.2 0000ffff"):
        assert isinstance(exabgp_events.parse(broken), exabgp_events.Malformed)
