"""What bgpd tells people: one question line in, one JSON answer out, on a unix socket.

    cymric node status ─▶ run_dir/bgpd.sock ─▶ Questions.answer ─▶ JSON, then the connection closes

Questions: `status` (also when nothing is asked within a moment), `routes` (the Loc-RIB),
`received <peer>`, `advertised <peer>`, `diff` (desired, commanded and confirmed, per peer), and
`why <prefix>` (every path to it, and at which step it lost or why it was rejected). Long answers
are written bit by bit, and others run in between.
The socket is readable by its owner only, as is everything in the run directory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path as FilePath
from typing import Any

import msgspec
import structlog

from bgpd import tcp_view
from bgpd.bfd.messages import SessionReport
from bgpd.bird_rows import rows
from bgpd.bird_socket import Daemon, Row
from bgpd.decision import Path, lost_at
from bgpd.fib import Fib
from bgpd.listings import Stream, advertised, chosen, received
from bgpd.md5_watch import Md5Watch, Watched
from bgpd.metrics import measure_once
from bgpd.outgoing import Outgoing
from bgpd.rib import AdjRibIn
from bgpd.router import Router
from bgpd.session_log import SessionLog
from bgpd.speaker import PeerProof, PeerStatus, SessionState, Speaker
from bgpd.tcp_view import TcpView
from cymric.model.net import Address, Network, parse_network

log = structlog.get_logger()

QUESTION_WITHIN_S = 0.5
LISTEN_WITHIN_S = 10.0
MEASURE_S = 5.0


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
        proc_net: FilePath = tcp_view.PROC_NET,
    ) -> None:
        self._router = router
        self._speaker = speaker
        self._fib = fib
        self._sessions = sessions
        self._outgoing = outgoing
        self._clock = clock
        self._started_s = clock()
        self._proc_net = proc_net
        self._md5 = Md5Watch(proc_net)
        self.bfd: Callable[[], Mapping[str, str]] = dict
        """State of BFD by peer, for the peers it watches."""

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

    def answer(self, question: str) -> Mapping[str, Any] | Stream:
        """The answer to one line; a question that is not understood is answered with `error`."""
        word, _, rest = question.strip().partition(" ")
        try:
            match word:
                case "" | "status":
                    return self._status()
                case "routes":
                    return Stream({}, "routes", chosen(self._router.rib.loc_rib))
                case "received":
                    return self._received(self._known(rest.strip()))
                case "advertised":
                    return self._advertised(self._known(rest.strip()))
                case "diff":
                    return self._diff()
                case "why":
                    return self._why(parse_network(rest.strip()))
                case _:
                    return {"error": f"no such question: {word!r}"}
        except ValueError as error:
            return {"error": str(error)}

    def _known(self, peer: str) -> str:
        """Raises ValueError for a peer that is not configured."""
        if peer not in self._router.sessions:
            raise ValueError(f"no session with {peer or 'nobody'} is configured on this node")
        return peer

    def _status(self) -> Mapping[str, Any]:
        router, speaker = self._router, self._speaker.status()
        is_down = len(router.up) < len(router.sessions)
        tcp = tcp_view.look(self._proc_net) if is_down else TcpView()
        bfd, proofs = self.bfd(), self._speaker.proof()
        return {
            "node": router.view.node,
            "in_sync": router.is_in_sync,
            "speaker": {
                "connected": speaker.connected,
                "generation": speaker.generation,
                "configuration": speaker.configuration,
            },
            "peers": [
                {
                    **self._peer(address, speaker.peers.get(address)),
                    **self._operation(address, tcp, proofs.get(address)),
                    "bfd": bfd.get(address, ""),
                }
                for address in router.sessions
            ],
            "started": self._started_s,
            "unsupported_peers": dict(router.unsupported),
            "problems": dict(router.problems),
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
            "info": "Established" if is_up else _why_down(seen) or waiting,
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

    def _operation(self, address: str, tcp: TcpView, proof: PeerProof | None) -> Mapping[str, Any]:
        """What an operator wants to know besides."""
        session, record = self._router.sessions[address], self._sessions.of(address)
        is_up = address in self._router.up
        hint = ""
        if not is_up:
            hint = tcp_view.hint(
                tcp,
                session.peer_address,
                session.peer_port,
                is_passive=session.is_passive,
                has_password=session.password is not None,
            )
        hint = "; ".join(filter(None, (self._md5.suspicion(session.peer_address), hint)))
        error = record.last_error
        return {
            "families": sorted(record.families) if is_up else [],
            "uptime_s": round(self._clock() - record.since_s, 3) if is_up else 0,
            "changed": record.since_s,
            "flaps": record.flaps,
            "failed_attempts": record.attempts,
            "updates": record.updates,
            "limit": self._router.rib.limit(address),
            "last_error": "" if error is None else error.text,
            "last_error_at": record.last_error_s,
            "hint": hint,
            "proof": None if proof is None else asdict(proof),
        }

    def _received(self, peer: str) -> Stream:
        table = self._router.rib.adj_ribs_in.get(peer, AdjRibIn())
        return Stream({"peer": peer, "is_up": peer in self._router.up}, "routes", received(table))

    def _advertised(self, peer: str) -> Stream:
        head = {
            "peer": peer,
            "is_up": peer in self._router.up,
            "waits_for": self._outgoing.waits_for,
            "drain": self._outgoing.state["phase"],
        }
        return Stream(head, "routes", advertised(self._outgoing.told(peer), self._why_advertised))

    def _why_advertised(self, prefix: str) -> str:
        network = parse_network(prefix)
        if (why := self._router.advertising.get(network)) is not None:
            return why.value
        choice = self._router.rib.loc_rib.get(network)
        return "" if choice is None else f"learned from {choice.path.peer.address}"

    def _diff(self) -> Mapping[str, Any]:
        proofs, seen = self._speaker.proof(), self._speaker.status().peers
        peers = []
        for address in self._router.sessions:
            proof, peer = proofs.get(address, PeerProof()), seen.get(address)
            told = self._outgoing.told(address)
            peers.append(
                {
                    "peer": address,
                    "is_up": address in self._router.up,
                    "wanted": len(told),
                    "configured": 0 if peer is None else peer.commanded,
                    **asdict(proof),
                }
            )
        return {
            "waits_for": self._outgoing.waits_for,
            "configuration": self._speaker.status().configuration,
            "peers": peers,
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
                    **self._reached(path.next_hop),
                    "stale": is_stale,
                    "rejected": rejection or "",
                    "lost_at": lost.get(path, ""),
                    "used": choice is not None and path in (choice.path, *choice.used),
                }
                for path, rejection, is_stale in found
            ],
        }

    def _reached(self, hop: Address) -> Mapping[str, Any]:
        """Through which gateways a next hop is reached, or why it is not."""
        found = self._router.resolver.resolve(hop)
        return {
            "reached_through": [str(one.gateway) for one in found.hops if one.gateway != hop],
            "unreachable": found.reason,
        }

    async def measure(self) -> None:
        """Keep the gauges, until cancelled."""
        while True:
            measure_once(self._router, self._speaker, self._sessions, self._outgoing)
            self._md5.note(
                Watched(
                    peer=session.peer_address,
                    has_password=session.password is not None,
                    is_up=address in self._router.up,
                )
                for address, session in self._router.sessions.items()
            )
            await asyncio.sleep(MEASURE_S)


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


def _why_down(seen: PeerStatus | None) -> str:
    if seen is None:
        return ""
    if seen.state is SessionState.HELD and seen.retry_in_s is not None:
        return f"held down for {seen.retry_in_s:.0f} s more: {seen.reason}"
    return seen.reason


def bfd_words(sessions: Iterable[SessionReport]) -> Mapping[str, str]:
    """How BFD sees each peer that it watches: its state, and what keeps it from seeing."""
    return {
        one.peer: one.state.name.lower().replace("_", " ")
        + (f" ({one.problem})" if one.problem else "")
        for one in sessions
    }


async def serve_questions(
    socket: FilePath, answer: Callable[[str], Mapping[str, Any] | Stream]
) -> None:
    """Answer on `socket` until cancelled; replaces what an earlier process left there."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(QUESTION_WITHIN_S):
                question = (await reader.readline()).decode(errors="replace")
        except (TimeoutError, ValueError):
            question = ""
        try:
            said = answer(question)
            chunks = said.chunks() if isinstance(said, Stream) else [msgspec.json.encode(said)]
            for chunk in chunks:
                writer.write(chunk)
                async with asyncio.timeout(LISTEN_WITHIN_S):
                    await writer.drain()
                await asyncio.sleep(0)  # routes and sessions go first
            writer.write(b"\n")
            await writer.drain()
        except (OSError, TimeoutError) as error:
            log.debug("a question's asker went away", error=str(error))
        finally:
            writer.close()

    socket.parent.mkdir(parents=True, exist_ok=True)
    socket.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(converse, socket)
    socket.chmod(0o600)
    async with server:
        await server.serve_forever()
