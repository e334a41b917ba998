"""Felix: enforces on one node what the datastore says, and knows which endpoints are complete.

    etcd ─ syncer ──┐▶ calculation ─▶ desired ─▶ ┌ sets ────▶ ipset restore
    cnid ─ handoff ─┘                            │ tables ──▶ iptables-restore
    kernel ─ link events ─▶ interfaces ────────▶ │ routes ──▶ netlink
                                                 └ status ──▶ files that cnid waits for

Ready means: in sync with the datastore, and applied once. A restart finds chains by hash, sets by
name and routes by protocol number and interface, and writes only what differs. When it stops, the
data plane stays. Parameters come from FelixConfiguration and FELIX_… (felix/calc/config.py).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from cymric.datastore.api import Datastore
from cymric.datastore.etcd import open_datastore
from cymric.datastore.syncer import Syncer, Update
from cymric.kernel.addresses import AddressEvents, by_interface
from cymric.kernel.command import Commands, HostCommands
from cymric.kernel.conntrack import KernelConnections
from cymric.kernel.netfilter_events import NetfilterEvents
from cymric.kernel.netlink import Netlink
from cymric.kernel.routes import RouteTable
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.keys import Key, ResourceKey, resource_prefix
from cymric.runtime import logs
from cymric.runtime.boot_mark import write_mark
from cymric.runtime.daemon import run_daemon
from cymric.runtime.health import Health
from cymric.runtime.namesake import namesake
from cymric.runtime.pacing import Kick
from cymric.runtime.questions import serve_questions
from cymric.runtime.settings import Settings
from felix import metrics
from felix.calc.config import FelixConfig
from felix.calc.state import KINDS, Calculation, HintRefused
from felix.calc.values import Desired, Endpoint, EndpointId
from felix.canary import PASSED, Canary
from felix.dataplane.conntrack import Conntrack
from felix.dataplane.endpoints import EndpointManager, RouteOwnership
from felix.dataplane.interfaces import Interfaces
from felix.dataplane.loop import Dataplane, Drivers
from felix.dataplane.reevaluate import Reevaluation
from felix.dataplane.status import StatusFiles
from felix.dataplane.sysctls import Sysctls
from felix.handoff import Handoff
from felix.ipset.sets import IPSets
from felix.iptables.backend import Backend, find, leftover_tables
from felix.iptables.table import CheckIntervals, Table
from felix.knowledge import HEARD, Knowledge
from felix.questions import Questions
from felix.rescue import rescue
from felix.rules.rule import TableContent
from felix.rules.tables import TABLES
from felix.status_reports import Statuses, StatusReports, host_statuses, statuses
from felix.trials import Trials

SOCKET_NAME = "felix.sock"
TRIAL_MARK = "policy-trial"
IN_SYNC, APPLIED = "in sync with the datastore", "data plane applied"

log = structlog.get_logger()


class Reporter:
    """Says what is not enforced as written, once per change."""

    def __init__(self, log_level: str) -> None:
        self._before = Desired()
        self._log_level = log_level

    @property
    def latest(self) -> Desired:
        """What was reported last."""
        return self._before

    def report(self, desired: Desired) -> None:
        """Log what is new and set the metrics."""
        before, self._before = self._before, desired
        for problem in sorted({*desired.problems} - {*before.problems}):
            log.warning("not as written", subject=problem.subject, reason=problem.reason)
        for note in sorted({*desired.notes} - {*before.notes}):
            log.info("set, but of no effect here", subject=note.subject, reason=note.reason)
        if desired.config.log_severity != before.config.log_severity:
            logs.set_level(desired.config.log_severity or self._log_level)
        metrics.PROBLEMS.set(len(desired.problems))
        metrics.LOCAL_POLICIES.set(len(desired.policies))
        metrics.LOCAL_SELECTORS.set(len(desired.ip_sets))
        counts = desired.count_by_kind
        policies = (counts.get(kind, 0) for kind in ("NetworkPolicy", "GlobalNetworkPolicy"))
        metrics.CLUSTER_POLICIES.set(sum(policies))
        for kind, gauge in metrics.CLUSTER_COUNTS.items():
            gauge.set(desired.count_by_kind.get(kind, 0))


class Stopwatch:
    """How long endpoints take from the first word of them to their status file."""

    MOST = 4096
    """Endpoints that are never complete are forgotten, the oldest first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heard: dict[EndpointId, tuple[float, str]] = {}

    def heard(self, value: WorkloadEndpoint, source: str) -> None:
        """A new endpoint is told of."""
        spec = value.spec
        endpoint_id = EndpointId(spec.orchestrator, value.workload_id, spec.endpoint)
        self._heard.setdefault(endpoint_id, (self._clock(), source))
        if len(self._heard) > self.MOST:
            del self._heard[next(iter(self._heard))]

    def up(self, endpoint: Endpoint) -> None:
        """It is complete."""
        if found := self._heard.pop(endpoint.id, None):
            started_s, source = found
            metrics.PROGRAMMED.labels(source).observe(self._clock() - started_s)


class Source:
    """The side of datastore and hints: feeds the calculation and kicks the data plane."""

    def __init__(
        self,
        calculation: Calculation,
        kick: Kick,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
        *,
        log_level: str = "info",
        trial_mark: Path | None = None,
        wall_clock: Callable[[], float] = time.time,
        on_heard: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_heard = on_heard
        self._calculation = calculation
        self._kick = kick
        self._health = health
        self._reporter = Reporter(log_level)
        self._trials = Trials(self._end_trial, trial_mark, wall_clock)
        self.stopwatch = Stopwatch(clock)
        self.in_sync = asyncio.Event()

    def hint(self, key: ResourceKey, value: WorkloadEndpoint) -> bool:
        """An endpoint that will be stored soon. Raises HintRefused."""
        if not self.in_sync.is_set():
            raise HintRefused("not in sync with the datastore yet")
        is_new = self._calculation.hint(key, value)
        if is_new:
            self.stopwatch.heard(value, "hint")
            self._kick()
        return is_new

    def end_hint(self, key: ResourceKey) -> bool:
        """It will not be stored."""
        had_one = self._calculation.end_hint(key)
        if had_one:
            self._kick()
        return had_one

    @property
    def hint_count(self) -> int:
        """How many hints stand."""
        return self._calculation.hint_count

    def on_updates(self, updates: Sequence[Update]) -> None:
        """Store a batch."""
        for key, value in ((update.key, update.value) for update in updates):
            if isinstance(value, WorkloadEndpoint) and self._is_new(key, value):
                self.stopwatch.heard(value, "datastore")
            self._calculation.on_update(key, self._trials.read(key, value))
        metrics.UPDATES.inc(len(updates))
        self._on_heard()
        self._kick()

    def _end_trial(self, key: Key, before: object | None) -> None:
        self._calculation.on_update(key, before)
        self._kick()

    def _is_new(self, key: Key, value: WorkloadEndpoint) -> bool:
        return (
            self.in_sync.is_set()
            and isinstance(key, ResourceKey)
            and value.spec.node == self._calculation.node_name
            and not self._calculation.has_endpoint(key)
        )

    def on_in_sync(self) -> None:
        """The whole picture has been seen."""
        metrics.RESYNC_STATE.set(3)
        self._trials.in_sync()
        self._health.set_ready(IN_SYNC)
        self.in_sync.set()
        self._kick()

    @property
    def picture(self) -> Desired:
        """The latest picture that was worked out."""
        return self._reporter.latest

    def desired(self) -> Desired:
        """The latest picture; what is wrong in it is reported when it is first seen."""
        with metrics.CALCULATION_TIME.time():
            desired = self._calculation.desired()
        metrics.EVALUATIONS.set(self._calculation.evaluations)
        metrics.TRIALS.set(len(self._trials.keys))
        self._reporter.report(desired)
        return desired


async def enforce(store: Datastore, settings: Settings, health: Health) -> None:
    """Run felix on `store` until cancelled."""
    started_s = time.monotonic()
    health.expect(IN_SYNC, APPLIED, HEARD, PASSED)
    metrics.RESYNC_STATE.set(1)
    kick = Kick()
    has_ipv6 = Sysctls().has_ipv6
    calculation = Calculation(settings.node_name, os.environ, has_ipv6=has_ipv6)
    trial_mark = settings.state_dir / TRIAL_MARK
    knowledge = Knowledge(health, settings.felix_stale_after_s, time.monotonic)
    metrics.KNOWLEDGE_AGE.set_function(lambda: knowledge.age_s)
    source = Source(
        calculation,
        kick,
        health,
        log_level=settings.log_level,
        trial_mark=trial_mark,
        on_heard=knowledge.heard,
    )
    prefixes = [resource_prefix(kind) for kind in KINDS]
    syncer = Syncer(store, prefixes, source.on_updates, source.on_in_sync)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(syncer.run(), name="syncer")
        tasks.create_task(knowledge.ask(store), name="knowledge")
        if settings.bears_calico_names:
            tasks.create_task(namesake("calico-felix"), name="namesake")
        tasks.create_task(Handoff(source).serve(settings.run_dir / SOCKET_NAME), name="handoff")
        rescuing = tasks.create_task(
            rescue(HostCommands(), trial_mark, settings.etcd_endpoints, time.time), name="rescue"
        )
        questions = Questions(
            lambda: source.picture, store, HostCommands(), is_in_sync=source.in_sync.is_set
        )
        answering = serve_questions(settings.felix_status_socket, questions.answer)
        tasks.create_task(answering, name="questions")
        await source.in_sync.wait()
        rescuing.cancel()
        while not (desired := source.desired()).is_ready:
            log.warning("datastore is locked (datastoreReady false), waiting")
            await kick.wait()
        commands = HostCommands()  # what is fed ends with us, for its pipe closes
        found = await find(commands, desired.config.iptables_backend)
        questions.backend = found.backend
        log.info("iptables chosen", variant=found.backend.variant, reason=found.reason)
        for version in desired.config.ip_versions:
            await _clean_other_backend(found.backend.of(version), commands)

        canary = Canary(commands, found.backend.of(4), health)

        def on_applied() -> None:
            tasks.create_task(canary.run(), name="canary")
            metrics.FIRST_APPLIED.set(time.monotonic() - started_s)
            health.set_ready(APPLIED)
            write_mark(settings.felix_mark)  # bgpd waits for it before it announces routes

        drivers = build_drivers(
            desired.config, found.backend, settings, commands, source.stopwatch.up
        )
        reports = StatusReports(
            store,
            settings.node_name,
            lambda: source.picture.config,
            lambda: _statuses(drivers, source.picture, settings.node_name),
        )
        tasks.create_task(reports.run(), name="status reports")
        await Dataplane(
            drivers,
            source.desired,
            kick,
            clock=time.monotonic,
            on_applied=on_applied,
            on_host_interfaces=calculation.on_host_interfaces,
        ).run()


def _statuses(drivers: Drivers, desired: Desired, node: str) -> Statuses:
    """What the datastore should say of this node's endpoints now."""

    def is_running(interface: str) -> bool:
        link = drivers.interfaces.get(interface)
        return link is not None and link.is_running

    hosts = host_statuses(desired.host_names, desired.host_endpoints, is_running)
    endpoints = {one.id: drivers.endpoints.is_complete(one) for one in desired.endpoints}
    return statuses(desired.config, node, endpoints, hosts)


def build_drivers(
    config: FelixConfig,
    backend: Backend,
    settings: Settings,
    commands: HostCommands,
    on_up: Callable[[Endpoint], None],
) -> Drivers:
    """All that writes to the kernel of the network namespace we are in."""
    clock = time.monotonic
    links = Netlink()
    # A socket of its own: the kernel answers EBUSY to a second dump on one socket.
    interfaces = Interfaces(Netlink(), clock=clock)
    ownership = RouteOwnership(interfaces, config)
    routes = RouteTable(protocol=config.device_route_protocol, owns=ownership)
    sysctls = Sysctls()
    intervals = CheckIntervals(
        refresh_s=config.iptables_refresh_interval_s,
        post_write_s=config.iptables_post_write_check_interval_s,
    )
    return Drivers(
        config=config,
        addresses=by_interface,
        interfaces=interfaces,
        ipsets=IPSets(
            commands,
            clock=clock,
            refresh_s=config.ipsets_refresh_interval_s,
            max_size=config.max_ipset_size,
        ),
        tables={
            version: {
                name: Table(name, backend.of(version), commands, clock=clock, intervals=intervals)
                for name in TABLES
            }
            for version in config.ip_versions
        },
        endpoints=EndpointManager(
            config=config,
            links=links,
            interfaces=interfaces,
            routes=routes,
            ownership=ownership,
            sysctls=sysctls,
            status=StatusFiles(settings.endpoint_status_dir),
            on_up=on_up,
        ),
        conntrack=Conntrack(commands, KernelConnections()),
        sysctls=sysctls,
        reevaluation=Reevaluation(commands),
        table_events=NetfilterEvents(),
        is_own=commands.has_fed,
        address_events=AddressEvents(),
    )


async def _clean_other_backend(backend: Backend, commands: Commands) -> None:
    """Rules that an earlier run left with the other iptables would still judge every packet."""
    for name in await leftover_tables(commands, backend.other):
        table = Table(name, backend.other, commands, clock=time.monotonic)
        table.want(TableContent(name))
        log.warning("removing our rules from the other iptables", table=name)
        await table.apply()


async def serve(settings: Settings, health: Health) -> None:
    """Felix on the etcd that the settings name."""
    async with open_datastore(settings) as store:
        await enforce(store, settings, health)


def main() -> None:
    """The program `cymric-felix`."""
    run_daemon("felix", serve)


if __name__ == "__main__":
    main()
