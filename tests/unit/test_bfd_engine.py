"""All BFD sessions of a node, on sockets in memory: whose packet it is, and whose time is over."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import pytest

from bgpd.bfd.engine import LATE_S, MOST_AT_ONCE, Engine
from bgpd.bfd.messages import Failed, SessionReport, WantedSession
from bgpd.bfd.packet import ControlPacket, Discard, State, decode, encode
from bgpd.bfd.transport import Datagram, Sender
from cymric.model.bfd import BfdParameters

US, PEER, OTHER = "198.19.8.1", "198.19.8.2", "198.19.8.3"


@dataclass
class Wire:
    """The sockets: what was sent, what waits to be read, what the kernel refuses."""

    sent: list[tuple[str, ControlPacket]] = field(default_factory=list)
    waiting: list[Datagram] = field(default_factory=list)
    listening: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    refusal: str = ""
    open_senders: int = 0

    def listen(self, locals_: Collection[str]) -> dict[str, str]:
        self.listening = set(locals_) - self.absent
        return dict.fromkeys(set(locals_) & self.absent, "no such address")

    def drain(self, most: int) -> Iterator[Datagram]:
        now, self.waiting = self.waiting[:most], self.waiting[most:]
        yield from now

    def sender(self, local: str, peer: str) -> Sender:
        if local in self.absent:
            raise OSError(99, "no such address")
        self.open_senders += 1
        return WireSender(self, peer)


@dataclass
class WireSender:
    wire: Wire
    peer: str

    def send(self, data: bytes) -> str:
        if not self.wire.refusal:
            self.wire.sent.append((self.peer, decode(data)))
        return self.wire.refusal

    def close(self) -> None:
        self.wire.open_senders -= 1


class Node:
    """An engine with a clock that a test moves, and peers that a test plays."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.now_s = 100.0
        self.failures: list[Failed] = []
        self.changes = 0
        self.engine = Engine(
            self.wire,
            on_change=self._changed,
            on_failure=self.failures.append,
            clock=lambda: self.now_s,
            wall_clock=lambda: self.now_s,
            chance=lambda: 1.0,
        )

    def _changed(self) -> None:
        self.changes += 1

    def expect(self, *peers: str, local: str = US) -> None:
        self.engine.expect(
            WantedSession(peer=peer, local=local, parameters=BfdParameters()) for peer in peers
        )
        self.engine.work()

    def hear(self, state: State, peer: str = PEER, **fields: object) -> None:
        """A packet of the peer, as a peer at 300 ms x 3 would send it."""
        found = [one for one in self.engine.report().sessions if one.peer == peer]
        packet = ControlPacket(
            state=state,
            my_discriminator=77,
            your_discriminator=found[0].local_discriminator if found else 5,
            desired_min_tx_us=300_000,
            required_min_rx_us=300_000,
            multiplier=3,
            independent=True,
        )
        packet = replace(packet, **fields)  # type: ignore[arg-type]
        self.wire.waiting.append(Datagram(US, peer, 255, encode(packet)))

    def bring_up(self, *peers: str) -> None:
        for peer in peers:
            self.hear(State.DOWN, peer, your_discriminator=0)
            self.hear(State.UP, peer)
            self.hear(State.UP, peer, final=True)
        self.engine.work()
        for peer in peers:
            assert self.report(peer).state is State.UP

    def run(self, seconds: float, *, step_s: float = 0.01) -> None:
        """Time passes and the engine is called when it asked to be."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            self.now_s = min(end_s, max(self.now_s + step_s / 10, self.engine.work()))
        self.engine.work()

    def report(self, peer: str = PEER) -> SessionReport:
        return {one.peer: one for one in self.engine.report().sessions}[peer]


@pytest.fixture
def node() -> Node:
    made = Node()
    made.expect(PEER)
    return made


def test_silence_is_a_failure_told_once(node: Node) -> None:
    """A peer that was up and falls silent fails after 0.9 s, once, with its C bit."""
    node.bring_up(PEER)
    node.run(0.89)
    assert node.failures == []
    node.run(0.05)
    [failed] = node.failures
    assert (failed.peer, failed.is_independent) == (PEER, True)
    assert failed.reason == "nothing heard within the detection time"
    node.run(5)
    assert len(node.failures) == 1
    assert node.report().state is State.DOWN
    assert node.report().reason == failed.reason


def test_a_peer_that_never_came_is_no_failure(node: Node) -> None:
    """A session that was never up cannot fail."""
    node.run(30)
    node.hear(State.DOWN, your_discriminator=0)
    node.run(30)
    assert node.failures == []


def test_packets_that_wait_were_in_time(node: Node) -> None:
    """After a stall of our own, packets in the socket count before the deadline does."""
    node.bring_up(PEER)
    node.now_s += 5
    node.hear(State.UP)
    node.engine.work()
    assert node.failures == []
    assert node.report().state is State.UP
    assert node.engine.stalls == 1


def test_a_stall_without_packets_gives_one_interval(node: Node) -> None:
    """Waking late with nothing to read, the peer gets 300 ms to be heard; then it has failed."""
    node.bring_up(PEER)
    node.now_s += 5
    assert node.engine.work() <= node.now_s + 0.3
    assert node.failures == []
    node.run(0.31, step_s=LATE_S / 2)
    assert len(node.failures) == 1


def test_a_flood_does_not_stop_the_clock(node: Node) -> None:
    """Packets without end from somebody else do not keep a dead peer alive."""
    node.bring_up(PEER)
    for _ in range(15):
        for _ in range(2 * MOST_AT_ONCE):
            node.wire.waiting.append(Datagram(US, OTHER, 255, b"noise"))
        node.now_s += 0.1
        node.engine.work()
        node.wire.waiting.clear()
    assert len(node.failures) == 1
    assert node.engine.discarded[Discard.SHORT] > MOST_AT_ONCE


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ttl": 254}, Discard.TTL),
        ({"ttl": -1}, Discard.TTL),
        ({"data": b"\x20"}, Discard.SHORT),
        ({"source": OTHER}, Discard.WRONG_PEER),
        ({"local": "198.19.8.99"}, Discard.WRONG_PEER),
    ],
)
def test_refused_packets(node: Node, change: dict[str, object], reason: Discard) -> None:
    """A packet with a wrong TTL, form, sender or address is counted and changes nothing."""
    node.bring_up(PEER)
    node.hear(State.DOWN)
    node.wire.waiting[0] = replace(node.wire.waiting[0], **change)  # type: ignore[arg-type]
    node.engine.work()
    assert node.report().state is State.UP
    assert node.engine.discarded == {reason: 1}


def test_packets_for_nobody(node: Node) -> None:
    """An unknown discriminator, or a first packet of a stranger, is counted."""
    node.hear(State.UP, your_discriminator=1)
    node.hear(State.DOWN, OTHER, your_discriminator=0)
    node.engine.work()
    assert node.engine.discarded == {Discard.NO_SESSION: 2}
    assert node.report().state is State.DOWN


def test_a_peers_admin_down_is_no_failure(node: Node) -> None:
    """An operator shut the peer's side: down, and nothing failed."""
    node.bring_up(PEER)
    node.hear(State.ADMIN_DOWN)
    node.engine.work()
    assert node.report().state is State.DOWN
    assert node.report().reason == "the peer is administratively down"
    assert node.failures == []


def test_a_session_not_wanted_any_more_says_so_and_goes(node: Node) -> None:
    """AdminDown goes out at once; later the session, its socket and its sender are gone."""
    node.bring_up(PEER)
    node.wire.sent.clear()
    node.expect()
    assert [packet.state for _, packet in node.wire.sent] == [State.ADMIN_DOWN]
    node.hear(State.DOWN)
    node.engine.work()
    assert node.engine.discarded == {Discard.ADMIN_DOWN: 1}
    node.run(7)
    assert len(node.engine) == 0
    assert (node.wire.open_senders, node.wire.listening) == (0, set())
    assert node.failures == []


def test_wanted_again_while_it_is_being_shut(node: Node) -> None:
    """The same peer is wanted again: a new session, with another discriminator."""
    node.bring_up(PEER)
    before = node.report().local_discriminator
    node.expect()
    node.expect(PEER)
    assert node.report().state is State.DOWN
    assert node.report().local_discriminator != before
    node.run(7)
    assert (len(node.engine), node.wire.open_senders) == (1, 1)


def test_wishing_the_same_changes_nothing(node: Node) -> None:
    """The whole set may be told as often as one likes; other sessions are not disturbed."""
    node.bring_up(PEER)
    before = node.report()
    node.expect(PEER, OTHER)
    node.expect(PEER)
    assert node.report() == before


def test_a_session_left_alone(node: Node) -> None:
    """Without parameters a session stays as it is, and none is started or shut."""
    node.bring_up(PEER)
    before = node.report()
    unclear = [WantedSession(peer=peer, local=US, parameters=None) for peer in (PEER, OTHER)]
    node.engine.expect(unclear)
    assert node.engine.report().sessions == (before,)
    node.engine.expect(())
    node.engine.expect(unclear)
    node.run(7)
    assert len(node.engine) == 0


def test_an_address_that_comes_later() -> None:
    """A local address that is not there yet is named as the problem, and used once it is."""
    node = Node()
    node.wire.absent = {US}
    node.expect(PEER)
    assert "no such address" in node.report().problem
    node.run(5)
    assert node.wire.sent == []
    node.wire.absent = set()
    node.run(3)
    assert node.report().problem == ""
    assert node.wire.sent[0][0] == PEER


def test_a_kernel_that_refuses_to_send(node: Node) -> None:
    """What the kernel says about sending is shown, and forgotten when it works again."""
    node.wire.refusal = "Network is unreachable"
    node.run(3)
    assert node.report().problem == "cannot send: Network is unreachable"
    assert node.report().send_errors >= 2
    node.wire.refusal = ""
    node.run(3)
    assert node.report().problem == ""


def test_saying_goodbye(node: Node) -> None:
    """At the end everybody is told AdminDown, as often as one says goodbye."""
    node.expect(PEER, OTHER)
    node.bring_up(PEER, OTHER)
    node.wire.sent.clear()
    node.engine.shut_all()
    node.engine.shut_all()
    told = [(peer, packet.state) for peer, packet in node.wire.sent]
    assert told == [(PEER, State.ADMIN_DOWN), (OTHER, State.ADMIN_DOWN)] * 2


def test_many_sessions_keep_their_pace() -> None:
    """Forty sessions send three packets a second each, however many there are."""
    node = Node()
    peers = [f"198.19.9.{number}" for number in range(1, 41)]
    node.expect(*peers)
    node.bring_up(*peers)
    node.wire.sent.clear()
    for _ in range(20):
        for peer in peers:
            node.hear(State.UP, peer)
        node.run(0.1)
    assert 40 * 6 <= len(node.wire.sent) <= 40 * 8
    assert node.failures == []
