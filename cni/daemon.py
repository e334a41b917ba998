"""cnid: the node's agent behind the CNI executables.

    cymric-cni ──▶ socket ──▶ request ──▶ agent ──▶ ipam ──▶ etcd
                                            ├─────▶ wiring ──▶ veth pair
                                            ├─────▶ WorkloadEndpoint ──▶ etcd ──▶ felix
                                            ├─────▶ the same by felix' socket
                                            └◀───── status file ◀── felix
    etcd ──▶ syncer ──▶ allocator (pools, settings), cluster (locked or not)

Restart: everything needed is in the datastore, the kernel and the journal. A new process undoes
what the journal says was left unfinished, and answers calls from the first moment.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import structlog
from prometheus_client import Histogram

from cni import request, result
from cni.addresses import Addresses
from cni.agent import Agent
from cni.cluster import Cluster
from cni.collect import Collector, Reporter
from cni.errors import CniError, Code, try_again
from cni.hint import FelixHint
from cni.journal import Journal
from cni.request import Call, Command, NodeCall, Request
from cni.server import Answer
from cni.server import serve as serve_socket
from cni.status import StatusDirectory
from cni.stored import Endpoints
from cni.sweep import EVERY_S, Sweeper
from cni.unread import Unread
from cni.waiting import Waiting
from cni.wiring import LinuxWiring
from cymric.datastore.api import DatastoreError
from cymric.datastore.etcd import open_datastore
from cymric.datastore.syncer import Syncer, Update
from cymric.kernel.command import HostCommands
from cymric.kernel.host_routes import HostRoutes
from cymric.model.codec import Malformed
from cymric.runtime.daemon import run_daemon
from cymric.runtime.health import Health
from cymric.runtime.pacing import Backoff
from cymric.runtime.settings import Settings
from ipam.allocator import Allocator
from ipam.collect import Collector as UnusedAddresses
from ipam.errors import AddressRefused, Contended, IPAMError, NoAddress

CALL_TIMEOUT_S = 45.0
"""The longest any call may take, waiting for others included; the executables wait 60 s."""
LEFTOVERS_PAUSE_S, LEFTOVERS_LONGEST_PAUSE_S = 1.0, 10.0

CALLS = Histogram(
    "cymric_cni_call_seconds",
    "Time to answer a CNI call, by command and outcome (0 or the error's code)",
    ["command", "code"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Answering:
    """Who answers which command."""

    agent: Agent
    collector: Collector
    reporter: Reporter
    unread: Unread


def main() -> NoReturn:
    """The console script."""
    run_daemon("cnid", serve)


async def serve(settings: Settings, health: Health) -> None:
    """Answer CNI calls until cancelled."""
    health.expect("socket", "datastore", "leftovers undone")
    store = open_datastore(settings)
    routes = HostRoutes()
    unused = UnusedAddresses(settings.node_name, grace_s=settings.ipam_leak_grace_s)
    allocator = Allocator(
        store,
        settings.node_name,
        is_routed=routes.leads_to_link,
        on_block=unused.on_block,
        ahead_part=settings.ipam_ahead_part,
        idle_s=settings.ipam_idle_s,
    )
    cluster = Cluster()
    status = StatusDirectory(settings.endpoint_status_dir)
    status.start()
    hint = FelixHint(settings.run_dir / "felix.sock")
    wiring, commands = LinuxWiring(), HostCommands()
    waiting = Waiting(status, wiring, hint, settings.policy_setup_timeout_s)
    endpoints = Endpoints(store, settings.node_name)
    directory = Path(settings.state_dir) / "cni"
    journal, lent = Journal(directory / "unfinished"), Journal(directory / "lent")
    agent = Agent(
        node=settings.node_name,
        endpoints=endpoints,
        addresses=Addresses(settings.node_name, allocator, commands),
        cluster=cluster,
        wiring=wiring,
        journal=journal,
        lent=lent,
        waiting=waiting,
        status=status,
        hint=hint,
        mtu_file=Path(settings.state_dir) / "mtu",
    )
    answering = Answering(
        agent,
        Collector(settings.node_name, store, endpoints, agent, commands),
        Reporter(store, cluster, waiting, commands),
        Unread(),
    )

    sweeper = Sweeper(endpoints, journal, lent, unused, allocator, routes.leads_to_link)

    def on_updates(updates: Sequence[Update]) -> None:
        allocator.on_updates(updates)
        cluster.on_updates(updates)

    def on_in_sync() -> None:
        allocator.on_in_sync()
        cluster.on_in_sync()
        health.set_ready("datastore")

    syncer = Syncer(store, (*allocator.prefixes, cluster.prefix), on_updates, on_in_sync)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(syncer.run(), name="syncer")
            tasks.create_task(allocator.run(), name="allocator")
            tasks.create_task(hint.run(), name="felix hint")
            tasks.create_task(_serve_socket(settings.cni_socket, answering, health), name="socket")
            tasks.create_task(_undo_leftovers(agent, health), name="leftovers")
            tasks.create_task(_sweep(sweeper), name="sweep")
    finally:
        status.close()
        routes.close()
        await store.close()


async def _serve_socket(path: Path, answering: Answering, health: Health) -> None:
    async def answer_one(asked: Request) -> Answer:
        return await answer(answering, asked)

    health.set_ready("socket")
    await serve_socket(path, answer_one)


async def _undo_leftovers(agent: Agent, health: Health) -> None:
    pauses = Backoff(LEFTOVERS_PAUSE_S, LEFTOVERS_LONGEST_PAUSE_S)
    while True:
        is_clean = await agent.undo_leftovers()
        health.set_ready("leftovers undone", is_ready=is_clean)
        if is_clean:
            pauses.succeeded()
        await asyncio.sleep(LEFTOVERS_PAUSE_S if is_clean else pauses.next_s())


async def _sweep(sweeper: Sweeper) -> None:
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            await sweeper.sweep()
        except (DatastoreError, IPAMError) as error:
            log.warning("unused addresses not looked for", why=str(error))


async def answer(answering: Answering, asked: Request) -> Answer:
    """Exit code and output for one request; every failure becomes a CNI error."""
    began = time.monotonic()
    command, code = "unknown", 0
    try:
        call = request.parse(asked)
        command = call.command.value
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return 0, await _dispatch(answering, call)
    except Exception as raised:
        error = as_cni_error(raised)
        code = int(error.code)
        if error.code == Code.INTERNAL:
            log.exception("call failed", command=command)
        else:
            log.warning("call failed", command=command, code=code, why=str(error))
        return 1, result.of_error(request.version_of(asked.raw_config), error)
    finally:
        CALLS.labels(command, str(code)).observe(time.monotonic() - began)


async def _dispatch(answering: Answering, call: Call | NodeCall) -> bytes:
    match call:
        case NodeCall(command=Command.GC):
            return await answering.collector.collect(call)
        case NodeCall():
            return await answering.reporter.status(call)
        case Call(command=Command.ADD):
            answering.unread.look(call)
            return await answering.agent.add(call)
        case Call(command=Command.DEL):
            return await answering.agent.delete(call)
        case Call():
            return await answering.agent.check(call)


def as_cni_error(error: Exception) -> CniError:
    """What the runtime is told about a failure."""
    match error:
        case CniError():
            return error
        case Contended():
            return try_again("the address pools are too busy", str(error))
        case NoAddress() | AddressRefused() | IPAMError():
            return CniError(Code.NO_ADDRESS, "no address can be assigned", str(error))
        case DatastoreError():
            text = f"{type(error).__name__} {error}".strip()
            return try_again("the datastore does not answer as it should", text)
        case Malformed():
            return CniError(Code.INTERNAL, "a stored value cannot be read", str(error))
        case TimeoutError():
            return try_again(f"the call took longer than {CALL_TIMEOUT_S:g} s")
        case OSError():
            return CniError(Code.WIRING_FAILED, "the network could not be set up", str(error))
        case _:
            return CniError(Code.INTERNAL, "an error inside cnid", repr(error))
