"""The one compare-and-swap loop, and typed reads around it.

A change is a pure function from what the keys hold now to what they shall hold. `land` reads the
keys, applies it and writes the result in one transaction that only lands if none of the keys was
written meanwhile; else it applies the change to what is there now. A lost answer is treated the
same way, so a change must find it in order when it has already happened.

`T` is what the change tells its caller; a change without operations writes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog

from cymric.datastore.api import (
    ABSENT,
    Compare,
    Conflict,
    Datastore,
    Delete,
    KeyValue,
    Operation,
    OutcomeUnknown,
    Put,
    Transaction,
)
from cymric.model.codec import Malformed, decode, encode
from cymric.model.keys import Key
from ipam.errors import Contended

CAS_ATTEMPTS = 100
"""How often one change is tried against other writers (Calico's number)."""

T = TypeVar("T")
V = TypeVar("V")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class View:
    """What some keys hold at one moment."""

    pairs: Mapping[str, KeyValue | None]

    def has(self, key: Key) -> bool:
        """Whether the key exists, readable or not."""
        return self.pairs[str(key)] is not None

    def get(self, key: Key, kind: type[V]) -> V | None:
        """The value of a key. Raises Malformed if it exists and cannot be read."""
        pair = self.pairs[str(key)]
        return None if pair is None else _typed(pair, kind)


Change = Callable[[View], tuple[T, Sequence[Operation]]]


async def land(store: Datastore, keys: Sequence[Key], change: Change[T]) -> T:
    """Apply `change` until it lands. Raises Contended, Malformed, and what the datastore raises."""
    texts = [str(key) for key in keys]
    pairs = await _read(store, texts)
    for _ in range(CAS_ATTEMPTS):
        result, operations = change(View(pairs))
        if not operations:
            return result
        compares = [
            Compare(text, ABSENT if pair is None else pair.revision) for text, pair in pairs.items()
        ]
        try:
            await store.commit(Transaction(compares, operations))
        except Conflict as conflict:
            pairs = {**pairs, **conflict.current}
        except OutcomeUnknown:
            pairs = await _read(store, texts)
        else:
            return result
    raise Contended(f"{texts[0]} kept changing; gave up after {CAS_ATTEMPTS} tries")


async def get(store: Datastore, key: Key, kind: type[V]) -> V | None:
    """The value of one key, None if missing. Raises Malformed."""
    pair = await store.get(str(key))
    return None if pair is None else _typed(pair, kind)


async def list_values(store: Datastore, prefix: str, kind: type[V]) -> tuple[tuple[Key, V], ...]:
    """All readable values of a kind under `prefix`, in key order; the others are logged by key."""
    found = []
    for pair in (await store.list(prefix)).items:
        try:
            decoded = decode(pair.key, pair.value)
        except Malformed as error:
            log.warning("value cannot be read and counts as absent", key=pair.key, why=error.reason)
            continue
        if decoded is not None and isinstance(decoded[1], kind):
            found.append((decoded[0], decoded[1]))
    return tuple(found)


def put(key: Key, value: object) -> Put:
    """The operation that stores `value` as Calico would."""
    return Put(str(key), encode(value))


def delete(key: Key) -> Delete:
    """The operation that removes a key."""
    return Delete(str(key))


async def _read(store: Datastore, texts: Sequence[str]) -> dict[str, KeyValue | None]:
    values = await asyncio.gather(*(store.get(text) for text in texts))
    return dict(zip(texts, values, strict=True))


def _typed(pair: KeyValue, kind: type[V]) -> V:
    decoded = decode(pair.key, pair.value)
    if decoded is None or not isinstance(decoded[1], kind):
        raise Malformed(pair.key, f"is no {kind.__name__}")
    return decoded[1]
