"""ExaBGP's main loop with many peers, changed in its process before it starts.

Stock code walks all peers a hundred times a second, each with half a dozen system calls, whether or
not anything happened: 60 idle sessions were a tenth of a core, and every command waited for the
walk. Measured with 60 sessions; what each change is for:

- `skip_quiet_peers`: a session that is up, has nothing to read or to write and had its turn within
  the last `TICK_S` (its timers count seconds) is passed over at the price of a few look-ups.
- `sleep_when_quiet`: if that is so for all, the loop sleeps `IDLE_MS` instead of 10 ms; what a peer
  or bgpd sends wakes it at once. Only a connection that a peer opens may wait that long.
- `flush_once`: lines to bgpd are written once a turn, not one by one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

TICK_S = 1.0
IDLE_MS = 100

_READABLE = "_cymric_readable"
_QUIET_UNTIL = "_cymric_quiet_until_s"
_UNFLUSHED = "_cymric_unflushed"


def apply() -> None:
    """Change the installed ExaBGP in this process; `exabgp_patches` has checked its version."""
    from exabgp.reactor.api.processes import Processes
    from exabgp.reactor.loop import Reactor
    from exabgp.reactor.peer import Peer

    skip_quiet_peers(Peer)
    sleep_when_quiet(Reactor)
    flush_once(Processes, Reactor)


def skip_quiet_peers(peer_class: Any) -> None:
    """A session with nothing to do has its turn once a second."""
    from exabgp.reactor.peer import ACTION

    run = peer_class.run

    @functools.wraps(run)
    def run_unless_quiet(peer: Any) -> Any:
        now_s = time.monotonic()
        if is_quiet(peer, now_s):
            return ACTION.LATER
        action = run(peer)
        setattr(peer, _QUIET_UNTIL, now_s + TICK_S if action == ACTION.LATER else 0.0)
        return action

    peer_class.run = run_unless_quiet


def is_quiet(peer: Any, now_s: float) -> bool:
    """Whether a turn would change nothing. Whatever is not known for sure means no."""
    from exabgp.bgp.fsm import FSM

    if now_s >= getattr(peer, _QUIET_UNTIL, 0.0) or peer.fsm != FSM.ESTABLISHED:
        return False
    protocol, neighbor = peer.proto, peer.neighbor
    if protocol is None or protocol.connection is None or protocol.connection.io is None:
        return False
    if peer._teardown or peer._neighbor is not None or peer.stopping():
        return False
    if neighbor.rib.outgoing.pending() or neighbor.eor or neighbor.refresh or neighbor.messages:
        return False
    if protocol.connection.__dict__.get("_cymric_waiting"):  # half-written, see finish_messages
        return False
    readable = getattr(peer.reactor, _READABLE, None)
    return readable is not None and peer.socket() not in readable


def sleep_when_quiet(reactor_class: Any) -> None:
    """The loop remembers who has something to read, and sleeps longer if nobody has a thing to do.

    A peer between two attempts to connect counts as quiet: it waits for whole seconds.
    """
    wait_for_io = reactor_class._wait_for_io

    @functools.wraps(wait_for_io)
    def wait(reactor: Any, sleep_ms: int) -> Iterator[int]:
        if sleep_ms:
            sleep_ms = _pause_ms(reactor, sleep_ms)
        ready = list(wait_for_io(reactor, sleep_ms))
        setattr(reactor, _READABLE, frozenset(ready))
        yield from ready

    reactor_class._wait_for_io = wait


def _pause_ms(reactor: Any, usual_ms: int) -> int:
    now_s, is_all_quiet = time.monotonic(), True
    for peer in reactor._peers.values():
        if peer.generator and not is_quiet(peer, now_s):
            is_all_quiet = False
            if peer.neighbor.rib.outgoing.pending():
                return 0
    return max(usual_ms, IDLE_MS) if is_all_quiet and not reactor.signal.received else usual_ms


def flush_once(processes_class: Any, reactor_class: Any) -> None:
    """What is told to bgpd goes out before the loop waits, all at once."""
    from exabgp.reactor.api.processes import ProcessError

    wait_for_io = reactor_class._wait_for_io

    @functools.wraps(processes_class.write)
    def write(processes: Any, process: str, string: str | None, neighbor: Any = None) -> bool:
        if string is None:
            return True
        try:
            processes._process[process].stdin.write(f"{string}\n".encode("ascii"))
        except OSError:
            processes._broken.append(process)
            raise ProcessError from None
        processes.__dict__.setdefault(_UNFLUSHED, set()).add(process)
        return True

    @functools.wraps(wait_for_io)
    def flush_and_wait(reactor: Any, sleep_ms: int) -> Any:
        flush(reactor.processes)
        return wait_for_io(reactor, sleep_ms)

    processes_class.write = write
    reactor_class._wait_for_io = flush_and_wait


def flush(processes: Any) -> None:
    """Write what is kept. A process that went away is found out by ExaBGP when it reads."""
    waiting: set[str] = processes.__dict__.get(_UNFLUSHED, set())
    while waiting:
        running = processes._process.get(waiting.pop())
        if running is not None:
            try:
                running.stdin.flush()
            except (OSError, ValueError):
                continue
