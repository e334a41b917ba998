"""ExaBGP's main loop with many peers: who is passed over, how long it sleeps, when lines go out."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from exabgp.bgp.fsm import FSM
from exabgp.reactor.api.processes import ProcessError
from exabgp.reactor.peer import ACTION

from bgpd import exabgp_loop


class Reactor:
    """Polls; `ready` are the descriptors that have something to read, `slept` what it was told."""

    def __init__(self) -> None:
        self.ready: list[int] = []
        self.slept: list[int] = []
        self._peers: dict[str, Any] = {}
        self.signal = SimpleNamespace(received=0)
        self.processes = SimpleNamespace(_process={})

    def _wait_for_io(self, sleep_ms: int) -> Iterator[int]:
        self.slept.append(sleep_ms)
        yield from self.ready

    def turn(self, sleep_ms: int = 10) -> int:
        """One pause of the loop; how long it was."""
        list(self._wait_for_io(sleep_ms))
        return self.slept[-1]


class Peer:
    """An Established session on descriptor 7 with nothing to do."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.generator: object = iter(())
        self.fsm: Any = FSM.ESTABLISHED
        self.pending = False
        self.runs = 0
        connection = type("Connection", (), {})()
        connection.io = object()
        self.proto: Any = SimpleNamespace(connection=connection)
        outgoing = SimpleNamespace(pending=lambda: self.pending)
        self.neighbor = SimpleNamespace(
            rib=SimpleNamespace(outgoing=outgoing), eor=[], refresh=[], messages=[]
        )
        self._teardown: int | None = None
        self._neighbor: object | None = None

    def stopping(self) -> bool:
        return False

    def socket(self) -> int:
        return 7

    def run(self) -> int:
        self.runs += 1
        return int(ACTION.LATER)


@pytest.fixture
def peer() -> Peer:
    """A peer that had its turn, in a loop that has looked."""

    class OurReactor(Reactor):
        pass

    class OurPeer(Peer):
        pass

    exabgp_loop.skip_quiet_peers(OurPeer)
    exabgp_loop.sleep_when_quiet(OurReactor)
    reactor = OurReactor()
    made = reactor._peers["one"] = OurPeer(reactor)
    made.run()
    reactor.turn()
    return made


def test_a_quiet_session_is_passed_over(peer: Peer) -> None:
    """Nothing to read or write, and it had its turn: no turn, and a long pause for the loop."""
    assert peer.run() == ACTION.LATER
    assert peer.runs == 1
    assert peer.reactor.turn() == exabgp_loop.IDLE_MS


@pytest.mark.parametrize(
    "happens",
    [
        pytest.param(lambda peer: setattr(peer, "pending", True), id="routes wait"),
        pytest.param(lambda peer: peer.neighbor.eor.append(1), id="an end of RIB waits"),
        pytest.param(lambda peer: peer.neighbor.refresh.append(1), id="a refresh waits"),
        pytest.param(lambda peer: setattr(peer, "fsm", FSM.OPENSENT), id="not up"),
        pytest.param(lambda peer: setattr(peer, "proto", None), id="no connection"),
        pytest.param(lambda peer: setattr(peer, "_teardown", 3), id="about to end"),
        pytest.param(lambda peer: setattr(peer, "_neighbor", 1), id="configured anew"),
        pytest.param(
            lambda peer: setattr(peer.proto.connection, "_cymric_waiting", [1]),
            id="a message is half written",
        ),
        pytest.param(
            lambda peer: setattr(peer, "_cymric_quiet_until_s", time.monotonic() - 0.001),
            id="its timers are due",
        ),
    ],
)
def test_whoever_has_something_to_do_has_a_turn(peer: Peer, happens: Any) -> None:
    """Each single reason is enough, and the loop does not sleep long then."""
    happens(peer)
    assert peer.reactor.turn() <= 10
    peer.run()
    assert peer.runs == 2


def test_what_can_be_read_is_read(peer: Peer) -> None:
    """A descriptor that the loop found readable gives its peer a turn."""
    peer.reactor.ready = [7]
    peer.reactor.turn()
    peer.run()
    assert peer.runs == 2


def test_routes_that_wait_leave_no_pause(peer: Peer) -> None:
    """Commands that were worked off just now are written in the next turn, not 10 ms later."""
    peer.pending = True
    assert peer.reactor.turn() == 0


def test_peers_between_attempts_do_not_keep_the_loop_awake(peer: Peer) -> None:
    """They wait for whole seconds; a signal is looked at soon."""
    peer.generator, peer.proto, peer.fsm = None, None, FSM.IDLE
    assert peer.reactor.turn() == exabgp_loop.IDLE_MS
    peer.reactor.signal.received = 15
    assert peer.reactor.turn() == 10


def test_lines_go_out_once_a_turn() -> None:
    """They are kept until the loop waits, in order; a reader that is gone is an error at once."""

    class OurReactor(Reactor):
        pass

    class Processes:
        def __init__(self, stdin: Any) -> None:
            self._process = {"d": SimpleNamespace(stdin=stdin)}
            self._broken: list[str] = []

        def write(self, process: str, string: str | None, neighbor: Any = None) -> bool:
            raise NotImplementedError

    exabgp_loop.flush_once(Processes, OurReactor)
    raw = io.BytesIO()
    reactor, processes = OurReactor(), Processes(io.BufferedWriter(raw))
    reactor.processes = processes  # type: ignore[assignment]
    assert processes.write("d", None)
    processes.write("d", "one")
    processes.write("d", "done")
    assert raw.getvalue() == b""
    reactor.turn()
    assert raw.getvalue() == b"one\ndone\n"

    class Gone:
        def write(self, _data: bytes) -> None:
            raise BrokenPipeError

    broken = Processes(Gone())
    with pytest.raises(ProcessError):
        broken.write("d", "one")
    assert broken._broken == ["d"]
