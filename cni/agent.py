"""What cnid does for each call about a container: ADD, DEL, CHECK.

    ADD   address (etcd)  ║ pair begun (kernel)
          endpoint (etcd) ║ endpoint told to felix ║ pair finished (kernel)
          wait for felix' word that it is programmed

What stands side by side runs side by side. A failure at any step undoes everything before it, and
what cannot be undone at once (etcd is away) stays in the journal and is undone later, also by the
next process. A DEL that etcd is away for is answered and carried out later in the same way.

Invariants: calls about one host interface wait for each other; nothing is changed before the
journal says so; an endpoint is only ever removed for the container it was made for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import structlog

from cni import endpoint, result
from cni.addresses import Addresses, Given, destinations, is_delegated, is_foreign, result_routes
from cni.cluster import Cluster
from cni.delegate import delegate_of
from cni.endpoint import Identity, identify
from cni.errors import CniError, Code, try_again
from cni.hint import FelixHint
from cni.journal import Entry, Journal
from cni.netconf import bad_config, previous_result
from cni.request import Call
from cni.result import Attached
from cni.sidework import beside
from cni.status import Awaited, StatusDirectory
from cni.stored import Endpoints, Stored
from cni.waiting import Waiting
from cni.wiring import Layout, Pair, Wire, Wiring, random_mac
from cymric.datastore.api import DatastoreError
from cymric.kernel.links import AlreadyThere
from cymric.model.codec import encode
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.net import Address, parse_interface
from ipam.errors import Contended

DATASTORE_TIMEOUT_S = 10.0
"""How long the datastore may take for all of one step before the call fails with 11.

Generous, as a hundred pods that start at once on a busy machine wait for each other in it, too.
"""
DEL_TIMEOUT_S = 2.0
"""How long a DEL waits for the datastore before it promises instead."""
UNDO_TIMEOUT_S = 2.0

log = structlog.get_logger()


@dataclass(slots=True)
class _Attempt:
    """How far an ADD came: the pair of that name is its; felix was told of that endpoint."""

    has_link: bool = False
    told: str = ""


@dataclass(slots=True)
class Agent:
    """Answers calls for one node. `mtu_file` has the MTU where the configuration says none.

    `lent` has an entry for each container that has addresses of ours under another main plugin.
    """

    node: str
    endpoints: Endpoints
    addresses: Addresses
    cluster: Cluster
    wiring: Wiring
    journal: Journal
    lent: Journal
    waiting: Waiting
    status: StatusDirectory
    hint: FelixHint
    mtu_file: Path
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)
    _queued: dict[str, int] = field(default_factory=dict)

    # --- ADD ---

    async def add(self, call: Call) -> bytes:
        """Attach a container; the result to print. Raises CniError, and what lies below."""
        identity = identify(call, self.node)
        entry = entry_of(call, identity)
        async with self.alone(identity):
            async with _in_time(DATASTORE_TIMEOUT_S):
                await self.cluster.refuse_when_locked()
                await self.endpoints.load()
                if self.journal.has(entry):
                    await self.undo(entry)
            if call.is_ipam_only:
                async with self._undone_on_failure(entry):
                    given = await self._give(call)
                    self.lent.begin(entry)  # no endpoint will tell that it is in use
                pairs = zip(given.addresses, given.blocks, strict=True)
                return result.of_addresses(call, tuple(pairs))
            _refuse_made_before(call)
            stored = await self._of_same_container(call, identity)
            if stored is not None and (former := await self._already(call, identity, stored)):
                return former
            async with self._undone_on_failure(entry) as attempt:
                return await self._attach(call, identity, stored, attempt)

    async def _attach(
        self, call: Call, identity: Identity, stored: Stored | None, attempt: _Attempt
    ) -> bytes:
        assert call.netns is not None
        wire = self._wire(call, identity, mac=call.wishes.mac or random_mac())
        name = identity.status_file
        before = self.status.look(name)
        async with beside(self._give(call, stored)) as giving:
            pair = await self._begin(wire, identity, attempt)
            with closing(pair):
                addresses = (await giving).addresses
                value = endpoint.build(
                    call,
                    identity,
                    addresses=addresses,
                    mac=wire.mac,
                    is_foreign=is_foreign(call),
                )
                async with beside(self._store(identity, value)) as storing:
                    attempt.told = identity.key_text
                    self.hint.tell(attempt.told, encode(value))
                    await pair.finish(_layout(call, addresses))
                    await storing
            mtu = pair.mtu
        await self.waiting.for_felix(
            Awaited(name, wire.mac, addresses, before), identity.host_interface
        )
        log.info("attached", container=call.container_id, addresses=[str(a) for a in addresses])
        return _result(call, identity, addresses, wire.mac, mtu)

    async def _begin(self, wire: Wire, identity: Identity, attempt: _Attempt) -> Pair:
        try:
            pair = await self.wiring.begin(wire)
        except AlreadyThere:
            # Of this pod's former container, or half of something: replaced. Another's: left alone.
            if self.endpoints.known(identity) is None:
                await self._refuse_foreign_interface(identity)
            await self.wiring.unwire_host(identity.host_interface)
            pair = await self.wiring.begin(wire)
        attempt.has_link = True
        return pair

    async def _give(self, call: Call, stored: Stored | None = None) -> Given:
        async with _in_time(DATASTORE_TIMEOUT_S, is_long=is_delegated(call)):
            # A former ADD of the same container that has to be wired anew keeps its address.
            if stored and (kept := await self.addresses.still_held(call, stored.value)):
                return Given(kept)
            return await self.addresses.give(call)

    async def _store(self, identity: Identity, value: WorkloadEndpoint) -> None:
        async with _in_time(DATASTORE_TIMEOUT_S):
            await self.endpoints.write(identity, value)

    async def _of_same_container(self, call: Call, identity: Identity) -> Stored | None:
        """What a former ADD of this container stored: read anew, as it decides what happens."""
        known = self.endpoints.known(identity)
        if known is None or known.value.spec.container_id != call.container_id:
            return None
        async with _in_time(DATASTORE_TIMEOUT_S):
            stored = await self.endpoints.read(identity)
        is_same = stored is not None and stored.value.spec.container_id == call.container_id
        return stored if is_same else None

    async def _already(self, call: Call, identity: Identity, stored: Stored) -> bytes | None:
        """The result of a former ADD of the same container and interface, if all of it stands."""
        addresses, mac = stored.value.spec.addresses, stored.value.spec.mac
        wire, layout = (
            self._wire(call, identity, mac=mac),
            _layout(call, stored.value.spec.addresses),
        )
        if await self.wiring.faults(wire, layout):
            return None
        async with _in_time(DATASTORE_TIMEOUT_S):
            if not await self.addresses.still_held(call, stored.value):
                return None
        found = (await self.wiring.look(identity.host_interface)).link
        log.info("attached already", container=call.container_id)
        return _result(call, identity, addresses, mac, found.mtu if found else 0)

    def _wire(self, call: Call, identity: Identity, *, mac: str) -> Wire:
        assert call.netns is not None
        wishes = call.wishes
        named = wishes.unmanaged or wishes.addresses
        families: set[int] = {a.version for a in named}
        if not families:
            families = {4} if is_delegated(call) else set(wishes.families)
        mtu = call.config.mtu or _mtu_in(self.mtu_file)
        if call.config.require_mtu_file and not mtu:
            raise bad_config(f"no mtu is configured and {self.mtu_file} has none")
        return Wire(
            host_interface=identity.host_interface,
            pod_interface=call.interface,
            netns=call.netns,
            mac=mac,
            mtu=mtu,
            queues=call.config.num_queues,
            families=tuple(sorted(families)),
            is_forwarding=call.config.container_settings.allow_ip_forwarding,
        )

    async def _refuse_foreign_interface(self, identity: Identity) -> None:
        """Two container ids that begin alike have one interface name: never take the other's."""
        async with _in_time(DATASTORE_TIMEOUT_S):
            owner = await self.endpoints.owner_of_interface(identity)
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
        entry = entry_of(call, identity)
        async with self.alone(identity):
            try:
                async with _in_time(DEL_TIMEOUT_S, is_long=is_delegated(call)):
                    await self.remove(entry, call.netns)
            except (DatastoreError, Contended, CniError) as error:
                if isinstance(error, CniError) and error.code != Code.TRY_AGAIN_LATER:
                    raise
                await self._promise(entry, call.netns, error)
        log.info("detached", container=call.container_id, interface=call.interface)
        return b""

    async def _promise(self, entry: Entry, netns: Path | None, error: Exception) -> None:
        """Note that an attachment has to go, and do what can be done of it without datastore."""
        self.journal.begin(msgspec.structs.replace(entry, is_owed=True))
        log.warning("to be removed later", entry=entry.name, why=str(error))
        if entry.is_ipam_only:
            return
        if netns is not None:
            await self.wiring.unwire_pod(netns, entry.identity.endpoint)
        known = self.endpoints.known(entry.identity)
        if known is not None and known.value.spec.container_id == entry.identity.container_id:
            await self.wiring.unwire_host(entry.identity.host_interface)

    async def remove(self, entry: Entry, netns: Path | None = None) -> None:
        """Remove all of an attachment: endpoint, pair, addresses. Raises what lies below.

        To be called `alone` with its identity.
        """
        kept: set[Address] = set()
        if not entry.is_ipam_only:
            await self._remove_endpoint(entry.identity)
            if netns is not None:
                await self.wiring.unwire_pod(netns, entry.identity.endpoint)
            others = await self.endpoints.of_container(entry.identity)
            kept = {address for other in others for address in other.spec.addresses}
        await self.addresses.take_back(entry, kept)
        if entry.is_ipam_only:
            self.lent.finish(entry)
        self.journal.finish(entry)

    async def _remove_endpoint(self, identity: Identity) -> None:
        """Delete the endpoint and the node's end of the pair, if they are this container's."""
        if await self.endpoints.remove(identity):
            await self.wiring.unwire_host(identity.host_interface)
            return
        if self.endpoints.known(identity) is not None:
            return  # a newer container's
        if not await self.wiring.is_there(identity.host_interface):
            return
        if await self.endpoints.owner_of_interface(identity) is None:
            await self.wiring.unwire_host(identity.host_interface)

    # --- CHECK ---

    async def check(self, call: Call) -> bytes:
        """See that everything ADD made is still there. Raises CniError with all that is not."""
        identity = identify(call, self.node)
        told = {parse_interface(ip.address).ip for ip in previous_result(call.config).ips}
        faults: list[str] = []
        async with self.alone(identity):
            async with _in_time(DATASTORE_TIMEOUT_S, is_long=is_delegated(call)):
                stored = None if call.is_ipam_only else await self.endpoints.read(identity)
                wanted = told
                if stored is not None and not call.is_ipam_only:
                    wanted = told & set(stored.value.spec.addresses)
                if stored is None or not endpoint.is_foreign(stored.value) or is_delegated(call):
                    missing = await self.addresses.missing(call, wanted)
                    faults += [f"{a} is not assigned to {call.handle}" for a in sorted(missing)]
            if not call.is_ipam_only:
                faults += await self._endpoint_faults(call, identity, stored, told)
        if faults:
            raise CniError(
                Code.CHECK_FAILED, "the attachment is not as it was made", "; ".join(faults)
            )
        return b""

    async def _endpoint_faults(
        self, call: Call, identity: Identity, stored: Stored | None, told: set[Address]
    ) -> tuple[str, ...]:
        if stored is None:
            return (f"{identity.key} is missing",)
        spec = stored.value.spec
        if spec.container_id != call.container_id:
            return (f"{identity.key} is of container {spec.container_id}",)
        if not spec.addresses or not set(spec.addresses) <= told:
            return (f"{identity.key} has {', '.join(spec.ip_networks)}, not the result's",)
        wire = self._wire(call, identity, mac=spec.mac)
        return await self.wiring.faults(wire, _layout(call, stored.value.spec.addresses))

    # --- undoing ---

    async def undo_leftovers(self) -> bool:
        """Remove what other processes or failed attempts left and what was promised; is it all?"""
        is_clean = True
        for entry in self.journal.entries():
            async with self.alone(entry.identity):
                if self.journal.has(entry):  # else its own call finished it meanwhile
                    try:
                        await self.undo(entry)
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
                if attempt.told:
                    self.hint.tell(attempt.told, None)
                if attempt.has_link:  # first, as this works without datastore, too
                    await self.wiring.unwire_host(entry.identity.host_interface)
                await self.undo(entry)
            except Exception as error:
                # The journal keeps it; the error that matters to the caller is the first one.
                log.warning("not undone yet", entry=entry.name, why=repr(error))
            raise
        self.journal.finish(entry)

    async def undo(self, entry: Entry) -> None:
        """Take back everything an ADD may have made. Raises what lies below; then try again."""
        async with _in_time(UNDO_TIMEOUT_S, is_long=entry.delegate is not None):
            await self.remove(entry)
        log.info("undone", entry=entry.name)

    @asynccontextmanager
    async def alone(self, identity: Identity) -> AsyncIterator[None]:
        """Calls about one host interface wait for each other."""
        name = identity.host_interface
        lock = self._locks.setdefault(name, asyncio.Lock())
        self._queued[name] = self._queued.get(name, 0) + 1
        try:
            async with lock:
                yield
        finally:
            self._queued[name] -= 1
            if not self._queued[name]:
                del self._queued[name], self._locks[name]


def entry_of(call: Call, identity: Identity) -> Entry:
    """What to note of a call in the journal."""
    return Entry(
        handle=call.handle,
        is_ipam_only=call.is_ipam_only,
        identity=identity,
        delegate=delegate_of(call.config.ipam.type, call.request) if is_delegated(call) else None,
    )


@asynccontextmanager
async def _in_time(limit_s: float, *, is_long: bool = False) -> AsyncIterator[None]:
    """A bound for the datastore; a delegated plugin, `is_long`, is bounded by its own."""
    if is_long:
        yield
        return
    try:
        async with asyncio.timeout(limit_s):
            yield
    except TimeoutError:
        raise try_again("the datastore does not answer", f"waited {limit_s:g} s") from None


def _refuse_made_before(call: Call) -> None:
    """After plugins that made this very interface there is nothing for us to do."""
    for made in previous_result(call.config).interfaces:
        if made.name == call.interface and made.sandbox == str(call.netns):
            raise bad_config(
                f"prevResult has {call.interface} already",
                "cymric-cni makes the container's interface, so it has to come first in the list",
            )


def _layout(call: Call, addresses: tuple[Address, ...]) -> Layout:
    routes, limits = destinations(call.config), call.wishes.qos
    return Layout(addresses=addresses, destinations=routes, limits=limits)


def _result(
    call: Call, identity: Identity, addresses: tuple[Address, ...], mac: str, mtu: int
) -> bytes:
    made = Attached(
        host_interface=identity.host_interface,
        mac=mac,
        mtu=mtu,
        addresses=addresses,
        routes=result_routes(call.config, addresses),
    )
    return result.of_endpoint(call, made)


def _mtu_in(path: Path) -> int:
    """The MTU that the node found out for pods; 0 when there is none."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return 0
