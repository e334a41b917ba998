"""What cnid does for each call: ADD, DEL, CHECK of an endpoint, or of an address alone.

ADD: is the datastore open for changes; an address; the veth pair; the WorkloadEndpoint; felix'
word that it is programmed. A failure at any step undoes everything before it, and what cannot be
undone at once (etcd is away) stays in the journal and is undone later, also by the next process.

Invariants: calls about one host interface wait for each other; nothing is changed before the
journal says so; an endpoint is only ever removed for the container it was made for.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address

import structlog

from cni import endpoint, result
from cni.endpoint import Identity, identify
from cni.errors import CniError, Code, try_again
from cni.journal import Entry, Journal
from cni.request import Call
from cni.status import Awaited, StatusDirectory
from cni.wiring import Wire, Wiring, random_mac
from cymric.datastore.api import (
    ABSENT,
    Compare,
    Conflict,
    Datastore,
    Delete,
    KeyValue,
    Put,
    Transaction,
)
from cymric.model.codec import decode, encode
from cymric.model.endpoints import WorkloadEndpoint, endpoint_name_prefix
from cymric.model.keys import ResourceKey, resource_prefix
from cymric.model.net import Address, parse_interface
from cymric.model.resources import ClusterInformation
from ipam.affinity import go_time, rfc3339
from ipam.client import IPAM, Assignment, Release, Request

DATASTORE_TIMEOUT_S = 4.0
"""How long the datastore may take for all of one step before the call fails with 11."""
UNDO_TIMEOUT_S = 2.0

CLUSTER = str(ResourceKey("ClusterInformation", "default"))

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Stored:
    """An endpoint as read, with the pair to compare against."""

    pair: KeyValue
    value: WorkloadEndpoint


@dataclass(slots=True)
class _Attempt:
    """How far an ADD came. `has_link`: the pair of that name is this attempt's."""

    has_link: bool = False


@dataclass(slots=True)
class Agent:
    """Answers calls for one node. `policy_timeout_s` 0 means not to wait for felix."""

    node: str
    store: Datastore
    ipam: IPAM
    wiring: Wiring
    journal: Journal
    status: StatusDirectory
    policy_timeout_s: float = 5.0
    clock: Callable[[], int] = time.time_ns
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)
    _waiting: dict[str, int] = field(default_factory=dict)

    # --- ADD ---

    async def add(self, call: Call) -> bytes:
        """Attach a container; the result to print. Raises CniError, and what lies below."""
        identity = identify(call, self.node)
        entry = Entry(handle=call.handle, is_ipam_only=call.is_ipam_only, identity=identity)
        async with self._alone(identity):
            if self.journal.has(entry):
                await self._undo(entry)
            async with _datastore_in_time():
                _, stored = await asyncio.gather(self._refuse_when_locked(), self._read(identity))
            if call.is_ipam_only:
                async with self._undone_on_failure(entry):
                    assignment = await self._assign(call)
                return result.of_address(call, assignment.address, assignment.block)
            if (former := await self._already(call, identity, stored)) is not None:
                return former
            await self._refuse_foreign_interface(identity, stored)
            async with self._undone_on_failure(entry) as attempt:
                return await self._attach(call, identity, stored, attempt)

    async def _attach(
        self, call: Call, identity: Identity, stored: _Stored | None, attempt: _Attempt
    ) -> bytes:
        assert call.netns is not None
        address = await self._address_to_keep(call, stored)
        if address is None:
            address = (await self._assign(call)).address
        mac = random_mac()
        name = identity.status_file
        awaited = Awaited(name, mac, address, before=self.status.look(name))
        await self.wiring.wire(
            Wire(
                host_interface=identity.host_interface,
                pod_interface=call.interface,
                netns=call.netns,
                address=address,
                mac=mac,
                mtu=call.config.mtu,
            )
        )
        attempt.has_link = True
        async with _datastore_in_time():
            await self._store_endpoint(call, identity, stored, address, mac)
        if self.policy_timeout_s > 0 and not await self.status.wait(awaited, self.policy_timeout_s):
            raise try_again(
                f"felix did not program the endpoint within {self.policy_timeout_s:g} s",
                f"no status file {name!r} for {identity.host_interface}, {address}",
            )
        log.info("attached", container=call.container_id, address=str(address))
        return result.of_endpoint(call, address, identity.host_interface, mac)

    async def _already(
        self, call: Call, identity: Identity, stored: _Stored | None
    ) -> bytes | None:
        """The result of a former ADD of the same container and interface, if all of it stands."""
        if stored is None or stored.value.spec.container_id != call.container_id:
            return None
        wire = _wire_of(call, stored.value)
        if wire is None or await self.wiring.faults(wire):
            return None
        async with _datastore_in_time():
            if wire.address not in await self.ipam.held_by(call.handle):
                return None
        log.info("attached already", container=call.container_id, address=str(wire.address))
        return result.of_endpoint(call, wire.address, identity.host_interface, wire.mac)

    async def _address_to_keep(self, call: Call, stored: _Stored | None) -> Address | None:
        """The address of a former ADD of the same container that has to be wired anew."""
        if stored is None or stored.value.spec.container_id != call.container_id:
            return None
        async with _datastore_in_time():
            held = await self.ipam.held_by(call.handle)
        return next((a for a in stored.value.spec.addresses if a in held), None)

    async def _assign(self, call: Call) -> Assignment:
        now = go_time(self.clock())
        request = Request(
            host=self.node,
            handle=call.handle,
            attributes=endpoint.attributes(call, self.node, now),
            pools=call.config.ipam.ipv4_pools,
        )
        async with _datastore_in_time():
            if call.address is not None:
                return await self.ipam.assign_address(call.address, request)
            return await self.ipam.assign(request)

    async def _store_endpoint(
        self, call: Call, identity: Identity, stored: _Stored | None, address: Address, mac: str
    ) -> None:
        former = stored.value.metadata if stored else None
        value = endpoint.build(
            call,
            identity,
            address=address,
            mac=mac,
            uid=(former and former.uid) or str(uuid.uuid4()),
            created_at=(former and former.creation_timestamp) or rfc3339(self.clock()),
        )
        key = str(identity.key)
        compare = Compare(key, stored.pair.revision if stored else ABSENT)
        try:
            await self.store.commit(Transaction((compare,), (Put(key, encode(value)),)))
        except Conflict:
            raise try_again("the endpoint was changed by another meanwhile", key) from None

    async def _refuse_when_locked(self) -> None:
        pair = await self.store.get(CLUSTER)
        if pair is None:
            raise try_again("the cluster is not set up", f"{CLUSTER} is missing")
        decoded = decode(pair.key, pair.value)
        assert decoded is not None
        cluster = decoded[1]
        if not (isinstance(cluster, ClusterInformation) and cluster.spec.datastoreReady):
            raise try_again("the datastore is locked", "datastoreReady is not true")

    async def _refuse_foreign_interface(self, identity: Identity, stored: _Stored | None) -> None:
        """Two container ids that begin alike have one interface name: never take the other's."""
        if stored is not None or not await self.wiring.is_there(identity.host_interface):
            return
        async with _datastore_in_time():
            owner = await self._owner_of_interface(identity)
        if owner is not None:
            raise CniError(
                Code.WIRING_FAILED,
                f"interface {identity.host_interface} belongs to another endpoint",
                str(owner),
            )

    # --- DEL ---

    async def delete(self, call: Call) -> bytes:
        """Detach a container; what is gone already is fine. Raises what lies below."""
        identity = identify(call, self.node)
        entry = Entry(handle=call.handle, is_ipam_only=call.is_ipam_only, identity=identity)
        async with self._alone(identity):
            async with _datastore_in_time():
                await self._remove_endpoint(entry)
            if call.netns is not None and not call.is_ipam_only:
                await self.wiring.unwire_pod(call.netns, call.interface)
            async with _datastore_in_time():
                await self._release(entry)
            self.journal.finish(entry)
        log.info("detached", container=call.container_id, interface=call.interface)
        return b""

    async def _remove_endpoint(self, entry: Entry) -> None:
        """Delete the endpoint and the node's end of the pair, if they are this container's."""
        if entry.is_ipam_only:
            return
        identity = entry.identity
        stored = await self._read(identity)
        while stored is not None and stored.value.spec.container_id == identity.container_id:
            try:
                compare = Compare(stored.pair.key, stored.pair.revision)
                await self.store.commit(Transaction((compare,), (Delete(stored.pair.key),)))
            except Conflict:
                stored = await self._read(identity)
                continue
            await self.wiring.unwire_host(identity.host_interface)
            return
        is_nobodys = stored is None and await self.wiring.is_there(identity.host_interface)
        if is_nobodys and await self._owner_of_interface(identity) is None:
            await self.wiring.unwire_host(identity.host_interface)

    async def _release(self, entry: Entry) -> None:
        """Free the handle's addresses, but for those that another interface of it has."""
        kept: set[Address] = set()
        if not entry.is_ipam_only:
            kept = {a for other in await self._siblings(entry) for a in other.spec.addresses}
        if not kept:
            await self.ipam.release_handle(entry.handle)
            return
        held = [a for a in await self.ipam.held_by(entry.handle) if a not in kept]
        await self.ipam.release(Release(address, entry.handle) for address in held)

    # --- CHECK ---

    async def check(self, call: Call) -> bytes:
        """See that everything ADD made is still there. Raises CniError with all that is not."""
        identity = identify(call, self.node)
        assert call.config.previous is not None
        wanted = {parse_interface(ip.address).ip for ip in call.config.previous.ips}
        faults: list[str] = []
        async with self._alone(identity):
            async with _datastore_in_time():
                held = set(await self.ipam.held_by(call.handle))
                stored = None if call.is_ipam_only else await self._read(identity)
            faults += [f"{address} is not assigned to {call.handle}" for address in wanted - held]
            if not call.is_ipam_only:
                faults += await self._endpoint_faults(call, identity, stored, wanted)
        if faults:
            raise CniError(
                Code.CHECK_FAILED, "the attachment is not as it was made", "; ".join(faults)
            )
        return b""

    async def _endpoint_faults(
        self, call: Call, identity: Identity, stored: _Stored | None, wanted: set[Address]
    ) -> tuple[str, ...]:
        if stored is None:
            return (f"{identity.key} is missing",)
        spec = stored.value.spec
        if spec.container_id != call.container_id:
            return (f"{identity.key} is of container {spec.container_id}",)
        if set(spec.addresses) != wanted:
            return (
                f"{identity.key} has {', '.join(spec.ip_networks)}, not the result's addresses",
            )
        wire = _wire_of(call, stored.value)
        return await self.wiring.faults(wire) if wire else (f"{identity.key} has no IPv4 address",)

    # --- undoing ---

    async def undo_leftovers(self) -> bool:
        """Undo what other processes, or failed attempts, left behind; whether nothing is left."""
        is_clean = True
        for entry in self.journal.entries():
            async with self._alone(entry.identity):
                if self.journal.has(entry):  # else its own call finished it meanwhile
                    try:
                        await self._undo(entry)
                    except Exception as error:
                        is_clean = False
                        log.warning("not undone yet", entry=entry.name, why=repr(error))
        return is_clean

    @asynccontextmanager
    async def _undone_on_failure(self, entry: Entry) -> AsyncIterator[_Attempt]:
        attempt = _Attempt()
        self.journal.begin(entry)
        try:
            yield attempt
        except BaseException:
            try:
                if attempt.has_link:  # first, as this works without datastore, too
                    await self.wiring.unwire_host(entry.identity.host_interface)
                await self._undo(entry)
            except Exception as error:
                # The journal keeps it; the error that matters to the caller is the first one.
                log.warning("not undone yet", entry=entry.name, why=repr(error))
            raise
        self.journal.finish(entry)

    async def _undo(self, entry: Entry) -> None:
        """Take back everything an ADD may have made. Raises what lies below; then try again."""
        async with asyncio.timeout(UNDO_TIMEOUT_S):
            await self._remove_endpoint(entry)
            await self._release(entry)
        self.journal.finish(entry)
        log.info("undone", entry=entry.name)

    # --- reading ---

    async def _read(self, identity: Identity) -> _Stored | None:
        return _stored(await self.store.get(str(identity.key)))

    async def _siblings(self, entry: Entry) -> list[WorkloadEndpoint]:
        """The other endpoints of the same container."""
        identity = entry.identity
        prefix = resource_prefix("WorkloadEndpoint", identity.namespace) + endpoint_name_prefix(
            identity.node, identity.orchestrator, identity.workload
        )
        found = [_stored(pair) for pair in (await self.store.list(prefix)).items]
        return [
            other.value
            for other in found
            if other is not None
            and other.value.spec.container_id == identity.container_id
            and other.value.metadata.name != identity.key.name
        ]

    async def _owner_of_interface(self, identity: Identity) -> ResourceKey | None:
        """The endpoint of this node, other than this one, that has the host interface."""
        listing = await self.store.list(resource_prefix("WorkloadEndpoint"))
        for pair in listing.items:
            stored = _stored(pair)
            if stored is None or pair.key == str(identity.key):
                continue
            spec = stored.value.spec
            if spec.node == self.node and spec.interface_name == identity.host_interface:
                metadata = stored.value.metadata
                return ResourceKey("WorkloadEndpoint", metadata.name, metadata.namespace)
        return None

    @asynccontextmanager
    async def _alone(self, identity: Identity) -> AsyncIterator[None]:
        """Calls about one host interface wait for each other."""
        name = identity.host_interface
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._waiting[name] = self._waiting.get(name, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name], self._locks[name]


@asynccontextmanager
async def _datastore_in_time() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(DATASTORE_TIMEOUT_S):
            yield
    except TimeoutError:
        raise try_again(
            "the datastore does not answer", f"waited {DATASTORE_TIMEOUT_S:g} s"
        ) from None


def _stored(pair: KeyValue | None) -> _Stored | None:
    if pair is None:
        return None
    decoded = decode(pair.key, pair.value)
    assert decoded is not None
    return _Stored(pair, decoded[1]) if isinstance(decoded[1], WorkloadEndpoint) else None


def _wire_of(call: Call, stored: WorkloadEndpoint) -> Wire | None:
    """The pair that an endpoint describes; None if it has no IPv4 address."""
    addresses = [a for a in stored.spec.addresses if isinstance(a, IPv4Address)]
    if not addresses or call.netns is None:
        return None
    return Wire(
        host_interface=stored.spec.interface_name,
        pod_interface=call.interface,
        netns=call.netns,
        address=addresses[0],
        mac=stored.spec.mac,
        mtu=call.config.mtu,
    )
