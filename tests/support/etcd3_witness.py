"""The etcd3 package at work in a process of its own: an independent witness of the API we speak.

It imports only with protobuf's pure Python implementation, which must be chosen before the first
import; hence the process. `python -m tests.support.etcd3_witness PORT` reads one JSON list of
operations, each a list of a name and its arguments, and writes the list of their results.
`borrow` lets our adapter write, read and watch over the client's channel.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from tests.support.etcd import EtcdServer


def witness(server: EtcdServer, *operations: Sequence[object]) -> list[Any]:
    """Let the etcd3 package do `operations` on `server`; their results."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.etcd3_witness", str(server.client_port)],
        input=json.dumps(operations),
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout)
    return results


class Operations:
    """What can be asked of the witness; values travel as text."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def put(self, key: str, value: str) -> None:
        """Write unconditionally."""
        self._client.put(key, value)

    def get(self, key: str) -> list[Any] | None:
        """Value and revision, or None."""
        value, metadata = self._client.get(key)
        return None if metadata is None else [value.decode(), metadata.mod_revision]

    def get_prefix(self, prefix: str) -> dict[str, str]:
        """Every value under a prefix, by key."""
        found = self._client.get_prefix(prefix)
        return {metadata.key.decode(): value.decode() for value, metadata in found}

    def delete(self, key: str) -> bool:
        """Whether there was something to delete."""
        return bool(self._client.delete(key))

    def swap(self, key: str, revision: int, value: str) -> bool:
        """Whether the key was still at `revision`, and now has the value."""
        transactions = self._client.transactions
        succeeded, _ = self._client.transaction(
            compare=[transactions.mod(key) == revision],
            success=[transactions.put(key, value)],
            failure=[],
        )
        return bool(succeeded)

    def watch(self, prefix: str, start_revision: int, count: int) -> list[list[Any]]:
        """The first `count` events as (key, value or None, revision)."""
        events, cancel = self._client.watch_prefix(prefix, start_revision=start_revision)
        heard = []
        for event in events:
            is_put = type(event).__name__ == "PutEvent"
            value = event.value.decode() if is_put else None
            heard.append([event.key.decode(), value, event.mod_revision])
            if len(heard) == count:
                break
        cancel()
        return heard

    def borrow(self, prefix: str) -> list[Any]:
        """Write, list and watch by our adapter over the client's channel."""
        return asyncio.run(_borrow(self._client, prefix))


async def _borrow(client: Any, prefix: str) -> list[Any]:
    from cymric.datastore.api import create, put
    from cymric.datastore.etcd_bridge import from_etcd3

    async with from_etcd3(client) as store:
        start = await create(store, prefix + "a", b"1")
        await put(store, prefix + "b", b"2")
        listed = await store.list(prefix)
        async with (
            asyncio.timeout(10),
            aclosing(store.watch(prefix, start_revision=start)) as batches,
        ):
            heard: list[bytes | None] = []
            async for batch in batches:
                heard += [event.value for event in batch]
                if len(heard) == 2:
                    break
    return [
        [item.key for item in listed.items],
        [value.decode() for value in heard if value is not None],
    ]


def main() -> None:
    """Work off the operations on standard input."""
    import etcd3

    from cymric.datastore.etcd_channel import CHANNEL_OPTIONS

    client = etcd3.client(port=int(sys.argv[1]), grpc_options=list(CHANNEL_OPTIONS))
    operations = Operations(client)
    results = [getattr(operations, name)(*rest) for name, *rest in json.load(sys.stdin)]
    client.close()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
