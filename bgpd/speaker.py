"""The speaker port: what the routing daemon asks of whatever speaks BGP, and what it hears back.

Place in the flow: bgpd works out, per peer, the whole Adj-RIB-Out it wants; a speaker makes it so.
In the other direction the speaker reports sessions and received routes as typed events. ExaBGP
stands behind this port (`bgpd/exabgp.py`); another speaker could. `bgpd/fake_speaker.py` keeps the
same promises in memory, for tests.

Invariants:

- A peer is named by the canonical text of its address, a route by the canonical text of its prefix.
- `advertise` is level, not edge: each call carries everything wanted for that peer, and the newest
  call wins. It may come before the session exists, and needs no repetition when the session flaps.
  So is `advertise_changes`, prefix by prefix: the newest word about a prefix wins.
- The first `advertise` for a peer says "this is the full set": the speaker then sends End-of-RIB
  after the routes. A peer that nobody advertised to gets no End-of-RIB.
- Events arrive in the order the speaker saw them. After `SpeakerLost` every session is down. After
  `SpeakerConnected` each session that is up is told by a `SessionUp` with `resumed`, also one that
  was known to be up; one that is gone is told by a `SessionDown`.
- Received routes carry no decision: loops, first-AS and next-hop checks are the listener's.

What a route says is in `bgpd/announcement.py`.

Source: RFC 4271 (RIBs), RFC 4724 (graceful restart), RFC 7313 (enhanced refresh).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from bgpd.announcement import Announcement

if TYPE_CHECKING:
    from cymric.model.peering import Session

# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SpeakerConnected:
    """The speaker answers. `generation` differs when its process is a new one.

    `lost_events`: something may have happened that nobody will tell; treat every path of a resumed
    session as unconfirmed, ask for a refresh and sweep what is not refreshed.
    """

    generation: str
    lost_events: bool


@dataclass(frozen=True, slots=True)
class SpeakerLost:
    """The speaker is gone or unreachable: count every session as down until told otherwise."""

    reason: str


@dataclass(frozen=True, slots=True)
class SessionUp:
    """A session is Established.

    `families` are those both sides agreed on. `restart_time_s` is the peer's graceful restart time
    (None: it does not do graceful restart), `forwarding_families` those whose forwarding state it
    says it kept, `peer_restarting` its R bit (RFC 4724 §3). `resumed`: the session was up before
    we listened, its routes were told to nobody or to an earlier process.
    """

    peer: str
    asn: int
    families: frozenset[str]
    restart_time_s: int | None = None
    forwarding_families: frozenset[str] = frozenset()
    peer_restarting: bool = False
    route_refresh: bool = False
    enhanced_refresh: bool = False
    router_id: str = ""
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class SessionDown:
    """A session that was up is not any more.

    `drop_paths`: the way to the peer is known to be broken (`session_lost`), or the peer is not to
    be believed (`hold_session`); graceful restart does not keep its paths (RFC 5882 §4.3.2).
    """

    peer: str
    reason: str
    drop_paths: bool = False


@dataclass(frozen=True, slots=True)
class RoutesReceived:
    """One UPDATE: withdrawals apply before announcements."""

    peer: str
    announced: tuple[Announcement, ...] = ()
    withdrawn: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EndOfRIB:
    """The peer has sent everything it has of this family (RFC 4724 §2)."""

    peer: str
    family: str


@dataclass(frozen=True, slots=True)
class RefreshBegin:
    """The peer starts to re-send everything of this family (RFC 7313): mark."""

    peer: str
    family: str


@dataclass(frozen=True, slots=True)
class RefreshEnd:
    """The peer re-sent everything of this family (RFC 7313): sweep what is still marked."""

    peer: str
    family: str


@dataclass(frozen=True, slots=True)
class NotificationReceived:
    """A NOTIFICATION, sent by the peer or by us; only for diagnosis, `SessionDown` follows."""

    peer: str
    code: int
    subcode: int
    data: str
    sent: bool = False


@dataclass(frozen=True, slots=True)
class SessionRejected:
    """A connection attempt failed before the session was up; only for diagnosis."""

    peer: str
    reason: str


SpeakerEvent = (
    SpeakerConnected
    | SpeakerLost
    | SessionUp
    | SessionDown
    | RoutesReceived
    | EndOfRIB
    | RefreshBegin
    | RefreshEnd
    | NotificationReceived
    | SessionRejected
)


# --- status -----------------------------------------------------------------------------------


class SessionState(StrEnum):
    """What a person is shown of a session."""

    UP = "up"
    DOWN = "down"
    HELD = "held down"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """One session as `cymric node status` shows it. `since_s` is Unix time, seconds.

    `retry_in_s`: how much longer a held session stays down.
    """

    peer: str
    state: SessionState
    since_s: float
    reason: str = ""
    retry_in_s: float | None = None
    wanted: int = 0
    commanded: int = 0
    confirmed: int = 0
    end_of_rib_sent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerProof:
    """How far what a peer was sent is what it should have, in prefixes.

    `desired`: wanted now. `confirmed`: of those, written to the peer as wanted. `pending`: changes
    commanded, or about to be. `missing`: wanted, neither confirmed nor pending; more than 0 for
    longer than a moment is a fault. `repaired`: differences found by comparing with what the
    speaker itself holds, attributes included, since this process started. `checked_s`: Unix time of
    the last such comparison, 0 if none. `unconfirmed` and `repaired_last` name some prefixes: those
    of which the peer was not yet told what is wanted, and those of the last repair.
    """

    desired: int = 0
    confirmed: int = 0
    pending: int = 0
    missing: int = 0
    repaired: int = 0
    checked_s: float = 0.0
    unconfirmed: tuple[str, ...] = ()
    repaired_last: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeakerStatus:
    """The speaker and its sessions, at one moment."""

    connected: bool
    generation: str = ""
    configuration: str = ""
    peers: Mapping[str, PeerStatus] = field(default_factory=dict)


# --- port -------------------------------------------------------------------------------------


class Speaker(Protocol):
    """Whatever speaks BGP for us."""

    def events(self) -> AsyncIterator[SpeakerEvent]:
        """What happens, in order; for one listener; ends never."""
        ...

    def advertise(self, peer: str, routes: Mapping[str, Announcement]) -> None:
        """Want exactly `routes` (by prefix) at `peer`, from now on and whatever happens."""
        ...

    def advertise_changes(self, peer: str, changes: Mapping[str, Announcement | None]) -> None:
        """Want these prefixes so (None: not at all), all others as before; costs what it names.

        As if the whole set were told with them. Raises ValueError if none ever was.
        """
        ...

    def request_refresh(self, peer: str) -> None:
        """Ask the peer to send all its routes again (RFC 2918), now or when it is next asked for.

        Nothing happens for a peer that is down: a new session brings all routes anyway.
        """
        ...

    def expect_sessions(self, sessions: Sequence[Session]) -> None:
        """Have exactly these sessions configured: reload when the configuration holds them."""
        ...

    def hold_session(self, peer: str, reason: str, retry_after_s: float) -> None:
        """End the session with Cease, maximum number of prefixes, and keep it down for so long.

        `SessionDown(drop_paths=True)` follows if it was up. The newest call counts; 0 s lets the
        session come up again now. A session that is down is kept down likewise.
        """
        ...

    def session_lost(self, peer: str, reason: str) -> None:
        """The way to the peer is broken (BFD): end the session at once, waiting for nothing.

        `SessionDown(drop_paths=True)` follows if it was up. It may come up again when it can.
        """
        ...

    def proof(self) -> Mapping[str, PeerProof]:
        """What was confirmed of what is wanted, for each peer that was ever heard of."""
        ...

    def status(self) -> SpeakerStatus:
        """A snapshot for people."""
        ...

    async def run(self) -> None:
        """Keep the speaker connected and the wanted state applied, until cancelled."""
        ...
