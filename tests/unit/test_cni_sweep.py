"""Addresses that nobody has: reported, and released after the grace period, never before."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cni.agent import Agent, entry_of
from cni.endpoint import identify
from cni.journal import Journal
from cni.sweep import Sweeper
from cymric.datastore.api import delete
from cymric.model.net import Address
from ipam.collect import Collector
from tests.support.cni_world import NODE, World
from tests.unit.test_cni_crashes import NEW, OLD, call

GRACE_S = 100


class Routed(set[Address]):
    """What the kernel routes."""

    def leads_to_link(self, address: Address) -> bool:
        return address in self


@pytest.fixture
async def world(tmp_path: Path) -> World:
    made = World(tmp_path)
    await made.set_up()
    return made


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000

    def __call__(self) -> int:
        return self.now_s * 10**9


@asynccontextmanager
async def sweeping(
    world: World, routed: Routed, clock: Clock
) -> AsyncIterator[tuple[Sweeper, Agent]]:
    collector = Collector(NODE, grace_s=GRACE_S)
    async with world.process(on_block=collector.on_block) as process:
        agent = process.agent
        ipam = agent.addresses.ipam
        yield (
            Sweeper(
                agent.endpoints,
                agent.journal,
                agent.lent,
                collector,
                ipam,
                routed.leads_to_link,
                (),
                clock,
            ),
            agent,
        )


async def lose(world: World) -> None:
    """Remove endpoint and pair without DEL, as a runtime that forgot would."""
    for key in await world.endpoints():
        await delete(world.store, key)
    world.pairs.by_name.clear()


async def test_a_lost_container_is_released_after_the_grace(world: World) -> None:
    """What no endpoint, route or journal knows is released, but only after the grace period."""
    clock, routed = Clock(), Routed()
    async with sweeping(world, routed, clock) as (sweeper, agent):
        await agent.add(call("ADD", OLD))
        assert await sweeper.sweep() == ()
        await lose(world)
        (leak,) = await sweeper.sweep()
        assert leak.held.handle == f"pods.{OLD}"
        clock.now_s += GRACE_S - 1
        assert len(await sweeper.sweep()) == 1
        assert len(await world.handles()) == 1
        clock.now_s += 1
        assert await sweeper.sweep() == ()
        assert await world.handles() == []


async def test_what_the_kernel_routes_is_in_use(world: World) -> None:
    """An address that a link of this node has is nobody's leak, whatever the datastore says."""
    clock, routed = Clock(), Routed()
    async with sweeping(world, routed, clock) as (sweeper, agent):
        await agent.add(call("ADD", OLD))
        (endpoint,) = await agent.endpoints.refresh()
        routed.update(endpoint.value.spec.addresses)
        await lose(world)
        for _ in range(3):
            assert await sweeper.sweep() == ()
            clock.now_s += GRACE_S
        routed.clear()
        assert len(await sweeper.sweep()) == 1  # from now on, not from the beginning
        assert len(await world.handles()) == 1


async def test_addresses_of_other_main_plugins_are_in_use(world: World) -> None:
    """Under another main plugin there is no endpoint: the node's own note counts, until DEL."""
    clock = Clock()
    async with sweeping(world, Routed(), clock) as (sweeper, agent):
        await agent.add(call("ADD", NEW, is_ipam_only=True, type="bridge"))
        for _ in range(3):
            assert await sweeper.sweep() == ()
            clock.now_s += GRACE_S
        assert len(await world.handles()) == 1
        await agent.delete(call("DEL", NEW, is_ipam_only=True, type="bridge"))
        assert list(agent.lent.entries()) == []
        assert await world.handles() == []


async def test_an_add_on_its_way_is_in_use(world: World) -> None:
    """What the journal has begun is not looked for."""
    clock = Clock()
    async with sweeping(world, Routed(), clock) as (sweeper, agent):
        await agent.add(call("ADD", OLD))
        entries = Journal(world.directory / "journal")
        await lose(world)
        made = call("ADD", OLD)
        entries.begin(entry_of(made, identify(made, NODE)))
        clock.now_s += 10 * GRACE_S
        assert await sweeper.sweep() == ()
