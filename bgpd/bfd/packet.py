"""The BFD control packet: bytes to values and back, checked as far as that needs no session.

    socket ▶ decode ▶ ControlPacket ▶ session.receive … session ▶ ControlPacket ▶ encode ▶ socket

Invariants
- `decode` raises `BadPacket` and nothing else, whatever the bytes are.
- What `encode` writes, `decode` reads as the same value.

Source: RFC 5880 §4.1 (format), §6.8.6 (checks, in their order). Only packets without
authentication are accepted, because none is configured.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum, StrEnum

VERSION = 1
LENGTH = 24
_AUTHENTICATED_LENGTH = 26
_FORMAT = struct.Struct("!BBBBIIIII")
_POLL, _FINAL, _INDEPENDENT, _AUTHENTICATED, _DEMAND, _MULTIPOINT = 32, 16, 8, 4, 2, 1
_MOST = 0xFFFF_FFFF


class State(IntEnum):
    """The state of a session (RFC 5880 §4.1, Sta)."""

    ADMIN_DOWN = 0
    DOWN = 1
    INIT = 2
    UP = 3

    @property
    def word(self) -> str:
        """As a person reads it."""
        return ("AdminDown", "Down", "Init", "Up")[self]


class Diagnostic(IntEnum):
    """Why a session last left Up (RFC 5880 §4.1, Diag). Received numbers may be others."""

    NONE = 0
    EXPIRED = 1
    ECHO_FAILED = 2
    NEIGHBOR_DOWN = 3
    FORWARDING_RESET = 4
    PATH_DOWN = 5
    CONCATENATED_PATH_DOWN = 6
    ADMIN_DOWN = 7
    REVERSE_CONCATENATED_PATH_DOWN = 8


DIAGNOSTIC_WORDS = {
    Diagnostic.NONE: "",
    Diagnostic.EXPIRED: "detection time expired",
    Diagnostic.ECHO_FAILED: "echo failed",
    Diagnostic.NEIGHBOR_DOWN: "peer says down",
    Diagnostic.FORWARDING_RESET: "forwarding plane reset",
    Diagnostic.PATH_DOWN: "path down",
    Diagnostic.CONCATENATED_PATH_DOWN: "concatenated path down",
    Diagnostic.ADMIN_DOWN: "administratively down",
    Diagnostic.REVERSE_CONCATENATED_PATH_DOWN: "reverse concatenated path down",
}


class Discard(StrEnum):
    """Why a packet is not used; also the label of the counter, so the set is bounded."""

    TTL = "ttl is not 255"
    SHORT = "shorter than its length"
    VERSION = "version"
    LENGTH = "length field"
    MULTIPLIER = "multiplier is zero"
    MULTIPOINT = "multipoint bit"
    DISCRIMINATOR = "own discriminator is zero"
    UNKNOWN_STATE = "no discriminator, but neither down nor admin down"
    AUTHENTICATION = "authentication"
    POLL_AND_FINAL = "poll and final at once"
    NO_SESSION = "no such session"
    WRONG_PEER = "discriminator of another peer"
    ADMIN_DOWN = "session is admin down"


class BadPacket(ValueError):
    """These bytes are no packet for us; `reason` says why."""

    def __init__(self, reason: Discard) -> None:
        super().__init__(reason.value)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlPacket:
    """One control packet without authentication. Intervals in microseconds, as on the wire."""

    state: State
    my_discriminator: int
    your_discriminator: int
    desired_min_tx_us: int
    required_min_rx_us: int
    multiplier: int
    diagnostic: int = 0
    poll: bool = False
    final: bool = False
    independent: bool = False
    demand: bool = False
    required_min_echo_rx_us: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.my_discriminator <= _MOST or not 0 < self.multiplier <= 255:
            raise ValueError("own discriminator and multiplier must fit and not be zero")
        if self.poll and self.final:
            raise ValueError("a packet cannot both poll and be the answer to a poll")
        if not 0 <= self.diagnostic < 32:
            raise ValueError(f"diagnostic {self.diagnostic} does not fit")


def encode(packet: ControlPacket) -> bytes:
    """The 24 bytes of a packet."""
    flags = (
        packet.state << 6
        | packet.poll * _POLL
        | packet.final * _FINAL
        | packet.independent * _INDEPENDENT
        | packet.demand * _DEMAND
    )
    return _FORMAT.pack(
        VERSION << 5 | packet.diagnostic,
        flags,
        packet.multiplier,
        LENGTH,
        packet.my_discriminator,
        packet.your_discriminator,
        packet.desired_min_tx_us,
        packet.required_min_rx_us,
        packet.required_min_echo_rx_us,
    )


def decode(data: bytes) -> ControlPacket:
    """The packet in a UDP payload. Raises BadPacket. What follows the packet is ignored."""
    if len(data) < LENGTH:
        raise BadPacket(Discard.SHORT)
    first, flags, multiplier, length, mine, yours, tx_us, rx_us, echo_us = _FORMAT.unpack_from(data)
    is_authenticated = bool(flags & _AUTHENTICATED)
    if first >> 5 != VERSION:
        raise BadPacket(Discard.VERSION)
    if length < (_AUTHENTICATED_LENGTH if is_authenticated else LENGTH):
        raise BadPacket(Discard.LENGTH)
    if length > len(data):
        raise BadPacket(Discard.SHORT)
    if multiplier == 0:
        raise BadPacket(Discard.MULTIPLIER)
    if flags & _MULTIPOINT:
        raise BadPacket(Discard.MULTIPOINT)
    if mine == 0:
        raise BadPacket(Discard.DISCRIMINATOR)
    state = State(flags >> 6)
    if yours == 0 and state not in (State.DOWN, State.ADMIN_DOWN):
        raise BadPacket(Discard.UNKNOWN_STATE)
    if is_authenticated:
        raise BadPacket(Discard.AUTHENTICATION)
    if flags & _POLL and flags & _FINAL:  # §4.1 and §6.5: the two never come together
        raise BadPacket(Discard.POLL_AND_FINAL)
    return ControlPacket(
        state=state,
        my_discriminator=mine,
        your_discriminator=yours,
        desired_min_tx_us=tx_us,
        required_min_rx_us=rx_us,
        multiplier=multiplier,
        diagnostic=first & 31,
        poll=bool(flags & _POLL),
        final=bool(flags & _FINAL),
        independent=bool(flags & _INDEPENDENT),
        demand=bool(flags & _DEMAND),
        required_min_echo_rx_us=echo_us,
    )
