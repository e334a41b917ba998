"""cnid killed before and after every call it makes: its successor leaves nothing half done."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from cni.request import Call, NodeCall, Request, parse
from tests.support.cni_world import Killed, Life, Process, World

pytestmark = pytest.mark.parametrize("takes_effect", [False, True], ids=["before", "after"])

OLD, NEW = "aaaabbbbccccdddd", "1111222233334444"
MOST_CALLS = 60
POD = "K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web-1"

Work = Callable[[Process], Awaitable[object]]


def call(
    command: str, container: str, args: str = POD, *, is_ipam_only: bool = False, **config: Any
) -> Call:
    env = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": f"/run/netns/{container}",
        "CNI_ARGS": args,
    }
    tree = {"cniVersion": "1.0.0", "name": "pods", "ipam": {"type": "calico-ipam"}, **config}
    made = parse(Request(is_ipam_only, env, json.dumps(tree).encode()))
    assert isinstance(made, Call)
    return made


def gc(*valid: str) -> NodeCall:
    attachments = [{"containerID": container, "ifname": "eth0"} for container in valid]
    tree = {
        "cniVersion": "1.1.0",
        "name": "pods",
        "ipam": {"type": "calico-ipam"},
        "cni.dev/valid-attachments": attachments,
    }
    made = parse(Request(False, {"CNI_COMMAND": "GC"}, json.dumps(tree).encode()))
    assert isinstance(made, NodeCall)
    return made


async def killed_everywhere(
    tmp_path: Path, takes_effect: bool, before: list[Work], work: Work, then: Callable[..., Any]
) -> None:
    """Do `before`, then `work` in a process killed at its first, second … call, then `then`."""
    for number in range(MOST_CALLS):
        directory = tmp_path / str(number)
        directory.mkdir()
        world = World(directory)
        await world.set_up()
        async with world.process() as process:
            for step in before:
                await step(process)
        async with world.process(Life(number, takes_effect)) as process:
            try:
                await work(process)
            except Killed:
                is_done = False
            else:
                is_done = True
        async with world.process() as process:
            await process.agent.undo_leftovers()
            await then(world, process, is_done)
        assert world.journal == []
        if is_done and not process.life.is_over:
            assert number > 1  # else nothing was tried
            return
    raise AssertionError("it never ended")


async def assert_state(world: World, *containers: str) -> None:
    """Exactly these containers have endpoint, address and pair."""
    assert len(await world.endpoints()) == len(containers)
    handles = [key.rpartition(".")[2] for key in await world.handles()]
    assert sorted(handles) == sorted(containers)
    ends = [netns.name for netns, layout in world.pairs.by_name.values() if layout is not None]
    assert sorted(ends) == sorted(containers)
    assert len(world.pairs.by_name) == len(ends)


async def test_add(tmp_path: Path, takes_effect: bool) -> None:
    """An ADD that was not answered is whole or leaves nothing, can be made again, and undone."""

    async def then(world: World, process: Process, is_done: bool) -> None:
        await assert_state(world, *([NEW] if await world.endpoints() or is_done else []))
        await process.agent.add(call("ADD", NEW))
        await assert_state(world, NEW)
        await process.agent.delete(call("DEL", NEW))
        await assert_state(world)

    await killed_everywhere(
        tmp_path, takes_effect, [], lambda p: p.agent.add(call("ADD", NEW)), then
    )


async def test_add_of_a_pods_next_container(tmp_path: Path, takes_effect: bool) -> None:
    """A pod's new container, half made, is undone; the old one's DEL and a new ADD both work."""

    async def then(world: World, process: Process, is_done: bool) -> None:
        await process.agent.delete(call("DEL", OLD))
        await assert_state(world, *([NEW] if await world.endpoints() or is_done else []))
        await process.agent.add(call("ADD", NEW))
        await assert_state(world, NEW)

    await killed_everywhere(
        tmp_path,
        takes_effect,
        [lambda p: p.agent.add(call("ADD", OLD))],
        lambda p: p.agent.add(call("ADD", NEW)),
        then,
    )


async def test_add_again(tmp_path: Path, takes_effect: bool) -> None:
    """A repeated ADD that was killed never takes the attachment away from under the container."""

    async def then(world: World, process: Process, is_done: bool) -> None:
        await assert_state(world, OLD)
        await process.agent.add(call("ADD", OLD))
        await assert_state(world, OLD)

    async def work(process: Process) -> None:
        await process.agent.add(call("ADD", OLD))
        for _ in range(5):  # more calls than ADD makes, so that the count comes to an end
            process.life.begins()

    await killed_everywhere(
        tmp_path, takes_effect, [lambda p: p.agent.add(call("ADD", OLD))], work, then
    )


async def test_delete(tmp_path: Path, takes_effect: bool) -> None:
    """A DEL that was not answered is made again, and then nothing is left."""

    async def then(world: World, process: Process, is_done: bool) -> None:
        if not is_done:
            await process.agent.delete(call("DEL", OLD))
        await assert_state(world)

    await killed_everywhere(
        tmp_path,
        takes_effect,
        [lambda p: p.agent.add(call("ADD", OLD))],
        lambda p: p.agent.delete(call("DEL", OLD)),
        then,
    )


async def test_collect(tmp_path: Path, takes_effect: bool) -> None:
    """A GC that was killed is finished by the next one; what is valid is never touched."""
    other = {"args": ""}

    async def then(world: World, process: Process, is_done: bool) -> None:
        await process.collector.collect(gc(NEW))
        await assert_state(world, NEW)

    await killed_everywhere(
        tmp_path,
        takes_effect,
        [
            lambda p: p.agent.add(call("ADD", OLD)),
            lambda p: p.agent.add(call("ADD", NEW, **other)),
        ],
        lambda p: p.collector.collect(gc(NEW)),
        then,
    )
