"""The wiring of bgpd: which parts there are, and what wakes which.

    etcd ─▶ Syncer ─▶ Router.on_updates ─┐ kick
    relay ◀▶ ExaBGPSpeaker ─▶ on_event ──┴─▶ Router.work ─┬─▶ Speaker.advertise, expect_sessions
                                                          └─▶ Fib.kick ─▶ Routes.apply ─▶ kernel
    bgpd.sock, bird.ctl ─▶ Questions (status, routes, why; BIRD's rows)

Every loop is level-triggered: a kick says that something changed, the woken reads the latest state.
The speaker is listened to only after the datastore was seen whole; ExaBGP and its relay go on by
themselves meanwhile. When bgpd stops, sessions and kernel routes stay as they are.
"""

from __future__ import annotations

import asyncio

import structlog

from bgpd.bird_socket import serve_bird
from bgpd.exabgp import ExaBGPSpeaker
from bgpd.fib import Fib
from bgpd.router import Router
from bgpd.session_log import SessionLog
from bgpd.speaker import Speaker
from bgpd.status import Questions, serve_questions
from bgpd.view import prefixes
from cymric.datastore.api import Datastore
from cymric.datastore.etcd import open_datastore
from cymric.datastore.syncer import Syncer
from cymric.kernel.api import Routes
from cymric.kernel.routes import RouteTable
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
    speaker = ExaBGPSpeaker(settings.speaker_socket, settings.exabgp_config)
    async with open_datastore(settings) as store, RouteTable() as routes:
        await run(settings, health, store, speaker, routes)


async def run(
    settings: Settings, health: Health, store: Datastore, speaker: Speaker, routes: Routes
) -> None:
    """Run on any datastore, speaker and kernel until cancelled."""
    health.expect(IN_SYNC, KERNEL)
    in_sync = asyncio.Event()
    router = Router(settings.node_name, speaker, on_routes_changed=lambda: fib.kick())
    fib = Fib(routes, router.wanted_in_kernel, on_applied=lambda: health.set_ready(KERNEL))
    sessions = SessionLog()
    questions = Questions(router, speaker, fib, sessions)

    def on_in_sync() -> None:
        health.set_ready(IN_SYNC)
        router.on_in_sync()
        router.work()  # sessions and policy are known before the speaker says its first word
        in_sync.set()

    async def listen() -> None:
        await in_sync.wait()
        async for event in speaker.events():
            sessions.note(event)
            router.on_event(event)

    async def speak() -> None:
        await in_sync.wait()
        await speaker.run()

    syncer = Syncer(store, prefixes(settings.node_name), router.on_updates, on_in_sync)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(syncer.run(), name="syncer")
        tasks.create_task(speak(), name="speaker")
        tasks.create_task(listen(), name="listen")
        tasks.create_task(router.run(), name="router")
        tasks.create_task(fib.run(), name="fib")
        tasks.create_task(questions.measure(), name="measure")
        answering = serve_questions(settings.bgpd_socket, questions.answer)
        tasks.create_task(answering, name="questions")
        if (directory := settings.bird_directory) is not None:
            names = settings.bears_calico_names
            bird = serve_bird(directory, questions.bird_rows, questions.bird, bears_names=names)
            tasks.create_task(bird, name="bird's sockets")


if __name__ == "__main__":
    main()
