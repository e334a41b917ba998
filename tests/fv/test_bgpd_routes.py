"""bgpd against BIRD, ExaBGP and a kernel of its own: routes come, change, stay and go."""

from __future__ import annotations

import asyncio
import re
import secrets
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import msgspec
import pytest

from bgpd import daemon
from bgpd.exabgp import ExaBGPSpeaker
from bgpd.fib import Fib
from cymric.datastore.memory import MemoryDatastore
from cymric.kernel.namespace import opened, visiting
from cymric.kernel.routes import RouteTable
from cymric.model.keys import BlockKey, ResourceKey
from cymric.model.net import parse_network
from cymric.model.peering import PeeringInputs, peering_of
from cymric.runtime.health import Health
from cymric.runtime.settings import Settings
from tests.fv.speaker_lab import OUR_ADDRESS, Bird, SpeakerLab, run
from tests.support.eventually import eventually
from tests.support.routing import block, node, peer, pool, remove, store

pytestmark = [pytest.mark.root, pytest.mark.peers]

OTHER, ROUTER, ROUTER_ASN = "198.19.8.2", "198.19.8.9", 64900
OWN_BLOCK, OTHER_BLOCK, THIRD = "198.19.16.0/26", "198.19.16.64/26", "198.19.16.128/26"


class Lab(SpeakerLab):
    """Our node `us`, a mesh node `other` played by BIRD, and a router of another AS."""

    store: MemoryDatastore
    node_name = "us"

    @property
    def namespace(self) -> str:
        """Where our node lives."""
        return f"{self.name}-{self.node_name}"

    def kernel(self) -> dict[str, str]:
        """Our protocol's routes by prefix, as `ip` prints the rest."""
        lines = run("ip", "-n", self.namespace, "route", "show", "proto", "179").splitlines()
        found = {}
        for line in lines:
            words = line.split()
            kind = words.pop(0) + " " if words[0] == "blackhole" else ""
            prefix = words[0] if "/" in words[0] else f"{words[0]}/32"
            found[prefix] = (kind + " ".join(words[1:])).strip()
        return found

    async def fill(self) -> None:
        """The cluster's objects, and the speaker's file as confd would render it."""
        self.store = MemoryDatastore()
        nodes = {
            "us": node("us", f"{OUR_ADDRESS}/20"),
            "other": node("other", f"{OTHER}/20"),
        }
        peers = {"router": peer(ROUTER, ROUTER_ASN)}
        await store(self.store, *nodes.values(), *peers.values(), pool())
        await store(self.store, block(OWN_BLOCK, "us"), block(OTHER_BLOCK, "other"))
        peering = peering_of("us", PeeringInputs(nodes=nodes, peers=peers, configurations={}))
        self.write_configuration(*peering.sessions)

    @asynccontextmanager
    async def bgpd(self) -> AsyncIterator[None]:
        """A bgpd, killed rather than stopped at the end: nothing is tidied up."""
        settings = Settings(node_name=self.node_name, run_dir=self.run_directory, announce_wait_s=0)
        speaker = ExaBGPSpeaker(settings.speaker_socket, settings.exabgp_config)
        with opened(f"/run/netns/{self.namespace}") as descriptor, visiting(descriptor):
            routes = RouteTable()
        running = asyncio.create_task(daemon.run(settings, Health(), self.store, speaker, routes))
        try:
            yield
            if running.done():
                running.result()
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            routes.close()

    async def status(self, question: str = "status") -> dict[str, object]:
        """What bgpd answers on its socket."""
        reader, writer = await asyncio.open_unix_connection(self.run_directory / "bgpd.sock")
        writer.write(question.encode() + b"\n")
        answer = await reader.read()
        writer.close()
        return msgspec.json.decode(answer, type=dict[str, object])


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    made = Lab(tmp_path, name=f"cyrib-{secrets.token_hex(2)}")
    try:
        yield made
    finally:
        made.close()


def other(lab: Lab, *routes: str) -> Bird:
    """The mesh node."""
    return lab.bird("other", OTHER, routes=routes)


async def rewrite(bird: Bird, *routes: str) -> None:
    """Let BIRD announce exactly these routes."""
    text = bird.configuration.read_text()
    statics = "".join(f"  route {prefix} blackhole;\n" for prefix in routes)
    text = re.sub(
        r"(protocol static st \{\n  ipv4;\n)(  route .*\n)*", lambda match: match[1] + statics, text
    )
    bird.configuration.write_text(text)
    assert "Reconfigured" in await asyncio.to_thread(bird.ask, "configure")


async def test_routes_come_change_and_go(lab: Lab) -> None:
    """A peer's block becomes a kernel route, its withdrawal removes it; own blocks drop and are
    announced; what import policy rejects is counted by reason and stays out of the kernel.
    """
    await lab.fill()
    bird = other(lab, OTHER_BLOCK, "192.0.2.0/24", "0.0.0.0/0", f"{OWN_BLOCK[:-5]}.7/32")
    lab.exabgp()
    async with lab.bgpd():
        expected = {
            OWN_BLOCK: "blackhole metric 1024",
            OTHER_BLOCK: f"via {OTHER} dev eth0 metric 1024",
        }
        await eventually(lambda: lab.kernel() == expected, 20)
        await eventually(lambda: bird.routes().keys() == {OWN_BLOCK})
        heard = bird.routes()[OWN_BLOCK]
        assert "BGP.local_pref: 2147482623" in heard
        assert f"BGP.next_hop: {OUR_ADDRESS}" in heard

        status = await lab.status()
        peers = {one["address"]: one for one in status["peers"]}  # type: ignore[attr-defined]
        assert peers[OTHER]["state"] == "up"
        assert (peers[OTHER]["received"], peers[OTHER]["accepted"]) == (4, 1)
        assert peers[OTHER]["rejected"] == {
            "outside pools and service ranges": 1,
            "default route": 1,
            "address in a block of this node, not borrowed by the announcing node": 1,
        }
        assert peers[ROUTER]["state"] == "start"
        why = await lab.status(f"why {OTHER_BLOCK}")
        assert why["settled_by"] == "only path"

        await rewrite(bird, THIRD)
        await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK, THIRD})

        # The address is lent: the block says so, and now its /32 is taken.
        lent = f"{OWN_BLOCK[:-5]}.7/32"
        await rewrite(bird, THIRD, lent)
        await eventually(lambda: _received(lab, bird, 2))
        assert lent not in lab.kernel()
        await store(lab.store, block(OWN_BLOCK, "us", {lent: "other"}))
        await eventually(lambda: lab.kernel().get(lent) == f"via {OTHER} dev eth0 metric 1024")

        # A block given up is withdrawn, and its blackhole goes.
        await store(lab.store, block(OWN_BLOCK, None))
        await eventually(lambda: not bird.routes())
        await eventually(lambda: lab.kernel().keys() == {THIRD, lent})
        await remove(lab.store, BlockKey(parse_network(OWN_BLOCK)))


async def _received(lab: Lab, bird: Bird, count: int) -> bool:
    peers = (await lab.status())["peers"]
    assert isinstance(peers, list)
    return any(one["address"] == bird.address and one["received"] == count for one in peers)


async def test_a_peer_of_another_as(lab: Lab) -> None:
    """An outsider hears our blocks with our AS and no LOCAL_PREF, and its routes inside the pool
    are taken, those outside are not.
    """
    await lab.fill()
    router = lab.bird("router", ROUTER, asn=ROUTER_ASN, routes=(THIRD, "10.0.0.0/8"))
    lab.exabgp()
    async with lab.bgpd():
        await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK, THIRD}, 20)
        await eventually(lambda: router.routes().keys() == {OWN_BLOCK})
        heard = router.routes()[OWN_BLOCK]
        assert "BGP.as_path: 64512" in heard


async def test_a_killed_bgpd_leaves_the_kernel_and_sweeps_when_it_is_back(lab: Lab) -> None:
    """While bgpd is away its routes stay. The next one keeps what the peers confirm, removes what
    was withdrawn meanwhile, and never touches a confirmed route.
    """
    await lab.fill()
    await remove_router(lab)
    bird = other(lab, OTHER_BLOCK, THIRD)
    lab.exabgp()
    async with lab.bgpd():
        await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK, THIRD}, 20)
    assert lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK, THIRD}
    await rewrite(bird, OTHER_BLOCK)
    since = bird.since
    with monitored(lab) as deleted:
        async with lab.bgpd():
            await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK}, 20)
    assert deleted() == {THIRD}
    assert bird.since == since, "the session was lost"


async def test_a_killed_exabgp_costs_no_route(lab: Lab) -> None:
    """Paths outlive ExaBGP; when sessions return they are confirmed or swept."""
    await lab.fill()
    await remove_router(lab)
    bird = other(lab, OTHER_BLOCK, THIRD)
    exabgp = lab.exabgp()
    async with lab.bgpd():
        await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK, THIRD}, 20)
        await eventually(lambda: bird.routes().keys() == {OWN_BLOCK})
        with monitored(lab) as deleted:
            exabgp.kill()
            exabgp.wait()
            await eventually(lambda: not bird.is_up)
            await rewrite(bird, OTHER_BLOCK)
            assert lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK, THIRD}
            lab.exabgp()
            await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK}, 40)
            await eventually(lambda: bird.routes().keys() == {OWN_BLOCK})
        assert deleted() == {THIRD}


async def test_a_dead_peers_routes_stay_for_its_restart_time(lab: Lab) -> None:
    """A peer with graceful restart dies: its routes stay. What it returns without goes."""
    await lab.fill()
    await remove_router(lab)
    bird = other(lab, OTHER_BLOCK, THIRD)
    lab.exabgp()
    async with lab.bgpd():
        await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK, THIRD}, 20)
        with monitored(lab) as deleted:
            bird.process.kill()
            bird.process.wait()
            await eventually(lambda: _is_down(lab, OTHER))
            assert lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK, THIRD}
            text = bird.configuration.read_text()
            bird.configuration.write_text(text.replace(f"  route {THIRD} blackhole;\n", ""))
            arguments = [
                argument if isinstance(argument, str) else str(argument)
                for argument in bird.process.args  # type: ignore[union-attr]
            ]
            lab.start("other", *arguments[2:], "-R", log=bird.configuration.parent / "output")
            await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK}, 40)
        assert deleted() == {THIRD}


async def _is_down(lab: Lab, address: str) -> bool:
    peers = (await lab.status())["peers"]
    assert isinstance(peers, list)
    return any(one["address"] == address and one["state"] != "up" for one in peers)


async def test_routes_that_others_delete_come_back(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A route of ours that somebody deletes is put back at the next look at the kernel."""
    monkeypatch.setattr(daemon, "Fib", partial(Fib, resync_s=0.3))
    await lab.fill()
    async with lab.bgpd():
        await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK})
        run("ip", "-n", lab.namespace, "route", "del", "blackhole", OWN_BLOCK, "metric", "1024")
        await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK})


@pytest.mark.slow
async def test_ten_thousand_routes(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten thousand routes of one peer reach the kernel, and leave it when they are withdrawn."""
    await lab.fill()
    await remove_router(lab)
    prefixes = [f"198.19.{16 + n // 256 % 8}.{n % 256}/32" for n in range(512, 2048)]
    await store(lab.store, pool("10.64.0.0/12", name="large"))
    prefixes += [
        f"10.{64 + n // 1024}.{n // 4 % 256}.{n % 4 * 64}/26" for n in range(10_000 - 1536)
    ]
    bird = other(lab, *prefixes)
    lab.exabgp()
    started = time.monotonic()
    async with lab.bgpd():
        await eventually(lambda: len(lab.kernel()) == 10_001, 60)
        with capsys.disabled():
            print(f" [10,000 routes in the kernel {time.monotonic() - started:.2f} s after start]")
        await rewrite(bird, OTHER_BLOCK)
        await eventually(lambda: lab.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK}, 60)


async def remove_router(lab: Lab) -> None:
    """Leave the mesh session alone, so that nothing waits for a peer that never comes."""
    await remove(lab.store, ResourceKey("BGPPeer", "router"))
    nodes = {"us": node("us", f"{OUR_ADDRESS}/20"), "other": node("other", f"{OTHER}/20")}
    peering = peering_of("us", PeeringInputs(nodes=nodes, peers={}, configurations={}))
    lab.write_configuration(*peering.sessions)


class monitored:  # noqa: N801 - reads as a phrase
    """Which prefixes' routes were deleted meanwhile, as the kernel told `ip monitor`."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def __enter__(self) -> monitored:
        self._log = self._lab.directory / f"monitor-{secrets.token_hex(2)}"
        command = ["ip", "-n", self._lab.namespace, "monitor", "route"]
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output)
        time.sleep(0.2)  # there is nothing to poll for: `ip monitor` says nothing when it is ready
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.2)  # the last message may still be under way
        self._process.terminate()
        self._process.wait()

    def __call__(self) -> set[str]:
        """The prefixes, without those of blackholes."""
        words = [line.split() for line in self._log.read_text().splitlines()]
        deleted = [line for line in words if line[0] == "Deleted" and "eth0" in line]
        return {line[1] if "/" in line[1] else f"{line[1]}/32" for line in deleted}
