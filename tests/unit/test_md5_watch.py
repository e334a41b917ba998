"""Segments refused for their signature, and the session that is to blame."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import pytest

from bgpd.md5_watch import REMEMBERED_S, Md5Watch, Watched

ONE, TWO, THREE = map(ip_address, ("198.19.0.7", "198.19.0.8", "198.19.0.9"))


@dataclass
class Kernel:
    """The files of /proc/net, and a clock."""

    directory: Path
    now_s: float = 0.0
    counters: list[int] = field(default_factory=lambda: [0, 0, 0])

    def drop(self, *, missing: int = 0, unexpected: int = 0, wrong: int = 0) -> None:
        """Segments are dropped."""
        for at, number in enumerate((missing, unexpected, wrong)):
            self.counters[at] += number
        names = "TCPMD5NotFound TCPMD5Unexpected TCPMD5Failure"
        text = f"TcpExt: {names}\nTcpExt: {' '.join(map(str, self.counters))}\n"
        (self.directory / "netstat").write_text(text)

    def connect(self, peer: str, *, retransmits: int) -> None:
        """There is an established connection."""
        (word,) = struct.unpack("=I", ip_address(peer).packed)
        line = (
            f" 0: 00000000:00B3 {word:08X}:9C40 01 00000010:00000000 01:00000010 {retransmits:08X}"
        )
        (self.directory / "tcp").write_text(f"heading\n{line} 0 0 1\n")


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    made = Kernel(tmp_path)
    made.drop(wrong=5)
    return made


@pytest.fixture
def watch(kernel: Kernel) -> Md5Watch:
    return Md5Watch(kernel.directory, clock=lambda: kernel.now_s)


def down(peer: object, *, has_password: bool = True) -> Watched:
    """A session that is not up."""
    return Watched(peer=ip_address(str(peer)), has_password=has_password, is_up=False)


def up(peer: object, *, has_password: bool = True) -> Watched:
    """One that is."""
    return Watched(peer=ip_address(str(peer)), has_password=has_password, is_up=True)


def test_what_was_dropped_before_is_nobodys(kernel: Kernel, watch: Md5Watch) -> None:
    """Nothing is held against a session that is down while no counter grows."""
    watch.note([down(ONE)])
    assert watch.suspicion(ONE) == ""


@pytest.mark.parametrize(
    ("dropped", "has_password", "words"),
    [
        ({"wrong": 3}, True, "the password differs from the peer's: 3 segments with a wrong TCP"),
        ({"missing": 2}, True, "the peer uses no password, and this side does: 2 segments with no"),
        ({"unexpected": 4}, False, "the peer uses a password, and this side none: 4 segments"),
        ({"unexpected": 4}, True, ""),
        ({"wrong": 4, "missing": 1}, False, ""),
    ],
)
def test_the_only_suspect(
    kernel: Kernel, watch: Md5Watch, dropped: dict[str, int], has_password: bool, words: str
) -> None:
    """What fits what is configured here is laid at the door of the one session that is not up."""
    kernel.drop(**dropped)
    watch.note([up(ONE), down(TWO, has_password=has_password)])
    assert watch.suspicion(ONE) == ""
    assert watch.suspicion(TWO).startswith(words)
    assert bool(watch.suspicion(TWO)) is bool(words)


def test_several_suspects(kernel: Kernel, watch: Md5Watch) -> None:
    """Of several each is suspected, and told so; one that comes up is cleared."""
    kernel.drop(wrong=3)
    watch.note([down(ONE), down(TWO), down(THREE, has_password=False)])
    assert watch.suspicion(ONE).endswith("of this or of 1 other peers")
    assert watch.suspicion(ONE) == watch.suspicion(TWO)
    assert watch.suspicion(THREE) == ""
    kernel.drop(wrong=2)
    watch.note([up(ONE), down(TWO), down(THREE, has_password=False)])
    assert watch.suspicion(ONE) == ""
    assert watch.suspicion(TWO).startswith("the password differs from the peer's: 5 segments")


@pytest.mark.parametrize("retransmits", [0, 1, 2])
def test_a_password_changed_under_a_session(
    kernel: Kernel, watch: Md5Watch, retransmits: int
) -> None:
    """A session still counts as up; its peer acknowledges nothing any more."""
    kernel.connect(str(ONE), retransmits=retransmits)
    kernel.drop(wrong=1)
    watch.note([up(ONE), up(TWO)])
    assert bool(watch.suspicion(ONE)) is (retransmits == 2)
    assert watch.suspicion(TWO) == ""


def test_suspicion_ends(kernel: Kernel, watch: Md5Watch) -> None:
    """After minutes in which nothing was dropped something else must be wrong."""
    kernel.drop(wrong=1)
    watch.note([down(ONE)])
    kernel.now_s = REMEMBERED_S
    assert watch.suspicion(ONE)
    kernel.now_s += 1
    assert not watch.suspicion(ONE)
