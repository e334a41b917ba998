"""ExaBGP's answers to `show` commands as values: pure.

Place in the flow: `Link.ask` ▶ lines of an answer ▶ one of these functions ▶ `bgpd/exabgp.py`.

Source: ExaBGP 5.0.15's `show neighbor json` and `show adj-rib out`; exabgp_show.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from bgpd import exabgp_events as lines
from bgpd import update_wire
from bgpd.announcement import IPV4_UNICAST, IPV6_UNICAST, Announcement


@dataclass(frozen=True, slots=True)
class Established:
    """A session as `show neighbor json` has it."""

    asn: int
    families: frozenset[str]
    route_refresh: bool


def established(answer: Sequence[str]) -> dict[str, Established]:
    """Sessions that are up, by peer. Raises TimeoutError if the answer is none."""
    try:
        neighbors = msgspec.json.decode("".join(answer))
        return {
            lines.canonical_address(neighbor["peer"]["address"]): Established(
                asn=int(neighbor["peer"]["as"]),
                families=frozenset(neighbor["families"]),
                route_refresh=bool(neighbor["peer"]["capabilities"].get("route-refresh")),
            )
            for neighbor in neighbors
            # Not "state": that says "down" in the first second, when the duration rounds to 0.
            if neighbor["fsm"] == "ESTABLISHED"
        }
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise TimeoutError(f"show neighbor json was answered by {answer[:1]!r}") from error


def offered(peer: str) -> frozenset[str]:
    """The families we offer: a session carries the family of its own addresses, and no other."""
    return frozenset({IPV6_UNICAST if ":" in peer else IPV4_UNICAST})


def common(peer: str, opened: lines.Open | None, seen: Established | None) -> frozenset[str]:
    """The families of a session, from the peer's OPEN or else from ExaBGP's word."""
    if opened is not None:
        return opened.families & offered(peer)
    return offered(peer) if seen is None else seen.families


def held_prefixes(peer: str, answer: Sequence[str]) -> list[str]:
    """Prefixes in the answer to `show adj-rib out`: `<peer> <afi> <safi> <prefix> …` a line."""
    words = (line.split() for line in answer)
    return [parts[3] for parts in words if len(parts) > 3 and parts[0] == peer]


def held_routes(peer: str, answer: Iterable[str]) -> Iterator[tuple[str, Announcement | None]]:
    """Routes in the answer to `exabgp_show.held`; None: with attributes that it does not tell."""
    for parts in (line.split() for line in answer):
        if len(parts) < 3 or parts[0] != peer:
            continue
        if parts[1] != "update":
            yield from ((prefix, None) for prefix in parts[3:4])
            continue
        said = update_wire.decode(bytes.fromhex(parts[2]))
        for prefix in said.announced:
            yield prefix, Announcement(prefix, said.next_hop, said.attributes)
