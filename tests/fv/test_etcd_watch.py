"""What a watch on a real etcd survives: restarts, silence, compaction, wiped data, big events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import aclosing
from pathlib import Path

import pytest

from cymric.datastore import etcd_watch
from cymric.datastore.api import (
    Compacted,
    Datastore,
    OutcomeUnknown,
    Put,
    Transaction,
    Unavailable,
    WatchEvent,
    delete,
    put,
    update,
)
from cymric.datastore.etcd import open_datastore
from cymric.runtime.settings import Settings
from tests.conftest import StartEtcd
from tests.support.datastore import client, listening
from tests.support.etcd import EtcdServer, free_port
from tests.support.eventually import eventually
from tests.support.forwarder import Forwarder

pytestmark = pytest.mark.etcd


async def write_soon(store: Datastore, key: str, value: bytes) -> int:
    """Put, patiently: the server may have been restarted a moment ago."""
    async with asyncio.timeout(20):
        return await put(store, key, value)


async def test_kill_and_restart_under_a_watch(start_etcd: StartEtcd) -> None:
    """A watch hears what is written after etcd was killed and restarted, without being asked."""
    server = start_etcd()
    async with client(server.endpoint) as store:
        start = await put(store, "/a", b"1")
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: heard.values == [b"1"])
            server.kill()
            await asyncio.to_thread(server.start)
            await write_soon(store, "/a", b"2")
            await eventually(lambda: heard.values == [b"1", b"2"])
            server.kill()
            await asyncio.to_thread(server.start)
            await write_soon(store, "/a", b"3")
            await eventually(lambda: heard.values == [b"1", b"2", b"3"])
        assert heard.error is None


async def test_writes_while_the_watch_was_away(start_etcd: StartEtcd) -> None:
    """What others wrote while this client could not reach etcd arrives once it can again."""
    server = start_etcd()
    async with (
        Forwarder(server.client_port) as forwarder,
        client(forwarder.endpoint) as store,
        client(server.endpoint) as other,
    ):
        start = await put(other, "/a", b"0")
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: heard.values == [b"0"])
            for round_ in range(1, 4):
                forwarder.cut()
                await put(other, "/a", b"%d" % round_)
                await delete(other, "/a")
            await eventually(lambda: len(heard.events) == 7)
            assert heard.values == [b"0", b"1", None, b"2", None, b"3", None]


@pytest.mark.slow
async def test_kill_in_the_middle_of_a_replay(start_etcd: StartEtcd) -> None:
    """Killed while replaying 8,000 revisions to a slow consumer: each event once, in order."""
    count = 8_000
    server = start_etcd(flags=("--snapshot-count=100000",))
    async with client(server.endpoint) as store:
        start = await put(store, "/r/first", b"")
        for first in range(0, count, 200):
            await asyncio.gather(
                *(put(store, f"/r/{n}", b"x" * 200) for n in range(first, first + 200))
            )
        seen: list[WatchEvent] = []
        kills = 0
        async with (
            asyncio.timeout(60),
            aclosing(store.watch("/r/", start_revision=start + 1)) as batches,
        ):
            async for batch in batches:
                seen += batch
                if len(seen) > count * (kills + 1) // 4 and kills < 2:
                    server.kill()
                    kills += 1
                    await asyncio.to_thread(server.start)
                if len(seen) >= count:
                    break
    assert kills == 2
    revisions = [event.revision for event in seen]
    assert revisions == list(range(start + 1, start + 1 + count))
    assert len({event.key for event in seen}) == count


@pytest.mark.slow
async def test_a_stopped_server(start_etcd: StartEtcd) -> None:
    """A server that keeps its connections and says nothing: the watch reopens and goes on."""
    server = start_etcd()
    async with client(server.endpoint) as store:
        start = await put(store, "/a", b"1")
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: heard.values == [b"1"])
            before = etcd_watch.RESTARTS._value.get()
            server.pause()
            await eventually(
                lambda: etcd_watch.RESTARTS._value.get() > before,
                25,
                what="the silent peer is noticed",
            )
            server.resume()
            await write_soon(store, "/a", b"2")
            await eventually(lambda: heard.values == [b"1", b"2"])


async def test_compaction_under_a_watcher_that_was_away(start_etcd: StartEtcd) -> None:
    """Who missed revisions that were compacted meanwhile hears Compacted with the oldest left."""
    server = start_etcd()
    async with (
        Forwarder(server.client_port) as forwarder,
        client(forwarder.endpoint) as store,
        client(server.endpoint) as other,
    ):
        start = await put(other, "/a", b"1")
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: heard.values == [b"1"])
            forwarder.loses_answers = True
            await put(other, "/a", b"2")
            await delete(other, "/a")
            last = await put(other, "/b", b"3")
            server.etcdctl("compact", str(last))
            forwarder.loses_answers = False
            forwarder.cut()
            await eventually(lambda: heard.error)
        assert isinstance(heard.error, Compacted)
        assert heard.error.revision == last


async def test_compaction_does_not_disturb_a_watch_that_keeps_up(start_etcd: StartEtcd) -> None:
    """A watch that caught up goes on through a compaction, also when it reconnects after it."""
    server = start_etcd()
    async with client(server.endpoint) as store:
        start = await put(store, "/a", b"1")
        async with listening(store, "/a", start) as heard:
            last = await put(store, "/a", b"2")
            await eventually(lambda: heard.values == [b"1", b"2"])
            server.etcdctl("compact", str(last))
            server.kill()
            await asyncio.to_thread(server.start)
            await write_soon(store, "/a", b"3")
            await eventually(lambda: heard.values == [b"1", b"2", b"3"])
            assert heard.error is None


async def test_wiped_data_is_noticed(start_etcd: StartEtcd) -> None:
    """After etcd lost its data, a watch from the old revision raises Compacted; it is not deaf."""
    server = start_etcd()
    async with client(server.endpoint) as store:
        for n in range(20):
            start = await put(store, "/a", b"%d" % n)
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: len(heard.events) == 1)
            server.kill()
            server.wipe()
            await asyncio.to_thread(server.start)
            await eventually(lambda: heard.error)
        assert isinstance(heard.error, Compacted)


async def test_wiped_data_is_noticed_when_it_grew_again(start_etcd: StartEtcd) -> None:
    """A wiped server that has more revisions than before is still noticed, by its younger term."""
    server = start_etcd()
    server.kill()
    await asyncio.to_thread(server.start)  # each start of a lone member begins a new term
    async with Forwarder(server.client_port) as forwarder, client(forwarder.endpoint) as store:
        start = await put(store, "/a", b"old")
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: len(heard.events) == 1)
            await forwarder.stop()
            server.kill()
            server.wipe()
            await asyncio.to_thread(server.start)
            async with client(server.endpoint) as other:
                for n in range(20):
                    await put(other, "/a", b"%d" % n)
            await forwarder.start()
            await eventually(lambda: heard.error)
        assert isinstance(heard.error, Compacted)
        assert heard.values == [b"old"]


async def test_another_cluster_is_noticed(start_etcd: StartEtcd) -> None:
    """A cluster that answers at the same address with newer revisions is another: Compacted."""
    old, new = start_etcd(), start_etcd()
    async with Forwarder(old.client_port) as forwarder, client(forwarder.endpoint) as store:
        start = await put(store, "/a", b"old")
        async with client(new.endpoint) as other:
            for n in range(20):
                await put(other, "/a", b"%d" % n)
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: len(heard.events) == 1)
            forwarder.retarget(new.client_port)
            await eventually(lambda: heard.error)
        assert isinstance(heard.error, Compacted)
        assert heard.values == [b"old"]


async def test_a_revision_of_five_megabytes(start_etcd: StartEtcd) -> None:
    """One transaction of 5 MB arrives whole, in one batch, and the watch lives on."""
    server = start_etcd(flags=(f"--max-request-bytes={16 << 20}",))
    settings = Settings(etcd_endpoints=(server.endpoint,))
    async with open_datastore(settings, max_request_bytes=8 << 20) as store:
        start = await put(store, "/a", b"before")
        puts = [Put(f"/big/{n}", bytes([n]) * (1 << 20)) for n in range(5)]
        await store.commit(Transaction((), puts))
        async with (
            asyncio.timeout(20),
            aclosing(store.watch("/big/", start_revision=start)) as batches,
        ):
            batch = await anext(batches)
            assert [len(event.value or b"") for event in batch] == [1 << 20] * 5
            await put(store, "/big/after", b"x")
            assert [event.value for event in await anext(batches)] == [b"x"]


async def test_many_megabytes_of_history_come_in_fragments(start_etcd: StartEtcd) -> None:
    """Etcd sends 8 MB of history in fragments; they are joined, and nothing is delivered twice."""
    server = start_etcd()
    async with client(server.endpoint) as store:
        start = await put(store, "/f/start", b"")
        for n in range(8):
            await put(store, f"/f/{n}", bytes([n]) * (1 << 20))
        async with (
            asyncio.timeout(20),
            aclosing(store.watch("/f/", start_revision=start)) as batches,
        ):
            batch = await anext(batches)
    assert [event.revision for event in batch] == list(range(start, start + 9))


async def test_far_behind_means_list_again(
    start_etcd: StartEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who comes back after very many revisions hears Compacted, because a listing is faster."""
    monkeypatch.setattr(etcd_watch, "FAR_BEHIND", 10)
    server = start_etcd()
    async with (
        Forwarder(server.client_port) as forwarder,
        client(forwarder.endpoint) as store,
        client(server.endpoint) as other,
    ):
        start = await put(other, "/a", b"1")
        for _ in range(20):
            await put(other, "/a", b"2")
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: len(heard.events) == 21)
            forwarder.loses_answers = True
            for _ in range(20):
                await put(other, "/a", b"3")
            forwarder.loses_answers = False
            forwarder.cut()
            await eventually(lambda: heard.error)
        assert isinstance(heard.error, Compacted)


async def test_an_outage_costs_no_processor_time(start_etcd: StartEtcd) -> None:
    """While etcd is away, watches wait; they do not spin."""
    server = start_etcd()
    dead = f"http://127.0.0.1:{free_port()}"  # refused at once, so only the back-off holds us
    async with client(server.endpoint, dead) as store:
        start = await put(store, "/a", b"1")
        async with (
            listening(store, "/a", start) as heard,
            listening(store, "/b", start),
            listening(store, "/c", start),
        ):
            await eventually(lambda: len(heard.events) == 1)
            server.kill()
            before, until = time.process_time(), time.monotonic() + 4
            await eventually(lambda: time.monotonic() > until)
            assert time.process_time() - before < 0.6  # of which the polling itself is a part


async def test_several_endpoints_the_first_dead(etcd_server: EtcdServer) -> None:
    """With dead endpoints in front, calls and watches use the one that lives, at once."""
    dead = (f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{free_port()}")
    async with client(*dead, etcd_server.endpoint) as store:
        async with asyncio.timeout(2):
            start = await put(store, "/several/a", b"1")
        async with listening(store, "/several/", start) as heard:
            await eventually(lambda: heard.values == [b"1"], 2)


async def test_an_endpoint_that_dies_later(start_etcd: StartEtcd) -> None:
    """When the endpoint in use goes, the next one serves calls and goes on with the watch."""
    server = start_etcd()
    async with (
        Forwarder(server.client_port) as first,
        client(first.endpoint, server.endpoint) as store,
    ):
        start = await put(store, "/a", b"1")
        async with listening(store, "/a", start) as heard:
            await eventually(lambda: heard.values == [b"1"])
            await first.stop()
            assert (await store.get("/a")) is not None
            await put(store, "/a", b"2")
            await eventually(lambda: heard.values == [b"1", b"2"], 5)


async def test_three_members_and_the_leader_is_killed(tmp_path: Path) -> None:
    """The watch goes on at another member, and each write lands once, asked again if unknown."""
    members = await asyncio.to_thread(EtcdServer.cluster, tmp_path, 3)
    try:
        leader = next(member for member in members if member.is_leader)
        others = [member.endpoint for member in members if member is not leader]
        async with client(leader.endpoint, *others) as store:
            revision = await put(store, "/a", b"0")
            async with listening(store, "/a", revision) as heard:
                await eventually(lambda: heard.values == [b"0"])
                leader.kill()
                for value in (b"1", b"2"):
                    revision = await swap(store, "/a", value, revision)
                await eventually(lambda: heard.values == [b"0", b"1", b"2"])
            assert heard.error is None
    finally:
        for member in members:
            member.kill()


async def swap(store: Datastore, key: str, value: bytes, revision: int) -> int:
    """Compare-and-swap as callers must: after an unknown outcome, read before trying again."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await update(store, key, value, if_revision=revision)
            except (OutcomeUnknown, Unavailable):
                with contextlib.suppress(Unavailable):
                    read = await store.get(key)
                    if read is not None and read.value == value:
                        return read.revision
