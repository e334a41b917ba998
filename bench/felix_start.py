"""What a large cluster costs felix: its start, its memory, one label changed, a storm of changes.

10,000 endpoints, 100 of them here, 1,000 policies with 1,000 selectors; real etcd, real kernel, the
real program (`felix_world.py`). Start is from the process' start until every pod of the node is
complete, on a kernel that knows nothing yet, and again on one that has all of it. The peer is the
least that anybody must do: the same rules, sets and all, by one `ipset restore` and one
`iptables-restore`, read from a file.

A label change is one endpoint's, written to etcd and followed into the sets; its processor time is
that of the process, all of its threads, and of the programs it runs, told apart. The storm are
10,000 changes a second for ten seconds, written to etcd in transactions of 120; afterwards the sets
in the kernel are compared with those calculated from what etcd holds.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import time
from collections.abc import Mapping

from bench import felix_calc
from bench.felix_calc import NAMESPACES, NODE, endpoint
from bench.felix_world import Usage, World, batches, inside, main, world
from bench.row import Row
from cymric.datastore.api import Transaction, put
from cymric.datastore.etcd import EtcdDatastore
from felix.calc.state import Calculation
from felix.dataplane import pools
from felix.ipset.sets import parse
from tests.support.eventually import eventually

CHANGES = 200
PAUSE_S = 0.02
RATE, SECONDS = felix_calc.RATE, felix_calc.SECONDS
QUIET_S = 1.0
MODULE = "bench.felix_start"
BY_HAND = "ipset + iptables-restore by hand"


def measure() -> list[Row]:
    """All rows."""
    return inside(MODULE)


async def measured(*sizes: int) -> list[Row]:
    """All rows, in the namespace we are in."""
    with world(*sizes) as here:
        await here.fill()
        cold_s = here.run_felix()
        cold = here.usage()
        by_hand_s = _by_hand(here)
        here.stop_felix()
        warm_s = here.run_felix()
        size = f"{here.count:,} endpoints, {here.local} local, {here.policies:,} policies"
        rows = [
            Row(
                what=f"felix cold start, {size}, until all is programmed",
                unit="s",
                cymric=cold_s,
                peer_name=BY_HAND,
                peer=by_hand_s,
            ),
            Row(what="felix cold start, its processor time", unit="s", cymric=cold.cpu_s),
            Row(what="felix restart, all is there already", unit="s", cymric=warm_s),
            Row(what="felix memory after cold start", unit="MiB", cymric=cold.rss_mib),
            Row(what="felix memory, peak", unit="MiB", cymric=cold.peak_mib),
        ]
        async with here.client() as store:
            rows += await _single(here, store)
            rows += await _storm(here, store)
        return rows


def _by_hand(here: World) -> float:
    """Seconds to write what is there once more into an empty place: a namespace of its own."""
    rules = here.on_node("iptables-nft-save")
    sets = here.on_node("ipset", "save")
    place = here.namespace("hand")
    here.on_node("ip", "netns", "add", place)
    try:
        began = time.perf_counter()
        for words, text in ((("ipset", "restore"), sets), (("iptables-nft-restore",), rules)):
            subprocess.run(
                ["nsenter", f"--net=/run/netns/{place}", *words],
                input=text.encode(),
                capture_output=True,
                check=True,
            )
        return time.perf_counter() - began
    finally:
        here.on_node("ip", "netns", "del", place)


async def _single(here: World, store: EtcdDatastore) -> list[Row]:
    """One change after the other, of any endpoint."""
    chance = random.Random(1)
    await _quiet(here)
    before = here.usage()
    for number in chance.choices(range(here.local, here.count), k=CHANGES):
        version = f"v{chance.randrange(here.policies)}"
        await put(store, *endpoint(number, here.count, here.local, version))
        await asyncio.sleep(PAUSE_S)
    after = await _quiet(here)
    each_ms = 1000 / CHANGES
    what = "one label change of 10,000 endpoints"
    moved = await _moved(here, store)
    return [
        *moved,
        Row(what=f"{what}, felix", unit="ms CPU", cymric=(after.cpu_s - before.cpu_s) * each_ms),
        Row(
            what=f"{what}, and the programs it runs",
            unit="ms CPU",
            cymric=(after.children_s - before.children_s) * each_ms,
        ),
    ]


async def _moved(here: World, store: EtcdDatastore) -> list[Row]:
    """Changes that take an endpoint out of some sets and put it into others, and back."""
    before = await _quiet(here)
    for number in range(CHANGES // 2):
        chosen = here.count - 1 - number
        key, value = endpoint(chosen, here.count, here.local, "v1")
        label = f'"app":"app{chosen % felix_calc.APPS}"'.encode()
        other = f'"app":"app{(chosen + NAMESPACES) % felix_calc.APPS}"'.encode()
        assert label in value
        for stored in (value.replace(label, other), value):
            await put(store, key, stored)
            await asyncio.sleep(PAUSE_S)
    after = await _quiet(here)
    return [
        Row(
            what="one label change that moves it from 5 sets to 5 others, felix",
            unit="ms CPU",
            cymric=(after.cpu_s - before.cpu_s) * 1000 / CHANGES,
        )
    ]


async def _storm(here: World, store: EtcdDatastore) -> list[Row]:
    """RATE changes a second for SECONDS."""
    chance = random.Random(2)
    changes = [
        endpoint(number, here.count, here.local, f"v{chance.randrange(here.policies)}")
        for number in chance.choices(range(here.count), k=RATE * SECONDS)
    ]
    groups = list(batches(changes))
    before = await _quiet(here)
    began = time.perf_counter()
    done = 0
    for group in groups:
        await store.commit(Transaction((), group))
        done += len(group)
        ahead_s = done / RATE - (time.perf_counter() - began)
        if ahead_s > 0:
            await asyncio.sleep(ahead_s)
    wrote_s = time.perf_counter() - began
    after = await _until_right(here, store)
    right_s = time.perf_counter() - began
    return [
        Row(
            what=f"storm: {done:,} label changes, seconds it took to write them",
            unit="s",
            cymric=wrote_s,
        ),
        Row(
            what="storm: the kernel's sets are right after the last write",
            unit="s",
            cymric=right_s - wrote_s,
        ),
        Row(
            what="storm: felix' processor time a change",
            unit="ms CPU",
            cymric=(after.cpu_s - before.cpu_s) * 1000 / done,
        ),
        Row(
            what="storm: memory grown",
            unit="MiB",
            cymric=after.rss_mib - before.rss_mib,
        ),
    ]


async def _until_right(here: World, store: EtcdDatastore) -> Usage:
    """Until the kernel's sets are those that follow from what is stored."""
    listing = await store.list("/calico/")
    calculation = Calculation(NODE, {})
    felix_calc.feed(calculation, [(item.key, item.value) for item in listing.items])
    wanted = {
        one.name: one.members
        for one in pools.sets(calculation.desired(), {})
        if one.is_policy and one.ip_version == 4
    }
    assert len(wanted) >= here.policies, "the cluster is not the one described"
    await eventually(lambda: _policy_sets(here, wanted) == wanted, 60, what="sets are right")
    return await _quiet(here)


def _policy_sets(here: World, wanted: Mapping[str, object]) -> Mapping[str, frozenset[str]]:
    found = parse(here.on_node("ipset", "save"))
    return {name: one.members for name, one in found.items() if name in wanted}


async def _quiet(here: World) -> Usage:
    """Until felix rests; what it has used by then."""
    usage = here.usage()
    while True:
        await asyncio.sleep(QUIET_S)
        before, usage = usage, here.usage()
        if usage.cpu_s - before.cpu_s < QUIET_S / 20:
            return usage


if __name__ == "__main__":
    main(MODULE, measured, measure)
