"""When ExaBGP is told to reload, and when to start anew, against one that ignores reloads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from bgpd import exabgp_reload
from bgpd.exabgp_link import Reply
from bgpd.exabgp_reload import RELOADS_BEFORE_RESTART, Reloader, is_accepted
from cymric.runtime.pacing import Backoff
from tests.support.eventually import eventually

HEADER = "# cymric-listen 0.0.0.0 179\n# cymric-peer 192.0.2.2 cymric-{label}\n"


class Quiet:
    """Peers of whom nothing is in flight."""

    def leave(self, peers: Iterable[str]) -> None:
        """Nobody is told anything."""

    def is_settled(self, peers: Iterable[str]) -> bool:
        return True

    def pause(self) -> None:
        """Nothing is commanded anyway."""

    def is_quiet(self) -> bool:
        return True

    def resume(self) -> None:
        """Nothing was held back."""


class Deaf:
    """An ExaBGP that answers `done` to every reload and, at first, does nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.running = ""
        self.reloads = 0
        self.restarts = 0

    async def ask(self, command: str, *, alone: bool = False) -> Reply:
        if command == "reload":
            assert alone
            self.reloads += 1
            return Reply(ok=True)
        if not self.running:
            return Reply(ok=True)
        return Reply(True, ("neighbor 192.0.2.2 {", f'  description "{self.running}";', "}"))

    def restart(self) -> None:
        self.restarts += 1
        self.running = self.path.read_text().split()[-1]


@pytest.fixture
def reload_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], Reloader]:
    monkeypatch.setattr(exabgp_reload, "POLL_S", 0.001)
    monkeypatch.setattr(exabgp_reload, "EFFECT_S", 0.0)
    path = tmp_path / "exabgp.conf"
    path.write_text(HEADER.format(label=1))
    exabgp = Deaf(path)

    def made(accepted: bool) -> Reloader:
        async def accepts(_path: Path) -> bool:
            return accepted

        reloader = Reloader(path, exabgp.ask, Quiet(), restart=exabgp.restart, is_accepted=accepts)
        reloader._backoff = Backoff(first_s=0.001, most_s=0.001)
        reloader.exabgp = exabgp  # type: ignore[attr-defined]
        return reloader

    return made


async def test_a_reload_that_never_works_ends_in_a_restart(
    reload_of: Callable[[bool], Reloader],
) -> None:
    """After some reloads without effect a new process is asked for, once, and that is the end."""
    reloader = reload_of(True)
    exabgp: Deaf = reloader.exabgp  # type: ignore[attr-defined]
    following = asyncio.create_task(reloader.run())
    await eventually(lambda: exabgp.restarts, 30)
    await eventually(lambda: reloader.status.running == {"192.0.2.2": "cymric-1"}, 30)
    following.cancel()
    assert (exabgp.reloads, exabgp.restarts) == (RELOADS_BEFORE_RESTART, 1)
    assert reloader.status.restarts == 1


async def test_exabgp_is_not_restarted_into_a_file_it_refuses(
    reload_of: Callable[[bool], Reloader],
) -> None:
    """It would not come back, and with it no session; what runs goes on, and reloads are tried."""
    reloader = reload_of(False)
    exabgp: Deaf = reloader.exabgp  # type: ignore[attr-defined]
    following = asyncio.create_task(reloader.run())
    await eventually(lambda: exabgp.reloads > 2 * RELOADS_BEFORE_RESTART, 30)
    following.cancel()
    assert exabgp.restarts == 0


async def test_the_real_exabgp_judges_the_file(tmp_path: Path) -> None:
    """Its own validation says whether a new process could read the file."""
    golden = Path(__file__).parents[1] / "golden" / "exabgp.conf"
    broken = tmp_path / "broken.conf"
    broken.write_text(golden.read_text() + "neighbor 192.0.2.9 {\n  nonsense 1;\n}\n")
    assert await is_accepted(golden)
    assert not await is_accepted(broken)


class Busy(Quiet):
    """Peers with changes in flight until somebody has waited for a while, having paused them."""

    def __init__(self) -> None:
        self.is_paused = False
        self.waits = 0

    def pause(self) -> None:
        self.is_paused = True

    def is_quiet(self) -> bool:
        self.waits += 1
        return self.is_paused and self.waits > 3

    def resume(self) -> None:
        self.is_paused = False


async def test_a_reload_waits_until_nothing_is_in_flight(tmp_path: Path) -> None:
    """Commands pause and what is in flight settles before `reload`; stock ExaBGP would drop it."""
    path = tmp_path / "exabgp.conf"
    path.write_text(HEADER.format(label=1))
    peers, exabgp = Busy(), Deaf(path)
    at_reload: list[tuple[bool, bool]] = []

    async def ask(command: str, *, alone: bool = False) -> Reply:
        if command == "reload":
            at_reload.append((peers.is_paused, peers.waits > 3))
            exabgp.running = path.read_text().split()[-1]
        return await exabgp.ask(command, alone=alone)

    async def accepts(_path: Path) -> bool:
        return True

    reloader = Reloader(path, ask, peers, restart=exabgp.restart, is_accepted=accepts)
    running = asyncio.create_task(reloader.run())
    try:
        await eventually(lambda: reloader.status.running == reloader.status.wanted != {}, 30)
    finally:
        running.cancel()
    assert at_reload == [(True, True)]
    assert not peers.is_paused
