"""bgpd's side of BFD: has the process run when it is needed, tells it what to watch, hears it.

    Router's sessions ─▶ expect ─▶ Expect ─▶ process
    process ─▶ Failed ─▶ on_failed ─▶ Router.on_path_failed      Report ─▶ sessions(), metrics

The process outlives us (see process.py), so the first thing is to look whether one is there.

Invariants
- Nothing is told before `expect` was called: an unknown wish is not the wish for no sessions.
- A BFD process that is gone, or cannot be started, is never a failure of a peer.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
from prometheus_client import Gauge

from bgpd.bfd.messages import (
    LONGEST_LINE_BYTES,
    PROTOCOL,
    Expect,
    Failed,
    Hello,
    Report,
    SessionReport,
    Stop,
    WantedSession,
    from_process,
    line,
)
from bgpd.bfd.packet import Discard, State
from cymric.model.peering import Session
from cymric.runtime.pacing import Backoff, Kick

log = structlog.get_logger()

SESSIONS = Gauge("cymric_bfd_sessions", "BFD sessions by state.", ["state"])
PACKETS = Gauge("cymric_bfd_packets", "BFD packets since its process began.", ["peer", "direction"])
DISCARDED = Gauge("cymric_bfd_discarded_packets", "BFD packets refused, by reason.", ["reason"])
TRANSITIONS = Gauge("cymric_bfd_transitions", "Changes of a session's state.", ["peer"])
FAILURES = Gauge("cymric_bfd_failures", "Times a session that was up failed.", ["peer"])
STALLS = Gauge("cymric_bfd_stalls", "Times the BFD process itself woke late.")
RUNNING = Gauge("cymric_bfd_process_connected", "Whether the BFD process answers.")


def watched(sessions: Iterable[Session]) -> Iterator[WantedSession]:
    """What BFD is to watch: the sessions whose BGPPeer, or mesh, asks for it.

    One whose annotation makes no sense goes on being watched as it was, if it was: AdminDown after
    a slip of the pen would have BIRD drop the BGP session.
    """
    for session in sessions:
        if session.bfd is not None or session.is_bfd_unclear:
            yield WantedSession(
                peer=session.key, local=str(session.local_address), parameters=session.bfd
            )


class OnFailed(Protocol):
    """Who acts when a path to a peer is dead: `Router.on_path_failed`."""

    def __call__(self, peer: str, reason: str, *, is_independent: bool) -> None:
        """The session of `peer` that was up is down; see `Failed`."""
        ...


class Bfd:
    """BFD as bgpd sees it. `command` starts the process; `socket` is where it listens."""

    def __init__(
        self,
        socket: Path,
        on_failed: OnFailed,
        *,
        command: Sequence[str] | None = None,
    ) -> None:
        self._socket = socket
        self._on_failed = on_failed
        self._command = tuple(command or (sys.executable, "-m", "bgpd.bfd.process", str(socket)))
        self._wanted: tuple[WantedSession, ...] | None = None
        self._report = Report()
        self._started: subprocess.Popen[bytes] | None = None
        self._backoff = Backoff()
        self._kick = Kick()
        self.problem = ""
        self.process_id = 0

    def expect(self, sessions: Iterable[WantedSession]) -> None:
        """Have exactly these sessions, from now on and whatever happens."""
        wanted = tuple(sorted(sessions, key=lambda one: one.peer))
        if wanted != self._wanted:
            self._wanted = wanted
            self._kick()

    def sessions(self) -> tuple[SessionReport, ...]:
        """Every wanted session as the process last told it, by peer address."""
        told = {one.peer: one for one in self._report.sessions}
        found = []
        for one in self._wanted or ():
            if one.peer in told:
                found.append(told[one.peer])
            elif one.parameters is not None:
                problem = self.problem or "the BFD process has not told yet"
                found.append(
                    SessionReport(
                        peer=one.peer, local=one.local, parameters=one.parameters, problem=problem
                    )
                )
        return tuple(found)

    @property
    def _is_needed(self) -> bool:
        return any(one.parameters is not None for one in self._wanted or ())

    @property
    def report(self) -> Report:
        """The last report: also discarded packets by reason, and stalls."""
        return self._report

    async def run(self) -> None:
        """Keep the process running, connected and told, until cancelled. It goes on without us."""
        while True:
            # Connected before we know what we want: a process that sees nobody would end.
            connection = await self._connect()
            if connection is not None:
                await self._converse(*connection)
            elif self._is_needed:
                self._start()
                await asyncio.sleep(self._backoff.next_s())
            else:
                await self._kick.wait()

    # --- the process ------------------------------------------------------------------------

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        try:
            return await asyncio.open_unix_connection(self._socket, limit=LONGEST_LINE_BYTES)
        except OSError:
            return None

    def _start(self) -> None:
        """Start the process, unless the one we started is still getting ready."""
        if self._started is not None and (code := self._started.poll()) is not None:
            self.problem = f"the BFD process ended with exit code {code}"
            log.warning("BFD process ended", exit_code=code)
            self._started = None
        if self._started is not None:
            return
        self._socket.parent.mkdir(parents=True, exist_ok=True)
        try:
            # A session of its own: what ends our process group must not end BFD.
            self._started = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            self.problem = f"the BFD process cannot be started: {error.strerror}"
            log.error("BFD process cannot be started", error=str(error))
        else:
            log.info("BFD process started", pid=self._started.pid)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Tell and hear until the connection is lost."""
        telling = asyncio.create_task(self._tell(writer), name="bfd tell")
        try:
            while text := await reader.readline():
                self._hear(from_process.decode(text), writer)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.warning("BFD process is not understood", error=str(error))
            await asyncio.sleep(self._backoff.next_s())
        finally:
            telling.cancel()
            writer.close()
        self._forget()

    async def _tell(self, writer: asyncio.StreamWriter) -> None:
        while True:
            if self._wanted is not None:
                writer.write(line(Expect(self._wanted)))
            await self._kick.wait()

    def _forget(self) -> None:
        self._report = Report()
        self.problem = "the BFD process is gone"
        self.process_id = 0
        RUNNING.set(0)
        if self._is_needed:
            log.warning("BFD process is gone; peers are not watched until it is back")

    # --- what it says -----------------------------------------------------------------------

    def _hear(self, message: Hello | Report | Failed, writer: asyncio.StreamWriter) -> None:
        match message:
            case Hello(protocol=protocol, pid=pid):
                self.process_id, self.problem = pid, ""
                self._backoff.succeeded()
                RUNNING.set(1)
                if protocol != PROTOCOL:
                    log.info("BFD process is of another version and makes room", pid=pid)
                    writer.write(line(Stop()))
            case Failed():
                log.warning("path failed", peer=message.peer, reason=message.reason)
                self._on_failed(message.peer, message.reason, is_independent=message.is_independent)
            case Report():
                self._log_changes(self._report, message)
                self._report = message
                self._measure()

    def _log_changes(self, before: Report, after: Report) -> None:
        states = {one.peer: (one.state, one.problem) for one in before.sessions}
        for one in after.sessions:
            if states.get(one.peer) != (one.state, one.problem):
                log.info(
                    "BFD session",
                    peer=one.peer,
                    state=one.state.word,
                    reason=one.reason,
                    problem=one.problem,
                )

    def _measure(self) -> None:
        for gauge in (PACKETS, TRANSITIONS, FAILURES):
            gauge.clear()
        for state in State:
            count = sum(one.state is state for one in self._report.sessions)
            SESSIONS.labels(state.word).set(count)
        for one in self._report.sessions:
            PACKETS.labels(one.peer, "sent").set(one.sent)
            PACKETS.labels(one.peer, "received").set(one.received)
            TRANSITIONS.labels(one.peer).set(one.transitions)
            FAILURES.labels(one.peer).set(one.failures)
        for reason in Discard:
            DISCARDED.labels(reason.value).set(self._report.discarded.get(reason.value, 0))
        STALLS.set(self._report.stalls)
