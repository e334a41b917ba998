"""Calls to a cluster: which endpoint, which token, how long, and what may be repeated.

Every call has a deadline. A call that certainly did nothing (no connection, a read that failed, a
refused token) is repeated at the next endpoint until its time is up; a write whose answer was lost
never is. All callers share one notion of the current endpoint, so a dead one is left once.

    adapter, watch, leases ─▶ Connection.call ─▶ Login.token ─▶ Endpoint.channel ─▶ etcd
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc

from cymric.datastore.api import DatastoreError, NotAuthenticated, OutcomeUnknown, Unavailable
from cymric.datastore.etcd_auth import Login
from cymric.datastore.etcd_channel import CONNECT_S, Channel, Endpoint
from cymric.datastore.etcd_errors import TokenRefused, translate
from cymric.datastore.etcd_messages_pb2 import (
    AuthenticateRequest,
    AuthenticateResponse,
    LeaseGrantRequest,
    LeaseGrantResponse,
    LeaseRevokeRequest,
    LeaseRevokeResponse,
    RangeRequest,
    RangeResponse,
    TxnRequest,
    TxnResponse,
)
from cymric.runtime.pacing import Backoff

CALL_S = 5.0
"""How long a call may take in all, over all endpoints, unless its caller says otherwise."""

Request = TypeVar("Request")
Response = TypeVar("Response")


@dataclass(frozen=True, slots=True)
class Method(Generic[Request, Response]):
    """One call of etcd's API. `is_write` if a repetition could do something twice."""

    path: str
    request: type[Request]
    response: type[Response]
    is_write: bool = False


RANGE = Method("/etcdserverpb.KV/Range", RangeRequest, RangeResponse)
TXN = Method("/etcdserverpb.KV/Txn", TxnRequest, TxnResponse, is_write=True)
# A lease granted twice does no harm: the one whose answer was lost runs out by itself.
GRANT = Method("/etcdserverpb.Lease/LeaseGrant", LeaseGrantRequest, LeaseGrantResponse)
REVOKE = Method("/etcdserverpb.Lease/LeaseRevoke", LeaseRevokeRequest, LeaseRevokeResponse)
AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", AuthenticateRequest, AuthenticateResponse)


class Connection:
    """The cluster behind `endpoints`, seen as one."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        *,
        user: str = "",
        password: str = "",
        call_s: float = CALL_S,
    ) -> None:
        if not endpoints:
            raise ValueError("an etcd client needs an endpoint")
        self._endpoints = tuple(endpoints)
        self._current = 0
        self._call_s = call_s
        self.login = Login(user, password, self._authenticate)
        self.cluster_id = 0
        """Of the last answer; 0 before the first."""

    @property
    def current(self) -> Endpoint:
        """The endpoint to use now."""
        return self._endpoints[self._current]

    def leave(self, endpoint: Endpoint) -> None:
        """`endpoint` does not serve; use the next, unless somebody already moved on."""
        if self.current is endpoint:
            self._current = (self._current + 1) % len(self._endpoints)

    async def ready(self, endpoint: Endpoint, purpose: str, timeout_s: float) -> Channel:
        """The connected channel of `endpoint`. Raises Unavailable."""
        return await endpoint.ready(purpose, timeout_s, is_only=len(self._endpoints) == 1)

    async def token(self, timeout_s: float) -> str:
        """The token to send, empty without a user. Raises Unavailable, NotAuthenticated."""
        try:
            async with asyncio.timeout(timeout_s):  # others may be in front of us
                return await self.login.token()
        except TimeoutError:
            raise Unavailable(f"{self.current.url} does not answer a login") from None

    async def call(
        self, method: Method[Request, Response], request: Request, *, timeout_s: float | None = None
    ) -> Response:
        """Call etcd; repeat what certainly did nothing. Typed errors only.

        `timeout_s` is for answers that take long; nobody answering at all is noticed as quickly as
        in any call.
        """
        limit_s = timeout_s or self._call_s
        token = ""
        has_logged_in_again = False

        async def once(endpoint: Endpoint, remaining_s: float) -> Response:
            nonlocal token
            token = await self.token(min(remaining_s, self._call_s))
            return await self._send(endpoint, method, request, token, remaining_s)

        while True:
            try:
                response: Response = await self._repeat(once, limit_s)
                return response
            except TokenRefused as error:
                if has_logged_in_again or not self.login.has_user:
                    raise NotAuthenticated(str(error)) from None
                self.login.forget(token)
                has_logged_in_again = True

    async def close(self) -> None:
        """Close all channels."""
        for endpoint in self._endpoints:
            await endpoint.close()

    async def _repeat(self, once: Any, timeout_s: float) -> Any:
        """Try `once` at one endpoint after the other, as long as it raises Unavailable."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        pauses = Backoff(first_s=0.05, most_s=0.5)
        while True:
            endpoint = self.current
            try:
                return await once(endpoint, timeout_s - (loop.time() - started))
            except Unavailable:
                self.leave(endpoint)
                pause_s = pauses.next_s()
                if loop.time() + pause_s >= started + self._call_s:
                    raise
                await asyncio.sleep(pause_s)

    async def _send(
        self,
        endpoint: Endpoint,
        method: Method[Request, Response],
        request: Any,
        token: str,
        remaining_s: float,
    ) -> Response:
        loop = asyncio.get_running_loop()
        started = loop.time()
        channel = await self.ready(endpoint, "calls", min(remaining_s, self._call_s))
        invoke = channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,  # type: ignore[attr-defined]
            response_deserializer=method.response.FromString,  # type: ignore[attr-defined]
        )
        timeout_s = max(0.01, remaining_s - (loop.time() - started))
        if not method.is_write and len(self._endpoints) > 1:
            timeout_s = min(timeout_s, max(CONNECT_S, remaining_s / 2))  # leave time for the next
        try:
            response: Any = await invoke(request, timeout=timeout_s, metadata=metadata(token))
        except grpc.RpcError as error:
            failure = translate(error, is_write=method.is_write)
            if isinstance(failure, OutcomeUnknown):
                self.leave(endpoint)
            raise failure from None
        self.cluster_id = response.header.cluster_id
        answer: Response = response
        return answer

    async def _authenticate(self, user: str, password: str) -> str:
        request = AuthenticateRequest(name=user, password=password)

        async def once(endpoint: Endpoint, remaining_s: float) -> AuthenticateResponse:
            return await self._send(endpoint, AUTHENTICATE, request, "", remaining_s)

        try:
            response: AuthenticateResponse = await self._repeat(once, self._call_s)
        except DatastoreError as error:
            if "authentication is not enabled" in str(error):
                return ""  # as etcd's own client does: the user is not needed yet
            raise
        return response.token


def metadata(token: str) -> tuple[tuple[str, str], ...]:
    """What goes along with every call."""
    return (("token", token),) if token else ()
