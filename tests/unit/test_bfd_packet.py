"""The BFD control packet: what is read, what is refused and why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgpd.bfd.packet import BadPacket, ControlPacket, Diagnostic, Discard, State, decode, encode
from cymric.model.bfd import BfdParameters, bfd_of, parse_bfd
from cymric.model.resources import BGPPeer, ObjectMeta

WORDS = st.integers(0, 0xFFFF_FFFF)
SOME = st.integers(1, 0xFFFF_FFFF)

GOOD = bytes.fromhex("20 c0 03 18 00000001 00000002 000493e0 000493e0 00000000")


@st.composite
def packets(draw: st.DrawFn) -> ControlPacket:
    state = draw(st.sampled_from(State))
    down = state in (State.DOWN, State.ADMIN_DOWN)
    poll = draw(st.booleans())
    return ControlPacket(
        state=state,
        diagnostic=draw(st.integers(0, 31)),
        my_discriminator=draw(SOME),
        your_discriminator=draw(WORDS if down else SOME),
        desired_min_tx_us=draw(WORDS),
        required_min_rx_us=draw(WORDS),
        required_min_echo_rx_us=draw(WORDS),
        multiplier=draw(st.integers(1, 255)),
        poll=poll,
        final=not poll and draw(st.booleans()),
        independent=draw(st.booleans()),
        demand=draw(st.booleans()),
    )


def test_the_format() -> None:
    """The bytes are those of RFC 5880 §4.1."""
    packet = ControlPacket(
        state=State.UP,
        my_discriminator=1,
        your_discriminator=2,
        desired_min_tx_us=300_000,
        required_min_rx_us=300_000,
        multiplier=3,
    )
    assert encode(packet) == GOOD
    assert decode(GOOD) == packet


@given(packet=packets(), padding=st.binary(max_size=8))
def test_round_trip(packet: ControlPacket, padding: bytes) -> None:
    """What is written is read as the same value, whatever follows it in the datagram."""
    assert decode(encode(packet) + padding) == packet


@given(data=st.binary(max_size=64))
def test_any_bytes(data: bytes) -> None:
    """Bytes from anybody are a packet or a named error, never another exception."""
    try:
        packet = decode(data)
    except BadPacket:
        return
    assert decode(encode(packet)) == packet


@given(
    data=st.tuples(packets(), st.integers(0, 23), st.integers(0, 255)).map(
        lambda made: bytes(
            made[2] if index == made[1] else byte for index, byte in enumerate(encode(made[0]))
        )
    )
)
def test_one_byte_wrong(data: bytes) -> None:
    """A packet with one byte changed is another packet or a named error."""
    try:
        packet = decode(data)
    except BadPacket:
        return
    assert decode(encode(packet)) == packet


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", Discard.SHORT, id="empty"),
        pytest.param(GOOD[:23], Discard.SHORT, id="cut off"),
        pytest.param(b"\x00" + GOOD[1:], Discard.VERSION, id="version 0"),
        pytest.param(b"\x40" + GOOD[1:], Discard.VERSION, id="version 2"),
        pytest.param(GOOD[:3] + b"\x17" + GOOD[4:], Discard.LENGTH, id="length 23"),
        pytest.param(GOOD[:3] + b"\x19" + GOOD[4:], Discard.SHORT, id="length beyond the end"),
        pytest.param(b"\x20\xc4" + GOOD[2:], Discard.LENGTH, id="authenticated, length 24"),
        pytest.param(
            b"\x20\xc4\x03\x1a" + GOOD[4:] + b"\x01\x02", Discard.AUTHENTICATION, id="authenticated"
        ),
        pytest.param(GOOD[:2] + b"\x00" + GOOD[3:], Discard.MULTIPLIER, id="multiplier"),
        pytest.param(b"\x20\xc1" + GOOD[2:], Discard.MULTIPOINT, id="multipoint"),
        pytest.param(GOOD[:4] + bytes(4) + GOOD[8:], Discard.DISCRIMINATOR, id="my discriminator"),
        pytest.param(GOOD[:8] + bytes(4) + GOOD[12:], Discard.UNKNOWN_STATE, id="Up, but to whom"),
        pytest.param(b"\x20\xf0" + GOOD[2:], Discard.POLL_AND_FINAL, id="poll and final"),
    ],
)
def test_refused(data: bytes, reason: Discard) -> None:
    """Each check of RFC 5880 §6.8.6 refuses by its own name."""
    with pytest.raises(BadPacket) as refused:
        decode(data)
    assert refused.value.reason is reason


def test_a_diagnostic_nobody_defined() -> None:
    """A reserved diagnostic is no reason to refuse a packet."""
    assert decode(b"\x3f" + GOOD[1:]).diagnostic == 31
    assert 31 not in tuple(Diagnostic)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("enabled", BfdParameters()),
        ("true", BfdParameters(min_tx_ms=300, min_rx_ms=300, multiplier=3)),
        ("disabled", None),
        ("", None),
        ("300ms x 3", BfdParameters()),
        ("1s x 5", BfdParameters(min_tx_ms=1000, min_rx_ms=1000, multiplier=5)),
        ("150ms/300ms x 5", BfdParameters(min_tx_ms=150, min_rx_ms=300, multiplier=5)),
        ("  150MS/1s*2 ", BfdParameters(min_tx_ms=150, min_rx_ms=1000, multiplier=2)),
    ],
)
def test_the_annotation(text: str, expected: BfdParameters | None) -> None:
    """The annotation's words and intervals; what is shown is read as the same."""
    peer = BGPPeer(metadata=ObjectMeta(name="tor", annotations={"cymric.io/bfd": text}))
    assert bfd_of(peer) == expected
    assert expected is None or parse_bfd(str(expected)) == expected
    assert bfd_of(BGPPeer(metadata=ObjectMeta(name="tor"))) is None


@pytest.mark.parametrize(
    "text",
    ["maybe", "300 x 3", "300ms", "300ms x", "10ms x 3", "61s x 3", "300ms x 0", "300ms x 256",
     "-300ms x 3", "300ms/10ms x 3", "٣٠٠ms x 3"],
)  # fmt: skip
def test_a_bad_annotation(text: str) -> None:
    """A value that cannot be used is refused with a sentence that names it."""
    with pytest.raises(ValueError, match=r"BFD|cymric\.io/bfd"):
        parse_bfd(text)
