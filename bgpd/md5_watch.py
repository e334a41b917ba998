"""Whose password differs: the kernel's counters of refused signatures, laid at a session's door.

    Questions.measure, each few seconds ─▶ Md5Watch.note ─▶ suspicion(peer) ─▶ status, log

The kernel counts segments dropped for their TCP MD5 signature, for the whole network namespace. So
a session is suspected by elimination: it is not up, or its connection is up and the peer does not
acknowledge what it is sent, just when a counter grows that fits what is configured here. A single
one is told as a fact, several as a suspicion each.

Invariants
- A session that is up and acknowledged is never suspected; what was counted for it is forgotten.
- Counted is only what was dropped while the session was suspect, and only for `REMEMBERED_S`.
- Nothing here can tell of a peer that only waits and drops our segments itself.

Source: RFC 2385; Linux' TcpExt counters TCPMD5NotFound, TCPMD5Unexpected, TCPMD5Failure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from bgpd import tcp_view
from bgpd.tcp_view import PROC_NET, Md5Drops
from cymric.model.net import Address

REMEMBERED_S = 300.0
"""A router may wait two minutes between attempts to connect."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Watched:
    """One session, as far as signatures go."""

    peer: Address
    has_password: bool
    is_up: bool


@dataclass(frozen=True, slots=True)
class _Count:
    """Segments dropped while a session was suspect, among how many; when last (monotonic)."""

    drops: Md5Drops
    suspects: int
    at_s: float


class Md5Watch:
    """See the module. `directory` is the /proc/net of the speaker's network namespace."""

    def __init__(
        self, directory: Path = PROC_NET, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = directory
        self._clock = clock
        self._seen = tcp_view.drops(directory)
        self._counts: dict[Address, _Count] = {}

    def note(self, sessions: Iterable[Watched]) -> None:
        """Look at the counters; these are all sessions."""
        now = tcp_view.drops(self._directory)
        new, self._seen = now.since(self._seen), now
        has_grown = max(new.missing, new.unexpected, new.wrong) > 0
        # Connections are many, so they are looked at only when there is a reason.
        unheard = tcp_view.look(self._directory).unheard if has_grown else frozenset()
        suspects = {one.peer: one for one in sessions if not one.is_up or one.peer in unheard}
        self._counts = {peer: one for peer, one in self._counts.items() if peer in suspects}
        if not has_grown:
            return
        for has_password in (True, False):
            mine = new.with_password() if has_password else new.without_password()
            blamed = [peer for peer, one in suspects.items() if one.has_password is has_password]
            if mine == Md5Drops():
                continue
            for peer in blamed:
                self._blame(peer, mine, len(blamed))

    def _blame(self, peer: Address, drops: Md5Drops, suspects: int) -> None:
        before = self._counts.get(peer)
        if before is None:
            log.warning("signatures of segments fail", peer=str(peer), suspects=suspects)
        else:
            drops = before.drops.plus(drops)
        self._counts[peer] = _Count(drops, suspects, self._clock())

    def suspicion(self, peer: Address) -> str:
        """A sentence about the password of this session; empty if nothing is held against it."""
        count = self._counts.get(peer)
        if count is None or self._clock() - count.at_s > REMEMBERED_S:
            return ""
        drops = count.drops
        kinds = (
            (drops.wrong, "a wrong", "the password differs from the peer's"),
            (drops.missing, "no", "the peer uses no password, and this side does"),
            (drops.unexpected, "a", "the peer uses a password, and this side none"),
        )
        number, signature, meaning = max(kinds)
        what = f"{number} segments with {signature} TCP MD5 signature were dropped here"
        if count.suspects == 1:
            return f"{meaning}: {what}"
        return f"perhaps {meaning}: {what}, of this or of {count.suspects - 1} other peers"
