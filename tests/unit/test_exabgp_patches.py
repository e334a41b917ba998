"""The repairs of ExaBGP, each on its own class; tests/fv has them on a running one."""

from __future__ import annotations

import importlib.metadata
import logging
import select
import socket
import time
from pathlib import Path

import pytest
from exabgp.configuration.configuration import Configuration
from exabgp.logger.option import option
from exabgp.protocol.family import AFI
from exabgp.reactor.delay import Delay
from exabgp.reactor.network.connection import Connection

from bgpd import exabgp_patches
from bgpd.launcher import environment
from bgpd.speaker_file import Header, Listen, parse_header, read_header, running_labels


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Repairs lean on private names, so they are never tried on a version they do not know."""
    monkeypatch.setattr(importlib.metadata, "version", lambda _name: "5.0.16")
    with pytest.raises(exabgp_patches.UnsupportedSpeaker, match=r"5\.0\.16"):
        exabgp_patches.apply(lambda _reason: None, tmp_path)


def test_installed_version_is_the_supported_one() -> None:
    """The pin in pyproject.toml and the guard agree."""
    assert importlib.metadata.version("exabgp") == exabgp_patches.SUPPORTED_VERSION


def test_pause_between_attempts_stays_short() -> None:
    """However often connecting failed, the next attempt is seconds away."""

    class Repaired(Delay):  # type: ignore[misc]
        pass

    exabgp_patches.retry_soon(Repaired)
    original, repaired = Delay(), Repaired()
    for _ in range(30):
        original.increase()
        repaired.increase()
    assert original._time - time.time() > 30
    assert repaired._time - time.time() <= exabgp_patches.RETRY_AT_MOST_S


@pytest.mark.parametrize("is_repaired", [False, True], ids=["stock", "repaired"])
def test_a_keepalive_cuts_an_update_in_two_only_in_stock_exabgp(
    monkeypatch: pytest.MonkeyPatch, is_repaired: bool
) -> None:
    """The socket takes half a message and no more; what falls due meanwhile waits for the rest."""
    monkeypatch.setattr(option, "logger", logging.getLogger("exabgp"))

    class Ours(Connection):  # type: ignore[misc]
        pass

    if is_repaired:
        exabgp_patches.finish_messages(Ours)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        theirs.settimeout(10)
        connection = Ours(AFI.ipv4, "192.0.2.2", "192.0.2.1")
        connection.io = ours
        update, keepalive = b"u" * 100_000, b"k" * 19
        writers = [connection.writer(update), connection.writer(keepalive)]
        while next(writers[0]) is False and select.select((), (ours,), (), 0)[1]:
            pass
        received = b""
        while len(received) < len(update) + len(keepalive):
            for writer in reversed(writers):  # as the main loop: keepalives first
                next(writer, None)
            received += theirs.recv(100_000)
    connection.io = None
    assert (received == update + keepalive) is is_repaired


def test_failed_reload_is_as_if_it_had_not_been() -> None:
    """Peers and processes stay, the reason is told, and the next attempt starts clean."""

    class Configuration:
        class Error:
            message = ""

            def set(self, message: str) -> bool:
                self.message = message
                return False

            def __str__(self) -> str:
                return self.message

        def __init__(self) -> None:
            self.error = self.Error()
            self.neighbors = {"kept": 1}
            self.processes = {"relay": 1}
            self.leftovers: list[str] = []
            self.texts = ["raise", "refuse", "missing", "good"]

        def _cleanup(self) -> None:
            self.leftovers = []
            self.error.message = ""

        def _reload(self) -> object:
            assert self.leftovers == [], "spoiled by the attempt before"
            self.leftovers.append("half a peer")
            self.neighbors, self.processes = {}, {}
            match self.texts.pop(0):
                case "raise":
                    raise RuntimeError("line 7")
                case "refuse":
                    return self.error.set("line 8")
                case "missing":
                    return False
            self.neighbors = {"new": 1}
            return True

    reasons: list[str] = []
    exabgp_patches.survive_bad_reload(Configuration, reasons.append)
    configuration = Configuration()
    for reason in ("line 7", "line 8", "the file is missing or unreadable"):
        assert configuration._reload() is False
        assert str(configuration.error) == reason
        assert (configuration.neighbors, configuration.processes) == ({"kept": 1}, {"relay": 1})
    assert configuration._reload() is True
    assert configuration.neighbors == {"new": 1}
    assert reasons == ["line 7", "line 8", "the file is missing or unreadable"]


def test_environment_keeps_exabgp_root_and_answering() -> None:
    """What the adapter depends on is set, whatever /etc/exabgp says."""
    values = environment(Listen("0.0.0.0", 1790))
    assert values["exabgp_daemon_drop"] == "false"
    assert values["exabgp_api_ack"] == "true"
    assert values["exabgp_api_cli"] == "false"
    assert (values["exabgp_tcp_bind"], values["exabgp_tcp_port"]) == ("0.0.0.0", "1790")


def test_header_of_a_foreign_file_is_empty(tmp_path: Path) -> None:
    """A missing file, or one without our lines, says nothing."""
    assert read_header(tmp_path / "missing") == Header()
    assert parse_header("neighbor 10.0.0.1 { }\n# cymric-listen nowhere\n") == Header()


def test_running_labels_are_read_from_exabgps_answer() -> None:
    """The description is the first one after each peer's name."""
    answer = [
        "neighbor 198.19.8.2 {",
        '  description "cymric-1";',
        "  router-id 198.19.8.1;",
        "}",
        "neighbor 198.19.8.3 {",
        '  description "";',
        "}",
    ]
    assert running_labels(answer) == {"198.19.8.2": "cymric-1", "198.19.8.3": ""}


GOOD = """
process relay {{ run /bin/true; encoder json; }}
neighbor {peer} {{
  router-id 192.0.2.1; local-address 192.0.2.1; local-as 64512; peer-as 64512;
  family {{ ipv4 unicast; }}
}}
"""
BROKEN = GOOD.replace("family", "nonsense")


@pytest.mark.parametrize("is_repaired", [False, True], ids=["stock", "repaired"])
def test_one_bad_file_spoils_all_later_ones_only_in_stock_exabgp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_repaired: bool
) -> None:
    """ExaBGP's own parser: a good file after a refused one is read, thanks to the repair alone."""
    monkeypatch.setattr(option, "logger", logging.getLogger("exabgp"))

    class Ours(Configuration):  # type: ignore[misc]
        pass

    reasons: list[str] = []
    if is_repaired:
        exabgp_patches.survive_bad_reload(Ours, reasons.append)
    path = tmp_path / "exabgp.conf"
    path.write_text(GOOD.format(peer="192.0.2.2"))
    configuration = Ours([str(path)])
    assert configuration.reload() is True
    path.write_text(BROKEN.format(peer="192.0.2.3"))
    assert configuration.reload() is not True
    path.write_text(GOOD.format(peer="192.0.2.4"))
    assert (configuration.reload() is True) == is_repaired
    if is_repaired:
        assert [str(one["peer-address"]) for one in configuration.neighbors.values()] == [
            "192.0.2.4"
        ]
        assert len(reasons) == 1
