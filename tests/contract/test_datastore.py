"""The datastore contract: the same tests on the memory adapter and on a real etcd.

Sources: etcd's API guarantees, and what the programs above the port rely on.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

import grpc
import pytest

from cymric.datastore.api import (
    ABSENT,
    MAX_OPERATIONS,
    MAX_REQUEST_BYTES,
    Compacted,
    Compare,
    Conflict,
    Datastore,
    Delete,
    LeaseLost,
    NoneCreated,
    Put,
    TooLarge,
    Transaction,
    WatchEvent,
    create,
    delete,
    put,
    update,
)
from cymric.datastore.etcd import open_datastore
from cymric.datastore.etcd_bridge import from_etcd3
from cymric.datastore.etcd_channel import CHANNEL_OPTIONS
from cymric.datastore.memory import MemoryDatastore
from cymric.runtime.settings import Settings
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually

_numbers = itertools.count()

Compact = Callable[[int], None]


@dataclass
class ForeignClient:
    """Stands for an `etcd3.Etcd3Client`, which is a blocking channel to us."""

    channel: grpc.Channel


@pytest.fixture(
    params=[
        "memory",
        pytest.param("etcd", marks=pytest.mark.etcd),
        pytest.param("etcd, borrowed channel", marks=pytest.mark.etcd),
    ]
)
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Datastore, Compact]]:
    """A datastore, and the operator's way to compact it."""
    if request.param == "memory":
        memory = MemoryDatastore()
        yield memory, memory.compact
        return
    server: EtcdServer = request.getfixturevalue("etcd_server")
    if request.param == "etcd":
        async with open_datastore(Settings(etcd_endpoints=(server.endpoint,))) as store:
            yield store, lambda revision: (server.etcdctl("compact", str(revision)), None)[1]
        return
    address = server.endpoint.removeprefix("http://")
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        async with from_etcd3(ForeignClient(channel)) as store:
            yield store, lambda revision: (server.etcdctl("compact", str(revision)), None)[1]


@pytest.fixture
def store(backend: tuple[Datastore, Compact]) -> Datastore:
    """The datastore alone."""
    return backend[0]


@pytest.fixture
def at() -> str:
    """A prefix that no other test uses."""
    return f"/test/{next(_numbers)}/"


async def take(store: Datastore, prefix: str, start_revision: int, count: int) -> list[WatchEvent]:
    """The first `count` events of a watch."""
    taken: list[WatchEvent] = []
    async with (
        asyncio.timeout(10),
        aclosing(store.watch(prefix, start_revision=start_revision)) as batches,
    ):
        async for batch in batches:
            taken += batch
            if len(taken) >= count:
                break
    return taken


async def test_none_created_since(store: Datastore, at: str) -> None:
    """What a listing did not show is guarded: a key created under the prefix refuses the write."""
    await put(store, at + "in/a", b"1")
    listing = await store.list(at + "in/")
    guard = NoneCreated(at + "in/", listing.revision)
    await put(store, at + "in/a", b"changed, not created")
    await delete(store, at + "in/missing")
    await put(store, at + "inside", b"another prefix")
    await store.commit(Transaction((), (Put(at + "b", b"1"),), (guard,)))
    await delete(store, at + "in/a")
    await store.commit(Transaction((), (Put(at + "b", b"2"),), (guard,)))
    created = await put(store, at + "in/c", b"new")
    with pytest.raises(Conflict) as lost:
        await store.commit(
            Transaction((Compare(at + "absent", ABSENT),), (Put(at + "b", b"3"),), (guard,))
        )
    assert set(lost.value.current) == {at + "absent", at + "in/c"}
    found = lost.value.current[at + "in/c"]
    assert found is not None
    assert (found.value, found.revision) == (b"new", created)
    assert lost.value.revision >= created
    kept = await store.get(at + "b")
    assert kept is not None
    assert kept.value == b"2"
    # Seen from the conflict's own revision nothing is new any more.
    since = NoneCreated(at + "in/", lost.value.revision)
    await store.commit(Transaction((), (Put(at + "b", b"3"),), (since,)))


async def test_a_key_created_again_is_new(store: Datastore, at: str) -> None:
    """Deleting a key and writing it anew counts as creating it."""
    await put(store, at + "in/a", b"1")
    revision = (await store.list(at)).revision
    await delete(store, at + "in/a")
    await put(store, at + "in/a", b"1")
    with pytest.raises(Conflict):
        await store.commit(
            Transaction((), (Put(at + "b", b""),), (NoneCreated(at + "in/", revision),))
        )


async def test_none_created_at_all(store: Datastore, at: str) -> None:
    """Since revision 0 means that nothing may exist; a transaction's own keys come after that."""
    guard = NoneCreated(at + "in/", 0)
    await store.commit(Transaction((), (Put(at + "in/a", b""),), (guard,)))
    with pytest.raises(Conflict):
        await store.commit(Transaction((), (Put(at + "in/b", b""),), (guard,)))
    with pytest.raises(ValueError, match="prefix"):
        await store.commit(Transaction((), (Put(at + "b", b""),), (NoneCreated("", 0),)))


async def test_missing_key(store: Datastore, at: str) -> None:
    """A key nobody wrote reads as None."""
    assert await store.get(at + "a") is None


async def test_put_and_get(store: Datastore, at: str) -> None:
    """A value reads back as written, at the revision its write returned."""
    revision = await put(store, at + "a", b"\x00\xffvalue")
    read = await store.get(at + "a")
    assert read is not None
    assert (read.key, read.value, read.revision) == (at + "a", b"\x00\xffvalue", revision)


async def test_empty_value_is_not_absence(store: Datastore, at: str) -> None:
    """An empty value exists, in reads and in events."""
    revision = await put(store, at + "a", b"")
    read = await store.get(at + "a")
    assert read is not None
    assert read.value == b""
    assert await take(store, at, revision, 1) == [WatchEvent(at + "a", b"", revision)]


async def test_revisions_grow_by_one_a_commit(store: Datastore, at: str) -> None:
    """Each commit that changes something has the next revision, however many keys it writes."""
    first = await put(store, at + "a", b"1")
    second = await store.commit(Transaction((), (Put(at + "a", b"2"), Put(at + "b", b"2"))))
    assert second == first + 1
    listed = await store.list(at)
    assert [item.revision for item in listed.items] == [second, second]


async def test_deleting_nothing_changes_nothing(store: Datastore, at: str) -> None:
    """Deleting a missing key is no error, and no new revision."""
    before = await put(store, at + "a", b"1")
    assert await delete(store, at + "b") == before


async def test_list_is_sorted_and_exact(store: Datastore, at: str) -> None:
    """A listing has every key under the prefix in order, and no neighbour."""
    for name in ("b", "a/2", "a/10", "c"):
        await put(store, at + name, name.encode())
    await put(store, at[:-1] + "0", b"the neighbour after")
    listed = await store.list(at)
    assert [item.key for item in listed.items] == [at + n for n in ("a/10", "a/2", "b", "c")]
    assert [item.key for item in (await store.list(at + "a")).items] == [at + "a/10", at + "a/2"]
    assert (await store.list(at + "zzz")).items == ()


async def test_list_revision_starts_a_gapless_watch(store: Datastore, at: str) -> None:
    """A watch from the listing's revision + 1 brings what came after it, and nothing before."""
    await put(store, at + "a", b"1")
    listed = await store.list(at)
    revision = await put(store, at + "a", b"2")
    assert await take(store, at, listed.revision + 1, 1) == [WatchEvent(at + "a", b"2", revision)]


async def test_create_only_if_absent(store: Datastore, at: str) -> None:
    """Creating what exists is a conflict that tells what is there."""
    revision = await create(store, at + "a", b"first")
    with pytest.raises(Conflict) as caught:
        await create(store, at + "a", b"second")
    current = caught.value.current[at + "a"]
    assert current is not None
    assert (current.value, current.revision) == (b"first", revision)


async def test_update_at_a_revision(store: Datastore, at: str) -> None:
    """An update lands only on the revision it was made from."""
    old = await put(store, at + "a", b"1")
    new = await update(store, at + "a", b"2", if_revision=old)
    with pytest.raises(Conflict) as caught:
        await update(store, at + "a", b"3", if_revision=old)
    current = caught.value.current[at + "a"]
    assert current is not None
    assert (current.value, current.revision) == (b"2", new)


async def test_delete_at_a_revision(store: Datastore, at: str) -> None:
    """A guarded delete conflicts with a newer write, and with a key already gone."""
    old = await put(store, at + "a", b"1")
    new = await put(store, at + "a", b"2")
    with pytest.raises(Conflict):
        await delete(store, at + "a", if_revision=old)
    await delete(store, at + "a", if_revision=new)
    with pytest.raises(Conflict) as caught:
        await delete(store, at + "a", if_revision=new)
    assert caught.value.current == {at + "a": None}


async def test_a_transaction_lands_whole_or_not_at_all(store: Datastore, at: str) -> None:
    """One failed comparison of several keeps every write out, and tells all compared keys."""
    there = await put(store, at + "there", b"1")
    both = (Compare(at + "there", there), Compare(at + "missing", 7))
    with pytest.raises(Conflict) as caught:
        await store.commit(Transaction(both, (Put(at + "new", b""), Delete(at + "there"))))
    assert await store.get(at + "new") is None
    assert set(caught.value.current) == {at + "there", at + "missing"}
    assert caught.value.current[at + "missing"] is None
    both = (Compare(at + "there", there), Compare(at + "missing", ABSENT))
    await store.commit(Transaction(both, (Put(at + "new", b""), Delete(at + "there"))))
    assert [item.key for item in (await store.list(at)).items] == [at + "new"]


async def test_two_writers_never_both_win(store: Datastore, at: str) -> None:
    """Of many writers that update one key from the same revision, exactly one wins each round."""
    revision = await put(store, at + "a", b"start")
    for _ in range(5):
        tries = [update(store, at + "a", b"%d" % n, if_revision=revision) for n in range(8)]
        results = await asyncio.gather(*tries, return_exceptions=True)
        wins = [result for result in results if isinstance(result, int)]
        assert len(wins) == 1
        assert all(isinstance(result, int | Conflict) for result in results)
        revision = wins[0]


async def test_limits_are_checked_before_sending(store: Datastore, at: str) -> None:
    """Too many operations, too many comparisons and too many bytes are all TooLarge."""
    many = [f"{at}{n}" for n in range(MAX_OPERATIONS + 1)]
    with pytest.raises(TooLarge):
        await store.commit(Transaction((), [Put(key, b"") for key in many]))
    with pytest.raises(TooLarge):
        await store.commit(Transaction([Compare(key, ABSENT) for key in many], ()))
    with pytest.raises(TooLarge):
        await put(store, at + "a", b"x" * MAX_REQUEST_BYTES)
    assert (await store.list(at)).items == ()


async def test_the_limits_themselves_are_allowed(store: Datastore, at: str) -> None:
    """As many operations, and nearly as many bytes, as the limits name do land."""
    keys = [f"{at}{n:03}" for n in range(MAX_OPERATIONS)]
    await store.commit(
        Transaction([Compare(key, ABSENT) for key in keys], [Put(key, b"1") for key in keys])
    )
    assert len((await store.list(at)).items) == MAX_OPERATIONS
    await put(store, at + "000", b"x" * (MAX_REQUEST_BYTES - 100))


async def test_a_key_is_written_once_in_a_transaction(store: Datastore, at: str) -> None:
    """Writing one key twice in a transaction, or an empty key, is a bug and refused as such."""
    with pytest.raises(ValueError, match="once"):
        await store.commit(Transaction((), (Put(at + "a", b"1"), Delete(at + "a"))))
    with pytest.raises(ValueError, match="empty"):
        await put(store, "", b"1")


async def test_watch_tells_puts_and_deletes_in_order(store: Datastore, at: str) -> None:
    """Events come in the order of writes, each with its revision; other prefixes stay out."""
    first = await put(store, at + "a", b"1")
    await put(store, at[:-1] + "0", b"the neighbour")
    second = await put(store, at + "a", b"2")
    third = await delete(store, at + "a")
    assert await take(store, at, first, 3) == [
        WatchEvent(at + "a", b"1", first),
        WatchEvent(at + "a", b"2", second),
        WatchEvent(at + "a", None, third),
    ]


async def test_watch_goes_on_live(store: Datastore, at: str) -> None:
    """A watch that caught up hears of later writes, several times."""
    start = await put(store, at + "a", b"0")
    heard: list[WatchEvent] = []

    async def listen() -> None:
        async for batch in store.watch(at, start_revision=start):
            heard.extend(batch)

    async with asyncio.TaskGroup() as tasks:
        listener = tasks.create_task(listen())
        for n in range(1, 4):
            await eventually(lambda n=n: len(heard) == n)
            await put(store, at + "a", b"%d" % n)
        await eventually(lambda: len(heard) == 4)
        listener.cancel()
    assert [event.value for event in heard] == [b"0", b"1", b"2", b"3"]


async def test_a_watch_from_the_next_revision_waits(store: Datastore, at: str) -> None:
    """Watching from the revision after the last is no error: the first event is the next write."""
    last = await put(store, at + "a", b"1")
    waiting = asyncio.create_task(take(store, at, last + 1, 1))
    revision = await put(store, at + "b", b"2")
    assert await waiting == [WatchEvent(at + "b", b"2", revision)]


async def test_a_revision_is_never_split(store: Datastore, at: str) -> None:
    """All events of one transaction arrive in one batch, in the order of its operations."""
    keys = [f"{at}{n:02}" for n in range(50, 0, -1)]
    revision = await store.commit(Transaction((), [Put(key, b"x" * 1000) for key in keys]))
    async with asyncio.timeout(10), aclosing(store.watch(at, start_revision=revision)) as batches:
        batch = await anext(batches)
    assert [event.key for event in batch] == keys


async def test_slow_consumer_loses_nothing(store: Datastore, at: str) -> None:
    """What is written while a consumer works on a batch is in the next ones."""
    start = await put(store, at + "a", b"0")
    heard: list[bytes | None] = []
    async with asyncio.timeout(10), aclosing(store.watch(at, start_revision=start)) as batches:
        async for batch in batches:
            heard += [event.value for event in batch]
            if len(heard) > 20:
                break
            await put(store, at + "a", b"%d" % (2 * len(heard) - 1))
            await put(store, at + "a", b"%d" % (2 * len(heard)))
    assert len(heard) == len(set(heard))


async def test_a_watch_never_starts_at_zero(store: Datastore, at: str) -> None:
    """Start revision 0 means 'from now' to etcd and would lose events, so it is refused."""
    with pytest.raises(ValueError, match="never at 0"):
        await anext(store.watch(at, start_revision=0))


async def test_watching_the_past_beyond_compaction(
    backend: tuple[Datastore, Compact], at: str
) -> None:
    """A watch from a compacted revision raises Compacted with the oldest one still there."""
    store, compact = backend
    first = await put(store, at + "a", b"1")
    await put(store, at + "a", b"2")
    last = await put(store, at + "a", b"3")
    compact(last)
    with pytest.raises(Compacted) as caught:
        await take(store, at, first, 1)
    assert caught.value.revision == last
    assert await take(store, at, last, 1) == [WatchEvent(at + "a", b"3", last)]


async def test_watching_the_future_is_noticed(store: Datastore, at: str) -> None:
    """A watch from a revision that lies ahead raises Compacted: the past must have been lost."""
    last = await put(store, at + "a", b"1")
    with pytest.raises(Compacted):
        await take(store, at, last + 1000, 1)


async def test_listing_after_compaction(backend: tuple[Datastore, Compact], at: str) -> None:
    """Compaction takes history, never what is there now."""
    store, compact = backend
    await put(store, at + "a", b"1")
    last = await put(store, at + "b", b"2")
    compact(last)
    assert [item.key for item in (await store.list(at)).items] == [at + "a", at + "b"]


async def test_revoking_a_lease_takes_its_keys_along(store: Datastore, at: str) -> None:
    """Keys written under a lease vanish with it, in one revision, and watches hear of it."""
    lease = await store.grant_lease(60)
    await put(store, at + "stays", b"")
    last = await store.commit(
        Transaction((), (Put(at + "a", b"", lease), Put(at + "b", b"", lease)))
    )
    await store.revoke_lease(lease)
    assert [item.key for item in (await store.list(at)).items] == [at + "stays"]
    gone = await take(store, at, last + 1, 2)
    assert sorted(event.key for event in gone) == [at + "a", at + "b"]
    assert all(event.value is None for event in gone)
    await store.revoke_lease(lease)  # a second time is no error


async def test_rewriting_without_the_lease_frees_a_key(store: Datastore, at: str) -> None:
    """A key last written without a lease outlives the lease it once had."""
    lease = await store.grant_lease(60)
    await store.commit(Transaction((), (Put(at + "a", b"1", lease),)))
    await put(store, at + "a", b"2")
    await store.revoke_lease(lease)
    assert await store.get(at + "a") is not None


async def test_writing_under_a_lost_lease(store: Datastore, at: str) -> None:
    """A put under a lease that is gone raises LeaseLost and writes nothing."""
    lease = await store.grant_lease(60)
    await store.revoke_lease(lease)
    with pytest.raises(LeaseLost):
        await store.commit(Transaction((), (Put(at + "a", b"1", lease), Put(at + "b", b""))))
    assert (await store.list(at)).items == ()
