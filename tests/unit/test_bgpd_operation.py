"""bgpd as operators meet it: waiting for felix after a boot, drained, asked for what it does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from prometheus_client import REGISTRY

from bgpd import drain
from bgpd import outgoing as outgoing_module
from bgpd.announcement import IPV4_UNICAST
from bgpd.drain import GRACEFUL_SHUTDOWN
from bgpd.listings import ROWS_AT_ONCE
from bgpd.metrics import measure_once
from bgpd.outgoing import Outgoing
from bgpd.router import Router
from bgpd.session_log import SessionLog
from bgpd.speaker import NotificationReceived, SessionDown, SessionUp, SpeakerConnected
from cymric.cli.node_drain import drain_node, undrain_node
from cymric.cli.objects import ObjectError
from cymric.datastore.api import Delete, Put, Transaction
from cymric.datastore.syncer import Update
from cymric.model.keys import ResourceKey
from cymric.runtime.boot_mark import write_mark
from tests.support.eventually import eventually
from tests.support.routing import block, configuration, endpoint, node, pool, store
from tests.unit.test_bgpd_daemon import OTHER, OWN, THEIRS, Node

SERVICES = "10.96.0.0/12"
US_KEY = str(ResourceKey("Node", "us"))


@pytest.fixture
async def us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """Node `us` with a block and one mesh peer; a drain gives peers a short time to move."""
    monkeypatch.setattr(drain, "MOVE_S", 0.1)
    monkeypatch.setattr(outgoing_module, "FOLLOW_EVERY_S", 0.05)
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


async def test_services_leave_and_pods_stay(us: Node) -> None:
    """Without a reboot in sight the range of services is marked and then withdrawn; the block is
    told as ever all the time. A bgpd that restarts meanwhile changes nothing of it.
    """
    services = configuration(serviceClusterIPs=[{"cidr": SERVICES}])
    await store(us.store, services)
    async with us.running():
        us.up()
        await eventually(lambda: us.heard(OTHER) == {OWN, SERVICES}, 30)
        assert not is_marked(us, SERVICES)
        await wish(us, "services")
        await eventually(lambda: us.heard(OTHER) == {OWN}, 30)
        assert not is_marked(us, OWN)
        await eventually(lambda: _is(told_phase(us), "services left"), 30)
    us.speaker.advertised.clear()
    async with us.running():
        await eventually(lambda: us.heard(OTHER) == {OWN}, 30)
        await wish(us, None)
        await eventually(lambda: us.heard(OTHER) == {OWN, SERVICES}, 30)
        assert not is_marked(us, SERVICES)


async def test_the_command_line_drains_a_node(us: Node, capsys: pytest.CaptureFixture[str]) -> None:
    """`drain --for-reboot` ends with "safe to reboot" when peers were told and no pod is left, and
    `undrain` when the node advertises as ever.
    """
    await store(us.store, endpoint("web", "us", "198.19.16.5"))
    async with us.running():
        us.up()
        await eventually(lambda: us.heard(OTHER) == {OWN}, 30)
        draining = asyncio.create_task(drain_node(us.store, "us", "reboot", 60.0))
        await eventually(lambda: _is(told_phase(us), "reboot left"), 30)
        assert is_marked(us, OWN)
        with pytest.raises(ObjectError, match="not safe to reboot us: 1 workload endpoints"):
            await drain_node(us.store, "us", "reboot", 0.01)
        assert not draining.done()
        await us.store.commit(Transaction((), [_delete_web()]))
        await draining
        assert "Safe to reboot us" in capsys.readouterr().out
        await undrain_node(us.store, "us", 60.0)
        assert us.heard(OTHER) == {OWN}
        assert not is_marked(us, OWN)


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


def _delete_web() -> Delete:
    key = ResourceKey("WorkloadEndpoint", "us-k8s-web-eth0", namespace="default")
    return Delete(str(key))


async def test_what_was_received_and_why_not_used(us: Node) -> None:
    """`received` lists a peer's routes with the reason for each that is not used; a peer that is
    not configured is an error.
    """
    async with us.running():
        us.up()
        us.announces(THEIRS, "192.0.2.0/24")
        await eventually(lambda: THEIRS in us.kernel, 30)
        answer = await us.ask(f"received {OTHER}")
        rejected = {row["prefix"]: row["rejected"] for row in answer["routes"]}
        assert rejected == {THEIRS: "", "192.0.2.0/24": "outside pools and service ranges"}
        assert answer["routes"][0]["next_hop"] == OTHER
        assert "no session with" in (await us.ask("received 192.0.2.1"))["error"]
        assert "no session with nobody" in (await us.ask("advertised"))["error"]


async def test_what_is_advertised_and_why(us: Node) -> None:
    """`advertised` lists what a peer should have, with attributes and the reason; `diff` counts
    how far that is so.
    """
    async with us.running():
        us.up()
        await eventually(lambda: us.heard(OTHER) == {OWN}, 30)
        (row,) = (await us.ask(f"advertised {OTHER}"))["routes"]
        assert (row["prefix"], row["why"], row["local_pref"]) == (
            OWN,
            "block of this node",
            2147482623,
        )
        await wish(us, "reboot")
        await eventually(lambda: is_marked(us, OWN), 30)
        (row,) = (await us.ask(f"advertised {OTHER}"))["routes"]
        assert (row["communities"], row["local_pref"]) == (["65535:0"], 0)
        (peer,) = (await us.ask("diff"))["peers"]
        assert (peer["wanted"], peer["desired"], peer["configured"], peer["confirmed"]) == (
            *(1, 1),
            *(1, 1),
        )
        assert peer["missing"] == 0


async def test_sessions_are_told_with_their_story(us: Node) -> None:
    """Family, uptime, flaps, limit, and the last error in words that stay after it is over."""
    async with us.running():
        us.up()
        us.announces(THEIRS)
        await eventually(lambda: THEIRS in us.kernel, 30)
        us.speaker.say(NotificationReceived(OTHER, 6, 2, "", sent=False))
        us.speaker.say(SessionDown(OTHER, "notification received (6,2)"))
        await eventually(lambda: _state(us, "start"), 30)
        (down,) = (await us.ask())["peers"]
        assert (down["flaps"], down["families"], down["uptime_s"]) == (1, [], 0)
        us.up()
        await eventually(lambda: _state(us, "up"), 30)
        (peer,) = (await us.ask())["peers"]
        assert peer["families"] == [IPV4_UNICAST]
        assert (peer["updates"], peer["flaps"], peer["limit"]) == (1, 1, 100_000)
        assert peer["uptime_s"] > 0
        assert peer["last_error"].startswith("administrative shutdown, the peer ended it")


async def _state(us: Node, state: str) -> bool:
    return [one["state"] for one in (await us.ask())["peers"]] == [state]


async def test_others_run_while_a_long_answer_is_written(us: Node) -> None:
    """A listing of many routes is whole, and gives way after every few hundred of them."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with us.running():
        us.up()
        us.announces(*(f"10.{a}.{b}.0/24" for a in range(40) for b in range(250)))
        await eventually(lambda: _received(us, 10_000), 60)
        counting = asyncio.create_task(count())
        try:
            before = turns
            answer = await us.ask(f"received {OTHER}")
            assert turns - before >= 10_000 / ROWS_AT_ONCE
        finally:
            counting.cancel()
        assert len({row["prefix"] for row in answer["routes"]}) == 10_000


async def _received(us: Node, count: int) -> bool:
    return [one["received"] for one in (await us.ask())["peers"]] == [count]


async def test_metrics_follow_the_peers(us: Node) -> None:
    """Each configured peer has its series; a peer that is removed leaves none behind."""
    router, log, outgoing = Router("us", us.speaker), SessionLog(), Outgoing(us.speaker.advertise)
    router.on_updates(
        [
            Update(ResourceKey("Node", "us"), node("us", "198.19.0.2/20")),
            Update(ResourceKey("Node", "other"), node("other", f"{OTHER}/20")),
        ]
    )
    router.on_in_sync()
    router.work()
    log.note(SessionUp(OTHER, 64512, frozenset({IPV4_UNICAST})))
    log.note(SessionDown(OTHER, "closing connection"))
    measure_once(router, us.speaker, log, outgoing)
    assert _sample("cymric_bgp_session_flaps", OTHER) == 1
    assert _sample("cymric_bgp_paths_limit", OTHER) == 100_000
    assert _sample("cymric_bgp_session_up", OTHER) == 0
    router.on_updates([Update(ResourceKey("Node", "other"), None)])
    router.work()
    measure_once(router, us.speaker, log, outgoing)
    assert _sample("cymric_bgp_session_flaps", OTHER) is None


def _sample(name: str, peer: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"peer": peer})
