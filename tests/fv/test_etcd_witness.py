"""The etcd3 package as witness: it reads what we write, we read what it writes."""

from __future__ import annotations

import pytest

from cymric.datastore.api import Conflict, Put, Transaction, delete, put, update
from tests.support.datastore import client, listening
from tests.support.etcd import EtcdServer
from tests.support.etcd3_witness import witness
from tests.support.eventually import eventually

pytestmark = pytest.mark.etcd


async def test_it_reads_what_we_write(etcd_server: EtcdServer) -> None:
    """Values, revisions, listings and events that we caused look the same to etcd3."""
    async with client(etcd_server.endpoint) as store:
        first = await store.commit(
            Transaction((), (Put("/witness/ours/a", b"1"), Put("/witness/ours/b", b"2")))
        )
        gone = await delete(store, "/witness/ours/b")
    prefix = "/witness/ours/"
    read, listed, watched = witness(
        etcd_server, ("get", prefix + "a"), ("get_prefix", prefix), ("watch", prefix, first, 3)
    )
    assert read == ["1", first]
    assert listed == {prefix + "a": "1"}
    assert watched == [
        [prefix + "a", "1", first],
        [prefix + "b", "2", first],
        [prefix + "b", None, gone],
    ]


async def test_we_read_what_it_writes(etcd_server: EtcdServer) -> None:
    """Values, listings and events that etcd3 caused look the same to us."""
    prefix = "/witness/theirs/"
    async with client(etcd_server.endpoint) as store:
        start = await put(store, "/witness/start", b"")
        async with listening(store, prefix, start + 1) as heard:
            witness(
                etcd_server,
                ("put", prefix + "a", "1"),
                ("put", prefix + "b", "2"),
                ("delete", prefix + "b"),
            )
            await eventually(lambda: heard.values == [b"1", b"2", None])
        listed = await store.list(prefix)
        assert [(item.key, item.value) for item in listed.items] == [(prefix + "a", b"1")]
        assert listed.items[0].revision == heard.events[0].revision


async def test_we_guard_against_each_other(etcd_server: EtcdServer) -> None:
    """A compare-and-swap by one loses against a write of the other, both ways."""
    key = "/witness/guard"
    async with client(etcd_server.endpoint) as store:
        ours = await put(store, key, b"ours")
        won, lost, read = witness(
            etcd_server, ("swap", key, ours, "theirs"), ("swap", key, ours, "again"), ("get", key)
        )
        assert (won, lost, read[0]) == (True, False, "theirs")
        with pytest.raises(Conflict) as caught:
            await update(store, key, b"late", if_revision=ours)
        current = caught.value.current[key]
        assert current is not None
        assert (current.value, current.revision) == (b"theirs", read[1])


async def test_our_adapter_on_its_channel(etcd_server: EtcdServer) -> None:
    """`from_etcd3` writes, lists and watches over the channel of a real etcd3 client."""
    prefix = "/witness/borrowed/"
    (result,) = witness(etcd_server, ("borrow", prefix))
    assert result == [[prefix + "a", prefix + "b"], ["1", "2"]]
