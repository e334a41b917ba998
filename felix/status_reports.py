"""What felix writes to the datastore of itself and its endpoints, under Calico's keys.

    every reportingInterval   …/felix/v2/<region>/host/<node>/status     lives reportingTTL
                              …/last_reported_status                     stays
    endpointReportingEnabled  …/workload/<orchestrator>/<namespace>%2f<pod>/endpoint/<name>
                              /calico/felix/v1/host/<node>/endpoint/<host endpoint>

The first of each after `FIRST_S`, so that a felix that fails again and again does not flap them.
What is there already is read first, every `RESYNC_S` again, and only differences are written.
Nothing depends on these keys: a datastore that does not take them is told of in the log, and tried
again. Source: Calico 3.32, felix/statusrep, in our own words.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from urllib.parse import quote

import structlog

from cymric.datastore.api import (
    MAX_OPERATIONS,
    Datastore,
    DatastoreError,
    Delete,
    LeaseLost,
    Operation,
    Put,
    Transaction,
)
from cymric.model.codec import encode_tree
from cymric.model.trial import time_text
from felix.calc.config import FelixConfig
from felix.calc.policies import WILDCARD_INTERFACE, HostEndpoint
from felix.calc.values import EndpointId

FIRST_S = 10.0
RESYNC_S = 90.0
LOOK_S = 1.0

Statuses = Mapping[str, str]
"""Status by key: `up`, `down` or `error`."""

log = structlog.get_logger()


def host_prefix(config: FelixConfig, node: str) -> str:
    """Where this node's own keys begin."""
    region = f"region-{config.openstack_region}" if config.openstack_region else "no-region"
    return f"/calico/felix/v2/{region}/host/{node}/"


def host_endpoint_prefix(node: str) -> str:
    """Where those of its host endpoints begin."""
    return f"/calico/felix/v1/host/{node}/endpoint/"


def workload_key(prefix: str, endpoint: EndpointId) -> str:
    """The key of one workload endpoint."""
    workload, name = _escaped(endpoint.workload), _escaped(endpoint.endpoint)
    return f"{prefix}workload/{_escaped(endpoint.orchestrator)}/{workload}/endpoint/{name}"


def _escaped(text: str) -> str:
    return text.replace("%", "%25").replace("/", "%2f")


def statuses(
    config: FelixConfig,
    node: str,
    endpoints: Mapping[EndpointId, bool],
    host_endpoints: Mapping[str, str],
) -> dict[str, str]:
    """What should stand there; nothing where it is not asked for."""
    if not config.endpoint_reporting_enabled:
        return {}
    prefix = host_prefix(config, node)
    found = {
        workload_key(prefix, one): "up" if is_up else "down" for one, is_up in endpoints.items()
    }
    start = host_endpoint_prefix(node)
    found |= {start + quote(name, safe="-_.~*"): how for name, how in host_endpoints.items()}
    return found


def host_statuses(
    names: frozenset[str], resolved: tuple[HostEndpoint, ...], is_running: Callable[[str], bool]
) -> dict[str, str]:
    """How each host endpoint of the node is: without an interface it is in error."""
    found: dict[str, str] = dict.fromkeys(names, "error")
    for one in resolved:
        is_up = one.interface == WILDCARD_INTERFACE or is_running(one.interface)
        if found.get(one.id) != "down":
            found[one.id] = "up" if is_up else "down"
    return found


class StatusReports:
    """See the chapter. `config` and `wanted` give what is so now.

    `clock` gives monotonic seconds, `wall_clock` seconds since 1970.
    """

    def __init__(
        self,
        store: Datastore,
        node: str,
        config: Callable[[], FelixConfig],
        wanted: Callable[[], Statuses],
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._node = node
        self._config = config
        self._wanted = wanted
        self._clock = clock
        self._wall_clock = wall_clock
        self._started_s = clock()
        self._is_first = True
        self._lease = 0
        self._ttl_s = 0
        self._known: dict[str, str] | None = None
        self._reported_s = self._read_s = float("-inf")
        self._failing = False

    async def run(self) -> None:
        """Report until cancelled."""
        await asyncio.sleep(FIRST_S)
        while True:
            config = self._config()
            try:
                await self.report(config)
                await self.report_endpoints(config)
                self._failing = False
            except DatastoreError as error:
                self._known = None
                if not self._failing:
                    log.warning("status is not written", error=repr(error))
                self._failing = True
            await asyncio.sleep(max(LOOK_S, config.endpoint_reporting_delay_s))

    async def report(self, config: FelixConfig) -> None:
        """Write this felix' own status if it is time. Raises DatastoreError."""
        interval_s = config.reporting_interval_s
        if not interval_s or self._clock() < self._reported_s + interval_s:
            return
        value = encode_tree(
            {
                "time": time_text(self._wall_clock()),
                "uptime": round(self._clock() - self._started_s, 3),
                "first_update": self._is_first,
            }
        )
        prefix = host_prefix(config, self._node)
        puts = [
            Put(f"{prefix}status", value, await self._leased(config)),
            Put(f"{prefix}last_reported_status", value),
        ]
        try:
            await self._store.commit(Transaction([], puts))
        except LeaseLost:
            self._lease = 0
            raise
        self._reported_s, self._is_first = self._clock(), False

    async def _leased(self, config: FelixConfig) -> int:
        ttl_s = max(1, round(config.reporting_ttl_s))
        if ttl_s != self._ttl_s:
            await self.let_go()
        if not self._lease:
            self._lease = await self._store.grant_lease(ttl_s, on_lost=self._on_lost)
            self._ttl_s = ttl_s
        return self._lease

    async def let_go(self) -> None:
        """Let the status vanish that lives only with us."""
        if self._lease:
            lease, self._lease = self._lease, 0
            await self._store.revoke_lease(lease)

    def _on_lost(self, lease: int) -> None:
        if lease == self._lease:
            self._lease = 0

    async def report_endpoints(self, config: FelixConfig) -> None:
        """Write what differs from what is known to be there. Raises DatastoreError."""
        wanted = dict(self._wanted())
        if not wanted and not self._known and not config.endpoint_reporting_enabled:
            return
        if self._known is None or self._clock() >= self._read_s + RESYNC_S:
            self._known = await self._read(config)
            self._read_s = self._clock()
        known = self._known
        changes: list[Operation] = [Delete(key) for key in known if key not in wanted]
        changes += [
            Put(key, encode_tree({"status": how}))
            for key, how in wanted.items()
            if known.get(key) != how
        ]
        for start in range(0, len(changes), MAX_OPERATIONS):
            await self._store.commit(Transaction([], changes[start : start + MAX_OPERATIONS]))
        self._known = wanted

    async def _read(self, config: FelixConfig) -> dict[str, str]:
        found: dict[str, str] = {}
        prefixes = (
            host_prefix(config, self._node) + "workload/",
            host_endpoint_prefix(self._node),
        )
        for prefix in prefixes:
            for item in (await self._store.list(prefix)).items:
                words = (encode_tree({"status": how}) for how in ("up", "down", "error"))
                is_known = item.value in words
                found[item.key] = item.value.decode()[11:-2] if is_known else ""
        return found
