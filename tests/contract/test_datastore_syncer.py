"""The syncer on both adapters: what a daemon hears, and when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cymric.datastore.api import (
    Compacted,
    Datastore,
    Delete,
    KeyValue,
    Listing,
    Put,
    Transaction,
    WatchEvent,
    delete,
    put,
)
from cymric.datastore.memory import MemoryDatastore
from cymric.datastore.syncer import UNREADABLE, Gathered, Syncer, Update, difference
from cymric.model import codec
from cymric.model.ipam import AllocationHandle, IPAMConfig
from cymric.model.keys import HANDLES, IPAM_CONFIG, RESOURCES, HandleKey, IPAMConfigKey
from tests.support.datastore import client
from tests.support.etcd import EtcdServer
from tests.support.eventually import eventually

CONFIG = b'{"strict_affinity":true}'


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Datastore]:
    """An empty datastore."""
    if request.param == "memory":
        yield MemoryDatastore()
        return
    server: EtcdServer = request.getfixturevalue("etcd_server")
    server.etcdctl("del", "--prefix", "/calico/")
    async with client(server.endpoint) as etcd:
        yield etcd


@dataclass
class Told:
    """What a syncer told, in order; `known` is the picture a daemon has from it."""

    log: list[Update | str] = field(default_factory=list)
    batches: list[tuple[Update, ...]] = field(default_factory=list)
    known: dict[object, object] = field(default_factory=dict)

    def on_updates(self, updates: Sequence[Update]) -> None:
        """As a daemon's call-back: note what came, keep the picture."""
        self.log += updates
        self.batches.append(tuple(updates))
        for update in updates:
            if update.value is None:
                self.known.pop(update.key, None)
            else:
                self.known[update.key] = update.value

    def on_in_sync(self) -> None:
        """As a daemon's call-back."""
        self.log.append("in sync")

    @property
    def is_in_sync(self) -> bool:
        """Whether the mark came."""
        return "in sync" in self.log


@asynccontextmanager
async def syncing(store: Datastore, *prefixes: str) -> AsyncIterator[Told]:
    """Run a syncer for as long as the block lasts."""
    told = Told()
    syncer = Syncer(store, prefixes, told.on_updates, told.on_in_sync)
    task = asyncio.create_task(syncer.run())
    try:
        yield told
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def handle(number: int) -> HandleKey:
    """The key of a handle."""
    return HandleKey(f"k8s-pod-network.{number}")


def handle_value(number: int) -> bytes:
    """What is stored at it."""
    return b'{"handleID":"k8s-pod-network.%d","block":{"198.19.16.0-26":1}}' % number


async def test_the_whole_picture_then_one_mark(store: Datastore) -> None:
    """What exists at the start is told before the in-sync mark, which comes once."""
    await put(store, IPAM_CONFIG, CONFIG)
    for number in range(3):
        await put(store, str(handle(number)), handle_value(number))
    async with syncing(store, HANDLES, IPAM_CONFIG) as told:
        await eventually(lambda: told.is_in_sync)
        assert told.log[-1] == "in sync"
        assert set(told.known) == {IPAMConfigKey(), *map(handle, range(3))}
        assert isinstance(told.known[IPAMConfigKey()], IPAMConfig)
        assert isinstance(told.known[handle(0)], AllocationHandle)
        await put(store, str(handle(7)), handle_value(7))
        await eventually(lambda: handle(7) in told.known)
        assert told.log.count("in sync") == 1


async def test_an_empty_datastore_is_in_sync(store: Datastore) -> None:
    """Nothing to tell is no reason to wait: the mark comes at once, and no empty batch."""
    async with syncing(store, HANDLES, IPAM_CONFIG) as told:
        await eventually(lambda: told.is_in_sync)
        assert told.log == ["in sync"]


async def test_every_change_in_order(store: Datastore) -> None:
    """Writes and deletions arrive in their order; no later one overtakes an earlier one."""
    async with syncing(store, HANDLES) as told:
        await eventually(lambda: told.is_in_sync)
        for number in range(20):
            await put(store, str(handle(number)), handle_value(number))
        for number in range(20):
            await delete(store, str(handle(number)))
        await eventually(lambda: len(told.log) == 41)
    heard = [update.key for update in told.log if isinstance(update, Update)]
    assert heard == [*map(handle, range(20)), *map(handle, range(20))]
    assert told.known == {}


async def test_a_transaction_stays_together(store: Datastore) -> None:
    """Keys written in one transaction under one prefix are told in one batch."""
    async with syncing(store, HANDLES) as told:
        await eventually(lambda: told.is_in_sync)
        puts = [Put(str(handle(number)), handle_value(number)) for number in range(30)]
        await store.commit(Transaction((), puts))
        await eventually(lambda: len(told.known) == 30)
    assert len(told.batches) == 1


async def test_a_slow_consumer_is_told_the_last_word(store: Datastore) -> None:
    """Two thousand changes of fifty keys come while it works: it hears each key's last value, and
    far from all that were between.
    """
    rounds, keys = 40, 50
    told = Told()

    def work(updates: Sequence[Update]) -> None:
        told.on_updates(updates)
        time.sleep(0.03)  # nothing else of the loop runs meanwhile

    syncer = Syncer(store, [HANDLES], work, told.on_in_sync)
    task = asyncio.create_task(syncer.run())
    try:
        await eventually(lambda: told.is_in_sync)
        for number in range(1, rounds + 1):
            puts = [Put(str(handle(key)), handle_value(number)) for key in range(keys)]
            await store.commit(Transaction((), puts))
        last = decode_value(handle_value(rounds))
        await eventually(lambda: list(told.known.values()) == [last] * keys, 30)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert len(told.log) < rounds * keys


def decode_value(value: bytes) -> object:
    """What a handle's value means."""
    decoded = codec.decode(str(handle(0)), value)
    assert decoded is not None
    return decoded[1]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 9)))),
    st.lists(st.integers(1, 4)),
)
def test_gathered_events_end_alike(changes: list[tuple[int, int | None]], sizes: list[int]) -> None:
    """However events are gathered: each key once, its last value, in the order of these."""
    events = [
        WatchEvent(f"/{key}", None if value is None else b"%d" % value, revision)
        for revision, (key, value) in enumerate(changes, start=1)
    ]
    gathered, left = Gathered(), list(events)
    for size in (*sizes, len(events)):
        gathered.add(left[:size])
        del left[:size]
    found = gathered.take()
    assert [event.revision for event in found] == sorted(
        {event.key: event.revision for event in events}.values()
    )
    assert gathered.take() == []


async def test_an_unreadable_value_is_absent(store: Datastore) -> None:
    """A value that does not parse is told as gone, counted, and never stops the rest."""
    await put(store, str(handle(1)), b"{broken")
    before = UNREADABLE._value.get()
    async with syncing(store, HANDLES) as told:
        await eventually(lambda: told.is_in_sync)
        assert told.log == [Update(handle(1), None), "in sync"]
        await put(store, str(handle(1)), handle_value(1))
        await eventually(lambda: handle(1) in told.known)
        await put(store, str(handle(1)), b"{broken again")
        await eventually(lambda: handle(1) not in told.known)
        await put(store, str(handle(2)), handle_value(2))
        await eventually(lambda: handle(2) in told.known)
    assert UNREADABLE._value.get() == before + 2


async def test_broken_and_foreign_keys_are_passed_over(store: Datastore) -> None:
    """A key of no kind we know, or of an impossible form, brings no update."""
    await put(store, RESOURCES + "unheardof/x", b"{}")
    await put(store, HANDLES + "too/deep", b"{}")
    await put(store, str(handle(1)), handle_value(1))
    async with syncing(store, HANDLES, RESOURCES) as told:
        await eventually(lambda: told.is_in_sync)
        assert set(told.known) == {handle(1)}
        await delete(store, HANDLES + "too/deep")
        await delete(store, str(handle(1)))
        await eventually(lambda: not told.known)
        assert len(told.log) == 3


async def test_overlapping_prefixes_are_refused() -> None:
    """A prefix inside another would tell everything twice, so it is a mistake."""
    with pytest.raises(ValueError, match="overlap"):
        Syncer(MemoryDatastore(), ["/calico/ipam/", "/calico/"], print, print)


async def test_a_bug_in_a_callback_ends_the_daemon() -> None:
    """An exception of the consumer is a bug: it ends `run` instead of being lost."""
    store = MemoryDatastore()
    await put(store, IPAM_CONFIG, CONFIG)

    def on_updates(updates: Sequence[Update]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        await Syncer(store, [IPAM_CONFIG], on_updates, lambda: None).run()
    assert caught.group_contains(ZeroDivisionError)


class LosesHistory(MemoryDatastore):
    """Watches that end with Compacted whenever the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = 0
        self._losses: list[Callable[[], None]] = []

    async def list(self, prefix: str) -> Listing:
        """Count, and list."""
        self.listed += 1
        return await super().list(prefix)

    async def watch(self, prefix: str, *, start_revision: int):  # type: ignore[no-untyped-def]
        """Tell nothing until `lose`."""
        lost = asyncio.get_running_loop().create_future()
        self._losses.append(lambda: lost.done() or lost.set_result(None))
        await lost
        raise Compacted(1)
        yield ()

    def lose(self) -> None:
        """End all watches."""
        for loss in self._losses:
            loss()
        self._losses.clear()


async def test_after_lost_history_only_the_difference_is_told() -> None:
    """Listed again: what vanished is told gone, what changed anew, what stayed not at all."""
    store = LosesHistory()
    for number in range(4):
        await put(store, str(handle(number)), handle_value(number))
    async with syncing(store, HANDLES) as told:
        await eventually(lambda: told.is_in_sync)
        told.log.clear()
        await delete(store, str(handle(0)))
        await put(store, str(handle(1)), b'{"handleID":"k8s-pod-network.1","block":{}}')
        await put(store, str(handle(2)), handle_value(2))  # the same again
        await put(store, str(handle(9)), handle_value(9))
        store.lose()
        await eventually(lambda: len(told.log) == 3)
        assert {update.key for update in told.log if isinstance(update, Update)} == {
            handle(0),
            handle(1),
            handle(9),
        }
        assert set(told.known) == {handle(1), handle(2), handle(3), handle(9)}


async def test_one_prefix_that_lost_history_leaves_the_others_alone() -> None:
    """Only the prefix whose watch ended is listed again, and in sync is said only once."""
    store = LosesHistory()
    async with syncing(store, HANDLES, IPAM_CONFIG) as told:
        await eventually(lambda: told.is_in_sync)
        assert store.listed == 2
        store.lose()
        await eventually(lambda: store.listed == 4)
        assert told.log == ["in sync"]


async def test_a_storm_of_lost_history_is_paced() -> None:
    """Watches that end at once again and again are reopened ever more slowly."""

    class AlwaysLoses(LosesHistory):
        async def watch(self, prefix: str, *, start_revision: int):  # type: ignore[no-untyped-def]
            """End at once."""
            raise Compacted(1)
            yield ()

    store = AlwaysLoses()
    async with syncing(store, HANDLES):
        await eventually(lambda: store.listed == 3)
        before = asyncio.get_running_loop().time()
        await eventually(lambda: store.listed == 5)
        assert asyncio.get_running_loop().time() - before > 0.5


async def test_waiting_for_a_datastore_that_is_down() -> None:
    """Started before the datastore, the syncer waits for it and says nothing until it is there."""
    store = MemoryDatastore()
    await put(store, IPAM_CONFIG, CONFIG)
    store.go_down()
    async with syncing(store, IPAM_CONFIG) as told:
        for _ in range(20):
            await asyncio.sleep(0)
        assert told.log == []
        store.come_up()
        await eventually(lambda: told.is_in_sync)
        assert len(told.known) == 1


async def test_an_outage_tells_nothing() -> None:
    """While the datastore is away, what is known stays; afterwards only news is told."""
    store = MemoryDatastore()
    await put(store, IPAM_CONFIG, CONFIG)
    async with syncing(store, IPAM_CONFIG, HANDLES) as told:
        await eventually(lambda: told.is_in_sync)
        told.log.clear()
        store.go_down()
        for _ in range(20):
            await asyncio.sleep(0)
        store.come_up()
        await put(store, str(handle(1)), handle_value(1))
        await eventually(lambda: told.log)
        assert [update.key for update in told.log if isinstance(update, Update)] == [handle(1)]


async def test_a_wiped_datastore_takes_everything_back() -> None:
    """After a wipe, everything that is not there any more is told gone, revisions or not."""
    store = MemoryDatastore()
    for number in range(3):
        await put(store, str(handle(number)), handle_value(number))
    async with syncing(store, HANDLES) as told:
        await eventually(lambda: len(told.known) == 3)
        store.wipe()
        await put(store, str(handle(1)), b'{"handleID":"k8s-pod-network.1","block":{}}')
        await put(store, str(handle(2)), handle_value(2))
        await eventually(lambda: set(told.known) == {handle(1), handle(2)})


keys = st.sampled_from([str(handle(number)) for number in range(6)])
pictures = st.dictionaries(keys, st.binary(max_size=2))


@given(pictures, pictures)
def test_a_difference_leads_from_one_picture_to_the_other(
    before: dict[str, bytes], after: dict[str, bytes]
) -> None:
    """Applied to the old picture, a difference gives the new one; told again, it is empty."""
    seen: dict[str, int] = {}
    picture: dict[str, bytes] = {}
    for target in (before, after):
        items = tuple(KeyValue(key, value, 5) for key, value in sorted(target.items()))
        listing = Listing(items, 9)
        events = difference(seen, listing)
        assert len({event.key for event in events}) == len(events)
        for event in events:
            assert picture.get(event.key) != event.value, "only differences are told"
            if event.value is None:
                del picture[event.key]
            else:
                picture[event.key] = event.value
        assert picture == target
        assert difference(seen, listing) == []


@pytest.mark.parametrize("seed", range(3))
async def test_random_work_ends_in_the_same_picture(store: Datastore, seed: int) -> None:
    """However writes are batched, a daemon ends up knowing exactly what is stored."""
    import random

    chance = random.Random(seed)
    async with syncing(store, HANDLES) as told:
        for _ in range(60):
            numbers = chance.sample(range(8), chance.randint(1, 3))
            await store.commit(
                Transaction(
                    (),
                    [
                        Delete(str(handle(n)))
                        if chance.random() < 0.4
                        else Put(str(handle(n)), handle_value(n))
                        for n in numbers
                    ],
                )
            )
        stored = {item.key for item in (await store.list(HANDLES)).items}
        await eventually(lambda: {str(key) for key in told.known} == stored)
