"""What gRPC and etcd answer, translated into the port's typed errors.

The one question that decides a translation is whether a write may have landed. Only a call that
never left (no connection) or that etcd refused before proposing it is known not to have; of any
other broken or late write the outcome is unknown. Reads have no such doubt and are `Unavailable`,
which is the only error the connection repeats by itself, apart from a refused token.

Source: etcd's api/v3rpc/rpctypes/error.go, and runs against etcd 3.4 and 3.5.
"""

from __future__ import annotations

import grpc

from cymric.datastore.api import (
    Compacted,
    DatastoreError,
    LeaseLost,
    NoSpace,
    NotAuthenticated,
    OutcomeUnknown,
    PermissionDenied,
    TooLarge,
    Unavailable,
)

NEVER_SENT = ("failed to connect to all addresses", "empty address list", "DNS resolution failed")
"""How gRPC says that a call found no connection."""

REFUSED_UNREAD = ("etcdserver: too many requests", "etcdserver: no leader")
"""How etcd turns a call away before it proposes anything."""

TOKEN_REFUSED = (
    "etcdserver: invalid auth token",
    "etcdserver: user name is empty",
    "etcdserver: revision of auth store is old",
)
"""How etcd says: log in (again). It did nothing with the call."""


class TokenRefused(NotAuthenticated):
    """The token is missing, expired, or from before etcd restarted; a new login may help."""


def translate(error: grpc.RpcError, *, is_write: bool) -> DatastoreError:
    """The typed error behind `error`, worded with etcd's own text."""
    code, text = error.code(), error.details() or ""
    if refused := is_refusal_of_token(text):
        return TokenRefused(refused)
    match code:
        case grpc.StatusCode.UNAUTHENTICATED:
            return TokenRefused(text)
        case grpc.StatusCode.PERMISSION_DENIED:
            return PermissionDenied(text)
        case grpc.StatusCode.OUT_OF_RANGE:  # compacted, or ahead of this server: list again
            return Compacted(reason=text)
        case grpc.StatusCode.NOT_FOUND if "lease" in text:
            return LeaseLost(text)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "space exceeded" in text:
            return NoSpace(text)
        case grpc.StatusCode.RESOURCE_EXHAUSTED if "larger than max" in text:
            return TooLarge(text)
        case grpc.StatusCode.INVALID_ARGUMENT if "too large" in text or "too many oper" in text:
            return TooLarge(text)
        case grpc.StatusCode.INVALID_ARGUMENT if "authentication failed" in text:
            return NotAuthenticated(text)
    if any(words in text for words in (*NEVER_SENT, *REFUSED_UNREAD)):
        return Unavailable(text)
    if code in _BROKEN:
        return OutcomeUnknown(text) if is_write else Unavailable(text)
    return DatastoreError(f"{code.name}: {text}")


def is_refusal_of_token(text: str) -> str:
    """`text` if a new login may help against it, else an empty string."""
    return text if any(words in text for words in TOKEN_REFUSED) else ""


_BROKEN = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,  # broken connection, lost leader, server stopping
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.INTERNAL,  # a stream reset in the middle of an answer
        grpc.StatusCode.UNKNOWN,
    }
)
