"""The syncer over a real etcd: what a daemon knows after history was lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from cymric.datastore.api import Datastore, delete, put
from cymric.datastore.syncer import RESYNCS, Syncer, Update
from cymric.model.keys import HANDLES, HandleKey
from tests.conftest import StartEtcd
from tests.support.datastore import client
from tests.support.etcd import EtcdServer, free_port
from tests.support.eventually import eventually
from tests.support.forwarder import Forwarder

pytestmark = pytest.mark.etcd


@asynccontextmanager
async def picture(store: Datastore) -> AsyncIterator[tuple[set[str], asyncio.Event]]:
    """The handles a daemon knows of, kept up to date, and whether it is in sync."""
    known: set[str] = set()
    in_sync = asyncio.Event()

    def on_updates(updates: Sequence[Update]) -> None:
        for update in updates:
            assert isinstance(update.key, HandleKey)
            known.discard(update.key.handle_id)
            if update.value is not None:
                known.add(update.key.handle_id)

    task = asyncio.create_task(Syncer(store, [HANDLES], on_updates, in_sync.set).run())
    try:
        yield known, in_sync
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def write(store: Datastore, name: str) -> None:
    """Store a handle."""
    await put(store, HANDLES + name, b'{"handleID":"%s","block":{}}' % name.encode())


async def test_a_deletion_in_the_compacted_hole_is_told(start_etcd: StartEtcd) -> None:
    """Deleted while we were away, and compacted before we came back: told all the same."""
    server = start_etcd()
    async with (
        Forwarder(server.client_port) as forwarder,
        client(forwarder.endpoint) as store,
        client(server.endpoint) as other,
    ):
        for name in ("stays", "goes"):
            await write(other, name)
        async with picture(store) as (known, _):
            await eventually(lambda: known == {"stays", "goes"})
            forwarder.loses_answers = True
            await delete(other, HANDLES + "goes")
            await write(other, "new")
            server.etcdctl("compact", str(await put(other, "/elsewhere", b"")))
            forwarder.loses_answers = False
            forwarder.cut()
            await eventually(lambda: known == {"stays", "new"})


async def test_a_wiped_server_takes_everything_back(start_etcd: StartEtcd) -> None:
    """What a wiped etcd has not is told gone; what is written to it afterwards is heard."""
    server = start_etcd()
    async with client(server.endpoint) as store:
        for name in ("a", "b", "c"):
            await write(store, name)
        async with picture(store) as (known, _):
            await eventually(lambda: len(known) == 3)
            server.kill()
            server.wipe()
            await asyncio.to_thread(server.start)
            await eventually(lambda: known == set())
            await write(store, "d")
            await eventually(lambda: known == {"d"})


async def test_restarts_cost_no_listing(start_etcd: StartEtcd) -> None:
    """A restart of etcd resumes the watch where it was; nothing is listed again or lost."""
    server = start_etcd()
    async with client(server.endpoint) as store:
        await write(store, "a")
        async with picture(store) as (known, _):
            await eventually(lambda: known == {"a"})
            before = RESYNCS._value.get()
            server.kill()
            assert known == {"a"}, "an outage changes nothing"
            await asyncio.to_thread(server.start)
            await write(store, "b")
            await eventually(lambda: known == {"a", "b"})
            assert RESYNCS._value.get() == before


async def test_started_before_etcd(etcd_server: EtcdServer) -> None:
    """A daemon that starts before etcd waits, and is in sync soon after etcd is there."""
    forwarder = Forwarder(etcd_server.client_port)
    async with (
        client(forwarder.endpoint, f"http://127.0.0.1:{free_port()}") as store,
        picture(store) as (_, in_sync),
    ):
        until = asyncio.get_running_loop().time() + 1
        await eventually(lambda: asyncio.get_running_loop().time() > until)
        assert not in_sync.is_set()
        async with forwarder:
            await eventually(in_sync.is_set)
