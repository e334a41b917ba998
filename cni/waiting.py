"""Waiting until felix has programmed an endpoint, measured, and what to say when it did not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import Counter, Histogram

from cni.errors import try_again
from cni.hint import FelixHint
from cni.status import Awaited, StatusDirectory
from cni.wiring import Wiring
from cymric.model.net import host_network

WAITS = Histogram(
    "cymric_cni_policy_wait_seconds",
    "Time from the stored endpoint to felix' word that it is programmed",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
TIMEOUTS = Counter(
    "cymric_cni_policy_wait_timeouts", "ADDs that failed because felix did not finish in time"
)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Waits at most `timeout_s`; 0 does not wait."""

    status: StatusDirectory
    wiring: Wiring
    hint: FelixHint
    timeout_s: float

    async def for_felix(self, awaited: Awaited, host_interface: str) -> None:
        """Return when the endpoint is programmed. Raises CniError that names what is missing."""
        if self.timeout_s <= 0:
            return
        began = time.monotonic()
        if await self.status.wait(awaited, self.timeout_s):
            WAITS.observe(time.monotonic() - began)
            return
        TIMEOUTS.inc()
        missing = [*await self._missing(awaited, host_interface)]
        raise try_again(
            f"felix did not program the endpoint within {self.timeout_s:g} s", "; ".join(missing)
        )

    async def _missing(self, awaited: Awaited, host_interface: str) -> Sequence[str]:
        found = []
        if not await is_listening(self.hint):
            found.append(f"felix does not listen at {self.hint.path}")
        look = await self.wiring.look(host_interface)
        if look.link is None:
            found.append(f"no interface {host_interface}")
        elif not look.link.is_running:
            found.append(f"{host_interface} carries nothing")
        unrouted = [a for a in awaited.addresses if host_network(a) not in look.routed]
        if look.link is not None and unrouted:
            wanted = ", ".join(map(str, unrouted))
            found.append(f"no route to {wanted} over {host_interface}")
        return (*found, f"no status file {awaited.name!r} of this endpoint")


async def is_listening(hint: FelixHint) -> bool:
    """Whether felix' socket takes connections."""
    if hint.is_connected:
        return True
    try:
        async with asyncio.timeout(0.2):
            _, writer = await asyncio.open_unix_connection(str(hint.path))
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    return True
