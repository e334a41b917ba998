"""Two whole nodes, ExaBGP on both sides: what BIRD does not show about our own restarts."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from cymric.datastore.memory import MemoryDatastore
from cymric.model.peering import PeeringInputs, peering_of
from tests.fv.speaker_lab import OUR_ADDRESS
from tests.fv.test_bgpd_routes import OTHER, OTHER_BLOCK, OWN_BLOCK, THIRD, Lab, monitored
from tests.support.eventually import eventually
from tests.support.routing import block, node, pool, store

pytestmark = [pytest.mark.root]

NODES = {"us": node("us", f"{OUR_ADDRESS}/20"), "other": node("other", f"{OTHER}/20")}


class Node(Lab):
    """One node of a mesh; `first` is None for the one that brings the bridge."""

    def __init__(self, directory: Path, node_name: str, first: Node | None = None) -> None:
        self.node_name = node_name
        self._first = first
        directory.mkdir()
        super().__init__(directory, name=first.name if first else f"cyrib-{secrets.token_hex(2)}")

    def __post_init__(self) -> None:
        if self._first is None:
            super().__post_init__()
        else:
            self._first.attach("other", OTHER)
            self.run_directory = self.directory / "run"
            self.run_directory.mkdir()
            self.configuration = self.run_directory / "exabgp.conf"
            self.socket = self.run_directory / "speaker.sock"
        inputs = PeeringInputs(nodes=NODES, peers={}, configurations={})
        self.write_configuration(*peering_of(self.node_name, inputs).sessions)

    def _in(self, name: str) -> tuple[str, ...]:
        return super()._in(self.node_name if name == "us" else name)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    us = Node(tmp_path / "us", "us")
    try:
        other = Node(tmp_path / "other", "other", us)
        try:
            yield us, other
        finally:
            other.close()
    finally:
        us.close()


async def test_two_nodes_and_their_restarts(nodes: tuple[Node, Node]) -> None:
    """Each has the other's block in the kernel. One bgpd dies and returns, then its ExaBGP: on
    neither node a route that is still wanted leaves the kernel, and what was given up meanwhile
    does.
    """
    us, other = nodes
    us.store = other.store = MemoryDatastore()
    await store(us.store, *NODES.values(), pool())
    await store(us.store, block(OWN_BLOCK, "us"), block(OTHER_BLOCK, "other"))
    await store(us.store, block(THIRD, "other"))
    speaker = us.exabgp()
    other.exabgp()
    everything = {OWN_BLOCK, OTHER_BLOCK, THIRD}
    async with other.bgpd():
        async with us.bgpd():
            await eventually(lambda: us.kernel().keys() == everything, 30)
            await eventually(lambda: other.kernel().keys() == everything, 30)
        with monitored(us) as deleted_here, monitored(other) as deleted_there:
            await store(us.store, block(THIRD, None))
            await eventually(lambda: THIRD not in other.kernel())
            assert us.kernel().keys() == everything
            async with us.bgpd():
                await eventually(lambda: us.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK}, 30)
                speaker.kill()
                speaker.wait()
                await eventually(lambda: _has(us, "start"))
                us.exabgp()
                await eventually(lambda: _has(us, "up"), 60)
                await eventually(lambda: _has(us, "", "stale_until"), 30)
                assert us.kernel().keys() == other.kernel().keys() == {OWN_BLOCK, OTHER_BLOCK}
        assert deleted_here() == {THIRD}
        assert deleted_there() == set()


async def _has(lab: Lab, value: str, word: str = "state") -> bool:
    peers = (await lab.status())["peers"]
    assert isinstance(peers, list)
    return [one[word] for one in peers] == [value]
