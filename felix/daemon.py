"""Felix: enforces on one node what the datastore says, and knows which endpoints are complete.

    etcd ─ syncer ─▶ calculation ─▶ desired ─▶ ┌ sets ────▶ ipset restore
                                               │ tables ──▶ iptables-restore
    kernel ─ link events ─▶ interfaces ──────▶ │ routes ──▶ netlink
                                               └ status ──▶ files that cnid waits for

Ready means: in sync with the datastore, and applied once. A restart finds chains by hash, sets by
name and routes by protocol number and interface, and writes only what differs. When it stops, the
data plane stays. Parameters come from FelixConfiguration and FELIX_… (felix/calc/config.py).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence

import structlog

from cymric.datastore.api import Datastore
from cymric.datastore.etcd import open_datastore
from cymric.datastore.syncer import Syncer, Update
from cymric.kernel.addresses import ipv4_by_interface
from cymric.kernel.command import Commands, HostCommands
from cymric.kernel.netlink import Netlink
from cymric.kernel.routes import RouteTable
from cymric.model.keys import resource_prefix
from cymric.runtime.daemon import run_daemon
from cymric.runtime.health import Health
from cymric.runtime.pacing import Kick
from cymric.runtime.settings import Settings
from felix import metrics
from felix.calc.config import FelixConfig
from felix.calc.state import KINDS, Calculation
from felix.calc.values import Desired
from felix.dataplane.conntrack import Conntrack
from felix.dataplane.endpoints import EndpointManager, RouteOwnership
from felix.dataplane.interfaces import Interfaces
from felix.dataplane.loop import Dataplane, Drivers
from felix.dataplane.status import StatusFiles
from felix.dataplane.sysctls import Sysctls
from felix.ipset.sets import IPSets
from felix.iptables.backend import Backend, Found, find
from felix.iptables.table import CheckIntervals, Table
from felix.rules.rule import TableContent
from felix.rules.tables import TABLES

IN_SYNC, APPLIED = "in sync with the datastore", "data plane applied"

log = structlog.get_logger()


class Reporter:
    """Says what is not enforced as written, once per change."""

    def __init__(self) -> None:
        self._before = Desired()

    def report(self, desired: Desired) -> None:
        """Log what is new and set the metrics."""
        before, self._before = self._before, desired
        for problem in sorted({*desired.problems} - {*before.problems}):
            log.warning("not as written", subject=problem.subject, reason=problem.reason)
        if desired.unenforced != before.unenforced and desired.unenforced:
            log.error(
                "POLICIES ARE NOT ENFORCED: this version cannot do network policy",
                count=len(desired.unenforced),
                policies=list(desired.unenforced),
            )
        metrics.UNENFORCED.set(len(desired.unenforced))
        metrics.PROBLEMS.set(len(desired.problems))
        for kind, gauge in metrics.CLUSTER_COUNTS.items():
            gauge.set(desired.count_by_kind.get(kind, 0))


class Source:
    """The datastore's side: feeds the calculation and kicks the data plane."""

    def __init__(self, calculation: Calculation, kick: Kick, health: Health) -> None:
        self._calculation = calculation
        self._kick = kick
        self._health = health
        self._reporter = Reporter()
        self.in_sync = asyncio.Event()

    def on_updates(self, updates: Sequence[Update]) -> None:
        """Store a batch."""
        for update in updates:
            self._calculation.on_update(update.key, update.value)
        metrics.UPDATES.inc(len(updates))
        self._kick()

    def on_in_sync(self) -> None:
        """The whole picture has been seen."""
        metrics.RESYNC_STATE.set(3)
        self._health.set_ready(IN_SYNC)
        self.in_sync.set()
        self._kick()

    def desired(self) -> Desired:
        """The latest picture; what is wrong in it is reported when it is first seen."""
        desired = self._calculation.desired()
        self._reporter.report(desired)
        return desired


async def enforce(store: Datastore, settings: Settings, health: Health) -> None:
    """Run felix on `store` until cancelled."""
    health.expect(IN_SYNC, APPLIED)
    metrics.RESYNC_STATE.set(1)
    kick = Kick()
    source = Source(Calculation(settings.node_name, os.environ), kick, health)
    prefixes = [resource_prefix(kind) for kind in KINDS]
    syncer = Syncer(store, prefixes, source.on_updates, source.on_in_sync)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(syncer.run(), name="syncer")
        await source.in_sync.wait()
        while not (desired := source.desired()).is_ready:
            log.warning("datastore is locked (datastoreReady false), waiting")
            await kick.wait()
        commands = HostCommands()  # what is fed ends with us, for its pipe closes
        found = await find(commands, desired.config.iptables_backend)
        log.info("iptables chosen", variant=found.backend.variant, reason=found.reason)
        await _clean_other_backend(found, commands)
        drivers = build_drivers(desired.config, found.backend, settings, commands)
        await Dataplane(
            drivers,
            source.desired,
            kick,
            clock=time.monotonic,
            on_applied=lambda: health.set_ready(APPLIED),
        ).run()


def build_drivers(
    config: FelixConfig, backend: Backend, settings: Settings, commands: Commands
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
        addresses=ipv4_by_interface,
        interfaces=interfaces,
        ipsets=IPSets(
            commands,
            clock=clock,
            refresh_s=config.ipsets_refresh_interval_s,
            max_size=config.max_ipset_size,
        ),
        tables={
            name: Table(name, backend, commands, clock=clock, intervals=intervals)
            for name in TABLES
        },
        endpoints=EndpointManager(
            config=config,
            links=links,
            interfaces=interfaces,
            routes=routes,
            ownership=ownership,
            sysctls=sysctls,
            status=StatusFiles(settings.endpoint_status_dir),
        ),
        conntrack=Conntrack(commands),
        sysctls=sysctls,
    )


async def _clean_other_backend(found: Found, commands: Commands) -> None:
    """Rules that an earlier run left with the other iptables would still judge every packet."""
    for name in found.leftover_tables:
        table = Table(name, found.other, commands, clock=time.monotonic)
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
