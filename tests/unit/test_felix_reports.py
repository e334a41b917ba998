"""What felix writes of itself to the datastore, and how old what it knows may be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cymric.datastore import api
from cymric.datastore.memory import MemoryDatastore
from cymric.runtime.health import Health
from felix.calc.config import FelixConfig
from felix.calc.values import EndpointId, HostEndpoint
from felix.knowledge import HEARD, Knowledge
from felix.status_reports import RESYNC_S, StatusReports, host_statuses, statuses, workload_key

HOST = "/calico/felix/v2/no-region/host/node1/"
POD = EndpointId("k8s", "prod/web-1", "eth0")
POD_KEY = f"{HOST}workload/k8s/prod%2fweb-1/endpoint/eth0"
HEP_KEY = "/calico/felix/v1/host/node1/endpoint/node1-up0"
ON = FelixConfig(endpoint_reporting_enabled=True)


class World:
    """A datastore, a clock turned by hand, and what should be reported."""

    def __init__(self) -> None:
        self.store = MemoryDatastore()
        self.now_s = 100.0
        self.config = ON
        self.pods = {POD: True}
        self.hosts = {"node1-up0": "up"}
        self.reports = StatusReports(
            self.store,
            "node1",
            lambda: self.config,
            lambda: statuses(self.config, "node1", self.pods, self.hosts),
            clock=lambda: self.now_s,
            wall_clock=lambda: 1_800_000_000.0,
        )

    async def written(self) -> dict[str, object]:
        """All keys of felix' own."""
        items = (await self.store.list("/calico/felix/")).items
        return {item.key: json.loads(item.value) for item in items}


def test_keys_are_calicos() -> None:
    """A slash in a workload's name is escaped in small letters; the region is in front."""
    assert workload_key(HOST, POD) == POD_KEY
    config = replace(ON, openstack_region="east")
    (key,) = statuses(config, "node1", {POD: False}, {})
    assert key == POD_KEY.replace("no-region", "region-east")
    assert statuses(FelixConfig(), "node1", {POD: False}, {"a": "up"}) == {}


async def test_endpoints_are_reported_where_asked_for() -> None:
    """What changed is written, what went is removed, others' changes are repaired in time."""
    world = World()
    await world.reports.report_endpoints(ON)
    up = {"status": "up"}
    assert await world.written() == {POD_KEY: up, HEP_KEY: up}
    world.pods, world.hosts = {POD: False}, {}
    await world.reports.report_endpoints(ON)
    assert await world.written() == {POD_KEY: {"status": "down"}}
    await api.put(world.store, POD_KEY, b'{"status":"up"}')
    await api.put(world.store, HEP_KEY, b'{"status":"what"}')
    await world.reports.report_endpoints(ON)
    assert (await world.written())[POD_KEY] == up, "nobody has looked yet"
    world.now_s += RESYNC_S
    await world.reports.report_endpoints(ON)
    assert await world.written() == {POD_KEY: {"status": "down"}}
    world.config = FelixConfig()
    await world.reports.report_endpoints(world.config)
    assert await world.written() == {}


async def test_a_fresh_process_removes_what_is_no_more() -> None:
    """What stands there already and is right is not written again."""
    world = World()
    await world.reports.report_endpoints(ON)
    before = (await world.store.list("/calico/felix/")).items
    again = World()
    again.store = world.store
    fresh = StatusReports(
        world.store,
        "node1",
        lambda: ON,
        lambda: statuses(ON, "node1", {}, again.hosts),
        clock=lambda: 0.0,
    )
    await fresh.report_endpoints(ON)
    (left,) = (await world.store.list("/calico/felix/")).items
    assert left in before
    assert left.key == HEP_KEY


async def test_own_status() -> None:
    """At once, then every interval; the first says so; one of the two keys has a lease."""
    world = World()
    config = FelixConfig(reporting_interval_s=30.0)
    await world.reports.report(config)
    said = {"time": "2027-01-15T08:00:00Z", "uptime": 0.0, "first_update": True}
    both = [f"{HOST}last_reported_status", f"{HOST}status"]
    assert await world.written() == dict.fromkeys(both, said)
    world.now_s += 29
    await world.reports.report(config)
    assert (await world.written())[both[0]] == said
    world.now_s += 1
    await world.reports.report(config)
    assert (await world.written())[both[0]] == {**said, "uptime": 30.0, "first_update": False}
    await world.reports.let_go()
    assert list(await world.written()) == both[:1], "the lease was the other one's life"


async def test_own_status_may_be_off() -> None:
    """An interval of 0, as `cymric node init` stores it."""
    world = World()
    await world.reports.report(FelixConfig(reporting_interval_s=0.0))
    assert await world.written() == {}


@pytest.mark.parametrize(
    ("interfaces", "running", "expected"),
    [
        ([], [], "error"),
        (["up0"], ["up0"], "up"),
        (["up0"], [], "down"),
        (["up0", "up1"], ["up1"], "down"),
        (["*"], [], "up"),
    ],
)
def test_status_of_host_endpoints(interfaces: list[str], running: list[str], expected: str) -> None:
    """Without an interface error, with one that is not running down."""
    resolved = tuple(HostEndpoint("h", interface) for interface in interfaces)
    found = host_statuses(frozenset(["h"]), resolved, lambda name: name in running)
    assert found == {"h": expected}


def test_silence_makes_not_ready() -> None:
    """Past the limit, until the datastore is heard again; without a limit never."""
    now = [0.0]
    health = Health()
    knowledge = Knowledge(health, 60.0, lambda: now[0])
    knowledge.heard()
    assert not health.missing
    now[0] = 60.0
    knowledge.judge()
    assert knowledge.age_s == 60.0
    assert not health.missing
    now[0] = 61.0
    knowledge.judge()
    assert list(health.missing) == [HEARD]
    knowledge.heard()
    assert knowledge.age_s == 0.0
    assert not health.missing
    always = Knowledge(health, 0.0, lambda: now[0])
    now[0] = 1e9
    always.judge()
    assert not health.missing
