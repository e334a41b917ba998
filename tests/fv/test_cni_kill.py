"""cnid killed again and again while containers start, others borrow, and a dead node is collected.

All on one real etcd, with a pool that is too small for every node to have blocks of its own:

    cnid of node-a      twenty ADDs at once, killed half way, started again
    node-b              assigns and releases all the time, in a process of its own
    node-c              is dead, and owns a block that others borrow from when it is collected
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from cymric.model.keys import ResourceKey
from cymric.model.resources import IPPool, IPPoolSpec, Node, ObjectMeta
from ipam.asking import Ask
from ipam.client import IPAM
from tests.support.cni_node import BIN, Answer, CniNode, Pod, finished, node_with_etcd
from tests.support.datastore import client
from tests.support.eventually import eventually_now
from tests.support.ipam_process import told
from tests.support.ipam_world import assert_consistent, everything

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
POOL, BLOCK_SIZE = "198.19.16.0/26", 28
PODS = 20
KILLED_AT = (1, 7, 14)
"""How many endpoints are stored when cnid is killed, in each round."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[CniNode]:
    with node_with_etcd(tmp_path) as made:
        pool = IPPool(
            metadata=ObjectMeta(name="pods"), spec=IPPoolSpec(cidr=POOL, block_size=BLOCK_SIZE)
        )
        made.put(ResourceKey("IPPool", "pods"), pool)
        for name in ("node-b", "node-c"):
            made.put(ResourceKey("Node", name), Node(metadata=ObjectMeta(name=name)))
        yield made


@contextmanager
def borrowing(node: CniNode) -> Iterator[None]:
    """Node-b at work. It has to end well, and what it was told is what is stored."""
    journal = node.directory / "node-b"
    journal.touch()
    command = [sys.executable, "-m", "tests.support.ipam_process", node.etcd.endpoint, "node-b"]
    with (node.directory / "node-b.log").open("ab") as log:
        process = subprocess.Popen([*command, journal], cwd=ROOT, stdout=log, stderr=log)
    try:
        eventually_now(lambda: journal.stat().st_size > 500, 30, what="node-b works")
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, (node.directory / "node-b.log").read_text()
    finally:
        process.kill()
        process.wait(10)
    stored = {handle: a for handle, a in held(node).items() if handle.startswith("net.")}
    assert stored == told(journal.read_text())


def held(node: CniNode) -> dict[str, set[str]]:
    """Addresses by handle, after a look at everything that must hold between keys."""

    async def look() -> dict[str, set[str]]:
        store = client(node.etcd.endpoint)
        try:
            stored = await everything(store)
        finally:
            await store.close()
        return {handle: set(found) for handle, found in assert_consistent(stored).items()}

    return asyncio.run(look())


def die(node: CniNode) -> None:
    """Node-c gets three addresses, and with them a block, and is no more."""

    async def assign() -> None:
        store = client(node.etcd.endpoint)
        try:
            for number in range(3):
                ask = Ask(handle=f"c-{number}", attributes={"node": "node-c"}, ipv4=1)
                await IPAM(store).grant("node-c", ask)
        finally:
            await store.close()

    asyncio.run(assign())
    node.etcd.etcdctl("del", str(ResourceKey("Node", "node-c")))


def cymric(node: CniNode, *words: str) -> None:
    """A command that has to succeed."""
    environment = {**os.environ, **node.settings}
    subprocess.run([BIN / "cymric", *words], env=environment, check=True, capture_output=True)


def start_all(
    node: CniNode, pods: list[Pod], command: str = "ADD"
) -> list[subprocess.Popen[bytes]]:
    return [node.begin(command, pod) for pod in pods]


def all_finished(pods: list[Pod], calls: list[subprocess.Popen[bytes]]) -> dict[str, Answer]:
    """The answers by container id."""
    return {pod.container_id: finished(call) for pod, call in zip(pods, calls, strict=True)}


def stored_endpoints(node: CniNode, count: int) -> bool:
    return len(node.endpoints) >= count


def assert_theirs(node: CniNode, answers: dict[str, Answer]) -> None:
    """Whoever was told of an address holds it, alone, on an endpoint."""
    by_handle = held(node)
    theirs = {id: answer.address for id, answer in answers.items() if answer.code == 0}
    assert len(set(theirs.values())) == len(theirs)
    stored = {e["spec"]["containerID"]: e["spec"]["ipNetworks"] for e in node.endpoints.values()}
    for container, address in theirs.items():
        assert by_handle[f"pod-network.{container}"] == {address}
        assert stored[container] == [f"{address}/32"]


def test_kill_nine(node: CniNode) -> None:
    """Whatever was cut short is finished or undone, nobody shares an address, nothing leaks."""
    die(node)
    node.start()
    pods = [node.pod(f"{number:04x}beefbeef{number:04x}") for number in range(PODS)]
    with borrowing(node):
        for place, stored in enumerate(KILLED_AT):
            calls = start_all(node, pods)
            eventually_now(partial(stored_endpoints, node, stored), 30, what="some are stored")
            node.stop(kill=True)
            answers = all_finished(pods, calls)
            assert {a.tree["code"] for a in answers.values() if a.code} <= {11}
            assert_theirs(node, answers)
            node.start()
            if place == 0:
                cymric(node, "ipam", "gc", "--dead-nodes")  # what node-c left
            eventually_now(lambda: not list(node.journal.iterdir()), 30, what="all is undone")
            # A runtime asks again for what failed; here for what succeeded, too.
            again = all_finished(pods, start_all(node, pods))
            assert [a.tree for a in again.values() if a.code] == []
            assert [a for id, a in answers.items() if a.code == 0 and again[id] != a] == []
            assert_theirs(node, again)
            assert {a.code for a in all_finished(pods, start_all(node, pods, "DEL")).values()} == {
                0
            }
            assert (node.endpoints, node.interfaces) == ({}, set())
    assert {handle for handle in held(node) if not handle.startswith("net.")} == set()


def test_a_pool_goes(node: CniNode) -> None:
    """A pool that goes while its addresses are in use takes none of them away, and gives none."""
    node.start()
    pods = [node.pod(f"{number:04x}beefbeef{number:04x}") for number in range(4)]
    with borrowing(node):
        answers = all_finished(pods, start_all(node, pods))
        assert {a.code for a in answers.values()} == {0}
        cymric(node, "delete", "ippool", "pods")
        node.stop(kill=True)
        node.start()
        assert_theirs(node, answers)
        assert all_finished(pods, start_all(node, pods)) == answers
        refused = node.call("ADD", node.pod("ffffbeefbeefffff"))
        assert (refused.code, refused.tree["code"]) == (1, 100)
        assert {a.code for a in all_finished(pods, start_all(node, pods, "DEL")).values()} == {0}
    assert {handle for handle in held(node) if not handle.startswith("net.")} == set()
