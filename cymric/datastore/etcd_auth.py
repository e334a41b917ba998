"""User and password at etcd: log in when first needed, and again whenever the token is refused.

A token lives some minutes without use (`--auth-token-ttl`) and does not survive a restart of etcd,
so being refused is an ordinary event. The token travels as `token` metadata, never as gRPC call
credentials, which would need TLS. With a client certificate alone there is nothing to do here.

Invariant: any number of callers whose token was refused cause one login.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog
from prometheus_client import Counter

log = structlog.get_logger()

LOGINS = Counter("cymric_datastore_logins", "Logins at etcd with user and password.")


class Login:
    """Keeps the token of one user. Without a user, the token is always empty."""

    def __init__(
        self, user: str, password: str, authenticate: Callable[[str, str], Awaitable[str]]
    ) -> None:
        self._user = user
        self._password = password
        self._authenticate = authenticate
        self._token: str | None = None
        self._lock = asyncio.Lock()

    @property
    def has_user(self) -> bool:
        """Whether a refused token is worth another login."""
        return bool(self._user)

    async def token(self) -> str:
        """The token to send; logs in if there is none. Raises what `authenticate` raises."""
        if not self._user:
            return ""
        async with self._lock:
            if self._token is None:
                self._token = await self._authenticate(self._user, self._password)
                LOGINS.inc()
                log.info("logged in at etcd", user=self._user)
            return self._token

    def forget(self, token: str) -> None:
        """`token` was refused; the next caller logs in, unless somebody already did."""
        if self._token == token:
            self._token = None
