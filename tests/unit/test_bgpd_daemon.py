"""bgpd as a whole, on a speaker, a kernel and a datastore in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bgpd import daemon
from bgpd.announcement import IPV4_UNICAST, Announcement
from bgpd.fake_speaker import FakeSpeaker
from bgpd.imports import IMPORT_ALL, IMPORT_ANNOTATION
from bgpd.speaker import (
    EndOfRIB,
    RefreshBegin,
    RefreshEnd,
    RoutesReceived,
    SessionDown,
    SessionUp,
    SpeakerConnected,
    SpeakerLost,
)
from cymric.datastore.api import Put, Transaction
from cymric.datastore.memory import MemoryDatastore
from cymric.kernel.api import blackhole, via
from cymric.kernel.fake_routes import FakeRoutes, FakeRoutingTable
from cymric.model import codec
from cymric.model.ipam import AffinityState
from cymric.model.keys import AffinityKey, BlockKey, ResourceKey
from cymric.model.net import parse_address, parse_network
from cymric.runtime.health import Health
from cymric.runtime.settings import Settings
from tests.support.eventually import eventually
from tests.support.routing import (
    affinity,
    block,
    configuration,
    endpoint,
    node,
    peer,
    pool,
    remove,
    store,
)

OTHER, ROUTER = "198.19.0.3", "198.19.0.254"
OWN, THEIRS, FAR = "198.19.16.0/26", "198.19.16.64/26", "192.0.2.0/24"
NOBODYS = "198.19.17.0/26"


class Node:
    """One node's bgpd and its surroundings, which outlive it."""

    def __init__(self, run_dir: Path) -> None:
        self.store = MemoryDatastore()
        self.speaker = FakeSpeaker()
        self.table = FakeRoutingTable({"eth0": (parse_network("198.19.0.0/20"),)})
        self.health = Health()
        self.settings = Settings(node_name="us", run_dir=run_dir, announce_wait_s=0)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """A fresh bgpd."""
        routes = FakeRoutes(self.table)
        task = asyncio.create_task(
            daemon.run(self.settings, self.health, self.store, self.speaker, routes)
        )
        try:
            yield
            if task.done():
                task.result()
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @property
    def kernel(self) -> dict[str, str]:
        """Next hop, or `drop`, of each route of ours."""
        return {
            str(prefix): str(route.next_hops[0].gateway) if route.next_hops else "drop"
            for (prefix, _), (protocol, route) in self.table.entries.items()
            if protocol == 179
        }

    def heard(self, peer: str) -> set[str]:
        """What a peer was told."""
        return set(self.speaker.advertised.get(peer, {}))

    async def ask(self, question: str = "status") -> Mapping[str, Any]:
        """An answer from the socket."""
        await eventually(self.settings.bgpd_socket.is_socket)
        reader, writer = await asyncio.open_unix_connection(self.settings.bgpd_socket)
        writer.write(question.encode() + b"\n")
        answer = await reader.read()
        writer.close()
        return msgspec.json.decode(answer, type=dict[str, Any])

    def up(self, address: str = OTHER, *, resumed: bool = False) -> None:
        """The session with a peer is up."""
        self.speaker.say(
            SessionUp(
                address,
                64512,
                frozenset({IPV4_UNICAST}),
                restart_time_s=120,
                route_refresh=True,
                enhanced_refresh=True,
                router_id=address,
                resumed=resumed,
            )
        )

    def announces(self, *prefixes: str, peer: str = OTHER) -> None:
        """A peer sends routes through itself."""
        said = tuple(Announcement(prefix, peer) for prefix in prefixes)
        self.speaker.say(RoutesReceived(peer, announced=said))


@pytest.fixture
async def us(tmp_path: Path) -> Node:
    """Node `us` with a block, a mesh peer with a block, and nothing running yet."""
    made = Node(tmp_path)
    await store(made.store, node("us", "198.19.0.2/20"), node("other", f"{OTHER}/20"), pool())
    await store(made.store, block(OWN, "us"), block(THEIRS, "other"))
    made.speaker.say(SpeakerConnected("1", lost_events=False))
    return made


async def test_a_node_starts(us: Node) -> None:
    """Own block announced and dropped, sessions expected, received routes in the kernel."""
    async with us.running():
        await eventually(lambda: us.kernel == {OWN: "drop"})
        assert [str(session.peer_address) for session in us.speaker.sessions] == [OTHER]
        assert us.heard(OTHER) == {OWN}
        assert us.speaker.advertised[OTHER][OWN].attributes.local_pref == 2147482623
        us.up()
        us.announces(THEIRS, FAR)
        await eventually(lambda: us.kernel == {OWN: "drop", THEIRS: OTHER})
        us.speaker.say(RoutesReceived(OTHER, withdrawn=(THEIRS,)))
        await eventually(lambda: us.kernel == {OWN: "drop"})
        await eventually(lambda: not us.health.missing)


async def test_nothing_happens_before_the_datastore_was_seen(us: Node) -> None:
    """With etcd away the speaker is not even listened to, and kernel routes are left alone."""
    us.table.entries[parse_network(THEIRS), 1024] = (179, via(parse_address(OTHER)))
    us.store.go_down()
    async with us.running():
        us.up()
        await asyncio.sleep(0.05)
        assert us.speaker.sessions == ()
        assert us.speaker.advertised == {}
        assert us.kernel == {THEIRS: OTHER}
        us.store.come_up()
        await eventually(lambda: us.kernel == {OWN: "drop", THEIRS: OTHER})


async def test_the_start_sweeps_when_the_peer_has_told_all(us: Node) -> None:
    """Routes of an earlier process stay until each session has said what it has."""
    gone = parse_network("198.19.16.128/26")
    for prefix in (gone, parse_network(THEIRS)):
        us.table.entries[prefix, 1024] = (179, via(parse_address(OTHER)))
    async with us.running():
        us.up(resumed=True)
        await eventually(lambda: us.speaker.refreshes == [OTHER])
        us.speaker.say(RefreshBegin(OTHER, IPV4_UNICAST))
        us.announces(THEIRS)
        await eventually(lambda: OWN in us.kernel)
        assert us.kernel == {OWN: "drop", THEIRS: OTHER, str(gone): OTHER}
        us.speaker.say(RefreshEnd(OTHER, IPV4_UNICAST))
        await eventually(lambda: us.kernel == {OWN: "drop", THEIRS: OTHER})


async def test_the_speaker_is_lost_and_returns(us: Node) -> None:
    """Nothing leaves the kernel while ExaBGP is away; what is not told again goes at the end."""
    async with us.running():
        us.up()
        us.announces(THEIRS, "198.19.16.128/26")
        us.speaker.say(EndOfRIB(OTHER, IPV4_UNICAST))
        await eventually(lambda: len(us.kernel) == 3)
        writes = us.table.writes
        us.speaker.say(SpeakerLost("killed"))
        us.speaker.say(SpeakerConnected("2", lost_events=True))
        us.up()
        us.announces(THEIRS)
        await eventually(lambda: _peer_says(us, "stale", 1))
        assert us.table.writes == writes
        us.speaker.say(EndOfRIB(OTHER, IPV4_UNICAST))
        await eventually(lambda: us.kernel == {OWN: "drop", THEIRS: OTHER})


async def _peer_says(us: Node, word: str, value: object) -> bool:
    return any(one[word] == value for one in (await us.ask())["peers"])


async def test_a_peer_without_graceful_restart_takes_its_routes_along(us: Node) -> None:
    """They leave the kernel when its session goes down."""
    async with us.running():
        us.speaker.say(SessionUp(OTHER, 64512, frozenset({IPV4_UNICAST})))
        us.announces(THEIRS)
        await eventually(lambda: THEIRS in us.kernel)
        us.speaker.say(SessionDown(OTHER, "hold timer"))
        await eventually(lambda: us.kernel == {OWN: "drop"})


async def test_lending_an_address(us: Node) -> None:
    """The /32 of an address in our block is taken as soon as the block says who holds it, from
    that node only, and no longer than that.
    """
    lent = "198.19.16.7/32"
    async with us.running():
        us.up()
        us.announces(lent, "198.19.16.8/32")
        await store(us.store, block(OWN, "us", {lent: "other"}))
        await eventually(lambda: us.kernel == {OWN: "drop", lent: OTHER})
        await store(us.store, block(OWN, "us"))
        await eventually(lambda: us.kernel == {OWN: "drop"})


async def test_borrowing_an_address(us: Node) -> None:
    """A workload here with an address of another node's block is announced as /32."""
    borrowed = "198.19.16.70/32"
    async with us.running():
        await store(us.store, block(THEIRS, "other", {borrowed: "us"}))
        await store(us.store, endpoint("web", "us", "198.19.16.70"))
        await eventually(lambda: us.heard(OTHER) == {OWN, borrowed})
        await remove(
            us.store, ResourceKey("WorkloadEndpoint", "us-k8s-web-eth0", namespace="default")
        )
        await eventually(lambda: us.heard(OTHER) == {OWN})


async def test_a_block_given_up(us: Node) -> None:
    """When the affinity leaves confirmed the aggregate is withdrawn and its blackhole goes."""
    claim = AffinityKey("us", parse_network(OWN))
    async with us.running():
        await eventually(lambda: us.heard(OTHER) == {OWN})
        await _write(us, claim, AffinityState.PENDING_DELETION)
        await eventually(lambda: us.heard(OTHER) == set())
        await eventually(lambda: us.kernel == {})
        await _write(us, claim, AffinityState.CONFIRMED)
        await eventually(lambda: us.kernel == {OWN: "drop"})
        await remove(us.store, BlockKey(parse_network(OWN)))
        await eventually(lambda: us.kernel == {})


async def _write(us: Node, key: AffinityKey, state: AffinityState) -> None:
    await us.store.commit(Transaction((), [Put(str(key), codec.encode(affinity(state)))]))


async def test_a_new_peer_and_a_peer_removed(us: Node) -> None:
    """Sessions follow the datastore; the routes of a peer that is no more go at once."""
    await store(us.store, peer(ROUTER, 65000))
    async with us.running():
        await eventually(lambda: us.heard(ROUTER) == {OWN})
        assert us.speaker.advertised[ROUTER][OWN].attributes.local_pref is None
        us.up(ROUTER)
        us.announces("198.19.17.0/26", peer=ROUTER)
        await eventually(lambda: "198.19.17.0/26" in us.kernel)
        await remove(us.store, ResourceKey("BGPPeer", "router"))
        await eventually(lambda: us.kernel == {OWN: "drop"})
        assert [str(session.peer_address) for session in us.speaker.sessions] == [OTHER]


async def test_a_session_that_was_up_before_its_peer_was_known(us: Node) -> None:
    """What it said went unheard, so it is asked again."""
    async with us.running():
        await eventually(lambda: us.heard(OTHER) == {OWN})
        us.up(ROUTER)
        us.announces("198.19.17.0/26", peer=ROUTER)
        await store(us.store, peer(ROUTER, 65000))
        await eventually(lambda: us.speaker.refreshes == [ROUTER])
        us.announces("198.19.17.0/26", peer=ROUTER)
        await eventually(lambda: "198.19.17.0/26" in us.kernel)


async def test_import_policy_follows_the_datastore(us: Node) -> None:
    """A pool that comes, and the annotation, let in what was rejected, without a refresh."""
    async with us.running():
        us.up()
        us.announces(FAR, "10.0.0.0/8")
        await eventually(lambda: _peer_says(us, "received", 2))
        assert us.kernel == {OWN: "drop"}
        await store(us.store, pool("192.0.2.0/24", name="second"))
        await eventually(lambda: us.kernel == {OWN: "drop", FAR: OTHER})
        await store(us.store, configuration(annotations={IMPORT_ANNOTATION: IMPORT_ALL}))
        await eventually(lambda: "10.0.0.0/8" in us.kernel)
        await remove(us.store, ResourceKey("BGPConfiguration", "default"))
        await eventually(lambda: us.kernel == {OWN: "drop", FAR: OTHER})
        assert us.speaker.refreshes == []


async def test_what_people_are_told(us: Node) -> None:
    """Status names peers with counts and reasons, `why` every path, and nonsense is answered."""
    await store(us.store, peer(ROUTER, 65000))
    async with us.running():
        us.up()
        us.up(ROUTER)
        us.announces(NOBODYS, FAR)
        us.announces(NOBODYS, peer=ROUTER)
        await eventually(lambda: us.kernel.get(NOBODYS) == ROUTER)
        status = await us.ask()
        mesh = status["peers"][0]
        assert (mesh["address"], mesh["type"], mesh["state"], mesh["info"]) == (
            OTHER,
            "node-to-node mesh",
            "up",
            "Established",
        )
        assert mesh["rejected"] == {"outside pools and service ranges": 1}
        assert mesh["advertised"]["wanted"] == 2
        assert status["advertising"] == {OWN: "block of this node"}
        routes = (await us.ask("routes"))["routes"]
        assert [(one["prefix"], one["settled_by"]) for one in routes] == [
            (NOBODYS, "external_before_internal")
        ]
        why = await us.ask(f"why {NOBODYS}")
        assert sorted((one["peer"], one["used"], one["lost_at"]) for one in why["paths"]) == [
            (ROUTER, True, ""),
            (OTHER, False, "external_before_internal"),
        ]
        assert "error" in await us.ask("why not")
        assert "error" in await us.ask("dance")


async def test_a_blackhole_is_not_felix_business(us: Node) -> None:
    """Felix and bgpd share the main table and never touch each other's routes."""
    workload = parse_network("198.19.16.5/32")
    us.table.entries[workload, 1024] = (3, blackhole())
    async with us.running():
        us.up()
        await eventually(lambda: OWN in us.kernel)
    assert us.table.entries[workload, 1024][0] == 3
