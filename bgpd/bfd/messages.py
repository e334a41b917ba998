"""What bgpd and the BFD process say to each other: one JSON object a line, on a unix socket.

    bgpd ─▶ Expect, Stop ─▶ process        process ─▶ Hello, Report, Failed ─▶ bgpd

`Expect` and `Report` carry the whole state; only `Failed` is an event, delivered once.
"""

from __future__ import annotations

import msgspec

from bgpd.bfd.packet import State
from cymric.model.bfd import BfdParameters

PROTOCOL = 2
"""Grows when an older process would misread us; then it is asked to end."""

LONGEST_LINE_BYTES = 16 * 1024 * 1024


class WantedSession(msgspec.Struct, frozen=True, kw_only=True):
    """One session that should exist: addresses as text, and what to tell the peer.

    Without parameters: nobody knows what is wanted, so leave it as it is, and start none.
    """

    peer: str
    local: str
    parameters: BfdParameters | None


class Expect(msgspec.Struct, frozen=True, tag="expect"):
    """Have exactly these sessions."""

    sessions: tuple[WantedSession, ...]


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """Say AdminDown to all peers and end."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first line of each connection."""

    protocol: int
    pid: int


class SessionReport(msgspec.Struct, frozen=True, kw_only=True):
    """One session as a person wants to see it. `since_s` is Unix time; intervals in seconds, None
    if there is none. `problem`: why nothing can be sent or received, in words.
    """

    peer: str
    local: str
    parameters: BfdParameters
    state: State = State.DOWN
    remote_state: State = State.DOWN
    since_s: float = 0.0
    reason: str = ""
    problem: str = ""
    send_interval_s: float | None = None
    detection_time_s: float | None = None
    local_discriminator: int = 0
    remote_discriminator: int = 0
    remote_multiplier: int = 0
    is_independent: bool = False
    sent: int = 0
    received: int = 0
    send_errors: int = 0
    transitions: int = 0
    failures: int = 0


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """Everything the process knows; `discarded` counts packets by reason, since its start."""

    sessions: tuple[SessionReport, ...] = ()
    discarded: dict[str, int] = {}
    stalls: int = 0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """A session that was up is down, and no operator asked for it.

    `is_independent`: both sides say that their BFD outlives their control plane (the C bit), so
    this is about forwarding and nothing else (RFC 5882 §4.3.2).
    """

    peer: str
    reason: str
    is_independent: bool
    at_s: float


ToProcess = Expect | Stop
FromProcess = Hello | Report | Failed

to_process = msgspec.json.Decoder(ToProcess)
from_process = msgspec.json.Decoder(FromProcess)


def line(message: ToProcess | FromProcess) -> bytes:
    """A message as it is written."""
    return msgspec.json.encode(message) + b"\n"
