"""Leases that live as long as their owner: granted, kept alive in the background, lost in the open.

A third of the time to live passes between two keep-alives. When etcd says that the lease is gone,
or could not be asked for the whole time to live, its owner is told once and it is let go: what was
written under it may already have vanished, and only the owner knows what to do about that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
import structlog

from cymric.datastore.api import DatastoreError, LeaseLost, Unavailable
from cymric.datastore.etcd_connection import GRANT, REVOKE, Connection, metadata
from cymric.datastore.etcd_errors import TokenRefused, translate
from cymric.datastore.etcd_messages_pb2 import (
    LeaseGrantRequest,
    LeaseKeepAliveRequest,
    LeaseKeepAliveResponse,
    LeaseRevokeRequest,
)

log = structlog.get_logger()

OnLost = Callable[[int], None]


class Leases:
    """The leases of one process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._keepers: dict[int, asyncio.Task[None]] = {}

    async def grant(self, ttl_s: int, on_lost: OnLost | None) -> int:
        """A new lease of at least `ttl_s` (etcd may give more), kept alive from now on."""
        if ttl_s <= 0:
            raise ValueError("the time to live of a lease must be positive")
        granted = await self._connection.call(GRANT, LeaseGrantRequest(TTL=ttl_s))
        keeper = asyncio.create_task(
            self._keep(granted.ID, float(granted.TTL), on_lost), name=f"keep lease {granted.ID}"
        )
        self._keepers[granted.ID] = keeper
        return granted.ID

    async def revoke(self, lease_id: int) -> None:
        """End the lease and everything written under it. One already gone is no error."""
        if keeper := self._keepers.pop(lease_id, None):
            keeper.cancel()
        try:
            await self._connection.call(REVOKE, LeaseRevokeRequest(ID=lease_id))
        except LeaseLost:
            return

    async def close(self) -> None:
        """Keep nothing alive any more; etcd ends the leases when their time is up."""
        keepers = [*self._keepers.values()]
        self._keepers.clear()
        for keeper in keepers:
            keeper.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)

    async def _keep(self, lease_id: int, ttl_s: float, on_lost: OnLost | None) -> None:
        loop = asyncio.get_running_loop()
        alive_until = loop.time() + ttl_s
        while loop.time() < alive_until:
            await asyncio.sleep(min(ttl_s / 3, max(0.0, alive_until - loop.time())))
            asked = loop.time()
            try:
                async with asyncio.timeout(max(0.1, ttl_s / 3)):
                    await self._keep_alive_once(lease_id)
                alive_until = asked + ttl_s
            except LeaseLost:
                break
            except (DatastoreError, TimeoutError) as error:
                log.warning("lease was not renewed", lease_id=lease_id, error=str(error))
        self._keepers.pop(lease_id, None)
        log.warning("lease is lost", lease_id=lease_id)
        if on_lost:
            on_lost(lease_id)

    async def _keep_alive_once(self, lease_id: int) -> None:
        """One answered keep-alive. Raises LeaseLost if etcd says that the lease is gone."""
        connection = self._connection
        endpoint = connection.current
        token = ""
        try:
            channel = await connection.ready(endpoint, "calls", 5.0)
            token = await connection.token(5.0)
            call = channel.stream_stream(
                "/etcdserverpb.Lease/LeaseKeepAlive",
                request_serializer=LeaseKeepAliveRequest.SerializeToString,
                response_deserializer=LeaseKeepAliveResponse.FromString,
            )(metadata=metadata(token))
            try:
                await call.write(LeaseKeepAliveRequest(ID=lease_id))
                response = await call.read()
            except grpc.RpcError as error:
                raise translate(error, is_write=False) from None
            except asyncio.InvalidStateError:
                raise Unavailable("the stream broke while it was opened") from None
            finally:
                call.cancel()
        except TokenRefused:
            connection.login.forget(token)
            raise
        except Unavailable:
            connection.leave(endpoint)
            raise
        if response is grpc.aio.EOF:
            raise Unavailable("etcd ended the stream")
        if response.TTL <= 0:
            raise LeaseLost(f"lease {lease_id} ran out")
