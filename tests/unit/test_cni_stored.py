"""The node's endpoints in the datastore: writes that share transactions, and those that collide."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from cni.endpoint import Identity
from cni.stored import Endpoints
from cymric.datastore.api import Datastore, Transaction, put
from cymric.datastore.memory import MemoryDatastore
from cymric.model.codec import encode
from cymric.model.endpoints import WorkloadEndpoint, WorkloadEndpointSpec
from cymric.model.resources import ObjectMeta
from tests.support.eventually import eventually

NODE = "node-a"


class Slow(MemoryDatastore):
    """Lands nothing before `open` is set; remembers how many operations each transaction had."""

    def __init__(self) -> None:
        super().__init__()
        self.open = asyncio.Event()
        self.sizes: list[int] = []

    async def commit(self, transaction: Transaction) -> int:
        self.sizes.append(len(transaction.operations))
        await self.open.wait()
        return await super().commit(transaction)


def identity(number: int) -> Identity:
    return Identity(
        node=NODE,
        orchestrator="cni",
        namespace="default",
        workload=f"container{number}",
        endpoint="eth0",
        container_id=f"container{number}",
        host_interface=f"cali{number}",
    )


def endpoint(number: int, mac: str = "") -> WorkloadEndpoint:
    named = identity(number)
    return WorkloadEndpoint(
        metadata=ObjectMeta(name=named.key.name, namespace=named.namespace),
        spec=WorkloadEndpointSpec(
            orchestrator="cni",
            node=NODE,
            container_id=named.container_id,
            endpoint="eth0",
            interface_name=named.host_interface,
            ip_networks=(f"198.19.16.{number}/32",),
            mac=mac,
        ),
    )


async def stored(store: Datastore, numbers: Sequence[int]) -> list[bool]:
    return [await store.get(identity(n).key_text) is not None for n in numbers]


async def test_writes_share_a_transaction() -> None:
    """Endpoints written while another write is in flight land together, and all are there."""
    store = Slow()
    endpoints = Endpoints(store, NODE)
    writing = [asyncio.create_task(endpoints.write(identity(0), endpoint(0)))]
    await eventually(lambda: store.sizes == [1])
    writing += [asyncio.create_task(endpoints.write(identity(n), endpoint(n))) for n in range(1, 9)]
    await asyncio.sleep(0)
    store.open.set()
    await asyncio.gather(*writing)
    assert store.sizes == [1, 8]
    assert all(await stored(store, range(9)))
    removing = [asyncio.create_task(endpoints.remove(identity(n))) for n in range(9)]
    assert all(await asyncio.gather(*removing))
    assert store.sizes == [1, 8, 9]
    assert not any(await stored(store, range(9)))


async def test_a_collision_is_one_endpoints_own() -> None:
    """Somebody changed one of the endpoints: it is written over what is there, the others land."""
    store = Slow()
    store.open.set()
    endpoints = Endpoints(store, NODE)
    await endpoints.write(identity(1), endpoint(1))
    await put(store, identity(1).key_text, encode(endpoint(1, "02:00:00:00:00:01")))
    store.sizes.clear()
    await asyncio.gather(*(endpoints.write(identity(n), endpoint(n)) for n in range(3)))
    assert store.sizes[0] == 3
    assert all(await stored(store, range(3)))
    found = await endpoints.read(identity(1))
    assert found is not None
    assert found.value.spec.mac == ""


async def test_removal_waits_for_a_write_given_up() -> None:
    """A write whose caller went away may still land; removing the endpoint comes after it."""
    store = Slow()
    endpoints = Endpoints(store, NODE)
    writing = asyncio.create_task(endpoints.write(identity(1), endpoint(1)))
    await eventually(lambda: store.sizes == [1])
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    removing = asyncio.create_task(endpoints.remove(identity(1)))
    await asyncio.sleep(0)
    store.open.set()
    assert await removing
    assert not any(await stored(store, [1]))
