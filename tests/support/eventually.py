"""Waiting for a condition with a deadline: the only way tests wait for anything."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.02


async def eventually(
    predicate: Callable[[], T | Awaitable[T]], timeout_s: float = 10.0, *, what: str = ""
) -> T:
    """Poll `predicate` (plain or async) until it is truthy and return that.

    Raises AssertionError, with `what` or the source of the predicate, after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = predicate()
        value = await answer if inspect.isawaitable(answer) else answer
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or _told(predicate)}")
        await asyncio.sleep(POLL_S)


def eventually_now(predicate: Callable[[], T], timeout_s: float = 10.0, *, what: str = "") -> T:
    """As `eventually`, for tests and fixtures without an event loop."""
    deadline = time.monotonic() + timeout_s
    while not (value := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {what or _told(predicate)}")
        time.sleep(POLL_S)
    return value


def _told(predicate: Callable[[], object]) -> str:
    try:
        return inspect.getsource(predicate).strip()
    except (OSError, TypeError):
        return repr(predicate)
