"""What stands between an Adj-RIB-Out and its peer: felix after a boot, and a drain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from bgpd.announcement import Announcement, PathAttributes
from bgpd.drain import MOVE_S, Drain, Phase, Role, Wish, marked
from bgpd.outgoing import Outgoing, Sight
from cymric.runtime import boot_mark
from cymric.runtime.boot_mark import is_marked, write_mark
from cymric.runtime.settings import Settings
from tests.support.eventually import eventually

PEER, OTHER = "198.19.0.3", "198.19.0.4"
SERVICE = Announcement("10.96.0.0/12", "198.19.0.2", PathAttributes(local_pref=100))
ROUTES = {SERVICE.prefix: SERVICE}


class Speaker:
    """Remembers what it was told, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Mapping[str, Announcement]]] = []
        self.changes: list[dict[str, Announcement | None]] = []

    def advertise(self, peer: str, routes: Mapping[str, Announcement]) -> None:
        self.calls.append((peer, dict(routes)))

    def advertise_changes(self, peer: str, changes: Mapping[str, Announcement | None]) -> None:
        assert self.calls, "changes of nothing"
        whole = {**next(dict(said) for to, said in reversed(self.calls) if to == peer), **changes}
        self.changes.append(dict(changes))
        self.calls.append((peer, {p: one for p, one in whole.items() if one is not None}))


@pytest.fixture
def speaker() -> Speaker:
    return Speaker()


@pytest.fixture
def outgoing(speaker: Speaker) -> Outgoing:
    return Outgoing(speaker.advertise, role=lambda _: Role.SERVICE)


def test_a_mark_holds_for_this_boot_and_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mark is seen; one of another boot, of another namespace, or broken, is none."""
    path = tmp_path / "run" / "felix.ready"
    assert not is_marked(path)
    write_mark(path)
    assert is_marked(path)
    other_boot = tmp_path / "boot_id"
    other_boot.write_text("another\n")
    monkeypatch.setattr(boot_mark, "BOOT_ID", other_boot)
    assert not is_marked(path)
    monkeypatch.undo()
    monkeypatch.setattr(boot_mark, "NAMESPACE", other_boot)
    assert not is_marked(path)
    monkeypatch.undo()
    path.write_bytes(b"\xff\xfe")
    assert not is_marked(path)


async def test_nothing_is_said_before_felix(
    tmp_path: Path, speaker: Speaker, outgoing: Outgoing
) -> None:
    """After a boot the speaker is told nothing at all, not even an empty set, until felix marks
    its data plane as up; then it is told what is wanted by then.
    """
    settings = Settings(node_name="us", run_dir=tmp_path)
    async with running(outgoing, settings):
        outgoing.want(PEER, {})
        outgoing.want(PEER, ROUTES)
        await asyncio.sleep(0.05)
        assert speaker.calls == []
        assert "felix" in outgoing.state["waits_for"]
        write_mark(settings.felix_mark)
        await eventually(lambda: speaker.calls == [(PEER, ROUTES)], 30)
        assert outgoing.state["waits_for"] == ""


async def test_patience_ends(tmp_path: Path, speaker: Speaker, outgoing: Outgoing) -> None:
    """A felix that never comes up does not keep the node silent for ever."""
    outgoing.want(PEER, ROUTES)
    settings = Settings(node_name="us", run_dir=tmp_path, announce_wait_s=0.1)
    async with running(outgoing, settings):
        await eventually(lambda: speaker.calls == [(PEER, ROUTES)], 30)


async def test_a_restart_of_bgpd_alone_waits_for_nothing(
    tmp_path: Path, speaker: Speaker, outgoing: Outgoing
) -> None:
    """The mark of this boot is there, whether or not felix runs just now."""
    settings = Settings(node_name="us", run_dir=tmp_path)
    write_mark(settings.felix_mark)
    outgoing.want(PEER, ROUTES)
    running_now = outgoing.run(settings, lambda: Sight(wish=Wish.NONE, told_by_peer={}))
    running_now.send(None)  # up to its first pause, which comes after opening
    running_now.close()
    assert speaker.calls == [(PEER, ROUTES)]


def test_a_drain_from_beginning_to_end(speaker: Speaker, outgoing: Outgoing) -> None:
    """Marked, then withdrawn when the peer was told and had its time, then as ever again; a peer
    hears each change of phase once.
    """
    outgoing.open()
    outgoing.want(PEER, ROUTES)
    phases: list[Phase] = []

    def look(now_s: float, wish: Wish = Wish.SERVICES, told: tuple[int, int] = (1, 1)) -> None:
        sight = Sight(wish=wish, told_by_peer={PEER: told})
        outgoing.step(sight, now_s, lambda drain: phases.append(drain.phase))

    look(0.0, told=(1, 0))
    look(1.0, told=(1, 0))
    look(2.0)
    outgoing.want(PEER, dict(ROUTES))
    outgoing.want(OTHER, ROUTES)
    look(2.0 + MOVE_S)
    look(3.0 + MOVE_S)
    look(90.0)
    look(91.0, wish=Wish.NONE)
    look(92.0, wish=Wish.NONE)
    assert phases == [Phase.MARKING, Phase.LEAVING, Phase.LEFT, Phase.NONE]
    mark = {SERVICE.prefix: marked(SERVICE)}
    assert [routes for peer, routes in speaker.calls if peer == PEER] == [
        *(ROUTES, mark, mark),  # what the router says is never held back, not even a repetition
        *({}, ROUTES),
    ]
    assert [routes for peer, routes in speaker.calls if peer == OTHER] == [mark, {}, ROUTES]


def test_a_block_that_becomes_empty_meanwhile(speaker: Speaker) -> None:
    """Before a reboot a block goes as soon as its last pod has gone, without any other change."""
    empty: set[str] = set()
    outgoing = Outgoing(speaker.advertise, role=lambda _: Role.BLOCK, is_empty=empty.__contains__)
    outgoing.open()
    outgoing.want(PEER, ROUTES)
    sight = Sight(wish=Wish.REBOOT, told_by_peer={PEER: (1, 1)})
    for now_s in (0.0, 1.0, 2.0 + MOVE_S, 3.0 + MOVE_S):
        outgoing.step(sight, now_s)
    assert outgoing.drain.phase is Phase.LEFT
    assert outgoing.told(PEER) == {SERVICE.prefix: marked(SERVICE)}
    empty.add(SERVICE.prefix)
    outgoing.step(sight, 60.0)
    assert outgoing.told(PEER) == {}


def test_a_wish_that_is_not_understood(outgoing: Outgoing) -> None:
    """It changes nothing and is shown."""
    outgoing.open()
    outgoing.step(Sight(wish=Wish.NONE, told_by_peer={}, complaint="'hurry' is no wish"), 0.0)
    assert outgoing.state["complaint"] == "'hurry' is no wish"
    assert outgoing.drain == Drain()


def test_peers_that_are_gone_are_forgotten(speaker: Speaker, outgoing: Outgoing) -> None:
    """They are not told of phases, and told anew when they return."""
    outgoing.open()
    outgoing.want(PEER, ROUTES)
    outgoing.keep({})
    outgoing.step(Sight(wish=Wish.SERVICES, told_by_peer={}), 0.0)
    assert len(speaker.calls) == 1
    outgoing.want(PEER, ROUTES)
    assert len(speaker.calls) == 2


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ("services left", {}),
        ("services leaving", {SERVICE.prefix: marked(SERVICE)}),
        ("reboot left", {SERVICE.prefix: marked(SERVICE)}),
        ("", {SERVICE.prefix: marked(SERVICE)}),
    ],
)
async def test_a_start_while_drained(
    tmp_path: Path,
    speaker: Speaker,
    outgoing: Outgoing,
    stored: str,
    expected: dict[str, Announcement],
) -> None:
    """Not for a moment does a node that starts drained announce a service as ever; one that had
    left stays away.
    """
    settings = Settings(node_name="us", run_dir=tmp_path, announce_wait_s=0)
    outgoing.want(PEER, ROUTES)
    sight = Sight(wish=Wish.SERVICES, told_by_peer={PEER: (1, 0)}, stored=stored)
    async with running(outgoing, settings, sight):
        await eventually(lambda: bool(speaker.calls), 30)
        assert speaker.calls == [(PEER, expected)]


async def test_a_state_that_is_over_is_told(
    tmp_path: Path, speaker: Speaker, outgoing: Outgoing
) -> None:
    """A wish that was taken back while nobody ran: what is stored of it is corrected."""
    settings = Settings(node_name="us", run_dir=tmp_path, announce_wait_s=0)
    told: list[Drain] = []
    sight = Sight(wish=Wish.NONE, told_by_peer={}, stored="services left")
    task = asyncio.create_task(outgoing.run(settings, lambda: sight, told.append))
    try:
        await eventually(lambda: told == [Drain()], 30)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_it_is_followed(tmp_path: Path, speaker: Speaker, outgoing: Outgoing) -> None:
    """What the sight says takes effect by itself."""
    settings = Settings(node_name="us", run_dir=tmp_path, announce_wait_s=0)
    outgoing.want(PEER, ROUTES)
    sights = [Sight(wish=Wish.NONE, told_by_peer={})]
    task = asyncio.create_task(outgoing.run(settings, lambda: sights[-1]))
    try:
        await eventually(lambda: speaker.calls == [(PEER, ROUTES)], 30)
        sights.append(Sight(wish=Wish.SERVICES, told_by_peer={PEER: (1, 1)}))
        await eventually(lambda: len(speaker.calls) == 2, 30)
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


NO_WISH = Sight(wish=Wish.NONE, told_by_peer={})


@asynccontextmanager
async def running(
    outgoing: Outgoing, settings: Settings, sight: Sight = NO_WISH
) -> AsyncIterator[None]:
    task = asyncio.create_task(outgoing.run(settings, lambda: sight))
    try:
        yield
        if task.done():
            task.result()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("wish", [Wish.NONE, Wish.REBOOT])
def test_changes_end_as_the_whole_would(speaker: Speaker, wish: Wish) -> None:
    """A changed prefix alone is told, as a drain makes it; before anything may be said, nothing."""
    outgoing = Outgoing(
        speaker.advertise,
        advertise_changes=speaker.advertise_changes,
        role=lambda _: Role.SERVICE,
    )
    block = Announcement("198.19.16.0/26", "198.19.0.2", PathAttributes(local_pref=100))
    routes = dict(ROUTES)
    outgoing.want(PEER, routes)
    outgoing.want_changes(PEER, routes, {})
    assert not speaker.calls
    outgoing.drain = Drain(wish, Phase.MARKING if wish is Wish.REBOOT else Phase.NONE)
    outgoing.open()
    routes[block.prefix] = block
    outgoing.want_changes(PEER, routes, {block.prefix: block})
    del routes[SERVICE.prefix]
    outgoing.want_changes(PEER, routes, {SERVICE.prefix: None})
    said = marked(block) if wish is Wish.REBOOT else block
    assert speaker.changes == [{block.prefix: said}, {SERVICE.prefix: None}]
    assert speaker.calls[-1] == (PEER, {block.prefix: said})
    assert outgoing.told(PEER) == {block.prefix: said}
