"""What the kernel says of a session that does not come up, in words."""

from __future__ import annotations

import struct
from ipaddress import ip_address
from pathlib import Path

import pytest

from bgpd.tcp_view import Md5Drops, TcpView, connections, hint, look, md5_drops

PEER = ip_address("198.19.0.9")
NONE = Md5Drops()


def line(remote: str, port: int, state: str) -> str:
    """A line of /proc/net/tcp, in this machine's byte order."""
    packed = ip_address(remote).packed
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    text = "".join(f"{word:08X}" for word in words)
    return f"   0: 00000000:C239 {text}:{port:04X} {state} 00000000:00000000 00:0 0 0 0 1"


def test_connections() -> None:
    """Both families are read, also an IPv4 address in IPv6 dress; listeners and noise are not."""
    found = connections(
        [
            line("198.19.0.9", 179, "02"),
            line("fd00::9", 1179, "01"),
            line("::ffff:198.19.0.8", 179, "01"),
            line("0.0.0.0", 0, "0A"),
            "",
            "noise",
        ]
    )
    assert found == {
        (PEER, 179): "SYN_SENT",
        (ip_address("fd00::9"), 1179): "ESTABLISHED",
        (ip_address("198.19.0.8"), 179): "ESTABLISHED",
    }


def test_counters_of_signatures() -> None:
    """They are found by name, whatever else the kernel counts; without them nothing was dropped."""
    text = [
        "TcpExt: SyncookiesSent TCPMD5NotFound TCPMD5Unexpected TCPMD5Failure New",
        "TcpExt: 1 2 3 4 5",
        "IpExt: InNoRoutes",
        "IpExt: 0",
    ]
    assert md5_drops(text) == Md5Drops(missing=2, unexpected=3, wrong=4)
    assert md5_drops([]) == NONE
    assert md5_drops(text).since(Md5Drops(1, 1, 1)) == Md5Drops(1, 2, 3)


def test_the_real_kernel_is_read(tmp_path: Path) -> None:
    """What this kernel shows can be read; where there is nothing, nothing is seen."""
    assert isinstance(look().states, dict)
    assert look(tmp_path) == TcpView()


@pytest.mark.parametrize(
    ("state", "has_password", "is_passive", "words"),
    [
        ("SYN_SENT", False, False, "TCP: port 179 of the peer does not answer: off, filtered"),
        ("SYN_SENT", True, False, "or the password differs"),
        (None, True, False, ""),
        ("ESTABLISHED", False, False, "BGP is not"),
        (None, False, True, "waiting for the peer to connect"),
    ],
)
def test_hints(state: str | None, has_password: bool, is_passive: bool, words: str) -> None:
    """What TCP is doing, in words; nothing where nothing is wrong or known."""
    view = TcpView(states={} if state is None else {(PEER, 179): state})
    said = hint(view, PEER, 179, is_passive=is_passive, has_password=has_password)
    assert words in said
    assert bool(said) is bool(words)
