"""ExaBGP's lines to values: pure, total, and the only place that knows ExaBGP's JSON.

Place in the flow: relay ▶ line ▶ `parse` ▶ one of the values below ▶ `bgpd/exabgp.py`. A line that
makes no sense becomes `Malformed`, never an exception: one odd message from one peer must not take
down the sessions of all others.

Source: ExaBGP 5.0.15's JSON encoder, recorded lines in tests/replay. Its graceful restart words are
swapped against RFC 4724: a family flagged "restart" has the F bit (forwarding state kept), and the
capability flagged "forwarding" has the R bit (the peer restarts).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

import msgspec

from bgpd import update_wire
from bgpd.announcement import Announcement, AsPathSegment, Origin, PathAttributes, SegmentKind


@dataclass(frozen=True, slots=True)
class Greeting:
    """The relay's first line. `sessions`: `up` and OPEN, if known, of each session that is up."""

    generation: str
    lost: bool
    sessions: tuple[tuple[State, Open | None], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of the answer to one command."""

    ok: bool


@dataclass(frozen=True, slots=True)
class Text:
    """A line of an answer before its end."""

    line: str


@dataclass(frozen=True, slots=True)
class State:
    """A session's state: `up`, `down` or `connected`."""

    peer: str
    asn: int
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Open:
    """What the peer said of itself in OPEN. `asn` may be AS_TRANS; the session's AS is in State."""

    peer: str
    router_id: str
    families: frozenset[str]
    restart_time_s: int | None
    forwarding_families: frozenset[str]
    restarting: bool
    route_refresh: bool
    enhanced_refresh: bool


@dataclass(frozen=True, slots=True)
class Update:
    """An UPDATE received from, or about to be written to, a peer."""

    peer: str
    sent: bool
    announced: tuple[Announcement, ...]
    withdrawn: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EndOfRIBLine:
    """An End-of-RIB received or sent."""

    peer: str
    sent: bool
    family: str


@dataclass(frozen=True, slots=True)
class Refresh:
    """A ROUTE-REFRESH received: `query`, `begin` or `end`."""

    peer: str
    family: str
    subtype: str


@dataclass(frozen=True, slots=True)
class NotificationLine:
    """A NOTIFICATION received or sent."""

    peer: str
    code: int
    subcode: int
    data: str
    sent: bool


@dataclass(frozen=True, slots=True)
class Shutdown:
    """ExaBGP is about to end."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """A line we understand and have no use for."""


@dataclass(frozen=True, slots=True)
class Malformed:
    """A line that makes no sense."""

    line: str
    reason: str


Line = (
    Greeting
    | Answer
    | Text
    | State
    | Open
    | Update
    | EndOfRIBLine
    | Refresh
    | NotificationLine
    | Shutdown
    | Ignored
    | Malformed
)

_decode = msgspec.json.Decoder().decode

_REFRESH, _ENHANCED_REFRESH, _MULTIPROTOCOL, _GRACEFUL_RESTART = "2", "70", "1", "64"
_CISCO_REFRESH = "128"
_SHOWN_CHARACTERS = 500
_ORIGINS = frozenset(Origin)
_NO_NEXT_HOP = "no-nexthop"


def parse(line: bytes) -> Line:
    """The value of one line without its newline."""
    if line.startswith(b"!"):
        return _whole_update(line)
    if not line.startswith(b"{"):
        if line in (b"done", b"error"):
            return Answer(line == b"done")
        return Text(line.decode(errors="replace"))
    try:
        return _parse_object(_decode(line))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        return Malformed(line[:_SHOWN_CHARACTERS].decode(errors="replace"), repr(error))


def _whole_update(line: bytes) -> Line:
    """An UPDATE as it was on the wire: `!r <peer> <hex>` received, `!s <peer> <hex>` written."""
    try:
        direction, peer, body = line.split(b" ")
        said = update_wire.decode(bytes.fromhex(body.decode()))
        attributes, next_hop = said.attributes, said.next_hop
        return Update(
            peer=peer.decode(),
            sent=direction == b"!s",
            announced=tuple(
                Announcement(prefix, next_hop, attributes) for prefix in said.announced
            ),
            withdrawn=said.withdrawn,
        )
    except (update_wire.NotPlain, ValueError, IndexError, struct.error) as error:
        return Malformed(line[:_SHOWN_CHARACTERS].decode(errors="replace"), repr(error))


def _parse_object(event: dict[str, Any]) -> Line:
    if "relay" in event:
        return _greeting(event)
    kind = event["type"]
    if kind == "notification" and event.get("notification") == "shutdown":
        return Shutdown()
    neighbor = event["neighbor"]
    peer = canonical_address(neighbor["address"]["peer"])
    sent = neighbor.get("direction") == "send"
    if kind == "update":
        return _update(peer, sent, neighbor["message"])
    if kind == "state":
        return State(
            peer, int(neighbor["asn"]["peer"]), neighbor["state"], neighbor.get("reason", "")
        )
    if kind == "open":
        return Ignored() if sent else _open(peer, neighbor["open"])
    if kind == "refresh":
        refresh = neighbor["route-refresh"]
        return Refresh(peer, f"{refresh['afi']} {refresh['safi']}", refresh["subtype"])
    if kind == "notification":
        said = neighbor["notification"]
        return NotificationLine(
            peer, int(said["code"]), int(said["subcode"]), str(said.get("data", "")), sent
        )
    return Ignored()


def _greeting(event: dict[str, Any]) -> Greeting:
    sessions = []
    for opened, up in event["sessions"]:
        state = _parse_object(up)
        said = None if opened is None else _parse_object(opened)
        if not isinstance(state, State) or not (said is None or isinstance(said, Open)):
            raise ValueError("a session in the greeting is not an open and a state event")
        sessions.append((state, said))
    return Greeting(
        generation=str(event["generation"]),
        lost=bool(event["lost"]),
        sessions=tuple(sessions),
    )


def _open(peer: str, opened: dict[str, Any]) -> Open:
    capabilities = opened["capabilities"]
    families = capabilities.get(_MULTIPROTOCOL, {}).get("families")
    graceful = capabilities.get(_GRACEFUL_RESTART)
    return Open(
        peer=peer,
        router_id=str(opened["router_id"]),
        # Without the multiprotocol capability a session carries IPv4 unicast (RFC 4760 §8).
        families=frozenset(_family(name) for name in families or ("ipv4/unicast",)),
        restart_time_s=None if graceful is None else int(graceful["time"]),
        forwarding_families=frozenset(
            _family(name)
            for name, flags in (graceful or {}).get("address-family-flags", {}).items()
            if "restart" in flags
        ),
        restarting="forwarding" in (graceful or {}).get("restart-flags", ()),
        route_refresh=_REFRESH in capabilities or _CISCO_REFRESH in capabilities,
        enhanced_refresh=_ENHANCED_REFRESH in capabilities,
    )


def _update(peer: str, sent: bool, message: dict[str, Any]) -> Line:
    if "eor" in message:
        end = message["eor"]
        return EndOfRIBLine(peer, sent, f"{end['afi']} {end['safi']}")
    update = message["update"]
    announce, said = update.get("announce", {}), update.get("attribute", {})
    withdrawn = tuple(_prefixes(update.get("withdraw", {})))
    if not sent and _is_broken(announce, said):
        return Update(peer, sent, (), (*withdrawn, *_announced_prefixes(announce)))
    announced = tuple(_announced(announce, parse_attributes(said)))
    return Update(peer=peer, sent=sent, announced=announced, withdrawn=withdrawn)


def _is_broken(announce: dict[str, Any], said: dict[str, Any]) -> bool:
    """Whether a mandatory attribute is missing or wrong, which ExaBGP tells as it came.

    Such routes are withdrawn, the session stays (RFC 7606 §3 d, §7.1, §7.3).
    """
    return bool(announce) and (
        said.get("origin") not in _ORIGINS
        or any(_NO_NEXT_HOP in entries for entries in announce.values())
    )


def _prefixes(entries_by_family: dict[str, Any]) -> Iterator[str]:
    for family, entries in entries_by_family.items():
        if family.endswith(" unicast"):
            yield from map(_prefix, entries)


def _announced_prefixes(announce: dict[str, Any]) -> Iterator[str]:
    for family, entries_by_next_hop in announce.items():
        for entries in entries_by_next_hop.values():
            yield from _prefixes({family: entries})


def _announced(announce: dict[str, Any], attributes: PathAttributes) -> Iterator[Announcement]:
    for family, entries_by_next_hop in announce.items():
        if not family.endswith(" unicast"):
            continue
        next_hop_by_prefix: dict[str, str] = {}
        for next_hop, entries in entries_by_next_hop.items():
            for entry in entries:
                prefix = _prefix(entry)
                # A global and a link-local next hop are one path (RFC 2545 §3), listed twice.
                if prefix not in next_hop_by_prefix or not _is_link_local(next_hop):
                    next_hop_by_prefix[prefix] = next_hop
        for prefix, next_hop in next_hop_by_prefix.items():
            yield Announcement(prefix, canonical_address(next_hop), attributes)


def parse_attributes(said: dict[str, Any]) -> PathAttributes:
    """Path attributes as ExaBGP prints them; lists of communities in numeric order."""
    path = said.get("as-path", {})
    return PathAttributes(
        origin=Origin(said.get("origin", "igp")),
        as_path=tuple(
            AsPathSegment(SegmentKind(segment["element"]), tuple(segment["value"]))
            for _, segment in sorted(path.items(), key=lambda item: int(item[0]))
        ),
        local_pref=said.get("local-preference"),
        med=said.get("med"),
        atomic_aggregate=bool(said.get("atomic-aggregate", False)),
        aggregator=said.get("aggregator"),
        communities=tuple(sorted((high, low) for high, low in said.get("community", ()))),
        large_communities=tuple(
            sorted((one, two, three) for one, two, three in said.get("large-community", ()))
        ),
        extended_communities=tuple(
            sorted(entry["value"] for entry in said.get("extended-community", ()))
        ),
        originator_id=said.get("originator-id"),
        cluster_list=tuple(said.get("cluster-list", ())),
    )


def _prefix(entry: Any) -> str:
    text = entry if isinstance(entry, str) else entry["nlri"]
    address, slash, length = text.partition("/")
    if not slash or not length.isdecimal():
        raise ValueError(f"{text!r} is no prefix")
    return f"{canonical_address(address)}/{length}"


def canonical_address(text: str) -> str:
    """One text for each address: the one of `ipaddress`."""
    # The common case, dotted quads, is already canonical.
    return text if ":" not in text and text.count(".") == 3 else str(ip_address(text))


def _is_link_local(next_hop: str) -> bool:
    return next_hop.lower().startswith(("fe8", "fe9", "fea", "feb"))


def _family(name: str) -> str:
    return name.replace("/", " ", 1)
