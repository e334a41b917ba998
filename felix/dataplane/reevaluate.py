"""Ending connections that policy denies now, where a policy asks for it.

What is established goes on by default, for it meets no policy. A policy may ask that its endpoints'
connections be judged anew (annotation `cymric.io/reevaluate-established: "true"`): after the new
rules are in the kernel, the connections of these endpoints are listed, and exactly those that the
rules deny are removed; their next packet is then one of a new connection. Only workloads' own
addresses count. Whoever changes policy again while this goes on is judged in the next round.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import structlog

from cymric.kernel.command import CommandFailed, Commands
from cymric.model.net import Address, parse_address
from felix import metrics
from felix.calc.values import Desired
from felix.rules.judge import Flow, Judge

_FIELD = re.compile(r"(src|dst|sport|dport|type|code|id)=(\S+)")
_ICMP = (1, 58)

log = structlog.get_logger()


def watched(desired: Desired) -> frozenset[Address]:
    """The addresses of endpoints with a policy that asks for it."""
    asking = {one.id for one in desired.policies.values() if one.reevaluate_established}
    if not asking:
        return frozenset()
    return frozenset(
        address
        for one in desired.endpoints
        if any(asking.intersection((*tier.inbound, *tier.outbound)) for tier in one.tiers)
        for address in one.addresses
    )


def is_needed(before: Desired | None, after: Desired) -> bool:
    """Whether verdicts may be others than before."""
    return before is None or any(
        getattr(before, name) is not getattr(after, name)
        for name in ("policies", "profiles", "ip_sets", "endpoints")
    )


class Reevaluation:
    """See the chapter. One runs at a time, for the latest picture."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands
        self._waiting: Desired | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, tasks: asyncio.TaskGroup, desired: Desired) -> None:
        """Judge connections by this picture, beside everything else."""
        self._waiting = desired
        if self._task is None or self._task.done():
            self._task = tasks.create_task(self._run(), name="judge connections")

    async def _run(self) -> None:
        while (desired := self._waiting) is not None:
            self._waiting = None
            addresses, judge = watched(desired), Judge(desired)
            for version in sorted({address.version for address in addresses}):
                try:
                    await self._judge(version, addresses, judge)
                except CommandFailed as error:
                    log.warning("connections not judged anew", error=str(error))

    async def _judge(self, version: int, addresses: frozenset[Address], judge: Judge) -> None:
        family = ("--family", f"ipv{version}")
        listed = (await self._commands.run(("conntrack", "--dump", *family))).checked()
        for flow, words in parse(listed.stdout):
            if not addresses.intersection((flow.source, flow.destination)) or judge.allows(flow):
                continue
            done = await self._commands.run(("conntrack", "--delete", *family, *words))
            if done.ok:  # else it ended by itself
                metrics.CONNECTIONS_ENDED.inc()
                log.info("connection ended, policy denies it now", flow=" ".join(words))


def parse(text: str) -> Iterator[tuple[Flow, tuple[str, ...]]]:
    """The flows in a listing of conntrack, and the words that name each for a deletion.

    The first tuple of a line is what was asked, the second what answers: its source is where
    the first leads after translation.
    """
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or not words[1].isdecimal():
            continue
        found: list[dict[str, str]] = []
        for name, value in _FIELD.findall(line):
            if name == "src":
                found.append({})
            if found:
                found[-1].setdefault(name, value)
        if len(found) < 2:
            continue
        asked, answer = found[0], found[1]
        protocol = int(words[1])
        if protocol in _ICMP:
            icmp = (int(asked.get("type", 0)), int(asked.get("code", 0)))
            names = (("type", "--icmp-type"), ("code", "--icmp-code"), ("id", "--icmp-id"))
        else:
            icmp = (0, 0)
            names = (("sport", "--orig-port-src"), ("dport", "--orig-port-dst"), ("", ""))
        flow = Flow(
            parse_address(asked["src"]),
            parse_address(answer["src"]),
            protocol,
            int(asked.get("sport", 0)),
            int(answer.get("sport", 0)),
            icmp,
        )
        chosen = [word for name, option in names if name in asked
                  for word in (option, asked[name])]  # fmt: skip
        named = ("--proto", words[0] if words[0] != "unknown" else words[1])
        ends = ("--orig-src", asked["src"], "--orig-dst", asked["dst"])
        yield flow, (*named, *ends, *chosen)
