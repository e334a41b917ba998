"""Allocators in processes of their own on a real etcd, killed again and again."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import StartEtcd
from tests.support.datastore import client
from tests.support.eventually import eventually_now
from tests.support.ipam_process import told
from tests.support.ipam_world import assert_consistent, everything, store_node, store_pool

pytestmark = [pytest.mark.etcd, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
NODES = ("node-a", "node-b", "node-c")
KILLS = 12


class Daemon:
    """One node's process, and the journal that outlives it."""

    def __init__(self, endpoint: str, node: str, journal: Path) -> None:
        self.journal = journal
        self._log = journal.with_suffix(".log").open("ab")
        self._command = [sys.executable, "-m", "tests.support.ipam_process", endpoint, node]
        self._process: subprocess.Popen[bytes] | None = None
        journal.touch()

    def start(self) -> None:
        """A new process, at work when this returns."""
        before = self.journal.stat().st_size
        arguments = [*self._command, str(self.journal)]
        self._process = subprocess.Popen(arguments, cwd=ROOT, stdout=self._log, stderr=self._log)
        eventually_now(lambda: self.journal.stat().st_size > before + 500, 30, what="it works")

    def end(self, how: signal.Signals) -> None:
        """End it; it must have been running until now."""
        assert self._process is not None
        assert self._process.poll() is None, self.journal.with_suffix(".log").read_text()
        self._process.send_signal(how)
        code = self._process.wait(20)
        assert code == (-how if how is signal.SIGKILL else 0)
        self._process = None

    def close(self) -> None:
        """Leave nothing behind."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
        self._log.close()


@pytest.fixture
def daemons(start_etcd: StartEtcd, tmp_path: Path) -> Iterator[tuple[str, dict[str, Daemon]]]:
    """Three nodes that share a pool which is just too small for all they want."""
    endpoint = start_etcd().endpoint

    async def prepare() -> None:
        store = client(endpoint)
        for node in NODES:
            await store_node(store, node)
        await store_pool(store, "pods", "10.0.0.0/27", block_size=29)
        await store.close()

    asyncio.run(prepare())
    made = {node: Daemon(endpoint, node, tmp_path / node) for node in NODES}
    yield endpoint, made
    for daemon in made.values():
        daemon.close()


def test_kill_nine(daemons: tuple[str, dict[str, Daemon]]) -> None:
    """Killed at any moment, daemons never give an address twice and lose none for good."""
    endpoint, by_node = daemons

    async def held_in_etcd() -> dict[str, set[str]]:
        store = client(endpoint)
        try:
            return {h: set(a) for h, a in assert_consistent(await everything(store)).items()}
        finally:
            await store.close()

    for daemon in by_node.values():
        daemon.start()
    chance = random.Random(20260102)
    for _ in range(KILLS):
        victim = by_node[chance.choice(NODES)]
        victim.end(signal.SIGKILL)
        stored = asyncio.run(held_in_etcd())  # also checks that blocks and handles agree
        for handle, addresses in told(victim.journal.read_text()).items():
            assert addresses <= stored.get(handle, set()), f"{handle} lost {addresses}"
        victim.start()
    for daemon in by_node.values():
        daemon.end(signal.SIGTERM)
    expected: dict[str, set[str]] = {}
    for daemon in by_node.values():
        expected |= told(daemon.journal.read_text())
    assert asyncio.run(held_in_etcd()) == expected
    assert sum(d.journal.read_text().count("+") for d in by_node.values()) > 100
