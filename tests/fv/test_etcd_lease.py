"""Leases on a real etcd: kept alive beyond their time, and lost in the open."""

from __future__ import annotations

import asyncio
import time

import pytest

from cymric.datastore.api import Put, Transaction
from tests.conftest import StartEtcd
from tests.support.datastore import client
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually

pytestmark = pytest.mark.etcd


async def test_a_lease_outlives_its_time(etcd_server: EtcdServer) -> None:
    """What is written under a lease of 2 s is still there after 5 s: it is kept alive."""
    lost: list[int] = []
    async with client(etcd_server.endpoint) as store:
        lease = await store.grant_lease(2, on_lost=lost.append)
        await store.commit(Transaction((), (Put("/lease/kept", b"", lease),)))
        until = time.monotonic() + 5

        async def is_over() -> bool:
            assert await store.get("/lease/kept") is not None
            return time.monotonic() > until

        await eventually(is_over)
        assert lost == []


async def test_a_closed_client_lets_its_leases_run_out(etcd_server: EtcdServer) -> None:
    """After `close` nobody keeps the lease alive, and etcd removes what hung on it."""
    async with client(etcd_server.endpoint) as store:
        lease = await store.grant_lease(1)
        await store.commit(Transaction((), (Put("/lease/closed", b"", lease),)))
    async with client(etcd_server.endpoint) as other:

        async def is_gone() -> bool:
            return await other.get("/lease/closed") is None

        await eventually(is_gone, 8)


async def test_a_lease_revoked_by_others_is_told(etcd_server: EtcdServer) -> None:
    """When somebody else revokes a lease, its owner is told its id, once."""
    lost: list[int] = []
    async with client(etcd_server.endpoint) as store:
        lease = await store.grant_lease(2, on_lost=lost.append)
        etcd_server.etcdctl("lease", "revoke", f"{lease:x}")
        await eventually(lambda: lost == [lease], 5)


async def test_a_lease_is_lost_when_etcd_is_away_too_long(start_etcd: StartEtcd) -> None:
    """With etcd away for the whole time to live, the owner is told although nobody answers."""
    server = start_etcd()
    lost: list[int] = []
    async with client(server.endpoint) as store:
        lease = await store.grant_lease(2, on_lost=lost.append)
        server.kill()
        await eventually(lambda: lost == [lease], 6)


async def test_a_short_outage_costs_no_lease(start_etcd: StartEtcd) -> None:
    """A restart of etcd within the time to live leaves the lease and its keys alone."""
    server = start_etcd()
    lost: list[int] = []
    async with client(server.endpoint) as store:
        lease = await store.grant_lease(6, on_lost=lost.append)
        await store.commit(Transaction((), (Put("/a", b"", lease),)))
        server.kill()
        await asyncio.to_thread(server.start)
        until = time.monotonic() + 3

        async def is_over() -> bool:
            assert await store.get("/a") is not None
            return time.monotonic() > until

        await eventually(is_over)
        assert lost == []
