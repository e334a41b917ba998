"""The datastore on etcd, over gRPC: the `Datastore` port, made of calls, watches and leases.

Etcd's v3 API is spoken directly; docs/etcd.md says why no client library is in between. Here are
only the requests: what may be repeated is in `etcd_connection.py`, what a broken watch does in
`etcd_watch.py`, what an error means in `etcd_errors.py`.

    open_datastore(settings) ─▶ EtcdDatastore ─▶ Connection ─▶ endpoints
                                             ├▶ Watch, one stream for each prefix
                                             └▶ Leases

Invariants: a listing is read at one revision, however many pages it takes; a commit is sent once;
nothing above this package sees a gRPC error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from cymric.datastore import api
from cymric.datastore.api import (
    MAX_REQUEST_BYTES,
    Compacted,
    Conflict,
    KeyValue,
    Listing,
    NoneCreated,
    Operation,
    Put,
    TooLarge,
    Transaction,
    Unavailable,
    WatchEvent,
    check,
)
from cymric.datastore.etcd_channel import Tls, UrlEndpoint
from cymric.datastore.etcd_connection import CALL_S, RANGE, TXN, Connection
from cymric.datastore.etcd_keys import range_of, to_bytes, to_text
from cymric.datastore.etcd_leases import Leases
from cymric.datastore.etcd_messages_pb2 import (
    Compare,
    DeleteRangeRequest,
    PutRequest,
    RangeRequest,
    RangeResponse,
    RequestOp,
    TxnRequest,
    TxnResponse,
)
from cymric.datastore.etcd_messages_pb2 import KeyValue as StoredKeyValue
from cymric.datastore.etcd_watch import Watch
from cymric.runtime.settings import Settings

PAGE_KEYS = 10_000
"""Keys read at once: etcd counts the rest of the range for each page, so small pages are slow."""

PAGE_S = 30.0
"""How long one page may take in all."""

LIST_ATTEMPTS = 5
"""How often a listing starts again: its revision was compacted meanwhile, or a page too large."""


class EtcdDatastore:
    """See `Datastore` for the contract. Made outside or inside a loop, used in one, then closed."""

    def __init__(
        self,
        connection: Connection,
        *,
        page_keys: int = PAGE_KEYS,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self._connection = connection
        self._leases = Leases(connection)
        self._page_keys = page_keys
        self._max_request_bytes = max_request_bytes

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def get(self, key: str) -> KeyValue | None:
        """The key as it is now, or None."""
        response = await self._connection.call(RANGE, RangeRequest(key=to_bytes(key)))
        return _first(response)

    async def list(self, prefix: str) -> Listing:
        """Every key that starts with `prefix`, in key order, all at one revision."""
        page_keys = self._page_keys
        for _ in range(LIST_ATTEMPTS):
            try:
                return await self._list_pages(prefix, page_keys)
            except Compacted:
                continue  # somebody compacted between two pages
            except TooLarge:  # a borrowed channel may take no more than 4 MiB at once
                page_keys = max(1, page_keys // 10)
        raise Unavailable(f"{prefix} could not be listed in {LIST_ATTEMPTS} attempts")

    async def commit(self, transaction: Transaction) -> int:
        """Land the transaction and return its revision; see `Datastore.commit` for the errors."""
        check(transaction, max_request_bytes=self._max_request_bytes)
        compared = [*dict.fromkeys(compare.key for compare in transaction.compares)]
        guards = transaction.none_created
        request = TxnRequest(
            compare=[*map(_comparison, transaction.compares), *map(_guard, guards)],
            success=[*map(_operation, transaction.operations)],
            # A lost try costs no further round trip: it brings what is there now.
            failure=[
                *(RequestOp(request_range=RangeRequest(key=to_bytes(key))) for key in compared),
                *(RequestOp(request_range=_created_since(guard)) for guard in guards),
            ],
        )
        response = await self._connection.call(TXN, request)
        if not response.succeeded:
            raise Conflict(_current(compared, response), response.header.revision)
        return response.header.revision

    def watch(
        self, prefix: str, *, start_revision: int
    ) -> AsyncGenerator[Sequence[WatchEvent], None]:
        """Every change under `prefix` from `start_revision` on; see `Datastore.watch`."""
        return Watch(self._connection, prefix, start_revision).batches()

    async def grant_lease(self, ttl_s: int, *, on_lost: Callable[[int], None] | None = None) -> int:
        """A new lease, kept alive until `revoke_lease` or `close`; `on_lost` hears if it fails."""
        return await self._leases.grant(ttl_s, on_lost)

    async def revoke_lease(self, lease_id: int) -> None:
        """End a lease; the keys written under it vanish. One already gone is no error."""
        await self._leases.revoke(lease_id)

    async def close(self) -> None:
        """Stop keeping leases alive and close connections. End your own watches first."""
        await self._leases.close()
        await self._connection.close()

    async def _list_pages(self, prefix: str, page_keys: int) -> Listing:
        key, range_end = range_of(prefix)
        items: list[KeyValue] = []
        revision = 0
        while True:
            request = RangeRequest(key=key, range_end=range_end, limit=page_keys, revision=revision)
            page = await self._connection.call(RANGE, request, timeout_s=PAGE_S)
            items.extend(map(_key_value, page.kvs))
            revision = revision or page.header.revision
            if not page.more:
                return Listing(tuple(items), revision)
            key = page.kvs[-1].key + b"\0"


def open_datastore(
    settings: Settings,
    *,
    call_s: float = CALL_S,
    page_keys: int = PAGE_KEYS,
    max_request_bytes: int = MAX_REQUEST_BYTES,
) -> EtcdDatastore:
    """The datastore that `settings` name. Connects at the first use. Raises ValueError."""
    tls = Tls(
        ca_cert_file=settings.etcd_ca_cert_file,
        cert_file=settings.etcd_cert_file,
        key_file=settings.etcd_key_file,
    )
    connection = Connection(
        [UrlEndpoint(url, tls) for url in settings.etcd_endpoints],
        user=settings.etcd_username,
        password=settings.etcd_password,
        call_s=call_s,
    )
    return EtcdDatastore(connection, page_keys=page_keys, max_request_bytes=max_request_bytes)


def _operation(operation: Operation) -> RequestOp:
    key = to_bytes(operation.key)
    if isinstance(operation, Put):
        put = PutRequest(key=key, value=operation.value, lease=operation.lease_id)
        return RequestOp(request_put=put)
    return RequestOp(request_delete_range=DeleteRangeRequest(key=key))


def _comparison(compare: api.Compare) -> Compare:
    return Compare(
        result=Compare.EQUAL,
        target=Compare.MOD,
        key=to_bytes(compare.key),
        mod_revision=compare.revision,
    )


def _guard(guard: NoneCreated) -> Compare:
    """A comparison over a range must hold for every key in it, and does where there is none."""
    key, range_end = range_of(guard.prefix)
    return Compare(
        result=Compare.LESS,
        target=Compare.CREATE,
        key=key,
        range_end=range_end,
        create_revision=guard.revision + 1,
    )


def _created_since(guard: NoneCreated) -> RangeRequest:
    key, range_end = range_of(guard.prefix)
    return RangeRequest(key=key, range_end=range_end, min_create_revision=guard.revision + 1)


def _current(compared: Sequence[str], response: TxnResponse) -> Mapping[str, KeyValue | None]:
    answers = [answer.response_range for answer in response.responses]
    created = (_key_value(stored) for answer in answers[len(compared) :] for stored in answer.kvs)
    asked = {key: _first(answer) for key, answer in zip(compared, answers, strict=False)}
    return {**{pair.key: pair for pair in created}, **asked}


def _first(response: RangeResponse) -> KeyValue | None:
    return _key_value(response.kvs[0]) if response.kvs else None


def _key_value(stored: StoredKeyValue) -> KeyValue:
    return KeyValue(to_text(stored.key), stored.value, stored.mod_revision)
