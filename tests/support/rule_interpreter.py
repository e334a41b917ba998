"""Walks a packet through rendered tables, from their text alone, as the kernel would.

The text that iptables-restore reads is what is interpreted, not the values it was made of, so that
a wrong spelling shows. Whatever is not understood is an error: nothing may match by oversight.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from ipaddress import ip_address, ip_network

from felix.iptables import render
from felix.rules.rule import Rule, TableContent

PROTOCOLS = {
    "icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58, "sctp": 132, "udplite": 136,
}  # fmt: skip
WITH_PORTS = {6: "tcp", 17: "udp", 132: "sctp", 136: "udplite"}
MOST_DEPTH = 16


@dataclass(frozen=True)
class Packet:
    """A packet at one hook. `state` is conntrack's; `is_translated` says that it went through DNAT.

    `reverse_path` says whether the route back leaves where it came in.
    """

    source: str
    destination: str
    protocol: int = 6
    source_port: int = 40000
    destination_port: int = 80
    icmp: tuple[int, int] = (8, 0)
    in_interface: str = ""
    out_interface: str = ""
    state: str = "NEW"
    is_translated: bool = False
    reverse_path: bool = True
    mark: int = 0

    @property
    def ip_version(self) -> int:
        """4 or 6."""
        return ip_address(self.source).version


@dataclass(frozen=True)
class Outcome:
    """How a walk ended: ACCEPT, DROP, REJECT, or RETURN at the end of the chain."""

    verdict: str
    mark: int
    logged: tuple[str, ...] = ()
    untracked: bool = False
    path: tuple[str, ...] = ()
    """The chains entered, in order."""
    met: int = 0
    """How many rules were looked at."""


Sets = Mapping[str, Collection[str]]
"""Members by the set's name in the kernel."""
Chains = Mapping[str, Sequence[str]]
"""Rules of the chains of one table: the words after `-A <chain>`."""


def as_text(content: TableContent) -> Chains:
    """A wanted table, the kernel's chains included."""
    chains = {name: texts(chain.rules) for name, chain in content.chains.items()}
    for hook in (*content.inserts, *content.appends):
        chains[hook] = texts((*content.inserts.get(hook, ()), *content.appends.get(hook, ())))
    return chains


def texts(rules: Sequence[Rule]) -> list[str]:
    """Rules without their hashes."""
    return [render.body(rule) for rule in rules]


@dataclass
class Interpreter:
    """Tables of one family by name, and sets."""

    tables: Mapping[str, Chains] = field(default_factory=dict)
    sets: Sets = field(default_factory=dict)

    def at_hook(self, table: str, hook: str, packet: Packet) -> Outcome:
        """Walk one of the kernel's chains; its end accepts."""
        outcome = self.in_chain(self.tables[table], hook, packet)
        return replace(outcome, verdict="ACCEPT") if outcome.verdict == "RETURN" else outcome

    def in_chain(self, chains: Chains, name: str, packet: Packet) -> Outcome:
        """Walk one chain."""
        walk = _Walk(chains, self.sets, packet)
        verdict = walk.chain(name, 0)
        return Outcome(verdict, walk.packet.mark, tuple(walk.logged), walk.untracked,
                       tuple(walk.path), walk.met)  # fmt: skip


class _Walk:
    def __init__(self, chains: Chains, sets: Sets, packet: Packet) -> None:
        self.chains, self.sets, self.packet = chains, sets, packet
        self.logged: list[str] = []
        self.path: list[str] = []
        self.untracked = False
        self.met = 0

    def chain(self, name: str, depth: int) -> str:
        assert depth < MOST_DEPTH, f"chains nest too deep at {name}"
        self.path.append(name)
        for text in self.chains[name]:
            tests, action = _parsed(text)
            self.met += 1
            if not all(test(self.packet, self.sets) for test in tests):
                continue
            match action:
                case []:
                    continue
                case ["--jump", "ACCEPT" | "DROP" | "REJECT" | "RETURN" as target]:
                    return target
                case ["--jump", "NOTRACK"]:
                    self.untracked = True
                case ["--jump", "MARK", "--set-mark", set_mark]:
                    value, mask = (int(part, 0) for part in set_mark.split("/"))
                    mark = self.packet.mark & ~mask | value
                    self.packet = replace(self.packet, mark=mark)
                case ["--jump", "LOG", "--log-prefix", prefix, "--log-level", "5"]:
                    assert len(prefix) <= 29
                    self.logged.append(prefix)
                case ["--jump" | "--goto" as how, target]:
                    verdict = self.chain(target, depth + 1)
                    if verdict != "RETURN" or how == "--goto":
                        return verdict
                case _:
                    raise AssertionError(f"unknown action {action}")
        return "RETURN"


_Test = Callable[[Packet, Sets], bool]


@cache
def _parsed(text: str) -> tuple[tuple[_Test, ...], list[str]]:
    words = shlex.split(text)
    tests: list[_Test] = []
    protocols = [words[at + 1] for at, word in enumerate(words) if word == "-p"]
    assert len(protocols) <= 1, "iptables takes one -p"
    for option in ("--source", "--destination"):
        assert words.count(option) <= 1, f"iptables takes one {option}"
    while words and words[0] not in ("--jump", "--goto"):
        taken, test = _match(words, protocols)
        del words[:taken]
        if test is not None:
            tests.append(test)
    return tuple(tests), words


def _match(words: Sequence[str], protocols: Sequence[str]) -> tuple[int, _Test | None]:
    """How many words one match takes, and the match."""
    match list(words):
        case ["-m", "comment", "--comment", text, *_]:
            assert len(text) <= 256
            return 4, None
        case ["!", "-p" | "--source" | "--destination" as option, text, *_]:
            return 3, _negated(_simple(option, text))
        case ["-p" | "--source" | "--destination" | "--in-interface" | "--out-interface" as option,
              text, *_]:  # fmt: skip
            return 2, _simple(option, text)
        case ["-m", "rpfilter", "--invert", "--validmark", *_]:
            return 4, lambda packet, _: not packet.reverse_path
        case ["-m", module, "!", option, *rest]:
            taken, test = _module(module, option, rest, protocols)
            return 4 + taken, _negated(test)
        case ["-m", module, option, *rest]:
            taken, test = _module(module, option, rest, protocols)
            return 3 + taken, test
    raise AssertionError(f"unknown match {list(words)}")


def _negated(test: _Test) -> _Test:
    return lambda packet, sets: not test(packet, sets)


def _simple(option: str, text: str) -> _Test:
    match option:
        case "-p":
            number = int(text) if text.isdecimal() else PROTOCOLS[text]
            return lambda packet, _: packet.protocol == number
        case "--source":
            return lambda packet, _: _inside(packet.source, text)
        case "--destination":
            return lambda packet, _: _inside(packet.destination, text)
        case "--in-interface":
            return lambda packet, _: _is_named(packet.in_interface, text)
        case _:
            return lambda packet, _: _is_named(packet.out_interface, text)


def _module(
    module: str, option: str, rest: Sequence[str], protocols: Sequence[str]
) -> tuple[int, _Test]:
    match module, option:
        case "mark", "--mark":
            value, mask = (int(part, 0) for part in rest[0].split("/"))
            return 1, lambda packet, _: packet.mark & mask == value
        case "set", "--match-set":
            name, directions = rest[0], rest[1]
            return 2, lambda packet, sets: _is_member(packet, sets[name], directions)
        case "multiport", "--source-ports" | "--destination-ports":
            ports = rest[0].split(",")
            assert sum(1 + (":" in one) for one in ports) <= 15, "too many ports"
            assert _first_number(protocols) in WITH_PORTS, "multiport needs a protocol with ports"
            is_source = option == "--source-ports"
            return (
                1,
                lambda packet, _: (
                    packet.protocol in WITH_PORTS
                    and _is_port(
                        packet.source_port if is_source else packet.destination_port, ports
                    )
                ),
            )
        case ("icmp", "--icmp-type") | ("icmp6", "--icmpv6-type"):
            number = 1 if module == "icmp" else 58
            assert _first_number(protocols) == number, f"{module} needs its protocol"
            wanted = [int(part) for part in rest[0].split("/")]
            return (
                1,
                lambda packet, _: (
                    packet.protocol == number and list(packet.icmp[: len(wanted)]) == wanted
                ),
            )
        case "conntrack", "--ctstate":
            states = rest[0].split(",")
            if states == ["DNAT"]:
                return 1, lambda packet, _: packet.is_translated
            return 1, lambda packet, _: packet.state in states
    raise AssertionError(f"unknown match {module} {option}")


def _first_number(protocols: Sequence[str]) -> int | None:
    """The number of the protocol that a rule asks for."""
    for text in protocols:
        return int(text) if text.isdecimal() else PROTOCOLS[text]
    return None


@cache
def _inside(address: str, cidr: str) -> bool:
    return ip_address(address) in ip_network(cidr)


def _is_named(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("+") else name == pattern


def _is_port(port: int, ports: Sequence[str]) -> bool:
    for one in ports:
        first, _, last = one.partition(":")
        if int(first) <= port <= int(last or first):
            return True
    return False


def _is_member(packet: Packet, members: Collection[str], directions: str) -> bool:
    side = directions.partition(",")[0]
    assert directions in (side, f"{side},{side}")
    address = packet.source if side == "src" else packet.destination
    if directions == side:
        return any(_inside(address, member) for member in members)
    port = packet.source_port if side == "src" else packet.destination_port
    name = WITH_PORTS.get(packet.protocol)
    return name is not None and f"{address},{name}:{port}" in members
