"""ExaBGP's API process: between ExaBGP's pipes and bgpd's socket, and never in anybody's way.

Place in the flow: ExaBGP starts this file (`python -I -S relay.py <socket>`), writes events and
answers to our stdin and reads commands from our stdout. bgpd connects to the socket. It may stop,
die or be upgraded; no session notices.

Invariants:

- stdin is always read. ExaBGP blocks, and all its sessions with it, when nobody reads.
- Lines are forwarded whole, in both directions. What a dead bgpd left half-written is dropped.
- One bgpd at a time; a new connection replaces the old one. It gets a greeting line: who ExaBGP is,
  whether events were lost since the last bgpd, and OPEN and `up` event of each live session; then
  the OPEN of each that is not up yet.
- Answers to commands of an earlier bgpd never reach a later one: its commands wait until the
  earlier ones are answered (or ExaBGP said nothing for `STALE_ANSWER_S`).
- A bgpd too slow to keep up is cut off; it comes back and is told that events were lost.

Standard library only: it starts in ExaBGP's shadow and must start fast and need nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import socket
import sys
import time
from typing import Any

READ_BYTES = 256 * 1024
EVENT_BACKLOG_BYTES = 32 * 1024 * 1024
COMMAND_BACKLOG_BYTES = 256 * 1024
COMMAND_LINE_BYTES = 1024 * 1024
EVENT_PIPE_BYTES = 1024 * 1024
STALE_ANSWER_S = 10.0
UNANSWERED_COMMAND = b"cymric "
"""How commands of our own begin (exabgp_orders.py); ExaBGP does not answer them."""
HEADER_BYTES = 400
"""A little more than the fixed part of an event that comes before its content."""


class Client:
    """A connected bgpd and what is on its way to and from it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.unsent = bytearray()
        self.unfinished_line = bytearray()

    def fileno(self) -> int:
        """For the poller."""
        return self.connection.fileno()


class Relay:
    """The whole state of this process."""

    def __init__(self, path: str) -> None:
        self.events_fd = sys.stdin.fileno()
        self.commands_fd = sys.stdout.fileno()
        for fd in (self.events_fd, self.commands_fd):
            os.set_blocking(fd, False)
        _enlarge(self.events_fd)
        self.listener = _listen(path)
        self.client: Client | None = None
        self.unfinished_event = bytearray()
        self.unwritten_commands = bytearray()
        self.unanswered = 0
        self.stale = 0
        self.stale_until = 0.0
        self.lost = False
        self.open_by_peer: dict[str, Any] = {}
        self.session_by_peer: dict[str, list[Any]] = {}

    def run(self) -> None:
        """Relay until ExaBGP goes."""
        while self.turn():
            pass

    def turn(self) -> bool:
        """Wait for something to do and do it; False when ExaBGP is gone."""
        readers: list[Any] = [self.events_fd, self.listener]
        writers: list[Any] = []
        if self.unwritten_commands:
            writers.append(self.commands_fd)
        if self.client is not None:
            if not self.stale and len(self.unwritten_commands) < COMMAND_BACKLOG_BYTES:
                readers.append(self.client)
            if self.client.unsent:
                writers.append(self.client)
        ready, writable, _ = select.select(readers, writers, [], 1.0 if self.stale else None)
        if self.events_fd in ready and not self.read_events():
            return False
        if self.commands_fd in writable and not self.write_commands():
            return False
        if self.client is not None and self.client in writable:
            self.send()
        if self.client is not None and self.client in ready:
            self.receive()
        if self.listener in ready:
            self.accept()
        if self.stale and time.monotonic() > self.stale_until:
            self.stale = 0
        return True

    # --- from ExaBGP ---------------------------------------------------------------------------

    def read_events(self) -> bool:
        """Take what ExaBGP wrote; False at its end."""
        try:
            data = os.read(self.events_fd, READ_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        *lines, rest = data.split(b"\n")
        if lines:
            lines[0] = bytes(self.unfinished_event) + lines[0]
            self.unfinished_event = bytearray(rest)
        else:
            self.unfinished_event += rest
        for line in lines:
            self.on_line(line)
        return True

    def on_line(self, line: bytes) -> None:
        """One event, or a line of an answer."""
        if line.startswith(b"!"):  # an UPDATE as it was on the wire: by far the most lines
            self.pass_on(line)
            return
        if line.startswith(b"{"):
            self.remember(line)
            self.pass_on(line)
            return
        is_last = line in (b"done", b"error")
        if self.stale:
            if is_last:
                self.stale -= 1
            self.stale_until = time.monotonic() + STALE_ANSWER_S
            return
        if is_last:
            self.unanswered = max(0, self.unanswered - 1)
        if self.client is not None:
            self.pass_on(line)

    def pass_on(self, line: bytes) -> None:
        """Queue a line for bgpd; cut bgpd off if it does not keep up."""
        if self.client is None:
            self.lost = True
            return
        self.client.unsent += line
        self.client.unsent += b"\n"
        if len(self.client.unsent) > EVENT_BACKLOG_BYTES:
            self.lost = True
            self.drop_client()

    def remember(self, line: bytes) -> None:
        """Keep the OPEN and `up` events of live sessions, for a bgpd that comes later."""
        head = line[:HEADER_BYTES]
        is_state = b'"type": "state"' in head
        if not is_state and b'"type": "open"' not in head:
            return
        try:
            event = json.loads(line)
            neighbor = event["neighbor"]
            peer = neighbor["address"]["peer"]
        except (ValueError, KeyError, TypeError):
            return  # bgpd reports lines that make no sense; here they only cannot be remembered
        if not is_state:
            if neighbor.get("direction") == "receive":
                self.open_by_peer[peer] = event
        elif neighbor.get("state") == "up":
            self.session_by_peer[peer] = [self.open_by_peer.get(peer), event]
        elif neighbor.get("state") == "down":
            self.session_by_peer.pop(peer, None)
            self.open_by_peer.pop(peer, None)

    # --- to and from bgpd ----------------------------------------------------------------------

    def accept(self) -> None:
        """A bgpd connects: it replaces the one before."""
        try:
            connection, _ = self.listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        self.drop_client()
        self.client = Client(connection)
        greeting = {
            "relay": 1,
            "pid": os.getppid(),
            "generation": f"{os.getppid()}-{_start_time(os.getppid())}",
            "lost": self.lost,
            "sessions": list(self.session_by_peer.values()),
        }
        self.lost = False
        self.client.unsent += json.dumps(greeting).encode() + b"\n"
        # Sessions that are about to be up: their OPEN was told before anybody listened.
        for peer, event in self.open_by_peer.items():
            if peer not in self.session_by_peer:
                self.client.unsent += json.dumps(event).encode() + b"\n"

    def drop_client(self) -> None:
        """Forget bgpd; answers still to come are nobody's."""
        if self.client is None:
            return
        if self.client.unsent:
            self.lost = True
        with contextlib.suppress(OSError):
            self.client.connection.close()
        self.client = None
        self.stale += self.unanswered
        self.unanswered = 0
        self.stale_until = time.monotonic() + STALE_ANSWER_S

    def send(self) -> None:
        """Give bgpd what it can take."""
        assert self.client is not None
        try:
            sent = self.client.connection.send(memoryview(self.client.unsent)[:READ_BYTES])
        except BlockingIOError:
            return
        except OSError:
            self.drop_client()
            return
        del self.client.unsent[:sent]

    def receive(self) -> None:
        """Take commands from bgpd, whole lines only."""
        client = self.client
        assert client is not None
        try:
            data = client.connection.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data or len(client.unfinished_line) > COMMAND_LINE_BYTES:
            self.drop_client()
            return
        client.unfinished_line += data
        whole, newline, rest = client.unfinished_line.rpartition(b"\n")
        if newline:
            self.unwritten_commands += whole + newline
            self.unanswered += sum(
                not line.startswith(UNANSWERED_COMMAND) for line in whole.split(b"\n")
            )
            client.unfinished_line = bytearray(rest)

    def write_commands(self) -> bool:
        """Give ExaBGP what it can take; False when it is gone."""
        try:
            written = os.write(self.commands_fd, memoryview(self.unwritten_commands)[:65536])
        except BlockingIOError:
            return True
        except OSError as error:
            if error.errno == errno.EPIPE:
                return False
            raise
        del self.unwritten_commands[:written]
        return True


def _listen(path: str) -> socket.socket:
    """The socket under its name, readable by its owner alone; a leftover of that name goes."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.setblocking(False)
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # noqa: PTH108 - pathlib would double our start-up time
    umask = os.umask(0o177)
    try:
        listener.bind(temporary)
    finally:
        os.umask(umask)
    listener.listen(4)
    os.rename(temporary, path)  # noqa: PTH104
    return listener


def _enlarge(fd: int) -> None:
    """A larger pipe lets ExaBGP go on a little longer when this process gets no turn."""
    with contextlib.suppress(OSError):
        fcntl.fcntl(fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), EVENT_PIPE_BYTES)


def _start_time(pid: int) -> str:
    """When the process started, in clock ticks after boot: a pid alone may be used again."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:  # noqa: PTH123
            return stat.read().decode(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"


if __name__ == "__main__":
    Relay(sys.argv[1]).run()
