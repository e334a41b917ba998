"""What TCP is doing for a session that is not up: the part of the story that ExaBGP does not tell.

    /proc/net/tcp, tcp6 ─▶ parse (pure) ─▶ hint ─▶ status
    /proc/net/netstat ─▶ drops ─▶ md5_watch.py ─┘

Connections are read only when somebody asks about a session that is down, or when signatures fail.
A SYN that nobody answers looks the same for a peer that is off, a filter and a wrong password; the
kernel's counters of refused MD5 signatures tell the last apart.

Source: proc(5); Linux' SNMP counters TcpExt; RFC 2385 (segments that fail are dropped unanswered).
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cymric.model.net import Address

PROC_NET = Path("/proc/net")

_STATES = {"01": "ESTABLISHED", "02": "SYN_SENT", "03": "SYN_RECV"}
_MD5 = {
    "TCPMD5NotFound": "missing",
    "TCPMD5Unexpected": "unexpected",
    "TCPMD5Failure": "wrong",
}


@dataclass(frozen=True, slots=True)
class Md5Drops:
    """Segments dropped since boot for their signature: none where one is expected, one where none
    is, and one that does not fit.
    """

    missing: int = 0
    unexpected: int = 0
    wrong: int = 0

    def since(self, before: Md5Drops) -> Md5Drops:
        """How many since `before`."""
        return Md5Drops(
            self.missing - before.missing,
            self.unexpected - before.unexpected,
            self.wrong - before.wrong,
        )

    def plus(self, more: Md5Drops) -> Md5Drops:
        """Both together."""
        return Md5Drops(
            self.missing + more.missing,
            self.unexpected + more.unexpected,
            self.wrong + more.wrong,
        )

    def with_password(self) -> Md5Drops:
        """What peers may have sent for whom a password is configured here."""
        return replace(self, unexpected=0)

    def without_password(self) -> Md5Drops:
        """What peers may have sent for whom none is."""
        return Md5Drops(unexpected=self.unexpected)


@dataclass(frozen=True, slots=True)
class TcpView:
    """Connections being made or standing, by the other side's address and port.

    `unheard`: addresses to which a standing connection sends again and again what it has sent.
    """

    states: Mapping[tuple[Address, int], str] = field(default_factory=dict)
    unheard: frozenset[Address] = frozenset()


def look(directory: Path = PROC_NET) -> TcpView:
    """What the kernel of our network namespace says; empty where it does not say anything."""
    lines = [line for name in ("tcp", "tcp6") for line in _lines(directory / name)[1:]]
    return TcpView(states=connections(lines), unheard=unheard(lines))


def drops(directory: Path = PROC_NET) -> Md5Drops:
    """What the kernel of our network namespace dropped for its signature, since it began."""
    return md5_drops(_lines(directory / "netstat"))


def connections(lines: Iterable[str]) -> dict[tuple[Address, int], str]:
    """From the lines of /proc/net/tcp and tcp6 without their headings."""
    found = {}
    for line in lines:
        words = line.split()
        if len(words) > 3 and (state := _STATES.get(words[3])):
            host, _, port = words[2].partition(":")
            found[_address(host), int(port, 16)] = state
    return found


def unheard(lines: Iterable[str]) -> frozenset[Address]:
    """Where nobody acknowledges: established, and retransmitted at least twice."""
    return frozenset(
        _address(words[2].partition(":")[0])
        for words in map(str.split, lines)
        if len(words) > 6 and _STATES.get(words[3]) == "ESTABLISHED" and int(words[6], 16) >= 2
    )


def md5_drops(lines: Iterable[str]) -> Md5Drops:
    """From the lines of /proc/net/netstat: names, then numbers, each pair with its prefix."""
    rows = [line.split() for line in lines if line.startswith("TcpExt:")]
    if len(rows) != 2:
        return Md5Drops()
    counters = dict(zip(*rows, strict=False))
    return Md5Drops(**{ours: int(counters.get(name, 0)) for name, ours in _MD5.items()})


def hint(
    view: TcpView,
    peer: Address,
    port: int,
    *,
    is_passive: bool,
    has_password: bool,
) -> str:
    """A sentence about a session that is not up. May be empty."""
    match view.states.get((peer, port)):
        case "SYN_SENT":
            doing = f"TCP: port {port} of the peer does not answer: off, filtered"
            return doing + (", or the password differs" if has_password else "")
        case "ESTABLISHED":
            return "TCP is connected, BGP is not: see the last error"
        case _ if is_passive:
            return "waiting for the peer to connect"
        case _:
            return ""


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _address(text: str) -> Address:
    """The kernel prints 32-bit words of the address in the machine's byte order."""
    words = [int(text[start : start + 8], 16) for start in range(0, len(text), 8)]
    address = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    return getattr(address, "ipv4_mapped", None) or address
