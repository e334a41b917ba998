"""A packet of our own, sent to see that packets really pass through our chains.

Rules can be as we wrote them and yet judge nothing: written with the iptables that this kernel's
packets do not meet, in another network namespace, behind somebody's rule that accepts everything
first. So felix sends one datagram over the loopback, now and then, and looks whether the counters
of its rules in OUTPUT and INPUT have moved. If not, the node is not ready and says why; the rules
stay as they are.

    count ─▶ one datagram to 127.0.0.1 ─▶ count again ─▶ health, metric, log
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import structlog

from cymric.kernel.command import CommandFailed, Commands
from cymric.runtime.health import Health
from felix import metrics
from felix.iptables.backend import Backend
from felix.iptables.counters import parse_counted
from felix.iptables.saved import parse_rule

PASSED = "packets pass our chains"
EVERY_S = 60.0
_CHAINS = ("OUTPUT", "INPUT")
_DISCARD_PORT = 9

log = structlog.get_logger()


def send_over_loopback() -> None:
    """One datagram that nobody waits for, from this network namespace to itself."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"cymric", ("127.0.0.1", _DISCARD_PORT))


class Canary:
    """See the chapter. `backend` is IPv4's iptables."""

    def __init__(
        self,
        commands: Commands,
        backend: Backend,
        health: Health,
        send: Callable[[], None] = send_over_loopback,
    ) -> None:
        self._commands = commands
        self._backend = backend
        self._health = health
        self._send = send
        self._missed: tuple[str, ...] = ()

    async def run(self) -> None:
        """Look now and every minute until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> None:
        """Send one packet and say whether it was counted."""
        try:
            before = await self._counts()
            self._send()
            after = await self._counts()
        except (CommandFailed, OSError) as error:
            # Not known is no verdict: what was seen last counts.
            log.warning("cannot see whether packets pass our chains", why=str(error))
            self._health.set_ready(PASSED, is_ready=not self._missed)
            return
        missed = tuple(
            chain for chain in _CHAINS if after[chain] is None or after[chain] == before[chain]
        )
        self._say(missed)

    def _say(self, missed: tuple[str, ...]) -> None:
        if missed:
            metrics.CANARY_MISSED.inc()
        if missed != self._missed:
            if missed:
                log.error("PACKETS DO NOT PASS OUR CHAINS, not ready", chains=list(missed))
            else:
                log.info("packets pass our chains again")
        self._missed = missed
        self._health.set_ready(PASSED, is_ready=not missed)

    async def _counts(self) -> dict[str, int | None]:
        """What our first rule in each chain counted; None where there is no rule of ours."""
        done = (await self._commands.run((*self._backend.save("filter"), "-c"))).checked()
        chains = parse_counted(done.stdout)
        return {
            chain: next(
                (
                    rule.count.packets
                    for rule in chains.get(chain, ())
                    if parse_rule(rule.text).is_ours
                ),
                None,
            )
            for chain in _CHAINS
        }
