"""Our BFD against those of FRR and BIRD: sessions come up, silence is noticed, bgpd acts on it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bgpd.bfd.client import Bfd
from bgpd.bfd.messages import SessionReport, WantedSession
from bgpd.bfd.packet import State
from cymric.datastore.api import put
from cymric.model.bfd import BfdParameters
from cymric.model.keys import ResourceKey
from tests.support.bgp_node import BgpNode
from tests.support.bird import BirdRouter
from tests.support.eventually import eventually
from tests.support.frr import Frr
from tests.support.routing import block, pool, store
from tests.support.underlay import Host, Underlay, run

pytestmark = [pytest.mark.root, pytest.mark.peers]

PATIENCE_S = 60.0
FAST = BfdParameters()
POOL, OURS, THEIRS = "198.19.16.0/24", "198.19.16.0/26", "198.19.16.64/26"
TOR_ASN, CLUSTER_ASN = 64900, 64512
BIRD_BFD = (
    'protocol bfd bfd1 {{ interface "*" {{ min rx interval 300 ms; min tx interval 300 ms;'
    " idle tx interval 1 s; multiplier 3; }}; {} }}\n"
)


@pytest.fixture
def underlay(tmp_path: Path) -> Iterator[Underlay]:
    made = Underlay(tmp_path, prefix="cybb-")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def us(underlay: Underlay) -> Host:
    return underlay.host("us", 1)


def address(host: Host, version: int) -> str:
    return host.v4 if version == 4 else host.v6


def set_silent(host: Host, *, is_silent: bool) -> None:
    """Let the bridge drop every frame of this host; every interface stays up, with carrier."""
    bridge = host.namespace.rsplit("-", 1)[0] + "-net"
    links = json.loads(run("ip", "-n", bridge, "-j", "link"))
    [port] = [one["ifname"] for one in links if one["ifname"].endswith(f"o{host.number}")]
    state = "0" if is_silent else "3"
    run("bridge", "-n", bridge, "link", "set", "dev", port, "state", state)
    [link] = json.loads(run("ip", "-n", host.namespace, "-j", "link", "show", "eth0"))
    assert link["operstate"] == "UP"


@dataclass
class Watch:
    """bgpd's side of BFD in the test's process; the BFD process is on our host."""

    host: Host
    bfd: Bfd = field(init=False)
    failures: list[tuple[str, str, bool]] = field(default_factory=list)
    failed_at_s: float = 0.0

    def __post_init__(self) -> None:
        socket = self.host.directory / "bfd.sock"
        command = (*self.host.enter, sys.executable, "-m", "bgpd.bfd.process", str(socket))
        self.bfd = Bfd(socket, self._failed, command=command)

    def _failed(self, peer: str, reason: str, *, is_independent: bool) -> None:
        self.failed_at_s = time.monotonic()
        self.failures.append((peer, reason, is_independent))

    def expect(self, version: int, *hosts: Host, parameters: BfdParameters = FAST) -> None:
        """Watch these hosts."""
        local = address(self.host, version)
        self.bfd.expect(
            WantedSession(peer=address(host, version), local=local, parameters=parameters)
            for host in hosts
        )

    def session(self, peer: str) -> SessionReport:
        return {one.peer: one for one in self.bfd.sessions()}[peer]

    def is_up(self, peer: str) -> bool:
        """Up, and at the pace both sides want."""
        one = self.session(peer)
        return one.state is State.UP and one.detection_time_s == pytest.approx(0.9)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Watch]:
        """Connected; at the end the process is told to end, by SIGTERM."""
        task = asyncio.create_task(self.bfd.run())
        try:
            yield self
            if task.done():
                task.result()
        finally:
            process_id = self.bfd.process_id
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            if process_id:
                os.kill(process_id, signal.SIGTERM)


def start_frr(underlay: Underlay, host: Host, peer: str) -> Frr:
    """FRR that watches us."""
    made = Frr.start(underlay, host, "", daemons=("bfdd",))
    made.load(frr_bfd(address(host, 6 if ":" in peer else 4), peer))
    return made


def frr_bfd(local: str, peer: str, *lines: str) -> str:
    words = "".join(f"  {line}\n" for line in lines)
    return (
        f"bfd\n peer {peer} local-address {local}\n  receive-interval 300\n"
        f"  transmit-interval 300\n  detect-multiplier 3\n{words} exit\nexit\n"
    )


def frr_session(frr: Frr, peer: str) -> dict[str, Any]:
    """What FRR says of its session with us."""
    text = frr.ask("show bfd peers json")
    found = json.loads(text) if text.strip().startswith("[") else []
    return next((one for one in found if one.get("peer") == peer), {})


def bird_session(bird: BirdRouter, peer: str) -> list[str]:
    """State, since, interval and timeout, as BIRD prints them."""
    lines = [line.split() for line in bird.ask("show bfd sessions").splitlines()]
    return next((words[2:] for words in lines if words and words[0] == peer), [])


@pytest.mark.parametrize("version", [4, 6])
async def test_frr(
    underlay: Underlay, us: Host, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With FRR's bfdd: up at the agreed pace; new intervals by poll; its shutdown is no failure;
    silence is one, noticed on both sides; it comes back.
    """
    tor = underlay.host("tor", 9)
    mine, theirs = address(us, version), address(tor, version)
    frr = start_frr(underlay, tor, mine)
    async with Watch(us).running() as watch:
        watch.expect(version, tor)
        await eventually(lambda: watch.is_up(theirs), PATIENCE_S)
        await eventually(lambda: frr_session(frr, mine).get("status") == "up", PATIENCE_S)
        assert frr_session(frr, mine)["remote-transmit-interval"] == 300

        watch.expect(version, tor, parameters=BfdParameters(min_tx_ms=400, min_rx_ms=200))
        await eventually(
            lambda: frr_session(frr, mine).get("remote-transmit-interval") == 400, PATIENCE_S
        )
        await eventually(lambda: watch.session(theirs).send_interval_s == 0.4, PATIENCE_S)
        assert watch.session(theirs).failures == 0
        watch.expect(version, tor)
        await eventually(lambda: watch.is_up(theirs), PATIENCE_S)

        frr.load(frr_bfd(theirs, mine, "shutdown"))
        await eventually(lambda: watch.session(theirs).state is State.DOWN, PATIENCE_S)
        assert watch.session(theirs).reason == "the peer is administratively down"
        frr.load(frr_bfd(theirs, mine, "no shutdown"))
        await eventually(lambda: watch.is_up(theirs), PATIENCE_S)
        assert watch.failures == []

        await check_silence(watch, tor, theirs, capsys)
        await eventually(lambda: frr_session(frr, mine).get("status") == "down", PATIENCE_S)
        set_silent(tor, is_silent=False)
        await eventually(lambda: watch.is_up(theirs), PATIENCE_S)
        await eventually(lambda: frr_session(frr, mine).get("status") == "up", PATIENCE_S)


@pytest.mark.parametrize("version", [4, 6])
async def test_bird(
    underlay: Underlay, us: Host, version: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """With BIRD's BFD: up at the agreed pace; silence is noticed; our leaving is no silence."""
    tor = underlay.host("tor", 10)
    mine, theirs = address(us, version), address(tor, version)
    bird = BirdRouter.start(underlay, tor, BIRD_BFD.format(f"neighbor {mine} local {theirs};"))
    async with Watch(us).running() as watch:
        watch.expect(version, tor)
        await eventually(lambda: watch.is_up(theirs), PATIENCE_S)
        await eventually(lambda: bird_session(bird, mine)[:1] == ["Up"], PATIENCE_S)
        await eventually(lambda: bird_session(bird, mine)[2:] == ["0.300", "0.900"], PATIENCE_S)

        await check_silence(watch, tor, theirs, capsys)
        await eventually(lambda: bird_session(bird, mine)[:1] == ["Down"], PATIENCE_S)
        set_silent(tor, is_silent=False)
        await eventually(lambda: watch.is_up(theirs), PATIENCE_S)

        watch.expect(version)
        await eventually(lambda: bird_session(bird, mine)[:1] == ["Down"], PATIENCE_S)
        assert len(watch.failures) == 1


async def check_silence(
    watch: Watch,
    host: Host,
    peer: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Cut a host off and see that it is noticed by missing packets, far below any hold time."""
    started_s = time.monotonic()
    set_silent(host, is_silent=True)
    await eventually(lambda: watch.failures, PATIENCE_S)
    [(failed, reason, _)] = watch.failures
    assert (failed, reason) == (peer, "nothing heard within the detection time")
    took_s = watch.failed_at_s - started_s
    with capsys.disabled():
        print(f" [silence of {peer} noticed after {took_s:.3f} s]", end="")
    assert took_s < 20, "that is no better than a hold timer"


async def test_bgpd_may_stand_still_or_go(underlay: Underlay, us: Host) -> None:
    """A bgpd that works for seconds without a pause, and one that is replaced, cost no session."""
    tor = underlay.host("tor", 10)
    bird = BirdRouter.start(underlay, tor, BIRD_BFD.format(f"neighbor {us.v4} local {tor.v4};"))
    first = Watch(us)
    running = asyncio.create_task(first.bfd.run())
    first.expect(4, tor)
    await eventually(lambda: first.is_up(tor.v4), PATIENCE_S)
    await eventually(lambda: bird_session(bird, us.v4)[:1] == ["Up"], PATIENCE_S)
    before = first.session(tor.v4)

    time.sleep(3)  # noqa: ASYNC251 - the loop of bgpd stands still: that is the point
    await eventually(lambda: first.session(tor.v4).received > before.received + 5, PATIENCE_S)
    process_id = first.bfd.process_id
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running

    async with Watch(us).running() as second:
        second.expect(4, tor)
        await eventually(lambda: second.bfd.process_id == process_id, PATIENCE_S)
        await eventually(lambda: second.is_up(tor.v4), PATIENCE_S)
        after = second.session(tor.v4)
        assert after.local_discriminator == before.local_discriminator
        assert after.transitions == before.transitions
        assert after.since_s == before.since_s
        assert bird_session(bird, us.v4)[0] == "Up"
        assert first.failures == second.failures == []


async def test_a_failure_while_nobody_listens(underlay: Underlay, us: Host) -> None:
    """What fails while bgpd is away is told to the next bgpd, once."""
    tor = underlay.host("tor", 10)
    BirdRouter.start(underlay, tor, BIRD_BFD.format(f"neighbor {us.v4} local {tor.v4};"))
    first = Watch(us)
    running = asyncio.create_task(first.bfd.run())
    first.expect(4, tor)
    await eventually(lambda: first.is_up(tor.v4), PATIENCE_S)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    set_silent(tor, is_silent=True)
    await asyncio.sleep(2)  # nobody is there to ask whether it was noticed
    async with Watch(us).running() as second:
        second.expect(4, tor)
        await eventually(lambda: second.failures, PATIENCE_S)
        await eventually(lambda: second.session(tor.v4).state is State.DOWN, PATIENCE_S)
    third = Watch(us)
    async with third.running():
        third.expect(4, tor)
        await eventually(lambda: third.session(tor.v4).sent > 0, PATIENCE_S)
        assert (first.failures, third.failures) == ([], [])
        assert len(second.failures) == 1


async def test_a_killed_process_is_started_again(underlay: Underlay, us: Host) -> None:
    """The death of our BFD process is no failure of a peer, and a new process takes over."""
    tor = underlay.host("tor", 10)
    BirdRouter.start(underlay, tor, BIRD_BFD.format(f"neighbor {us.v4} local {tor.v4};"))
    async with Watch(us).running() as watch:
        watch.expect(4, tor)
        await eventually(lambda: watch.is_up(tor.v4), PATIENCE_S)
        killed, before = watch.bfd.process_id, watch.session(tor.v4)
        os.kill(killed, signal.SIGKILL)
        await eventually(lambda: watch.bfd.process_id not in (0, killed), PATIENCE_S)
        await eventually(lambda: watch.is_up(tor.v4), PATIENCE_S)
        assert watch.session(tor.v4).local_discriminator != before.local_discriminator
        assert watch.failures == []


async def test_a_packet_from_afar(underlay: Underlay, us: Host) -> None:
    """A router on the way lowers the TTL: such packets are refused and counted by reason."""
    tor = underlay.host("tor", 10)
    bird = BirdRouter.start(underlay, tor, BIRD_BFD.format(f"neighbor {us.v4} local {tor.v4};"))
    run(*tor.enter, "iptables", "-t", "mangle", "-A", "POSTROUTING", "-p", "udp",
        "-j", "TTL", "--ttl-set", "254")  # fmt: skip
    async with Watch(us).running() as watch:
        watch.expect(4, tor)
        await eventually(
            lambda: watch.bfd.report.discarded.get("ttl is not 255", 0) > 2, PATIENCE_S
        )
        assert watch.session(tor.v4).state is State.DOWN
        assert bird_session(bird, us.v4)[0] != "Up"


# --- with BGP -----------------------------------------------------------------------------------


async def resource(
    us: BgpNode, kind: str, name: str, spec: dict[str, Any], **annotations: str
) -> None:
    """Store an object as calicoctl would."""
    metadata = {"name": name, "annotations": {f"cymric.io/{n}": t for n, t in annotations.items()}}
    tree = {"apiVersion": "projectcalico.org/v3", "kind": kind, "metadata": metadata}
    await put(us.store, str(ResourceKey(kind, name)), json.dumps({**tree, "spec": spec}).encode())


def next_hops(us: BgpNode) -> set[str]:
    """Where our kernel sends packets for their block."""
    shown = run(*us.host.enter, "ip", "route", "show", THEIRS)
    return set(re.findall(r"via (\S+)", shown))


class Pings:
    """Packets to many addresses, so that equal paths all carry some; who answered how many."""

    EVERY_S, COUNT = 0.02, 1000

    def __init__(self, host: Host, targets: list[str]) -> None:
        words = ("ping", "-n", "-q", "-i", str(self.EVERY_S), "-c", str(self.COUNT))
        self._processes = [
            subprocess.Popen([*host.enter, *words, target], stdout=subprocess.PIPE, text=True)
            for target in targets
        ]

    def lost_s(self) -> list[float]:
        """When all have ended: for how long each address did not answer."""
        told = [process.communicate(timeout=120)[0] for process in self._processes]
        counts = [re.search(r"(\d+) packets transmitted, (\d+) received", text) for text in told]
        return [(int(one[1]) - int(one[2])) * self.EVERY_S for one in counts if one]

    def stop(self) -> None:
        """Leave nothing behind."""
        for process in self._processes:
            process.kill()
            process.wait()


async def test_a_typo_drops_no_session(underlay: Underlay, us: Host) -> None:
    """BGP and BFD sessions stay as they are, it is told as a problem; mended, it is followed."""
    node = BgpNode(underlay, us)
    await resource(node, "Node", "us", {"bgp": {"ipv4Address": f"{us.v4}/20"}})
    await resource(node, "BGPConfiguration", "default", {"nodeToNodeMeshEnabled": False})
    one, other = underlay.host("one", 9), underlay.host("other", 10)

    async def annotate(text: str) -> None:
        for name, host in (("one", one), ("other", other)):
            await resource(
                node, "BGPPeer", name, {"peerIP": host.v4, "asNumber": TOR_ASN}, bfd=text
            )

    await annotate("300ms x 3")
    frr = Frr.start(underlay, one, "", daemons=("bfdd",))
    frr.load(frr_with_bgp(us, one))
    bird = BirdRouter.start(underlay, other, bird_with_bgp(us, other))
    node.settings.run_dir.mkdir(exist_ok=True)
    socket = str(node.settings.run_dir / "bfd.sock")
    underlay.start(us, sys.executable, "-m", "bgpd.bfd.process", socket)
    await eventually(Path(socket).is_socket, PATIENCE_S)
    async with node.running():
        await eventually(lambda: frr.is_up(us.v4) and bird.is_up("node"), PATIENCE_S)
        await eventually(lambda: frr_session(frr, us.v4).get("status") == "up", PATIENCE_S)
        await eventually(lambda: bird_session(bird, us.v4)[2:] == ["0.300", "0.900"], PATIENCE_S)
        since, drops = bird.since("node"), frr.neighbor(us.v4)["connectionsDropped"]
        watched = bird_session(bird, us.v4)
        await annotate("300 x thrice")
        await eventually(lambda: has_problems(node, 2), PATIENCE_S)
        await eventually(lambda: all_words(node, "up"), PATIENCE_S)
        assert bird_session(bird, us.v4) == watched
        assert (bird.since("node"), bird.is_up("node")) == (since, True)
        assert (frr.neighbor(us.v4)["connectionsDropped"], frr.is_up(us.v4)) == (drops, True)
        await annotate("150ms x 4")
        await eventually(lambda: bird_session(bird, us.v4)[2:] == ["0.300", "1.200"], PATIENCE_S)
        assert (bird.since("node"), bird.is_up("node")) == (since, True)


async def has_problems(node: BgpNode, count: int) -> bool:
    """Whether bgpd tells of so many."""
    return len((await node.ask())["problems"]) == count


async def all_words(node: BgpNode, word: str) -> bool:
    """Whether that is how BFD sees every peer."""
    return {peer["bfd"] for peer in (await node.ask())["peers"]} == {word}


@pytest.mark.slow
@pytest.mark.parametrize("silent", ["frr", "bird"])
async def test_two_tors(
    underlay: Underlay, us: Host, silent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two ToRs, FRR and BIRD, share a prefix by equal paths. One falls silent, its interface up:
    the kernel uses only the other long before the hold time of 90 s is over, and both again when it
    is back. Packets are lost for that while only, and only on the silent one's path.
    """
    node = BgpNode(underlay, us)
    await resource(node, "Node", "us", {"bgp": {"ipv4Address": f"{us.v4}/20"}})
    await resource(node, "BGPConfiguration", "default", {"nodeToNodeMeshEnabled": False})
    await store(node.store, pool(POOL), block(OURS, "us"))
    one, other = underlay.host("one", 9), underlay.host("other", 10)
    targets = [f"198.19.16.{number}" for number in range(65, 81)]
    for name, host in (("one", one), ("other", other)):
        spec = {"peerIP": host.v4, "asNumber": TOR_ASN, "keepaliveTime": "30s"}
        await resource(node, "BGPPeer", name, spec, bfd="300ms x 3")
        for target in targets:
            run("ip", "-n", host.namespace, "address", "add", f"{target}/32", "dev", "lo")
    frr = Frr.start(underlay, one, "", daemons=("bfdd",))
    frr.load(frr_with_bgp(us, one))
    bird = BirdRouter.start(underlay, other, bird_with_bgp(us, other))
    gone, left = (one, other) if silent == "frr" else (other, one)
    both = {one.v4, other.v4}
    node.settings.run_dir.mkdir(exist_ok=True)
    socket = str(node.settings.run_dir / "bfd.sock")
    # bgpd runs in the test's own namespace and would start it there, so it finds it started.
    process = underlay.start(us, sys.executable, "-m", "bgpd.bfd.process", socket)
    await eventually(Path(socket).is_socket, PATIENCE_S)
    async with node.running():
        await eventually(lambda: frr.is_up(us.v4) and bird.is_up("node"), PATIENCE_S)
        await eventually(lambda: frr_session(frr, us.v4).get("status") == "up", PATIENCE_S)
        await eventually(lambda: bird_session(bird, us.v4)[2:] == ["0.300", "0.900"], PATIENCE_S)
        await eventually(lambda: next_hops(node) == both, PATIENCE_S)
        assert process.poll() is None
        pings = Pings(us, targets)
        try:
            await asyncio.sleep(1)  # packets flow on both paths
            started_s = time.monotonic()
            set_silent(gone, is_silent=True)
            await eventually(lambda: next_hops(node) == {left.v4}, PATIENCE_S)
            took_s = time.monotonic() - started_s
            lost_s = await asyncio.to_thread(pings.lost_s)
        finally:
            pings.stop()
        with capsys.disabled():
            print(f" [kernel off the silent {silent} after {took_s:.2f} s; ", end="")
            print(f"packets lost for up to {max(lost_s):.2f} s on half of the paths]", end="")
        assert len(lost_s) == len(targets)
        assert 0 < max(lost_s) < Pings.COUNT * Pings.EVERY_S * 0.9, "nothing came back"
        assert took_s < 45, "that might be the hold timer"

        set_silent(gone, is_silent=False)
        await eventually(lambda: next_hops(node) == both, PATIENCE_S)


def frr_with_bgp(us: Host, tor: Host) -> str:
    return (
        f"router bgp {TOR_ASN}\n bgp router-id {tor.v4}\n no bgp ebgp-requires-policy\n"
        " no bgp network import-check\n bgp graceful-restart\n timers bgp 30 90\n"
        f" neighbor {us.v4} remote-as {CLUSTER_ASN}\n neighbor {us.v4} timers connect 1\n"
        f" neighbor {us.v4} bfd 3 300 300\n"
        f" address-family ipv4 unicast\n  network {THEIRS}\n exit-address-family\n"
    )


def bird_with_bgp(us: Host, tor: Host) -> str:
    return (
        BIRD_BFD.format("")
        + f"protocol static st {{ ipv4; route {THEIRS} blackhole; }}\n"
        + f"protocol bgp node {{ local {tor.v4} as {TOR_ASN}; neighbor {us.v4} as {CLUSTER_ASN};\n"
        "  bfd on; graceful restart on; hold time 90;\n"
        "  connect delay time 1; connect retry time 1; error wait time 1, 2;\n"
        "  ipv4 { import all; export where source = RTS_STATIC; }; }\n"
    )
