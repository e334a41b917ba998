"""The relay between pipes and a socket, with nobody else involved."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bgpd.relay
from tests.support.eventually import eventually_now

RELAY = bgpd.relay.__file__


def event(kind: str, peer: str = "198.19.8.2", **said: Any) -> bytes:
    """A line shaped as ExaBGP writes it."""
    neighbor = json.dumps({"address": {"local": "198.19.8.1", "peer": peer}, **said})
    return f'{{ "exabgp": "5.0.0", "type": "{kind}", "neighbor": {neighbor} }}\n'.encode()


class Relay:
    """A relay process, with us in the place of ExaBGP."""

    def __init__(self, directory: Path, program: str = RELAY) -> None:
        self.path = directory / "speaker.sock"
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", program, str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        eventually_now(self.path.exists)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.events, self.commands = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.commands, False)
        self._read = b""

    def say(self, *lines: bytes) -> None:
        """As ExaBGP: events and answers. Blocks as ExaBGP would."""
        data = b"".join(lines)
        while data:
            data = data[os.write(self.events, data) :]

    def commanded(self) -> bytes:
        """What was written to ExaBGP so far."""
        with contextlib.suppress(BlockingIOError):
            self._read += os.read(self.commands, 1 << 20)
        return self._read

    def connect(self) -> Client:
        """As bgpd."""
        return Client(self.path)


class Client:
    """A bgpd: the greeting is read at once."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")
        self.greeting = json.loads(self.file.readline())

    def line(self) -> bytes:
        """The next line."""
        return self.file.readline()

    def send(self, data: bytes) -> None:
        """Commands."""
        self.socket.sendall(data)

    def close(self) -> None:
        """As a process that died."""
        self.file.close()
        self.socket.close()


@pytest.fixture
def relay(tmp_path: Path) -> Iterator[Relay]:
    running = Relay(tmp_path)
    yield running
    running.process.kill()
    running.process.communicate()


def test_lines_pass_both_ways(relay: Relay) -> None:
    """Events and answers reach bgpd, commands reach ExaBGP, unchanged and in order."""
    client = relay.connect()
    relay.say(event("update", n=1), b"text\n", b"done\n")
    assert [client.line() for _ in range(3)] == [event("update", n=1), b"text\n", b"done\n"]
    client.send(b"one\ntwo\n")
    eventually_now(lambda: relay.commanded() == b"one\ntwo\n")


def test_greeting_names_exabgp_and_what_is_up(relay: Relay) -> None:
    """Live sessions are told with the OPEN that started them; ended ones are not."""
    opened = event("open", direction="receive", open={"asn": 1})
    relay.say(
        opened,
        event("open", direction="send", open={"asn": 2}),
        event("state", state="up"),
        event("state", peer="198.19.8.3", state="up"),
        event("state", peer="198.19.8.4", state="up"),
        event("state", peer="198.19.8.4", state="down", reason="x"),
    )

    def told() -> list[Any]:
        client = relay.connect()
        client.close()
        assert client.greeting["pid"] == os.getpid()
        assert client.greeting["generation"].startswith(f"{os.getpid()}-")
        sessions: list[Any] = client.greeting["sessions"]
        return sessions

    sessions = eventually_now(told)
    assert sessions == [
        [json.loads(opened), json.loads(event("state", state="up"))],
        [None, json.loads(event("state", peer="198.19.8.3", state="up"))],
    ]


def test_an_open_that_came_before_bgpd_is_told_again(relay: Relay) -> None:
    """Between OPEN and `up` a session is in no greeting; its `up` event alone would leave bgpd
    without the peer's router ID, restart time and refresh.
    """
    opened = event("open", direction="receive", open={"asn": 1})
    earlier = relay.connect()
    relay.say(opened)
    assert earlier.line() == opened  # so it was read
    client = relay.connect()
    assert client.greeting["sessions"] == []
    assert json.loads(client.line()) == json.loads(opened)
    up = event("state", state="up")
    relay.say(up)
    assert client.line() == up
    late = relay.connect()
    assert late.greeting["sessions"] == [[json.loads(opened), json.loads(up)]]
    relay.say(b"text\n")
    assert late.line() == b"text\n"


def test_loss_is_told_once(relay: Relay) -> None:
    """What came while nobody listened is gone, and the next bgpd, only, is told so."""
    first = relay.connect()
    assert not first.greeting["lost"]
    first.close()
    relay.say(event("update", n=1))

    def lost_told() -> bool:
        client = relay.connect()
        client.close()
        return bool(client.greeting["lost"])

    eventually_now(lost_told)
    assert not lost_told()


def test_half_a_line_waits_for_its_end(relay: Relay) -> None:
    """Lines cut by the pipe or the socket arrive whole."""
    client = relay.connect()
    relay.say(event("update", n=1)[:30])
    relay.say(event("update", n=1)[30:])
    assert client.line() == event("update", n=1)
    client.send(b"neighbor x ann")
    client.send(b"ounce\nneigh")
    eventually_now(lambda: relay.commanded() == b"neighbor x announce\n")


def test_half_a_command_of_a_dead_bgpd_is_dropped(relay: Relay) -> None:
    """Its whole lines still go out, the cut one does not, nor is it glued to the next one's."""
    dying = relay.connect()
    dying.send(b"whole\nneighbor x ann")
    eventually_now(lambda: relay.commanded() == b"whole\n")
    dying.close()
    relay.say(b"done\n")
    client = relay.connect()
    client.send(b"first\n")
    eventually_now(lambda: relay.commanded() == b"whole\nfirst\n")


def test_answers_to_a_dead_bgpd_reach_nobody(relay: Relay) -> None:
    """The next one's commands wait until the earlier ones are answered."""
    dying = relay.connect()
    dying.send(b"show\nannounce\n")
    eventually_now(lambda: relay.commanded() == b"show\nannounce\n")
    dying.close()
    client = relay.connect()
    client.send(b"mine\n")
    relay.say(b"table\n", b"done\n", event("update", n=1))
    assert client.line() == event("update", n=1), "events pass all the time"
    assert relay.commanded() == b"show\nannounce\n"
    relay.say(b"error\n")
    eventually_now(lambda: relay.commanded().endswith(b"mine\n"))
    relay.say(b"text\n", b"done\n")
    assert [client.line(), client.line()] == [b"text\n", b"done\n"]


def test_slow_bgpd_is_cut_off_and_exabgp_is_not_held_up(tmp_path: Path) -> None:
    """Beyond its backlog a bgpd that does not read loses the connection; `say` never blocks."""
    small = tmp_path / "relay.py"
    text = Path(RELAY).read_text()
    assert "EVENT_BACKLOG_BYTES = 32 * 1024 * 1024" in text
    small.write_text(
        text.replace("EVENT_BACKLOG_BYTES = 32 * 1024 * 1024", "EVENT_BACKLOG_BYTES = 2_000_000")
    )
    relay = Relay(tmp_path, str(small))
    try:
        client = relay.connect()
        line = event("update", filler="x" * 1000)
        relay.say(*[line] * 5000)
        received = client.file.read()
        assert 0 < len(received) < 5000 * len(line)
        whole, _, rest = received.rpartition(b"\n")
        assert set(whole.split(b"\n")) <= {line.rstrip(b"\n")}
        assert line.startswith(rest)
        assert relay.connect().greeting["lost"]
    finally:
        relay.process.kill()
        relay.process.communicate()


def test_new_bgpd_replaces_the_old(relay: Relay) -> None:
    """One at a time, and the newest is it."""
    old, new = relay.connect(), relay.connect()
    relay.say(event("update", n=1))
    assert new.line() == event("update", n=1)
    assert old.line() == b""


def test_socket_is_private_and_a_leftover_is_replaced(tmp_path: Path) -> None:
    """A socket file of a killed relay is no obstacle, and nobody else may command ExaBGP."""
    first = Relay(tmp_path)
    first.process.kill()
    first.process.communicate()
    assert first.path.exists()
    inode = first.path.stat().st_ino
    second = Relay(tmp_path)
    try:
        eventually_now(lambda: second.path.stat().st_ino != inode)
        assert second.path.stat().st_mode & 0o777 == 0o600
        second.connect()
        assert [each.name for each in tmp_path.iterdir()] == ["speaker.sock"]
    finally:
        second.process.kill()
        second.process.communicate()


def test_it_ends_with_exabgp(relay: Relay) -> None:
    """When ExaBGP is gone the relay goes too."""
    assert relay.process.stdin is not None
    relay.process.stdin.close()
    relay.process.stdin = None
    assert relay.process.wait(5) == 0


def test_nonsense_is_passed_on(relay: Relay) -> None:
    """Lines that are no JSON, or JSON of another shape, harm nothing; bgpd reports them."""
    client = relay.connect()
    odd = [
        b'{ "type": "state" nonsense\n',
        b'{"type": "state"}\n',
        b'{"type": "open", "neighbor": 1}\n',
    ]
    relay.say(*odd)
    assert [client.line() for _ in odd] == odd
