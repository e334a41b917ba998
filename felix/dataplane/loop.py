"""The data plane: one loop that keeps the kernel as the calculation wants it.

    kick ─▶ desired ─▶ sets in ─▶ tables ─────────────┐─▶ sets out ─▶ status files
                             └▶ interfaces, routes ──┘
    time ─▶ read back sets, tables, routes ─▶ repair
    table changed by somebody else ─▶ read back that table ─▶ repair

Tables and routes are written at the same time: a route to a pod whose chains are not there yet
leads nowhere, for what no chain knows is dropped. Only the first round of a process, which may be
the first of the machine, writes all tables before any route.

Everything is level-driven: a kick says that something changed (an update, a link, a retry), the
loop reads the latest picture, and what changes meanwhile is in the next round. Nothing is written
before the datastore is in sync, nor while it is locked. Reading back happens only when nothing is
waiting, except when it is long overdue. A table that cannot be written ends the process, as do
`MAX_ERRORS` rounds in a row that failed otherwise: a fresh one reads everything anew. A route that
the kernel refuses only keeps its endpoint from being complete; it is tried again and again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import structlog

from cymric.kernel.addresses import AddressEvents, NoAddressEvents
from cymric.kernel.command import CommandFailed
from cymric.kernel.links import EventsLost, Link
from cymric.kernel.netfilter_events import SilentEvents, TableEvents
from cymric.runtime.pacing import Backoff, Kick
from felix import metrics
from felix.calc.config import FelixConfig
from felix.calc.values import Desired
from felix.dataplane import pools
from felix.dataplane.conntrack import Conntrack
from felix.dataplane.endpoints import GRACE_S, EndpointManager
from felix.dataplane.interfaces import Interfaces
from felix.dataplane.ordering import Order, way, with_other_sets
from felix.dataplane.pools import AddressesByInterface
from felix.dataplane.reevaluate import Reevaluation, is_needed, watched
from felix.dataplane.sysctls import Sysctls
from felix.ipset.sets import IPSets, SetChange
from felix.iptables.table import Table
from felix.rules.tables import TableContents

MAX_ERRORS = 10
NEVER = float("inf")
OVERDUE_S = 10.0
STATUS_CHECK_S = 10.0

log = structlog.get_logger()


class ConfigChanged(Exception):
    """A parameter changed that only a fresh process can follow; its supervisor starts one."""


class DataplaneFailed(Exception):
    """The kernel could not be brought to the desired state, however often it was tried."""


def fixed_parameters(config: FelixConfig) -> tuple[object, ...]:
    """The parameters that drivers are built with."""
    return (
        config.interface_prefixes,
        config.iptables_backend,
        config.iptables_refresh_interval_s,
        config.iptables_post_write_check_interval_s,
        config.ipsets_refresh_interval_s,
        config.route_refresh_interval_s,
        config.max_ipset_size,
        config.device_route_protocol,
        config.normal_route_priority,
        config.normal_route_priority_ipv6,
        config.ip_forwarding,
        config.device_route_source,
        config.device_route_source_ipv6,
        config.ip_versions,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drivers:
    """All that writes to the kernel, built for one FelixConfig."""

    config: FelixConfig
    addresses: Callable[[], AddressesByInterface]
    interfaces: Interfaces
    ipsets: IPSets
    tables: Mapping[int, Mapping[str, Table]]
    """By IP version and name."""
    endpoints: EndpointManager
    conntrack: Conntrack
    sysctls: Sysctls
    reevaluation: Reevaluation | None = None
    table_events: TableEvents = field(default_factory=SilentEvents)
    is_own: Callable[[int], bool] = lambda _: False
    """Whether the process of that id is one of ours that writes tables."""
    address_events: AddressEvents | NoAddressEvents = field(default_factory=NoAddressEvents)

    @property
    def all_tables(self) -> tuple[Table, ...]:
        """Of both families."""
        return tuple(table for tables in self.tables.values() for table in tables.values())


class Dataplane:
    """See the chapter. `clock` gives monotonic seconds."""

    def __init__(
        self,
        drivers: Drivers,
        desired: Callable[[], Desired],
        kick: Kick,
        *,
        clock: Callable[[], float],
        on_applied: Callable[[], None],
        on_host_interfaces: Callable[[AddressesByInterface], None] = lambda _: None,
    ) -> None:
        self._drivers = drivers
        self._desired = desired
        self._kick = kick
        self._clock = clock
        self._on_applied = on_applied
        self._on_host_interfaces = on_host_interfaces
        self._host_interfaces: AddressesByInterface = {}
        self._is_host_changed = False
        self._applied: Desired | None = None
        self._settled: Desired | None = None
        """What rules and sets in the kernel are of; None after a failure: a mixture."""
        self._sets = pools.Sets()
        self._contents = {version: TableContents(version) for version in drivers.tables}
        self._is_forwarding_ipv6 = False
        self._backoff = Backoff(first_s=0.1, most_s=5.0)
        self._retry_at_s = NEVER
        self._errors = 0
        self._routes_due_s = self._status_due_s = NEVER

    def on_link(self, name: str, before: Link | None, link: Link | None) -> None:
        """An interface changed."""
        if self._drivers.endpoints.on_link(name, before, link):
            if link is not None and before is None:
                # Routes on it that nobody wants may be removed when it is no longer new.
                self._routes_due_s = min(self._routes_due_s, self._clock() + GRACE_S)
            self._kick()
        elif not self._drivers.config.is_workload_interface(name):
            self._look_at_host()

    async def run(self) -> None:
        """Keep the kernel as wanted until cancelled. Raises ConfigChanged, DataplaneFailed."""
        self._drivers.sysctls.configure_node(
            forwarding=self._drivers.config.ip_forwarding == "enabled"
        )
        self._drivers.interfaces.tell(self.on_link)
        await self._drivers.interfaces.read()
        self._routes_due_s = self._clock() + GRACE_S
        self._look_at_host()
        self._kick()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._drivers.interfaces.follow(), name="follow links")
            tasks.create_task(self._follow_tables(), name="follow tables")
            tasks.create_task(self._follow_addresses(), name="follow addresses")
            while True:
                is_kicked = await self._kick.wait(self._pause_s())
                if is_kicked or self._clock() >= self._retry_at_s:
                    with metrics.APPLY_TIME.time():
                        self._plan_retry(is_done=await self._tried(self._apply_latest(tasks)))
                    if self._clock() < self._check_due_s() + OVERDUE_S:
                        continue
                if not self._errors and not await self._tried(self._check()):
                    self._plan_retry(is_done=False)

    def _look_at_host(self) -> None:
        """Tell of the host's interfaces if they, or their addresses, are others than before."""
        drivers = self._drivers
        addresses = drivers.addresses()
        found = {
            link.name: addresses.get(link.name, frozenset())
            for link in drivers.interfaces.all()
            if not drivers.config.is_workload_interface(link.name)
        }
        if found != self._host_interfaces:
            self._host_interfaces = found
            self._on_host_interfaces(found)
            self._is_host_changed = True  # the set of its addresses is another
            self._kick()

    async def _follow_addresses(self) -> None:
        drivers = self._drivers
        while True:
            try:
                async for index in drivers.address_events.watch():
                    link = next(
                        (one for one in drivers.interfaces.all() if one.index == index), None
                    )
                    if link is None or not drivers.config.is_workload_interface(link.name):
                        self._look_at_host()
            except EventsLost:
                log.warning("events of addresses were lost, reading all")
                self._look_at_host()

    async def _follow_tables(self) -> None:
        """Doubt tables in which somebody else touched what is ours, or may stand before it."""
        drivers = self._drivers
        while True:
            try:
                async for change in drivers.table_events.watch(drivers.is_own):
                    table = drivers.tables.get(change.ip_version, {}).get(change.table)
                    if table is not None and table.concerns(change.chain):
                        table.doubt()
                        self._kick()
            except EventsLost:
                log.warning("events of tables were lost, reading all")
                for table in drivers.all_tables:
                    table.doubt()
                self._kick()
            except OSError as error:
                log.info("no events of tables, they are only read back", error=str(error))
                return

    def _pause_s(self) -> float:
        due_s = self._retry_at_s if self._errors else min(self._retry_at_s, self._check_due_s())
        return max(0.0, due_s - self._clock())

    def _check_due_s(self) -> float:
        if self._applied is None:
            return NEVER
        tables = (table.check_due_s for table in self._drivers.all_tables)
        sets = self._drivers.ipsets
        return min(
            sets.check_due_s, sets.delete_due_s, self._routes_due_s, self._status_due_s, *tables
        )

    async def _tried(self, work: Awaitable[bool]) -> bool:
        """Do `work`; whether it is done. Raises DataplaneFailed after too many errors in a row."""
        try:
            is_done = await work
        except (CommandFailed, OSError) as error:
            log.warning("not applied, trying again", error=str(error))
            self._errors += 1
            if self._errors >= MAX_ERRORS:
                raise DataplaneFailed(f"{MAX_ERRORS} rounds in a row failed") from error
            return False
        self._errors = 0
        return is_done

    def _plan_retry(self, *, is_done: bool) -> None:
        if is_done:
            self._backoff.succeeded()
            self._retry_at_s = NEVER
        else:
            metrics.APPLY_FAILURES.inc()
            self._retry_at_s = self._clock() + self._backoff.next_s()

    async def _apply_latest(self, tasks: asyncio.TaskGroup) -> bool:
        desired = self._desired()
        if not desired.is_ready:
            log.warning("datastore is locked (datastoreReady false), changing nothing")
            return True
        if fixed_parameters(desired.config) != fixed_parameters(self._drivers.config):
            raise ConfigChanged("a parameter changed that needs a restart")
        return await self._apply(desired, tasks)

    async def _apply(self, desired: Desired, tasks: asyncio.TaskGroup) -> bool:
        drivers, is_first = self._drivers, self._applied is None
        if desired is not self._applied or self._is_host_changed:
            self._want(desired)
        elif self._settled is desired and not any(table.is_pending for table in drivers.all_tables):
            # Nearly all that happens in a large cluster is no news to this node.
            is_done = not drivers.endpoints.is_pending or await self._lead_to_pods(tasks)
            drivers.endpoints.report()
            return is_done
        # Order matters: the kernel refuses a rule naming a missing set, and to destroy a used one.
        before, self._settled = self._settled, None
        changes = await drivers.ipsets.create()
        chosen = way(before, desired, changes)
        if chosen.order is Order.STAGED:
            await self._switch_to_copies(desired, changes)
        if chosen.order is not Order.TABLES_FIRST:
            await drivers.ipsets.write(chosen.at_once, in_place=chosen.in_place)
        self._want_tables(desired)
        is_done, problem = True, None
        async with asyncio.TaskGroup() as writes:
            for table in drivers.all_tables:
                if table.is_pending:
                    writes.create_task(table.apply(), name=f"table {table.name}")
            if not is_first:
                await asyncio.sleep(0)  # the tables first: their work is done by others
                try:
                    is_done = await self._lead_to_pods(tasks)
                except (CommandFailed, OSError) as error:
                    problem = error
        if problem is not None:
            raise problem
        if chosen.order is Order.TABLES_FIRST:
            await drivers.ipsets.write(chosen.at_once, in_place=chosen.in_place)
        await drivers.ipsets.delete_unwanted()
        if is_first:
            is_done = await self._lead_to_pods(tasks)
        drivers.endpoints.report()
        if drivers.reevaluation is not None and is_needed(before, desired) and watched(desired):
            drivers.reevaluation.start(tasks, desired)
        self._applied = self._settled = desired
        if is_first:
            self._status_due_s = self._clock() + STATUS_CHECK_S
            self._on_applied()
        return is_done

    def _want(self, desired: Desired) -> None:
        drivers, applied = self._drivers, self._applied
        is_other = applied is None or pools.ingredients(desired) != pools.ingredients(applied)
        if is_other or self._is_host_changed:
            self._is_host_changed = False
            drivers.ipsets.want(self._sets.sets(desired, drivers.addresses()))
        if applied is None or desired.endpoints is not applied.endpoints:
            drivers.endpoints.want(desired)
        if 6 in drivers.tables and not self._is_forwarding_ipv6 and _uses_ipv6(desired):
            if drivers.config.ip_forwarding == "enabled":
                drivers.sysctls.forward_ipv6()
            self._is_forwarding_ipv6 = True

    def _want_tables(
        self, desired: Desired, copies: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """State the tables, with copies of sets by their names instead of these."""
        for version, tables in self._drivers.tables.items():
            for name, content in self._contents[version].contents(desired).items():
                tables[name].want(with_other_sets(content, copies) if copies else content)

    async def _switch_to_copies(self, desired: Desired, changes: Sequence[SetChange]) -> None:
        """Switch rules and sets together, to rules that look at copies of the sets."""
        copies = await self._drivers.ipsets.copy(change.name for change in changes)
        self._want_tables(desired, copies)
        async with asyncio.TaskGroup() as writes:
            for table in self._drivers.all_tables:
                if table.is_pending:
                    writes.create_task(table.apply(), name=f"table {table.name}")
        metrics.STAGED.inc()

    async def _lead_to_pods(self, tasks: asyncio.TaskGroup) -> bool:
        """Interfaces and routes. Connections of addresses that went, or moved, end with them."""
        changes = self._drivers.endpoints.take_moved()
        moved = [address for address, (before, _) in changes.items() if before is not None]
        self._drivers.conntrack.forget(tasks, moved)
        if changes:
            await self._drivers.conntrack.wait_for(
                [address for address, (_, after) in changes.items() if after is not None]
            )
        return await self._drivers.endpoints.apply()

    async def _check(self) -> bool:
        """Read back what is due and repair it."""
        now_s = self._clock()
        drivers = self._drivers
        if drivers.ipsets.delete_due_s <= now_s:
            await drivers.ipsets.delete_unwanted()
        if drivers.ipsets.check_due_s <= now_s:
            await drivers.ipsets.check()
        for table in drivers.all_tables:
            if table.check_due_s <= now_s:
                await table.check()
        if self._routes_due_s <= now_s:
            interval_s = drivers.config.route_refresh_interval_s
            self._routes_due_s = now_s + interval_s if interval_s else NEVER
            self._look_at_host()
            drivers.endpoints.check_soon()
            self._kick()
        if self._status_due_s <= now_s:
            self._status_due_s = now_s + STATUS_CHECK_S
            drivers.endpoints.report_all()
        return True


def _uses_ipv6(desired: Desired) -> bool:
    """Whether anybody here has an IPv6 address, or may get one."""
    return any(pool.version == 6 for pool in desired.pools) or any(
        6 in one.ip_versions for one in desired.endpoints
    )
