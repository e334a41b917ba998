"""Telling everybody how far a drain is: an annotation on this node's Node object.

    Outgoing ─ phase ─▶ DrainStatus.tell ─▶ Node annotation cymric.io/drain-status

So `cymric node drain` can wait for a node from any machine, and `cymric node status` shows it. It
is the only thing that bgpd writes to the datastore. It is written over what is stored, field by
field as it was, guarded by the revision read; whatever refuses it costs the report and nothing
else. Unwritten as long as there never was a drain.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import structlog

from bgpd.drain import STATUS_ANNOTATION, Drain, described
from cymric.datastore import api
from cymric.datastore.api import Datastore
from cymric.model import codec
from cymric.model.keys import ResourceKey
from cymric.runtime.pacing import Backoff, Kick

log = structlog.get_logger()


class DrainStatus:
    """Writes the newest phase of `node`'s drain."""

    def __init__(self, store: Datastore, node: str) -> None:
        self._store = store
        self._key = str(ResourceKey("Node", node))
        self._text = ""
        self._kick = Kick()

    def tell(self, drain: Drain) -> None:
        """The phase changed."""
        self._text = described(drain.wish, drain.phase)
        self._kick()

    async def run(self) -> None:
        """Write whenever told, until cancelled."""
        backoff = Backoff(first_s=0.2, most_s=30.0)
        while True:
            await self._kick.wait()
            if await self._write():
                backoff.succeeded()
            else:
                self._kick()
                await asyncio.sleep(backoff.next_s())

    async def _write(self) -> bool:
        """True if it is written, or nothing can be done about it."""
        text = self._text
        try:
            read = await self._store.get(self._key)
            if read is None:
                return True
            tree = _annotated(read.value, text)
            if tree is not None:
                value = codec.encode_tree(tree)
                await api.update(self._store, self._key, value, if_revision=read.revision)
        except api.PermissionDenied as error:
            log.warning("may not tell how far the drain is", key=self._key, error=str(error))
            return True
        except (api.DatastoreError, msgspec.DecodeError) as error:
            log.info("how far the drain is will be told later", error=repr(error))
            return False
        return text == self._text


def _annotated(value: bytes, text: str) -> dict[str, Any] | None:
    """The Node with the status in place; None if it is there already, or is no object."""
    tree = msgspec.json.decode(value)
    if not isinstance(tree, dict) or not isinstance(tree.get("metadata"), dict):
        return None
    annotations = dict(tree["metadata"].get("annotations") or {})
    if annotations.get(STATUS_ANNOTATION, "") == text:
        return None
    if text:
        annotations[STATUS_ANNOTATION] = text
    else:
        del annotations[STATUS_ANNOTATION]
    tree["metadata"]["annotations"] = annotations
    if not annotations:
        del tree["metadata"]["annotations"]
    return tree
