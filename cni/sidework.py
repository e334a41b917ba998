"""Work that goes on beside other work and ends with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")

HEAD_START = 9
"""Turns of the loop before the body begins, so that what the work first sends is on its way.

A body that keeps the kernel busy would otherwise hold it back. Enough for IPAM to gather the calls
and for gRPC to send them; a turn in which nothing is ready takes microseconds.
"""


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Start `work` and run the body, which awaits it; if the body fails first, it is cancelled.

    Unlike in a task group errors keep their class, by which callers sort them.
    """
    task = asyncio.create_task(work)
    for _ in range(HEAD_START):
        await asyncio.sleep(0)
    try:
        yield task
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # the body failed first: one error is told, the other is known
