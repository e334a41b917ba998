"""What one received route costs bgpd, without ExaBGP: events in, routes in a real kernel.

Microseconds of CPU per route, by stage, for 100,000 routes in UPDATEs of 200 and for 10,000 routes
of which each has its own attributes. Everything runs in one process; texts are parsed by whoever
reads ExaBGP, so the events are made before the clock starts.

`python -m bench.router` as root. It makes one namespace `cybr-*` and removes it.
"""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from bgpd.announcement import IPV4_UNICAST, Announcement, PathAttributes, as_sequence
from bgpd.fake_speaker import FakeSpeaker
from bgpd.fib import Fib
from bgpd.router import Router
from bgpd.speaker import RoutesReceived, SessionUp, SpeakerConnected
from bgpd.view import prefixes as watched
from cymric.datastore.memory import MemoryDatastore
from cymric.datastore.syncer import Syncer
from cymric.kernel.namespace import opened, visiting
from cymric.kernel.routes import RouteTable
from tests.support.routing import node, peer, pool, store

OURS, ROUTER, ROUTER_ASN = "198.19.8.1", "198.19.8.9", 64900
PER_UPDATE = 200
UPDATES_PER_TURN = 20
"""How many UPDATEs the daemon reads between two rounds of work, as seen with ExaBGP."""


def events(count: int, *, own_attributes: bool) -> list[RoutesReceived]:
    """What a speaker tells about `count` routes."""
    prefixes = [f"10.{64 + n // 1024}.{n // 4 % 256}.{n % 4 * 64}/26" for n in range(count)]
    path = as_sequence(ROUTER_ASN)
    if own_attributes:
        return [
            RoutesReceived(
                ROUTER, (Announcement(one, ROUTER, PathAttributes(as_path=path, med=n)),)
            )
            for n, one in enumerate(prefixes)
        ]
    told = []
    for start in range(0, count, PER_UPDATE):
        attributes = PathAttributes(as_path=path)
        told.append(
            RoutesReceived(
                ROUTER,
                tuple(Announcement(p, ROUTER, attributes) for p in prefixes[start:][:PER_UPDATE]),
            )
        )
    return told


async def measure(count: int, *, own_attributes: bool) -> dict[str, float]:
    """Microseconds of CPU per route, by stage."""
    with _namespace() as routes:
        router = Router("us", FakeSpeaker())
        await _fill(router)
        fib = Fib(routes, router.wanted_in_kernel)
        told = events(count, own_attributes=own_attributes)
        spent: dict[str, float] = dict.fromkeys(("receive", "settle", "kernel"), 0.0)
        per_turn = UPDATES_PER_TURN * (PER_UPDATE if own_attributes else 1)
        for start in range(0, count, per_turn):
            if start >= len(told):
                break
            with _timed(spent, "receive"):
                for event in told[start : start + per_turn]:
                    router.on_event(event)
            with _timed(spent, "settle"):
                router.work()
            if start // per_turn % 5 == 4:
                with _timed(spent, "kernel"):
                    await _apply(fib)
        with _timed(spent, "kernel"):
            await _apply(fib)
        assert fib.installed == count, fib.installed
        routes.close()
    return {stage: seconds / count * 1e6 for stage, seconds in spent.items()}


async def _apply(fib: Fib) -> None:
    wanted = fib._wanted()
    assert wanted is not None
    await fib._apply(wanted)


async def _fill(router: Router) -> None:
    datastore = MemoryDatastore()
    await store(datastore, node("us", f"{OURS}/20"), peer(ROUTER, ROUTER_ASN))
    await store(datastore, pool("10.0.0.0/8"))
    in_sync = asyncio.Event()
    syncer = Syncer(datastore, watched("us"), router.on_updates, in_sync.set)
    task = asyncio.create_task(syncer.run())
    await in_sync.wait()
    task.cancel()
    router.on_in_sync()
    router.work()
    router.on_event(SpeakerConnected("1", lost_events=False))
    router.on_event(SessionUp(ROUTER, ROUTER_ASN, frozenset({IPV4_UNICAST}), router_id=ROUTER))


@contextmanager
def _timed(spent: dict[str, float], stage: str) -> Iterator[None]:
    started = time.process_time()
    yield
    spent[stage] += time.process_time() - started


@contextmanager
def _namespace() -> Iterator[RouteTable]:
    name = f"cybr-{secrets.token_hex(2)}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("netns", "add", name)
    try:
        ip("-n", name, "link", "add", "eth0", "type", "veth", "peer", "name", "far0")
        for device in ("lo", "eth0", "far0"):
            ip("-n", name, "link", "set", device, "up")
        ip("-n", name, "address", "add", f"{OURS}/20", "dev", "eth0")
        with opened(f"/run/netns/{name}") as namespace, visiting(namespace):
            routes = RouteTable()
        yield routes
    finally:
        ip("netns", "del", name)


def main() -> None:
    """Print both rows."""
    for what, count, own_attributes in (
        ("100,000 routes, 200 an UPDATE", 100_000, False),
        ("10,000 routes, each with its own attributes", 10_000, True),
    ):
        spent = asyncio.run(measure(count, own_attributes=own_attributes))
        stages = ", ".join(f"{stage} {us:.1f}" for stage, us in spent.items())
        print(f"{what}: {sum(spent.values()):.1f} us a route ({stages})")


if __name__ == "__main__":
    main()
