"""The announced set, proved: what ExaBGP holds for each peer against what it was commanded.

Three sets belong to a peer: what is wanted, what was commanded and is held by ExaBGP, and what
ExaBGP wrote to the peer. The first two are compared at every change, the third with every UPDATE
written (exabgp_peer.py). This file closes the gap that is left: that ExaBGP itself lost a route,
has one that nobody remembers, or has one with other attributes. It is asked, peer after peer, and
believed; a difference is repaired by commanding it again, counted and logged.

Invariants:

- Only a settled session is judged, and only if nothing was commanded while the answer came.
- The cost is bounded: a pause after each peer, the longer the more routes it has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from bgpd import exabgp_show
from bgpd.announcement import Announcement
from bgpd.exabgp_answers import held_routes
from bgpd.exabgp_link import Link
from bgpd.exabgp_session import NAMED_PREFIXES, PeerSession

CHECK_EVERY_S = 10.0
ROUTES_PER_S = 1000.0
"""ExaBGP needs some 20 us to tell one route: at most a fiftieth of a core goes into the proof."""
LINES_AT_ONCE = 100

log = structlog.get_logger()


async def keep_proving(
    link: Link, peers: Callable[[], Iterable[PeerSession]], clock: Callable[[], float]
) -> None:
    """Check one peer after the other until cancelled. `clock` gives Unix time in seconds."""
    while True:
        await asyncio.sleep(CHECK_EVERY_S)
        for peer in tuple(peers()):
            await prove(link, peer, clock)
            await asyncio.sleep(len(peer.rib.held) / ROUTES_PER_S)


async def prove(link: Link, peer: PeerSession, clock: Callable[[], float]) -> None:
    """Compare and, where they differ, have the session's task command it again."""
    session, changes = peer.up, peer.rib.changes
    if session is None or not peer.rib.is_settled:
        return
    reply = await link.ask(exabgp_show.held(peer.name))
    actual: dict[str, Announcement | None] = {}
    for start in range(0, len(reply.lines), LINES_AT_ONCE):
        actual.update(held_routes(peer.name, reply.lines[start : start + LINES_AT_ONCE]))
        await asyncio.sleep(0)  # sessions and routes go first
    if peer.up is not session or peer.rib.changes != changes:
        return
    if not reply.ok:
        log.warning("exabgp does not say what it holds", peer=peer.name)
        return
    peer.checked_s = clock()
    if differing := peer.rib.correct(actual):
        peer.repaired += len(differing)
        peer.repaired_last = tuple(sorted(differing)[:NAMED_PREFIXES])
        log.warning(
            "exabgp held another set than commanded",
            peer=peer.name,
            prefixes=len(differing),
            some=peer.repaired_last[:5],
        )
        peer.kick()
