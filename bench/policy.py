"""How soon a policy holds: from its write to etcd to the first packet with the new verdict.

A pod sends another a packet every half millisecond, in the node of `felix_world.py`: real etcd,
real kernel, the real program, 100 pods here, 10,000 endpoints and 1,000 policies in the cluster;
once more with 250 pods and 10,000 policies. Time begins before the write is sent. It ends when the
first packet was sent that arrives (allowed) or does not arrive (denied); packets carry when they
were sent, and nobody answers them, so each is the first of its connection to the kernel.

The peer is the same change by hand, on the same kernel with the same rules, felix ended: one
`ipset restore` and one `iptables-restore` with the chains that differ, from starting the program.
That needs no etcd, no calculation and no comparison: it is the least that a change can take when
programs are started for it.
"""

from __future__ import annotations

import asyncio
import mmap
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from bench import felix_calc
from bench.felix_calc import resource
from bench.felix_world import SENDER, World, inside, main, world
from bench.row import Row, median
from cymric.datastore.api import delete, put
from cymric.datastore.etcd import EtcdDatastore
from cymric.kernel.namespace import opened, visiting
from tests.support.eventually import eventually

TIMES = 25
MOST = (10_000, 250, 10_000)
PORT = 9000
SO_RCVBUFFORCE = 33
"""socket(7); the module does not name it."""
EVERY_S = 0.0005
MISSED = 100
"""So many packets in a row have not arrived when they count as denied."""
SETTLE_S = 0.15
WITHIN_S = 30.0
MODULE = "bench.policy"
BY_HAND = "ipset + iptables-restore by hand"

SEND = f"""
import mmap, socket, struct, sys, time
to = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
to.connect((sys.argv[1], {PORT}))
file = open(sys.argv[2], "r+b")
log = mmap.mmap(file.fileno(), 0)
number = 0
while True:
    struct.pack_into("=q", log, 8 * number, time.time_ns())
    try:
        to.send(struct.pack("=q", number))
    except OSError:
        pass
    number += 1
    time.sleep({EVERY_S})
"""
"""Notes in a file when each packet is sent, and sends its number."""
LOG_BYTES = 1 << 24

Change = Callable[[], Awaitable[object]]


def measure() -> list[Row]:
    """All rows."""
    return [*inside(MODULE), *inside(MODULE, *MOST)]


async def measured(*sizes: int) -> list[Row]:
    """The rows of a cluster of these sizes, in the namespace we are in."""
    with world(*sizes) as here:
        await here.fill()
        here.run_felix()
        size = f"{here.local} local, {here.count:,} endpoints, {here.policies:,} policies"
        with _packets(here) as packets:
            async with here.client() as store:
                one, everyone = _Policy(here, store), _Policy(here, store, is_for_all=True)
                policies = {"one pod": one, "all pods": everyone}
                by_etcd = {
                    "policy for one pod, comes": await packets.both(one.allow, one.remove),
                    "its rule changed": await _changed(packets, one),
                    "policy for all pods, comes": await packets.both(
                        everyone.allow, everyone.remove
                    ),
                }
                by_hand = {word: await _Hands.of(here, which) for word, which in policies.items()}
            here.stop_felix()
            least = {
                word: await packets.both(hands.allow, hands.remove)
                for word, hands in by_hand.items()
            }
        rows = []
        for what, taken in by_etcd.items():
            word = "all pods" if "all pods" in what else "one pod"
            rows += _rows(f"{what}, {size}", taken, least[word])
        return rows


def _rows(what: str, taken: _Taken, least: _Taken) -> list[Row]:
    rows = []
    for word, ours, by_hand in (
        ("allowed", taken.allowed, least.allowed),
        ("denied", taken.denied, least.denied),
    ):
        rows.append(
            Row(
                what=f"{what}: first packet {word}, p50",
                unit="ms",
                cymric=median(ours),
                peer_name=BY_HAND,
                peer=median(by_hand),
            )
        )
        p95 = statistics.quantiles(ours, n=20)[18]
        rows.append(Row(what=f"{what}: first packet {word}, p95", unit="ms", cymric=p95))
    return rows


async def _changed(packets: _Packets, policy: _Policy) -> _Taken:
    """The policy stays, its rule allows and denies in turn."""
    await asyncio.sleep(SETTLE_S)
    await packets.until_allowed(policy.allow)
    taken = await packets.both(policy.allow, policy.deny, begin_with_second=True)
    await asyncio.sleep(SETTLE_S)
    await packets.until_denied(policy.remove)
    return taken


@dataclass
class _Policy:
    """The policy that decides about the packets, and others it could be."""

    here: World
    store: EtcdDatastore
    is_for_all: bool = False

    def _stored(self, action: str) -> tuple[str, bytes]:
        number = self.here.receiver
        wanted = f"app == 'app{number % felix_calc.APPS}'"
        rule = {
            "action": action,
            "protocol": "UDP",
            "source": {"selector": f"app == 'app{SENDER}'"},
            "destination": {"ports": [PORT]},
        }
        spec = {
            "order": -1,
            "selector": "all()" if self.is_for_all else wanted,
            "types": ["Ingress"],
            "ingress": [rule],
        }
        if self.is_for_all:
            # Of workloads only.
            spec["selector"] = "has(projectcalico.org/namespace)"
            return resource("GlobalNetworkPolicy", "globalnetworkpolicies", "bench", spec)
        return resource("NetworkPolicy", "networkpolicies", "bench", spec, namespace="ns0")

    async def allow(self) -> None:
        """Store it, allowing."""
        await put(self.store, *self._stored("Allow"))

    async def deny(self) -> None:
        """Store it, denying."""
        await put(self.store, *self._stored("Deny"))

    async def remove(self) -> None:
        """Remove it, and its other form."""
        await delete(self.store, self._stored("Allow")[0])


@dataclass(frozen=True)
class _Hands:
    """The texts with which the change can be made by hand."""

    sets: str
    rules_allowing: str
    rules_denying: str
    names: tuple[str, ...]

    @classmethod
    async def of(cls, here: World, policy: _Policy) -> _Hands:
        """Looked up in the kernel, from before and after the real change."""
        before, sets_before = _saved(here)
        await policy.allow()
        await eventually(lambda: _saved(here)[0] != before, WITHIN_S, what="policy is there")
        await asyncio.sleep(SETTLE_S)
        after, sets_after = _saved(here)
        await policy.remove()
        await eventually(lambda: _saved(here)[0] == before, WITHIN_S, what="policy is gone")
        await asyncio.sleep(SETTLE_S)
        names = tuple(sets_after.keys() - sets_before.keys())
        return cls(
            "".join(line for name in names for line in sets_after[name]),
            _difference(before, after),
            _difference(after, before),
            names,
        )

    async def allow(self) -> None:
        """Sets, then rules."""
        _feed("ipset", "-exist", "restore", text=self.sets)
        _feed("iptables-nft-restore", "--noflush", text=self.rules_allowing)

    async def remove(self) -> None:
        """Rules, then sets."""
        _feed("iptables-nft-restore", "--noflush", text=self.rules_denying)
        lines = "".join(f"destroy {name}\n" for name in self.names)
        # The kernel lets go of rules a little later, and of sets only then; that is no matter here.
        _feed("ipset", "restore", text=lines, check=False)


def _feed(*words: str, text: str, check: bool = True) -> None:
    subprocess.run(words, input=text.encode(), capture_output=True, check=check)


_Lines = dict[str, list[str]]


def _saved(here: World) -> tuple[_Lines, _Lines]:
    """The filter table's rules by chain, and the lines of each set."""
    text = here.on_node("iptables-nft-save", "-t", "filter").splitlines()
    rules: _Lines = {line.split()[0][1:]: [] for line in text if line.startswith(":cali")}
    for line in text:
        words = line.split(maxsplit=2)
        if words[0] == "-A" and words[1] in rules:
            rules[words[1]].append(line + "\n")
    sets: _Lines = {}
    for line in here.on_node("ipset", "save").splitlines():
        sets.setdefault(line.split()[1], []).append(line + "\n")
    return rules, sets


def _difference(before: _Lines, after: _Lines) -> str:
    """A transaction from one to the other: chains that differ, whole."""
    changed = [name for name, lines in after.items() if before.get(name) != lines]
    gone = before.keys() - after.keys()
    lines = ["*filter\n", *(f":{name} - -\n" for name in (*changed, *gone))]
    for name in changed:
        lines += after[name]
    lines += [f"-X {name}\n" for name in gone]
    return "".join((*lines, "COMMIT\n"))


@dataclass
class _Taken:
    """Milliseconds, of all changes in one direction and in the other."""

    allowed: list[float] = field(default_factory=list)
    denied: list[float] = field(default_factory=list)


class _Packets:
    """Packets on their way from one pod to the other, and what becomes of them."""

    def __init__(self, arrivals: socket.socket, log: mmap.mmap) -> None:
        self._arrivals = arrivals
        self._log = log

    async def both(self, allow: Change, deny: Change, *, begin_with_second: bool = False) -> _Taken:
        """Change to and fro; with `begin_with_second` packets are allowed at first."""
        taken = _Taken()
        self._drain()
        for number in range(2 * TIMES):
            # Not in step with anything that happens at even times.
            await asyncio.sleep(SETTLE_S + number % 7 * 0.011)
            if (number % 2 == 0) != begin_with_second:
                taken.allowed.append(await self.until_allowed(allow))
            else:
                taken.denied.append(await self.until_denied(deny))
        return taken

    async def until_allowed(self, change: Change) -> float:
        """Make the change; milliseconds until the first packet is sent that arrives."""
        if self._drain():
            raise RuntimeError("packets arrive that should not")
        began_ns = time.time_ns()
        await change()
        found = await eventually(self._drain, WITHIN_S, what="packets arrive")
        return (self._sent_ns(found[0]) - began_ns) / 1e6

    async def until_denied(self, change: Change) -> float:
        """Make the change; milliseconds until the first packet is sent that does not arrive."""
        if not self._drain():
            raise RuntimeError("no packet arrives")
        began_ns = time.time_ns()
        await change()
        last, deadline_s = 0, time.monotonic() + WITHIN_S
        while not last or not self._sent_ns(last + MISSED):
            if time.monotonic() > deadline_s:
                raise RuntimeError("packets go on arriving")
            await asyncio.sleep(MISSED * EVERY_S)
            last = max((last, *self._drain()))
        return (self._sent_ns(last + 1) - began_ns) / 1e6

    def _sent_ns(self, number: int) -> int:
        """When a packet was sent; 0: not yet."""
        sent_ns: int = struct.unpack_from("=q", self._log, 8 * number)[0]
        return sent_ns

    def _drain(self) -> list[int]:
        """The numbers of packets that arrived since this was asked last."""
        return list(self._read())

    def _read(self) -> Iterable[int]:
        while True:
            try:
                data = self._arrivals.recv(64)
            except BlockingIOError:
                return
            yield struct.unpack("=q", data)[0]


@contextmanager
def _packets(here: World) -> Iterator[_Packets]:
    """Packets on their way, for as long as the block lasts."""
    receiver = here.namespace(f"pod{here.receiver}")
    with opened(f"/run/netns/{receiver}") as there, visiting(there):
        arrivals = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    arrivals.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 1 << 25)
    arrivals.bind(("", PORT))
    path = here.directory / "sent"
    path.write_bytes(bytes(LOG_BYTES))
    sender = subprocess.Popen(
        [
            "nsenter",
            f"--net=/run/netns/{here.namespace(f'pod{SENDER}')}",
            *("nice", "-n-10", sys.executable, "-ISc", SEND),
            here.address(here.receiver),
            str(path),
        ]
    )
    try:
        with path.open("rb") as file:
            log = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        yield _Packets(arrivals, log)
    finally:
        sender.kill()
        sender.wait()
        arrivals.close()


if __name__ == "__main__":
    main(MODULE, measured, measure)
