"""GC and STATUS: calls about the node, not about one container.

GC removes every attachment of a network on this node that the runtime does not list: those with an
endpoint, and addresses that only IPAM knows (under another main plugin). What network something is
of is told by the endpoint's annotation or by the name of the IPAM handle, `<network>.<container>`;
where the two dots of a name leave that open, nothing is removed. It goes on after failures and
reports them at the end.
Source: CNI specification 1.1.0 sections 2 and 3.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from cni import delegate, endpoint
from cni.agent import Agent
from cni.cluster import KEY, Cluster
from cni.delegate import Delegate, delegate_of
from cni.endpoint import Identity
from cni.errors import CniError, Code
from cni.journal import Entry
from cni.request import Command, NodeCall
from cni.stored import Endpoints, identity_of
from cni.waiting import Waiting, is_listening
from cymric.datastore.api import Datastore, DatastoreError
from cymric.kernel.command import Commands
from cymric.model.codec import Malformed
from cymric.model.ipam import AllocationBlock, AllocationHandle
from cymric.model.keys import BlockKey, HandleKey
from cymric.model.net import parse_network
from ipam import block as blocks
from ipam.errors import IPAMError
from ipam.storage import get, list_values

STATUS_TIMEOUT_S = 3.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Collector:
    """Answers GC."""

    node: str
    store: Datastore
    endpoints: Endpoints
    agent: Agent
    commands: Commands

    async def collect(self, call: NodeCall) -> bytes:
        """Remove what the runtime does not list. Raises CniError with all that failed."""
        assert call.config.attachments is not None
        valid = {(one.container_id, one.ifname) for one in call.config.attachments}
        handles = await self._handles(call.config.name)
        unwanted = [
            *await self._endpoints_but(call, valid, handles),
            *await self._handles_but(call, valid, handles),
        ]
        # Side by side, so that their links go in one step.
        outcomes = await asyncio.gather(*map(self._remove, unwanted))
        failures = [text for text in outcomes if text]
        if not call.config.ipam.is_own and not call.is_ipam_only:
            failures += await self._delegate(call)
        log.info("collected", network=call.config.name, unused=len(unwanted), failed=len(failures))
        if failures:
            raise CniError(
                Code.GC_INCOMPLETE, "not all that is unused is removed", "; ".join(failures)
            )
        return b""

    async def _remove(self, entry: Entry) -> str:
        """Remove an attachment; what went wrong, or nothing. What fails now is tried again later.

        Noted before it begins, since what is left of it half way is not found by another GC.
        """
        log.info("unused attachment", entry=entry.name)
        try:
            async with self.agent.alone(entry.identity):
                self.agent.journal.begin(entry)
                await self.agent.remove(entry)
        except (CniError, DatastoreError, IPAMError, Malformed, OSError) as error:
            return f"{entry.name}: {error}"
        return ""

    async def _endpoints_but(
        self, call: NodeCall, valid: set[tuple[str, str]], handles: dict[str, AllocationHandle]
    ) -> list[Entry]:
        found = []
        for stored in await self.endpoints.refresh():
            identity = identity_of(stored.value)
            if (identity.container_id, identity.endpoint) in valid:
                continue
            network = endpoint.network_of(stored.value)
            handle = f"{call.config.name}.{identity.container_id}"
            if network == call.config.name or (network is None and handle in handles):
                asked = self._delegate_of(call, identity, endpoint.is_foreign(stored.value))
                found.append(
                    Entry(handle=handle, is_ipam_only=False, identity=identity, delegate=asked)
                )
        return found

    def _delegate_of(self, call: NodeCall, identity: Identity, is_foreign: bool) -> Delegate | None:
        if call.config.ipam.is_own or not is_foreign:
            return None
        return delegate_of(
            call.config.ipam.type,
            call.request,
            container_id=identity.container_id,
            interface=identity.endpoint,
        )

    async def _handles(self, network: str) -> dict[str, AllocationHandle]:
        prefix = str(HandleKey(f"{network}."))
        found = await list_values(self.store, prefix, AllocationHandle)
        return {key.handle_id: value for key, value in found if isinstance(key, HandleKey)}

    async def _handles_but(
        self, call: NodeCall, valid: set[tuple[str, str]], handles: dict[str, AllocationHandle]
    ) -> list[Entry]:
        """Handles of containers that neither the runtime lists nor an endpoint has."""
        containers = {container for container, _ in valid}
        containers |= {one.value.spec.container_id for one in self.endpoints.all_known}
        found = []
        for name, handle in handles.items():
            container = name.removeprefix(f"{call.config.name}.")
            if container in containers or "." in container:
                continue
            if await self._is_ours(name, handle):
                identity = _identity_without_endpoint(self.node, container)
                found.append(Entry(handle=name, is_ipam_only=True, identity=identity))
        return found

    async def _is_ours(self, name: str, handle: AllocationHandle) -> bool:
        """Whether all that a handle holds was given on this node."""
        nodes = set()
        for cidr in handle.block:
            try:
                block = await get(self.store, BlockKey(parse_network(cidr)), AllocationBlock)
            except Malformed as error:
                log.warning("block cannot be read", key=error.key, why=error.reason)
                return False
            for ordinal in blocks.ordinals_of_handle(block, name) if block else ():
                assert block is not None
                holder = block.holder_of(ordinal)
                nodes.add(holder.attributes.get("node") if holder else None)
        return nodes == {self.node}

    async def _delegate(self, call: NodeCall) -> list[str]:
        try:
            asked = delegate_of(call.config.ipam.type, call.request)
            await delegate.run(self.commands, asked, Command.GC)
        except CniError as error:
            # A plugin from before GC has nothing to say here; its DELs were called one by one.
            return [] if error.code in delegate.LACKS_COMMAND else [str(error)]
        return []


@dataclass(frozen=True, slots=True)
class Reporter:
    """Answers STATUS."""

    store: Datastore
    cluster: Cluster
    waiting: Waiting
    commands: Commands

    async def status(self, call: NodeCall) -> bytes:
        """Nothing, when an ADD can be answered. Raises CniError 50 or 51 with the reason."""
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                await self.store.get(str(KEY))
                await self.cluster.refuse_when_locked()
        except CniError as error:
            raise CniError(Code.NOT_AVAILABLE, error.message, error.details) from None
        except (DatastoreError, TimeoutError) as error:
            raise CniError(
                Code.NOT_AVAILABLE, "the datastore does not answer", str(error)
            ) from None
        if self.waiting.timeout_s > 0 and not await is_listening(self.waiting.hint):
            # Pods that run keep what they have, but nobody changes their policy or routes now.
            raise CniError(
                Code.LIMITED, "felix does not answer", f"nobody at {self.waiting.hint.path}"
            )
        if not call.config.ipam.is_own and not call.is_ipam_only:
            asked = delegate_of(call.config.ipam.type, call.request)
            try:
                await delegate.run(self.commands, asked, Command.STATUS)
            except CniError as error:
                if error.code not in delegate.LACKS_COMMAND:
                    raise
        return b""


def _identity_without_endpoint(node: str, container: str) -> Identity:
    """A name to wait under for an address without endpoint: nothing else of it is used."""
    return Identity(
        node=node,
        orchestrator="cni",
        namespace=endpoint.DEFAULT_NAMESPACE,
        workload=container,
        endpoint="-",
        container_id=container,
        host_interface=f"gc:{container}",
    )
