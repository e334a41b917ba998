"""bgpd as operators meet it: waiting for felix after a boot, drained, asked for what it does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from bgpd import drain
from bgpd.drain import GRACEFUL_SHUTDOWN
from bgpd.speaker import SpeakerConnected
from cymric.datastore.api import Put, Transaction
from cymric.model.keys import ResourceKey
from cymric.runtime.boot_mark import write_mark
from tests.support.eventually import eventually
from tests.support.routing import block, endpoint, node, pool, store
from tests.unit.test_bgpd_daemon import OTHER, OWN, THEIRS, Node

US_KEY = str(ResourceKey("Node", "us"))


@pytest.fixture
async def us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Node `us` with a block and one mesh peer; a drain gives peers a short time to move."""
    monkeypatch.setattr(drain, "MOVE_S", 0.1)
    made = Node(tmp_path)
    await store(made.store, node("us", "198.19.0.2/20"), node("other", f"{OTHER}/20"), pool())
    await store(made.store, block(OWN, "us"), block(THEIRS, "other"))
    made.speaker.say(SpeakerConnected("1", lost_events=False))
    return made


async def wish(us: Node, value: str | None) -> None:
    """Annotate our node as an operator does, past every program, with a field nobody knows."""
    tree = await stored(us)
    annotations = tree["metadata"].setdefault("annotations", {})
    tree["spec"]["ofANewerVersion"] = {"kept": True}
    if value is None:
        del annotations[drain.ANNOTATION]
    else:
        annotations[drain.ANNOTATION] = value
    await us.store.commit(Transaction((), [Put(US_KEY, msgspec.json.encode(tree))]))


async def stored(us: Node) -> dict[str, dict[str, object]]:  # type: ignore[type-arg]
    read = await us.store.get(US_KEY)
    assert read is not None
    tree: dict[str, dict[str, object]] = msgspec.json.decode(read.value)
    return tree


async def told_phase(us: Node) -> object:
    tree = await stored(us)
    annotations = tree["metadata"].get("annotations") or {}
    assert isinstance(annotations, dict)
    return annotations.get(drain.STATUS_ANNOTATION, "")


def is_marked(us: Node, prefix: str) -> bool:
    """Whether the peer was told to take it last."""
    attributes = us.speaker.advertised[OTHER][prefix].attributes
    marked = GRACEFUL_SHUTDOWN in attributes.communities
    assert (attributes.local_pref == 0) is marked
    return marked


async def test_after_a_boot_felix_comes_first(us: Node) -> None:
    """Sessions come up and routes are learnt, but nothing is announced before felix is ready; a
    bgpd that starts again later waits for nothing.
    """
    us.settings = replace(us.settings, announce_wait_s=3600.0)
    async with us.running():
        us.up()
        us.announces(THEIRS)
        await eventually(lambda: THEIRS in us.kernel, 30)
        assert us.speaker.advertised == {}
        assert "felix" in (await us.ask())["outgoing"]["waits_for"]
        write_mark(us.settings.felix_mark)
        await eventually(lambda: us.heard(OTHER) == {OWN}, 30)
    us.speaker.advertised.clear()
    async with us.running():
        await eventually(lambda: us.heard(OTHER) == {OWN}, 30)


async def test_a_node_is_drained_and_comes_back(us: Node) -> None:
    """For a reboot: all is marked; then a block without pods goes, one with pods stays until its
    last pod has gone; without the wish all is as ever. How far it is stands at the Node, whose
    other fields are left as they are.
    """
    await store(us.store, endpoint("web", "us", "198.19.16.5"))
    async with us.running():
        us.up()
        await eventually(lambda: us.heard(OTHER) == {OWN}, 30)
        assert not is_marked(us, OWN)
        await wish(us, "reboot")
        await eventually(lambda: is_marked(us, OWN), 30)
        await eventually(lambda: _is(told_phase(us), "reboot left"), 30)
        assert us.heard(OTHER) == {OWN}
        assert (await us.ask())["outgoing"]["phase"] == "left"
        await us.store.commit(Transaction((), [_delete_web()]))
        await eventually(lambda: us.heard(OTHER) == set(), 30)
        await wish(us, None)
        await eventually(lambda: us.heard(OTHER) == {OWN}, 30)
        assert not is_marked(us, OWN)
        await eventually(lambda: _is(told_phase(us), ""), 30)
        assert (await stored(us))["spec"]["ofANewerVersion"] == {"kept": True}


async def test_a_wish_nobody_understands(us: Node) -> None:
    """It drains nothing, and status says so."""
    async with us.running():
        us.up()
        await wish(us, "hurry")
        await eventually(lambda: _complains(us), 30)
        assert us.heard(OTHER) == {OWN}
        assert not is_marked(us, OWN)


async def _complains(us: Node) -> bool:
    return "hurry" in (await us.ask())["outgoing"]["complaint"]


async def _is(value: object, expected: object) -> bool:
    assert asyncio.iscoroutine(value)
    return bool((await value) == expected)


def _delete_web() -> object:
    from cymric.datastore.api import Delete

    key = ResourceKey("WorkloadEndpoint", "us-k8s-web-eth0", namespace="default")
    return Delete(str(key))
