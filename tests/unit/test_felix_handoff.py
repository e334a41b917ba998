"""Endpoints told of directly: worth a head start, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cymric.datastore.syncer import Update
from cymric.model import codec
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.keys import ResourceKey
from cymric.runtime.health import Health
from cymric.runtime.pacing import Kick
from felix import handoff
from felix.calc.state import Calculation, HintRefused
from felix.daemon import Source
from felix.handoff import Handoff
from tests.support.eventually import eventually
from tests.unit.test_felix_calc import NODE, update, wep

NAME = "WorkloadEndpoint default/node1-k8s-a-eth0"


def pair(**spec: Any) -> tuple[ResourceKey, WorkloadEndpoint]:
    """A pod's endpoint under its key."""
    key, value = update(NAME, wep("a", **spec))
    assert isinstance(key, ResourceKey)
    assert isinstance(value, WorkloadEndpoint)
    return key, value


KEY, VALUE = pair()
OTHER = pair(mac="02:00:00:00:00:02")[1]


def line(value: object = VALUE, key: object = str(KEY)) -> bytes:
    """What cnid sends."""
    return b'{"key": %s, "value": %s}\n' % (json.dumps(key).encode(), codec.encode(value))


def interfaces(calculation: Calculation) -> list[str]:
    """Those of wanted endpoints."""
    return [one.interface for one in calculation.desired().endpoints]


def test_a_hint_is_the_same_as_the_stored_value() -> None:
    """The picture made of a hint is the one made of the stored value; that confirms it in place."""
    hinted, stored = Calculation(NODE, {}), Calculation(NODE, {})
    assert hinted.hint(KEY, VALUE) is True
    stored.on_update(KEY, VALUE)
    before = hinted.desired().endpoints
    assert before == stored.desired().endpoints
    hinted.on_update(KEY, VALUE)
    assert hinted.desired() == stored.desired()
    assert hinted.desired().endpoints is before, "nothing downstream has to work again"
    assert hinted.end_hint(KEY) is False


def test_the_datastore_wins_whatever_it_says() -> None:
    """Another value replaces a hint, a deletion (or a value that cannot be read) ends it."""
    for said in (OTHER, None):
        calculation = Calculation(NODE, {})
        calculation.hint(KEY, VALUE)
        calculation.on_update(KEY, said)
        fresh = Calculation(NODE, {})
        fresh.on_update(KEY, said)
        assert calculation.desired() == fresh.desired()
        assert calculation.hint_count == 0


def test_a_hint_never_stands_against_a_stored_value() -> None:
    """Nobody can tell which of the two is newer."""
    calculation = Calculation(NODE, {})
    calculation.on_update(KEY, OTHER)
    with pytest.raises(HintRefused, match="another value is stored"):
        calculation.hint(KEY, VALUE)
    assert calculation.hint(KEY, OTHER) is False
    assert calculation.desired().endpoints[0].mac == OTHER.spec.mac


def test_a_hint_of_another_node_is_refused() -> None:
    """A node enforces its own endpoints only."""
    with pytest.raises(HintRefused, match="on node node1"):
        Calculation("node2", {}).hint(KEY, VALUE)


VALUES = {"value": VALUE, "other": OTHER, "gone": None}


@settings(deadline=None)
@given(st.lists(st.sampled_from(["hint value", "hint other", "end", *VALUES]), max_size=12))
def test_after_the_datastore_spoke_hints_leave_no_trace(steps: list[str]) -> None:
    """Whatever was hinted before, once a key was stored or deleted the picture is the store's."""
    calculation, fresh = Calculation(NODE, {}), Calculation(NODE, {})
    last: WorkloadEndpoint | None = None
    for step in [*steps, "end"]:
        match step.split():
            case ["hint", word]:
                value = VALUES[word]
                assert value is not None
                with suppress(HintRefused):
                    calculation.hint(KEY, value)
            case ["end"]:
                calculation.end_hint(KEY)
            case [word]:
                last = VALUES[word]
                calculation.on_update(KEY, last)
        calculation.desired()
    fresh.on_update(KEY, last)
    assert calculation.desired() == fresh.desired()


class Node:
    """The socket of a felix that is in sync, without a data plane."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "run" / "felix.sock"
        self.calculation = Calculation(NODE, {})
        self.source = Source(self.calculation, Kick(), Health())
        self.source.on_in_sync()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        task = asyncio.ensure_future(Handoff(self.source).serve(self.path))
        try:
            await eventually(self.path.exists)
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def ask(self, *lines: bytes) -> list[dict[str, Any]]:
        """What is answered on one connection; nothing, if it is closed before all was read."""
        reader, writer = await asyncio.open_unix_connection(self.path)
        answers = b""
        with suppress(ConnectionError):
            writer.write(b"".join(lines))
            writer.write_eof()
            answers = await reader.read()
        writer.close()
        return [json.loads(answer) for answer in answers.splitlines()]


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """See Node."""
    return Node(tmp_path)


def test_a_source_without_a_mark_touches_no_file() -> None:
    """Nowhere to note trials is no path at all, least of all a device that everybody needs."""
    before = Path(os.devnull).stat()
    source = Source(Calculation(NODE, {}), Kick(), Health())
    source.on_in_sync()
    after = Path(os.devnull).stat()
    assert (before.st_ino, before.st_rdev) == (after.st_ino, after.st_rdev)


async def test_the_socket_takes_lines_and_answers_each(node: Node) -> None:
    """Several on a connection, in order; root only; a socket left behind is replaced."""
    node.path.parent.mkdir()
    node.path.touch()
    async with node.serving():
        await eventually(lambda: stat.S_ISSOCK(node.path.stat().st_mode))
        assert stat.S_IMODE(node.path.stat().st_mode) == 0o600
        answers = await node.ask(line(), line(), b"nonsense\n", line(None), line(None))
        assert [answer.get("ok") for answer in answers] == [True, True, None, True, True]
        assert interfaces(node.calculation) == []
        await node.ask(line())
        assert interfaces(node.calculation) == ["calia"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"\n",
        b"{}\n",
        b"\xff\xfe\n",
        b"[" * 60_000 + b"\n",
        b'{"key": "/calico/resources/v3/projectcalico.org/nodes/n", "value": {}}\n',
        b'{"key": "/nowhere", "value": {}}\n',
        line(key="/calico/resources/v3/projectcalico.org/workloadendpoints/default/another"),
        line({"kind": "WorkloadEndpoint", "metadata": {}, "spec": {}}),
        line(pair(interfaceName="x" * 15)[1]).replace(b"xxx", b"x" * 70_000),
        b'{"key": "half a mess',
    ],
)
async def test_garbage_does_no_harm(node: Node, garbage: bytes) -> None:
    """It is answered (if anybody still listens), changes nothing, and the next one is served."""
    node.source.on_updates([Update(KEY, OTHER)])
    before = node.calculation.desired()
    async with node.serving():
        for answer in await node.ask(garbage):
            assert "error" in answer
        assert node.calculation.desired() is before
        assert await node.ask(line(OTHER)) == [{"ok": True}]


async def test_too_many_connections_and_hints(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are bounded; who comes later is told, and served when others left."""
    monkeypatch.setattr(handoff, "MOST_CONNECTIONS", 3)
    monkeypatch.setattr(handoff, "MOST_HINTS", 1)
    async with node.serving():
        held = [await asyncio.open_unix_connection(node.path) for _ in range(3)]
        for reader, writer in held:
            writer.write(b"x\n")
            await reader.readline()
        assert {"ok": True} not in await node.ask(line())
        assert node.calculation.hint_count == 0
        for _, writer in held:
            writer.close()

        async with asyncio.timeout(10):
            while await node.ask(line()) != [{"ok": True}]:
                pass
        key, value = update("WorkloadEndpoint default/node1-k8s-b-eth0", wep("b"))
        assert "hints stand already" in (await node.ask(line(value, str(key))))[0]["error"]


async def test_a_hint_that_is_not_stored_ends_by_itself(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that was stored meanwhile stays when its time has come."""
    monkeypatch.setattr(handoff, "KEEP_S", 0.05)
    other_key, other = update("WorkloadEndpoint default/node1-k8s-b-eth0", wep("b"))
    async with node.serving():
        await node.ask(line(), line(other, str(other_key)))
        assert interfaces(node.calculation) == ["calia", "calib"]
        node.source.on_updates([Update(other_key, other)])
        await eventually(lambda: interfaces(node.calculation) == ["calib"])
        assert node.calculation.hint_count == 0


async def test_no_hint_before_the_datastore_is_in_sync(tmp_path: Path) -> None:
    """Earlier nobody knows what is stored."""
    node = Node(tmp_path)
    node.source.in_sync.clear()
    async with node.serving():
        assert "not in sync" in (await node.ask(line()))[0]["error"]
    assert interfaces(node.calculation) == []
