"""What TCP is doing for a session that is not up: the part of the story that ExaBGP does not tell.

    /proc/net/tcp, tcp6, netstat ─▶ parse (pure) ─▶ hint ─▶ status

Read only when somebody asks about a session that is down. A SYN that nobody answers looks the same
for a peer that is off, a filter and a wrong password; the kernel's counters of refused MD5
signatures tell the last apart. They count for the whole node, so they raise a suspicion, no more.

Source: proc(5); Linux' SNMP counters TcpExt; RFC 2385 (segments that fail are dropped unanswered).
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True, slots=True)
class TcpView:
    """Connections being made or standing, by the other side's address and port."""

    states: Mapping[tuple[Address, int], str] = field(default_factory=dict)
    drops: Md5Drops = Md5Drops()


def look(directory: Path = PROC_NET) -> TcpView:
    """What the kernel of our network namespace says; empty where it does not say anything."""
    return TcpView(
        states=connections(
            line for name in ("tcp", "tcp6") for line in _lines(directory / name)[1:]
        ),
        drops=md5_drops(_lines(directory / "netstat")),
    )


def connections(lines: Iterable[str]) -> dict[tuple[Address, int], str]:
    """From the lines of /proc/net/tcp and tcp6 without their headings."""
    found = {}
    for line in lines:
        words = line.split()
        if len(words) > 3 and (state := _STATES.get(words[3])):
            host, _, port = words[2].partition(":")
            found[_address(host), int(port, 16)] = state
    return found


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
    drops: Md5Drops,
) -> str:
    """A sentence about a session that is not up; `drops` since we started. May be empty."""
    suspicion = ""
    if has_password and (drops.wrong or drops.missing):
        suspicion = (
            f"segments with a wrong or no TCP MD5 signature were dropped here "
            f"({drops.wrong} wrong, {drops.missing} without): does the password differ?"
        )
    elif not has_password and drops.unexpected:
        suspicion = (
            f"{drops.unexpected} segments with a TCP MD5 signature were dropped here: "
            "does the peer use a password, and this side none?"
        )
    match view.states.get((peer, port)):
        case "SYN_SENT":
            doing = f"TCP: port {port} of the peer does not answer: off, filtered"
            doing += ", or the password differs" if has_password else ""
        case "ESTABLISHED":
            doing = "TCP is connected, BGP is not: see the last error"
        case _ if is_passive:
            doing = "waiting for the peer to connect"
        case _:
            doing = ""
    return "; ".join(filter(None, (doing, suspicion)))


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
