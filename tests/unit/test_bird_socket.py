"""BIRD's control sockets, as calicoctl and birdc speak to them."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

import pytest

from bgpd import bird_socket
from bgpd.bird_rows import rows
from bgpd.bird_socket import SOCKET_BY_FAMILY, BirdSocket, Daemon, Dialogue, Row, serve_bird
from bgpd.causes import Cause
from bgpd.session_log import Record
from cymric.model.peering import PeerType, Session
from tests.support.eventually import eventually

NOW_S = 1_767_323_045.0
DAY_S = 86_400.0


def session(address: str, name: str, *, is_passive: bool = False) -> Session:
    """One of our sessions."""
    ours = "10.0.0.11" if "." in address else "fd00::11"
    return Session(
        name=name,
        peer_type=PeerType.MESH,
        peer_address=ip_address(address),
        peer_port=179,
        peer_asn=64512,
        local_address=ip_address(ours),
        local_asn=64512,
        router_id=ip_address("10.0.0.11"),
        listen_port=179,
        is_passive=is_passive,
    )


SESSIONS = (
    (session("10.0.0.12", "Mesh_10_0_0_12"), Record(is_up=True, since_s=NOW_S - 3)),
    (
        session("10.0.0.13", "Global_10_0_0_13"),
        Record(since_s=NOW_S - 2 * DAY_S, last_error=Cause("", "Socket: Connection refused")),
    ),
    (session("10.0.0.14", "Node_10_0_0_14_port_1179", is_passive=True), Record()),
    (session("fd00::12", "Mesh_fd00__12"), Record(is_up=True, since_s=NOW_S)),
)


def served(family: int) -> Sequence[Row]:
    return rows(family, SESSIONS, started_s=NOW_S - 10)


def described() -> Daemon:
    return Daemon(router_id="10.0.0.11", started_s=NOW_S - 10, configured_s=NOW_S - 5)


def dialogue(family: int = 4) -> Dialogue:
    return Dialogue(lambda: served(family), described, clock=lambda: NOW_S)


@asynccontextmanager
async def running(path: Path, *, look_again_s: float = 0.01) -> AsyncIterator[BirdSocket]:
    """The IPv4 socket at `path`, without waiting for it to listen."""
    made = BirdSocket(path, dialogue(), look_again_s=look_again_s)
    task = asyncio.create_task(made.run())
    try:
        yield made
        if task.done():
            task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that has read the greeting."""
    await eventually(path.is_socket, 30)
    reader, writer = await asyncio.open_unix_connection(path)
    assert await reader.readline() == b"0001 BIRD v0.3.3+birdv1.6.8 ready.\n"
    return reader, writer


async def ask(path: Path, command: bytes) -> list[str]:
    """All lines up to the one that ends the answer."""
    reader, writer = await connect(path)
    try:
        writer.write(command + b"\n")
        lines: list[str] = []
        async with asyncio.timeout(30):
            while line := (await reader.readline()).decode():
                lines.append(line.rstrip("\n"))
                if line[:4].isdigit() and line[4] == " ":
                    break
        return lines
    finally:
        writer.close()


def clock_time(at_s: float) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(at_s).strftime("%H:%M:%S")


def calicoctl_reads(lines: Sequence[str]) -> list[list[str]]:
    """Name, state, since, info of the sessions, as calicoctl takes the reply apart; it gives up
    at any line that begins in no way it knows.
    """
    found = []
    for line in lines:
        if line.startswith("0000"):
            return found
        if line.startswith("0001"):
            continue
        if line.startswith("2002"):
            assert line[5:].split() == ["name", "proto", "table", "state", "since", "info"]
            continue
        assert line.startswith(("1002-", " ")), line
        words = line.removeprefix("1002-").split()
        if words[1] == "BGP":
            found.append([words[0], words[3], words[4], " ".join(words[5:])])
    raise AssertionError("the reply has no end")


async def test_show_protocols(tmp_path: Path) -> None:
    """The reply is BIRD's to the letter: header, first row with a code, further rows, the end."""
    path = tmp_path / "bird.ctl"
    async with running(path):
        lines = await ask(path, b"show protocols")
    since = clock_time(NOW_S - 10)
    assert lines[0] == "2002-name     proto    table    state  since       info"
    assert lines[1].rstrip() == f"1002-static1  Static   master   up     {since}"
    assert lines[2].rstrip() == f" kernel1  Kernel   master   up     {since}"
    mesh = f" Mesh_10_0_0_12 BGP      master   up     {clock_time(NOW_S - 3)}    Established"
    assert lines[4].rstrip() == mesh
    assert lines[-1].startswith("0000")
    assert calicoctl_reads(lines) == [
        ["Mesh_10_0_0_12", "up", clock_time(NOW_S - 3), "Established"],
        ["Global_10_0_0_13", "start", "2025-12-31", "Active Socket: Connection refused"],
        ["Node_10_0_0_14_port_1179", "start", clock_time(NOW_S - 10), "Passive"],
    ]


def test_each_family_has_its_own_sessions() -> None:
    """The IPv6 socket lists the IPv6 sessions only."""
    reply = dialogue(6).answer("show protocols").splitlines()
    assert [words[0] for words in calicoctl_reads(reply)] == ["Mesh_fd00__12"]


def test_one_protocol() -> None:
    """A name restricts the list; a name that is not there is an error with BIRD's code."""
    reply = dialogue().answer('show protocols "Mesh_10_0_0_12"').splitlines()
    assert len(reply) == 3
    assert reply[1].startswith("1002-Mesh_10_0_0_12 BGP")
    assert dialogue().answer("show protocols nobody") == "8003 No protocols match\n"


def test_show_status() -> None:
    """Whoever asks for the daemon's health finds a line that begins with BIRD, and the last code
    that means up and running.
    """
    lines = dialogue().answer("show status").splitlines()
    assert lines[0].startswith("1000-BIRD v0.3.3+birdv1.6.8")
    assert lines[1] == "1011-Router ID is 10.0.0.11"
    assert lines[-1] == "0013 Daemon is up and running"


@pytest.mark.parametrize(
    "line", ["show route all", "configure", "down", "disable all", "show", "\0", "öäü", "0000"]
)
def test_what_is_not_served(line: str) -> None:
    """Other commands are refused with an error code and say what there is instead."""
    reply = dialogue().answer(line)
    assert reply.startswith("9001 ")
    assert reply.count("\n") == 1
    assert "show protocols" in reply


async def test_many_commands_on_one_connection(tmp_path: Path) -> None:
    """A client may ask again and again, after an error and after empty lines as well."""
    path = tmp_path / "bird.ctl"
    async with running(path):
        reader, writer = await connect(path)
        writer.write(b"dance\n\n\nrestrict\nshow status\n")
        assert (await reader.readline()).startswith(b"9001 ")
        assert await reader.readline() == b"0016 Access restricted\n"
        assert (await reader.readline()).startswith(b"1000-BIRD")
        writer.close()


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(b"x" * 100_000, id="a line without end"),
        pytest.param(b"\n" * 50_000, id="nothing, very often"),
        pytest.param(os.urandom(20_000), id="noise"),
        pytest.param(b"show proto", id="half a word"),
        pytest.param(b"", id="silence"),
        pytest.param(b"show protocols\n" * 5_000, id="questions, and no ear for the answers"),
    ],
)
async def test_hostile_clients(
    tmp_path: Path, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one client does, the next is served."""
    monkeypatch.setattr(bird_socket, "WRITE_WITHIN_S", 0.2)
    path = tmp_path / "bird.ctl"
    async with running(path):
        _, writer = await connect(path)
        with suppress(OSError):
            writer.write(said)
        assert len(calicoctl_reads(await ask(path, b"show protocols"))) == 3
        writer.transport.abort()
        assert len(calicoctl_reads(await ask(path, b"show protocols"))) == 3


async def test_a_thousand_connections(tmp_path: Path) -> None:
    """A thousand clients that only hold on cost a bounded number of connections, and the newest
    is always served.
    """
    path = tmp_path / "bird.ctl"
    async with running(path) as server:
        await eventually(path.is_socket, 30)
        held: list[socket.socket] = []
        try:
            for number in range(1000):
                client = socket.socket(socket.AF_UNIX)
                client.setblocking(False)
                held.append(client)
                async with asyncio.timeout(30):
                    while True:
                        try:
                            client.connect(str(path))
                            break
                        except BlockingIOError:  # the backlog is full: let the server run
                            await asyncio.sleep(0)
                if number % 50 == 0:
                    await asyncio.sleep(0)
            assert len(calicoctl_reads(await ask(path, b"show protocols"))) == 3
            assert len(server._open) <= bird_socket.CONNECTIONS
        finally:
            for client in held:
                client.close()


async def test_a_socket_of_an_earlier_process(tmp_path: Path) -> None:
    """What a dead process left behind is replaced, and the new one is for its owner only."""
    path = tmp_path / "bird.ctl"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with running(path):
        await eventually(lambda: _answers(path), 30)
        assert path.stat().st_mode & 0o777 == 0o600


async def _answers(path: Path) -> bool:
    try:
        _, writer = await connect(path)
    except OSError:
        return False
    writer.close()
    return True


async def test_a_real_bird_is_left_alone(tmp_path: Path) -> None:
    """A socket on which somebody answers is not taken over until that one is gone."""
    path = tmp_path / "bird.ctl"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        async with running(path):
            other.settimeout(30)
            accepted = await asyncio.to_thread(other.accept)  # it looked, and saw us
            accepted[0].close()
            again = await asyncio.to_thread(other.accept)
            again[0].close()
            other.close()
            await eventually(lambda: _answers(path), 30)


async def test_a_file_in_the_way_stays(tmp_path: Path) -> None:
    """Something that is no socket is never removed."""
    path = tmp_path / "bird.ctl"
    path.write_text("mine")
    async with running(path):
        await asyncio.sleep(0.05)
    assert path.read_text() == "mine"


async def test_the_names_calicoctl_looks_for(tmp_path: Path) -> None:
    """While we serve, a process is called exactly `bird` and another `bird6`; after us none."""
    before = _children_called("bird", "bird6")
    task = asyncio.create_task(serve_bird(tmp_path, served, described, bears_names=True))
    try:
        await eventually(lambda: _children_called("bird", "bird6") - before, 30)
        await eventually(lambda: len(_children_called("bird", "bird6") - before) == 2, 30)
        for name in SOCKET_BY_FAMILY.values():
            await eventually((tmp_path / name).is_socket, 30)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await eventually(lambda: _children_called("bird", "bird6") <= before, 30)


def _children_called(*names: str) -> set[int]:
    """Our children whose argv[0] is one of the names."""
    found = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, IndexError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            first = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
            if parent == os.getpid() and first in names:
                found.add(int(entry.name))
    return found


@pytest.mark.peers
async def test_birdc_understands_us(tmp_path: Path) -> None:
    """BIRD's own client shows our sessions and our status."""
    birdc = shutil.which("birdc")
    assert birdc is not None, "bird2 is not installed"
    path = tmp_path / "bird.ctl"
    async with running(path):
        await eventually(path.is_socket, 30)
        shown = await _run(birdc, "-r", "-s", str(path), "show", "protocols")
        assert "Mesh_10_0_0_12 BGP      master   up" in shown
        assert "Access restricted" in shown
        assert "Daemon is up and running" in await _run(birdc, "-s", str(path), "show", "status")


async def _run(*words: str) -> str:
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(60):
        said, _ = await process.communicate()
    assert process.returncode == 0, said
    return said.decode()
