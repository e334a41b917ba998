"""What bgpd tells people: one question line in, one JSON answer out, on a unix socket.

    cymric node status ─▶ run_dir/bgpd.sock ─▶ Questions.answer ─▶ JSON, then the connection closes

Questions: `status` (also when nothing is asked within a moment), `routes` (the Loc-RIB), and
`why <prefix>` (every path to it, and at which step it lost or why it was rejected).
The socket is readable by its owner only, as is everything in the run directory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import msgspec
import structlog
from prometheus_client import Gauge

from bgpd.bird_rows import rows
from bgpd.bird_socket import Daemon, Row
from bgpd.decision import Path, lost_at
from bgpd.fib import Fib
from bgpd.outgoing import Outgoing
from bgpd.rib import AdjRibIn
from bgpd.router import Router
from bgpd.session_log import SessionLog
from bgpd.speaker import PeerStatus, SessionState, Speaker
from cymric.model.net import Network, parse_network

log = structlog.get_logger()

QUESTION_WITHIN_S = 0.5
MEASURE_S = 5.0

SESSION_UP = Gauge("cymric_bgp_session_up", "Whether a session is Established.", ["peer"])
PATHS = Gauge("cymric_bgp_paths", "Paths in Adj-RIB-In.", ["peer"])
STALE = Gauge("cymric_bgp_paths_stale", "Paths that wait to be confirmed or swept.", ["peer"])
REJECTED = Gauge("cymric_bgp_paths_rejected", "Paths that policy rejects.", ["peer", "reason"])
CHOSEN = Gauge("cymric_bgp_loc_rib_prefixes", "Prefixes with a path in use.")
ADVERTISED = Gauge("cymric_bgp_advertised_prefixes", "Prefixes this node advertises.")
UNCONFIRMED = Gauge("cymric_bgp_unconfirmed_prefixes", "Not yet sent to a peer.", ["peer"])


class Questions:
    """Answers from the running router, speaker and FIB."""

    def __init__(
        self,
        router: Router,
        speaker: Speaker,
        fib: Fib,
        sessions: SessionLog,
        outgoing: Outgoing,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._router = router
        self._speaker = speaker
        self._fib = fib
        self._sessions = sessions
        self._outgoing = outgoing
        self._started_s = clock()

    def bird_rows(self, family: int) -> Sequence[Row]:
        """What BIRD of that family would list."""
        sessions = self._router.sessions.items()
        told = ((session, self._sessions.of(address)) for address, session in sessions)
        return rows(family, told, started_s=self._started_s)

    def bird(self) -> Daemon:
        """What BIRD would say of itself."""
        router_ids = {str(session.router_id) for session in self._router.sessions.values()}
        return Daemon(
            router_id=min(router_ids, default="0.0.0.0"),
            started_s=self._started_s,
            configured_s=self._started_s,
        )

    def answer(self, question: str) -> Mapping[str, Any]:
        """The answer to one line; a question that is not understood is answered with `error`."""
        word, _, rest = question.strip().partition(" ")
        try:
            match word:
                case "" | "status":
                    return self._status()
                case "routes":
                    return self._routes()
                case "why":
                    return self._why(parse_network(rest.strip()))
                case _:
                    return {"error": f"no such question: {word!r}"}
        except ValueError as error:
            return {"error": str(error)}

    def _status(self) -> Mapping[str, Any]:
        router, speaker = self._router, self._speaker.status()
        return {
            "node": router.view.node,
            "in_sync": router.is_in_sync,
            "speaker": {
                "connected": speaker.connected,
                "generation": speaker.generation,
                "configuration": speaker.configuration,
            },
            "peers": [
                self._peer(address, speaker.peers.get(address)) for address in router.sessions
            ],
            "unsupported_peers": dict(router.unsupported),
            "outgoing": self._outgoing.state,
            "advertising": {str(prefix): why for prefix, why in router.advertising.items()},
            "routes": {
                "chosen": len(router.rib.loc_rib),
                "installed": self._fib.installed,
                "refused": {
                    str(prefix): refused.reason for prefix, refused in self._fib.refused.items()
                },
            },
        }

    def _peer(self, address: str, seen: PeerStatus | None) -> Mapping[str, Any]:
        session = self._router.sessions[address]
        table = self._router.rib.adj_ribs_in.get(address, AdjRibIn())
        is_up = seen is not None and seen.state is SessionState.UP
        waiting = "Passive" if session.is_passive else "Connect"
        return {
            "address": address,
            "name": session.name,
            "type": session.peer_type,
            "asn": session.peer_asn,
            "node": session.peer_node,
            "state": "up" if is_up else "start",
            "since": 0.0 if seen is None else seen.since_s,
            "info": "Established" if is_up else (seen.reason if seen else "") or waiting,
            "received": len(table.paths),
            "accepted": table.accepted,
            "rejected": dict(table.rejections()),
            "over_limit": self._router.rib.over_limit[address],
            "stale": len(table.stale),
            "stale_until": self._router.restarts.waiting(address),
            "advertised": {
                "wanted": 0 if seen is None else seen.wanted,
                "confirmed": 0 if seen is None else seen.confirmed,
                "end_of_rib": seen is not None and seen.end_of_rib_sent,
            },
        }

    def _routes(self) -> Mapping[str, Any]:
        chosen = self._router.rib.loc_rib
        return {
            "routes": [
                {
                    "prefix": str(prefix),
                    "next_hop": str(chosen[prefix].path.next_hop),
                    "peer": str(chosen[prefix].path.peer.address),
                    "settled_by": chosen[prefix].settled_by,
                }
                for prefix in sorted(chosen, key=lambda one: (one.version, one))
            ]
        }

    def _why(self, prefix: Network) -> Mapping[str, Any]:
        found = self._router.rib.candidates(prefix)
        lost = lost_at([path for path, rejection, _ in found if rejection is None])
        choice = self._router.rib.loc_rib.get(prefix)
        return {
            "prefix": str(prefix),
            "settled_by": "" if choice is None else choice.settled_by,
            "paths": [
                {
                    **_path(path),
                    "stale": is_stale,
                    "rejected": rejection or "",
                    "lost_at": lost.get(path, ""),
                    "used": choice is not None and path == choice.path,
                }
                for path, rejection, is_stale in found
            ],
        }

    async def measure(self) -> None:
        """Keep the gauges, until cancelled."""
        while True:
            self._measure_once()
            await asyncio.sleep(MEASURE_S)

    def _measure_once(self) -> None:
        router, seen = self._router, self._speaker.status().peers
        for gauge in (SESSION_UP, PATHS, STALE, REJECTED, UNCONFIRMED):
            gauge.clear()
        for peer in router.sessions:
            SESSION_UP.labels(peer).set(peer in router.up)
            if peer in seen:
                UNCONFIRMED.labels(peer).set(seen[peer].wanted - seen[peer].confirmed)
        for peer, table in router.rib.adj_ribs_in.items():
            PATHS.labels(peer).set(len(table.paths))
            STALE.labels(peer).set(len(table.stale))
            for reason, count in table.rejections().items():
                REJECTED.labels(peer, reason).set(count)
        CHOSEN.set(len(router.rib.loc_rib))
        ADVERTISED.set(len(router.advertising))


def _path(path: Path) -> Mapping[str, Any]:
    attributes = path.attributes
    return {
        "peer": str(path.peer.address),
        "next_hop": str(path.next_hop),
        "local_pref": path.local_pref,
        "as_path": [list(segment.asns) for segment in attributes.as_path],
        "origin": attributes.origin,
        "med": attributes.med,
    }


async def serve_questions(socket: FilePath, answer: Callable[[str], Mapping[str, Any]]) -> None:
    """Answer on `socket` until cancelled; replaces what an earlier process left there."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(QUESTION_WITHIN_S):
                question = (await reader.readline()).decode(errors="replace")
        except (TimeoutError, ValueError):
            question = ""
        try:
            writer.write(msgspec.json.encode(answer(question)) + b"\n")
            await writer.drain()
        except OSError as error:
            log.debug("a question's asker went away", error=str(error))
        finally:
            writer.close()

    socket.parent.mkdir(parents=True, exist_ok=True)
    socket.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(converse, socket)
    socket.chmod(0o600)
    async with server:
        await server.serve_forever()
