"""What makes ExaBGP fast enough, each change on its own; tests/fv has them on a running one."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from exabgp.bgp.message import Message, Update
from exabgp.bgp.message.direction import Direction
from exabgp.logger.option import option
from exabgp.protocol.family import AFI, SAFI
from exabgp.reactor.api import API
from exabgp.reactor.asynchronous import ASYNC
from exabgp.reactor.peer import ACTION
from exabgp.rib.outgoing import OutgoingRIB

from bgpd import exabgp_speed
from tests.unit.test_update_wire import body, mandatory, packed

PEER = "neighbor 192.0.2.2 local-ip 192.0.2.1 local-as 1 peer-as 1 router-id 192.0.2.1"
UNICAST = (AFI.ipv4, SAFI.unicast)


@pytest.fixture(autouse=True)
def _logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """ExaBGP logs wherever it goes, and has no logger before it runs."""
    monkeypatch.setattr(option, "logger", logging.getLogger("exabgp"))


class Peer:
    """A peer with so many messages to go."""

    def __init__(self, messages: float) -> None:
        self.messages = messages

    def run(self) -> int:
        self.messages -= 1
        return int(ACTION.NOW if self.messages > 0 else ACTION.LATER)


def test_a_busy_peer_goes_on() -> None:
    """It works off what it has in one turn of the loop, but never takes the loop for itself."""

    class Repaired(Peer):
        pass

    exabgp_speed.several_turns(Repaired)
    assert Peer(5).run() == ACTION.NOW
    assert Repaired(5).run() == ACTION.LATER
    endless = Repaired(float("inf"))
    assert endless.run() == ACTION.NOW, "others have their turn now"


def counting(log: list[str], name: str, steps: int) -> Iterator[None]:
    """Work of so many steps."""
    for _ in range(steps):
        log.append(name)
        yield


def test_commands_are_worked_off_in_order() -> None:
    """Some hundred steps take one turn; one that fails is answered and holds up nobody."""
    log: list[str] = []

    class Repaired(ASYNC):  # type: ignore[misc]
        pass

    class Reactor:
        def __init__(self) -> None:
            self.asynchronous = Repaired()

        def _wait_for_io(self, sleep_ms: int) -> int:
            return sleep_ms

    def failing() -> Iterator[None]:
        yield
        raise RuntimeError("no such thing")

    exabgp_speed.work_without_pause(Repaired, Reactor)
    reactor = Reactor()
    waiting = reactor.asynchronous
    waiting.set_error_handler(lambda uid: log.append(f"error {uid}"))
    assert reactor._wait_for_io(10) == 10
    waiting.schedule("1", "", counting(log, "a", 150))
    waiting.schedule("2", "", failing())
    waiting.schedule("3", "", counting(log, "b", 150))
    assert reactor._wait_for_io(10) == 0, "no pause while something waits"
    waiting.run()
    assert log == ["a"] * 150 + ["error 2"] + ["b"] * 150
    assert waiting._async == deque()


class Reactor:
    """What a command needs: one peer with its table, and somebody to answer."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.rib = OutgoingRIB(True, {UNICAST})
        neighbor = SimpleNamespace(
            rib=SimpleNamespace(outgoing=self.rib),
            families=lambda: [UNICAST],
            remove_self=lambda change: change,
        )
        self.processes = SimpleNamespace(
            answer_done=lambda _service: self.answers.append("done"),
            answer_error=lambda _service: self.answers.append("error"),
        )
        self.asynchronous = ASYNC()
        self.configuration = SimpleNamespace(
            neighbors={PEER: neighbor},
            inject_change=lambda _peers, change: self.rib.add_to_rib(change) or True,
        )
        self.parsed = 0

    def peers(self, _service: str) -> list[str]:
        return [PEER]

    def announced(self) -> dict[str, str]:
        return {str(one.nlri.cidr): str(one.attributes) for one in self.rib.cached_changes()}


def quick(name: str) -> Callable[..., Any]:
    """The changed command beside the stock one."""

    class Repaired(API):  # type: ignore[misc]
        callback = {"text": dict(API.callback["text"])}  # noqa: RUF012

    exabgp_speed.many_prefixes_a_command(Repaired)
    return Repaired.callback["text"][name]


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> API:
    made = API(None)
    for name in ("log_message", "log_failure"):
        monkeypatch.setattr(made, name, lambda *_: None)
    return made


@pytest.mark.parametrize(
    "attributes",
    [
        "next-hop 192.0.2.1 origin igp",
        "next-hop 192.0.2.7 med 5 community [ 65001:7 65001:8 ] as-path [ 65001 65002 ]",
    ],
)
def test_many_prefixes_end_as_in_the_stock_command(api: API, attributes: str) -> None:
    """The same table and the same withdrawals, with the parser asked once instead of each time."""
    prefixes = " ".join(f"10.0.{n}.0/26" for n in range(50))
    tables = []
    for announce, withdraw in (
        (API.callback["text"]["announce attributes"], API.callback["text"]["withdraw attributes"]),
        (quick("announce attributes"), quick("withdraw attributes")),
    ):
        reactor = Reactor()
        head = "neighbor 192.0.2.2"
        announce(
            api, reactor, "d", f"{head} announce attributes {attributes} nlri {prefixes}", False
        )
        while reactor.asynchronous._async:
            reactor.asynchronous.run()
        announced = reactor.announced()
        updates = [(len(one.nlris), str(one.attributes)) for one in reactor.rib.updates(True)]
        withdraw(
            api, reactor, "d",
            f"{head} withdraw attributes next-hop 0.0.0.0 nlri {prefixes}", False,
        )  # fmt: skip
        while reactor.asynchronous._async:
            reactor.asynchronous.run()
        withdrawn = [
            sorted(f"{nlri.action} {nlri.cidr}" for nlri in one.nlris)
            for one in reactor.rib.updates(True)
        ]
        tables.append((announced, updates, withdrawn, reactor.announced(), reactor.answers))
    stock, ours = tables
    assert ours == stock
    assert len(ours[0]) == 50
    assert ours[3] == {}
    assert ours[4] == ["done", "done"]


@pytest.mark.parametrize(
    "tail", ["10.0.0.0/26 10.0.0.1/26", "10.0.0.0/26 fd00::/64", "10.0.0.0/26 x", "x 10.0.0.0/26"]
)
def test_a_prefix_that_is_none_is_refused_whole(api: API, tail: str) -> None:
    """No route of a refused command is announced, and the answer says so."""
    reactor = Reactor()
    line = f"neighbor 192.0.2.2 announce attributes next-hop 192.0.2.1 nlri {tail}"
    quick("announce attributes")(api, reactor, "d", line, False)
    while reactor.asynchronous._async:
        reactor.asynchronous.run()
    assert reactor.answers == ["error"]
    assert reactor.announced() == {}


def test_a_command_to_the_next_peer_is_not_parsed_again(
    api: API, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prefix with attributes parsed before ends as with a parser; so does a withdrawal, and a
    peer that does not exist is an error.
    """
    parse, parsed = api.api_attributes, []

    def parse_and_note(command: str, peers: object) -> Any:
        parsed.append(command)
        return parse(command, peers)

    monkeypatch.setattr(api, "api_attributes", parse_and_note)

    def say(reactor: Reactor, peer: str, text: str, prefix: str) -> None:
        line = f"neighbor {peer} {text} attributes next-hop 192.0.2.77 med 5 nlri {prefix}"
        quick(f"{text} attributes")(api, reactor, "d", line, False)
        while reactor.asynchronous._async:
            reactor.asynchronous.run()

    first, second = Reactor(), Reactor()
    say(first, "192.0.2.2", "announce", "10.0.0.0/26")
    say(second, "192.0.2.2", "announce", "10.0.1.0/26")
    assert len(parsed) == 1
    assert first.announced()["10.0.0.0/26"] == second.announced()["10.0.1.0/26"]
    say(second, "192.0.2.2", "withdraw", "10.0.1.0/26")
    assert second.announced() == {}
    say(second, "192.0.2.22", "announce", "10.0.1.0/26")
    say(second, "192.0.2.2", "announce", "10.0.1.1/26")
    assert second.answers == ["done", "done", "error", "error"]
    assert second.announced() == {}


class Told:
    """ExaBGP's messages to the API, and who writes to the peer."""

    def __init__(self, *, asn4: bool = True) -> None:
        self.lines: list[str] = []
        self.objects: list[object] = []
        self.negotiated = SimpleNamespace(
            asn4=asn4,
            families=[UNICAST],
            addpath=SimpleNamespace(receive=lambda *_: False, send=lambda *_: False),
        )

        class Messages(Message):  # type: ignore[misc]
            @classmethod
            def unpack(cls, _kind: int, data: bytes, *_: object) -> object:
                return bytes(data)

        outer = self

        class Processes:
            silence = False

            def message(self, _kind: int, _neighbor: Any, _direction: str, message: Any) -> None:
                outer.objects.append(message)

            def _notify(self, _neighbor: Any, _event: str) -> list[str]:
                return ["d"]

            def write(self, _process: str, line: str, _neighbor: Any) -> None:
                outer.lines.append(line)

        class Protocol:
            def send(self, raw: bytes) -> Iterator[bool]:
                outer.objects.append(raw)
                yield True

        exabgp_speed.pass_updates_whole(Messages, Processes, Protocol)
        self.messages, self.processes, self.protocol = Messages, Processes(), Protocol()
        self.neighbor = SimpleNamespace(api={"send-update": True})

    def receive(self, data: bytes) -> None:
        message = self.messages.unpack(Update.ID, data, Direction.IN, self.negotiated)
        neighbor = {"peer-address": "192.0.2.2"}
        self.processes.message(Update.ID, neighbor, "receive", message)


PLAIN = body(mandatory(), packed(["10.0.0.0/26"]))
ODD = body(b"\xc0\x63\x00" + mandatory(), packed(["10.0.0.0/26"]))


@pytest.mark.parametrize(
    ("data", "asn4", "is_whole"),
    [(PLAIN, True, True), (ODD, True, False), (PLAIN, False, False)],
    ids=["plain", "unknown attribute", "two-octet AS numbers"],
)
def test_plain_updates_are_passed_as_they_are(data: bytes, asn4: bool, is_whole: bool) -> None:
    """What needs judgement, or knowledge of the session, goes ExaBGP's own way."""
    told = Told(asn4=asn4)
    told.receive(data)
    if is_whole:
        assert told.lines == [f"!r 192.0.2.2 {data.hex()}"]
        assert told.objects == []
    else:
        assert told.lines == []
        assert told.objects == [data]


def test_updates_written_are_told_once_and_before() -> None:
    """The line comes out before the bytes go in; what is not plain is left to stock code."""
    told = Told()
    neighbor = type("Neighbor", (dict,), {"api": {"send-update": True}})(
        {"peer-address": "192.0.2.2"}
    )
    written: list[bytes] = []

    def writer(raw: bytes) -> Iterator[bool]:
        assert told.lines
        written.append(raw)
        yield True

    protocol: Any = told.protocol
    protocol.neighbor, protocol.negotiated = neighbor, told.negotiated
    protocol.connection = SimpleNamespace(writer=writer)
    stats = {"send-update": 0}
    protocol.peer = SimpleNamespace(stats=stats, reactor=SimpleNamespace(processes=told.processes))
    header = b"\xff" * 16 + b"\0\0" + bytes([Update.ID])
    assert list(protocol.send(header + PLAIN)) == [True]
    assert (told.lines, written) == ([f"!s 192.0.2.2 {PLAIN.hex()}"], [header + PLAIN])
    assert stats == {"send-update": 1}
    assert list(protocol.send(header + ODD)) == [True]
    assert told.objects == [header + ODD]
