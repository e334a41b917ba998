"""Calls to a real etcd when answers are lost, servers stand still, or answers are large."""

from __future__ import annotations

import asyncio
import time

import pytest

from cymric.datastore.api import (
    Compare,
    Conflict,
    Datastore,
    OutcomeUnknown,
    Put,
    TooLarge,
    Transaction,
    Unavailable,
    put,
    update,
)
from cymric.datastore.etcd import open_datastore
from cymric.runtime.settings import Settings
from tests.conftest import StartEtcd
from tests.support.datastore import client
from tests.support.etcd import EtcdServer, free_port
from tests.support.eventually import eventually
from tests.support.forwarder import Forwarder

pytestmark = pytest.mark.etcd


async def test_a_lost_answer_is_outcome_unknown(etcd_server: EtcdServer) -> None:
    """A compare-and-swap that landed but whose answer was cut off is unknown, and sent once."""
    async with (
        Forwarder(etcd_server.client_port) as forwarder,
        client(forwarder.endpoint) as store,
        client(etcd_server.endpoint) as other,
    ):
        revision = await put(store, "/lost/a", b"before")
        forwarder.loses_answers = True
        writing = asyncio.create_task(update(store, "/lost/a", b"mine", if_revision=revision))
        await eventually(lambda: _value_is(other, "/lost/a", b"mine"))
        forwarder.cut()
        with pytest.raises(OutcomeUnknown):
            await writing
        forwarder.loses_answers = False
        read = await store.get("/lost/a")
        assert read is not None
        assert (read.value, read.revision) == (b"mine", revision + 1), "it landed exactly once"
        with pytest.raises(Conflict):
            await update(store, "/lost/a", b"again", if_revision=revision)


async def test_a_late_answer_is_outcome_unknown(start_etcd: StartEtcd) -> None:
    """A write to a server that stands still is OutcomeUnknown within seconds, not for ever."""
    server = start_etcd()
    async with client(server.endpoint, call_s=2) as store:
        await put(store, "/a", b"1")
        server.pause()
        started = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            await put(store, "/a", b"2")
        assert time.monotonic() - started < 4
        server.resume()
        assert await store.get("/a") is not None


async def test_nothing_was_written_when_nobody_listens() -> None:
    """Without any server, reads and writes are Unavailable in seconds: surely nothing landed."""
    async with client(f"http://127.0.0.1:{free_port()}", call_s=2) as store:
        started = time.monotonic()
        results = await asyncio.gather(
            store.get("/a"), put(store, "/a", b""), store.grant_lease(5), return_exceptions=True
        )
        assert [type(result) for result in results] == [Unavailable] * 3
        assert "connect" in str(results[0]), "the error says what was wrong"
        assert time.monotonic() - started < 4


async def test_a_read_waits_for_a_server_that_is_coming_up(start_etcd: StartEtcd) -> None:
    """A call made while etcd restarts is answered when it is back, within its deadline."""
    server = start_etcd()
    async with client(server.endpoint) as store:
        await put(store, "/a", b"1")
        server.kill()
        reading = asyncio.create_task(store.get("/a"))
        await asyncio.to_thread(server.start)
        read = await reading
        assert read is not None
        assert read.value == b"1"


async def test_a_silent_endpoint_costs_a_read_little(start_etcd: StartEtcd) -> None:
    """A read at an endpoint that stands still is answered by the next one in time."""
    silent, alive = start_etcd(), start_etcd()
    async with client(silent.endpoint, alive.endpoint) as store:
        assert await store.get("/a") is None
        silent.pause()
        assert await store.get("/a") is None
        started = time.monotonic()
        assert await store.get("/a") is None
        assert time.monotonic() - started < 1, "the endpoint that answered is kept"


async def test_a_snapshot_over_four_megabytes_in_pages(etcd_server: EtcdServer) -> None:
    """A listing far over gRPC's default limit comes whole, however small its pages are."""
    settings = Settings(etcd_endpoints=(etcd_server.endpoint,))
    async with open_datastore(settings, page_keys=7) as store, open_datastore(settings) as whole:
        for first in range(0, 60, 10):
            puts = [Put(f"/snapshot/{first + n:03}", b"x" * 100_000) for n in range(10)]
            await store.commit(Transaction((), puts))
        paged = await store.list("/snapshot/")
        assert [item.key for item in paged.items] == [f"/snapshot/{n:03}" for n in range(60)]
        assert (await whole.list("/snapshot/")).items == paged.items


async def test_all_pages_are_of_one_revision(etcd_server: EtcdServer) -> None:
    """Writes that land between two pages are not in the listing, which is of the first page."""
    settings = Settings(etcd_endpoints=(etcd_server.endpoint,))
    async with (
        open_datastore(settings, page_keys=1) as store,
        client(etcd_server.endpoint) as other,
    ):
        for round_ in range(3):
            keys = [f"/pages/{n:02}" for n in range(40)]
            last = await other.commit(Transaction((), [Put(key, b"%d" % round_) for key in keys]))
            listing = asyncio.create_task(store.list("/pages/"))
            writes = 0
            while not listing.done():
                await other.commit(
                    Transaction((), [Put(key, b"later") for key in (keys[0], keys[-1])])
                )
                writes += 1
            listed = await listing
            assert writes > 3, "the listing was raced"
            assert len({item.value for item in listed.items if item.revision > last}) <= 1
            ends = listed.items[0], listed.items[-1]
            assert ends[0].revision == ends[1].revision <= listed.revision


async def test_a_listing_starts_again_when_its_revision_is_compacted(
    etcd_server: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compaction between two pages makes the listing begin again, and end well."""
    settings = Settings(etcd_endpoints=(etcd_server.endpoint,))
    async with open_datastore(settings, page_keys=10) as store:
        await store.commit(Transaction((), [Put(f"/again/{n:02}", b"1") for n in range(30)]))
        call, calls = store._connection.call, 0

        async def compacting_call(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == 2:
                last = await put(store, "/again/00", b"2")
                etcd_server.etcdctl("compact", str(last))
            return await call(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(store._connection, "call", compacting_call)
        listed = await store.list("/again/")
        assert calls > 5, "it started again"
        assert len(listed.items) == 30
        assert listed.items[0].value == b"2"


async def test_what_only_the_server_finds_too_large(start_etcd: StartEtcd) -> None:
    """A server with lower limits than ours refuses as TooLarge, not as something odd."""
    server = start_etcd(flags=("--max-request-bytes=10000", "--max-txn-ops=4"))
    async with client(server.endpoint) as store:
        with pytest.raises(TooLarge):
            await put(store, "/a", b"x" * 20_000)
        with pytest.raises(TooLarge):
            await store.commit(Transaction((), [Put(f"/{n}", b"") for n in range(5)]))
        with pytest.raises(TooLarge):
            await store.commit(Transaction([Compare(f"/{n}", 0) for n in range(5)], ()))


async def _value_is(store: Datastore, key: str, value: bytes) -> bool:
    read = await store.get(key)
    return read is not None and read.value == value
