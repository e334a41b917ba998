"""The wiring of bgpd: which parts there are, and what wakes which.

    etcd ─▶ Syncer ─▶ Router.on_updates ──┐ kick
    BFD process ◀▶ Bfd ─▶ on_path_failed ─┤
    kernel ─▶ UnderlayWatch ─▶ on_underlay┤
    relay ◀▶ ExaBGPSpeaker ─▶ on_event ───┴─▶ Router.work ─┬─▶ Outgoing ─▶ Speaker.advertise
                                                           ├─▶ Speaker.expect_sessions
                                                           └─▶ Fib.kick ─▶ Routes.apply ─▶ kernel
    bgpd.sock, bird.ctl ─▶ Questions (status, routes, why; BIRD's rows)

Every loop is level-triggered: a kick says that something changed, the woken reads the latest state.
The speaker is listened to only after the datastore was seen whole; ExaBGP and its relay go on by
themselves meanwhile. When bgpd stops, sessions and kernel routes stay as they are.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import structlog

from bgpd.bfd.client import Bfd, watched
from bgpd.bird_socket import serve_bird
from bgpd.drain import STATUS_ANNOTATION, Role, Wish, wish
from bgpd.drain_status import DrainStatus
from bgpd.exabgp import ExaBGPSpeaker
from bgpd.fib import Fib
from bgpd.outgoing import Outgoing, Sight
from bgpd.router import Router
from bgpd.session_log import SessionLog
from bgpd.speaker import Speaker
from bgpd.status import Questions, bfd_words, serve_questions
from bgpd.tcp_view import PROC_NET
from bgpd.underlay_watch import UnderlayWatch
from bgpd.view import prefixes
from cymric.datastore.api import Datastore
from cymric.datastore.etcd import open_datastore
from cymric.datastore.syncer import Syncer
from cymric.kernel.api import Routes
from cymric.kernel.routes import RouteTable
from cymric.kernel.underlay import KernelUnderlay, Underlay
from cymric.model.net import contains, host_network
from cymric.model.prefix import prefix as to_prefix
from cymric.runtime.daemon import run_daemon
from cymric.runtime.health import Health
from cymric.runtime.settings import Settings

log = structlog.get_logger()

IN_SYNC, KERNEL = "datastore in sync", "kernel routes written"


def main() -> None:
    """The console script `cymric-bgpd`."""
    run_daemon("bgpd", serve)


async def serve(settings: Settings, health: Health) -> None:
    """Run on the real datastore, speaker and kernel until cancelled."""
    # A full table is a million live objects and hardly a cycle: the default, which walks them all
    # at every few thousand new ones, doubles the cost of a received route.
    gc.set_threshold(50_000, 50, 50)
    speaker = ExaBGPSpeaker(settings.speaker_socket, settings.exabgp_config)
    async with open_datastore(settings) as store, RouteTable() as routes:
        with closing(KernelUnderlay()) as underlay:
            await run(settings, health, store, speaker, routes, underlay=underlay)


async def run(
    settings: Settings,
    health: Health,
    store: Datastore,
    speaker: Speaker,
    routes: Routes,
    *,
    underlay: Underlay | None = None,
    bfd_command: Sequence[str] | None = None,
    proc_net: Path = PROC_NET,
) -> None:
    """Run on any datastore, speaker and kernel until cancelled.

    Without `underlay` every next hop is taken to be on-link. `bfd_command` starts the BFD process,
    if not with our interpreter and where we are. `proc_net`: what the kernel tells of TCP
    where the speaker is.
    """
    health.expect(IN_SYNC, KERNEL)
    in_sync = asyncio.Event()
    outgoing = Outgoing(
        speaker.advertise,
        advertise_changes=speaker.advertise_changes,
        role=lambda prefix: role_of(router, prefix),
        is_empty=lambda prefix: is_empty(router, prefix),
    )
    router = Router(
        settings.node_name,
        speaker,
        on_routes_changed=lambda: fib.kick(),
        tell=outgoing.want,
        tell_changes=outgoing.want_changes,
        on_sessions=lambda wanted: bfd.expect(watched(wanted)),
    )
    bfd = Bfd(settings.run_dir / "bfd.sock", router.on_path_failed, command=bfd_command)
    fib = Fib(routes, router.wanted_in_kernel, on_applied=lambda: health.set_ready(KERNEL))
    watch = UnderlayWatch(underlay, router.resolver, router.on_underlay, fib.doubt)
    sessions = SessionLog()
    questions = Questions(router, speaker, fib, sessions, outgoing, proc_net=proc_net)
    questions.bfd = lambda: bfd_words(bfd.sessions())
    drain_status = DrainStatus(store, settings.node_name)

    def on_in_sync() -> None:
        health.set_ready(IN_SYNC)
        router.on_in_sync()
        router.work()  # sessions and policy are known before the speaker says its first word
        in_sync.set()

    async def listen() -> None:
        await in_sync.wait()
        await watch.ready.wait()
        async for event in speaker.events():
            sessions.note(event)
            router.on_event(event)

    async def speak() -> None:
        await in_sync.wait()
        await speaker.run()

    async def announce() -> None:
        await in_sync.wait()
        await outgoing.run(settings, sight, drain_status.tell)

    def sight() -> Sight:
        outgoing.keep(router.sessions)
        sessions.keep(router.sessions)
        return sight_of(router, speaker, is_draining=outgoing.drain.is_active)

    syncer = Syncer(store, prefixes(settings.node_name), router.on_updates, on_in_sync)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(syncer.run(), name="syncer")
        tasks.create_task(speak(), name="speaker")
        tasks.create_task(listen(), name="listen")
        tasks.create_task(router.run(), name="router")
        tasks.create_task(announce(), name="announce")
        tasks.create_task(drain_status.run(), name="drain status")
        tasks.create_task(watch.run(), name="underlay")
        tasks.create_task(fib.run(), name="fib")
        tasks.create_task(bfd.run(), name="bfd")
        tasks.create_task(questions.measure(), name="measure")
        answering = serve_questions(settings.bgpd_socket, questions.answer)
        tasks.create_task(answering, name="questions")
        if (directory := settings.bird_directory) is not None:
            names = settings.bears_calico_names
            bird = serve_bird(directory, questions.bird_rows, questions.bird, bears_names=names)
            tasks.create_task(bird, name="bird's sockets")


_ROLE_BY_WHY = {
    "OWN_BLOCK": Role.BLOCK,
    "WORKLOAD": Role.ADDRESS,
    "FOREIGN": Role.ADDRESS,
    "SERVICE_RANGE": Role.SERVICE,
    "SERVICE": Role.SERVICE,
}


def role_of(router: Router, prefix: str) -> Role:
    """What a prefix that we advertise is to this node; what we do not originate is passed on."""
    why = router.advertising.get(to_prefix(prefix))
    return Role.PASSED_ON if why is None else _ROLE_BY_WHY[why.name]


def is_empty(router: Router, prefix: str) -> bool:
    """Whether no workload of this node has an address in the prefix."""
    network = to_prefix(prefix)
    return not any(
        contains(network, host_network(address))
        for endpoint in router.view.endpoints.values()
        for address in endpoint.spec.addresses
    )


def sight_of(router: Router, speaker: Speaker, *, is_draining: bool) -> Sight:
    """What the drain looks at. What peers were told is counted only when it matters."""
    node = router.view.nodes.get(router.view.node)
    complaint = ""
    try:
        wanted = Wish.NONE if node is None else wish(node.annotations)
    except ValueError as error:
        wanted, complaint = Wish.NONE, str(error)
    told: dict[str, tuple[int, int]] = {}
    if is_draining:
        proofs = speaker.proof()
        for peer in router.up.keys() & router.sessions.keys():
            proof = proofs.get(peer)
            told[peer] = (1, 0) if proof is None else (proof.desired, proof.confirmed)
    stored = "" if node is None else node.annotations.get(STATUS_ANNOTATION, "")
    return Sight(wish=wanted, told_by_peer=told, complaint=complaint, stored=stored)


if __name__ == "__main__":
    main()
