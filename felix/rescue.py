"""The way to the datastore, opened when a trial cut it off and felix was killed before its end.

A running felix ends a trial by its timer and needs nobody. One that starts changes nothing before
it is in sync, and it may be the rules on trial that keep it from that. So when the file says that a
trial's time has passed and there still is no word from the datastore, what goes to and comes from
its configured addresses and ports is accepted ahead of everything else of ours; nothing more. The
rules carry no hash that anybody wants: once in sync felix removes them like all it does not want.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from cymric.kernel.command import CommandFailed, Commands
from cymric.model import trial
from cymric.model.net import Address
from felix.iptables.backend import Backend, find
from felix.iptables.saved import parse

PATIENCE_S = 3.0
"""How long the datastore may take to answer a fresh process."""
CHECK_S = 2.0
_PLACES = (
    ("raw", "cali-PREROUTING"),
    ("raw", "cali-OUTPUT"),
    ("mangle", "cali-PREROUTING"),
    ("filter", "cali-INPUT"),
    ("filter", "cali-OUTPUT"),
)
"""Where packets of the host meet our rules first."""

Endpoints = Sequence[tuple[Address, int]]

log = structlog.get_logger()


async def rescue(
    commands: Commands,
    mark: Path,
    etcd_endpoints: Iterable[str],
    clock: Callable[[], float],
    patience_s: float = PATIENCE_S,
) -> None:
    """Open the way once the time in the file has passed. To be cancelled when in sync."""
    await asyncio.sleep(patience_s)
    while not is_over(mark, clock()):  # noqa: ASYNC110 - nobody tells of a time that has come
        await asyncio.sleep(CHECK_S)
    endpoints = await resolve(etcd_endpoints)
    log.error(
        "A TRIAL IS OVER AND THE DATASTORE IS SILENT: opening the way to it",
        endpoints=[f"{address} port {port}" for address, port in endpoints],
    )
    backend = (await find(commands, "auto")).backend
    for version in (4, 6):
        wanted = [one for one in endpoints if one[0].version == version]
        if wanted:
            await _open(commands, backend.of(version), wanted)


def is_over(mark: Path, now: float) -> bool:
    """Whether the file tells of a trial that is over; an unreadable one is."""
    try:
        return now >= trial.parse_time(mark.read_text().strip())
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True


async def resolve(etcd_endpoints: Iterable[str]) -> Endpoints:
    """Addresses and ports; names that nobody can resolve now are left out."""
    found: list[tuple[Address, int]] = []
    loop = asyncio.get_running_loop()
    for text in etcd_endpoints:
        url = urlsplit(text if "://" in text else f"http://{text}")
        host, port = url.hostname or "", url.port or 2379
        try:
            answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            log.warning("cannot resolve", endpoint=text, error=str(error))
            continue
        found += ((ip_address(str(answer[4][0])), port) for answer in answers)
    return list(dict.fromkeys(found))


async def _open(commands: Commands, backend: Backend, endpoints: Endpoints) -> None:
    for name in ("raw", "mangle", "filter"):
        try:
            saved = parse((await commands.run(backend.save(name))).checked().stdout)
            chains = saved[name].chains if name in saved else {}
            if text := transaction(name, endpoints, chains):
                await commands.feed(backend.restore(), text)
        except (CommandFailed, ValueError) as error:
            log.warning("way not opened", table=name, error=str(error))


def transaction(table: str, endpoints: Endpoints, chains: Iterable[str]) -> str:
    """What to add to a table in which these chains are; empty for nothing."""
    there = set(chains)
    lines = [
        f"-I {chain} 1 -p tcp --{side} {address} -m tcp --{side[0]}port {port} -j ACCEPT"
        for of_table, chain in _PLACES
        if of_table == table and chain in there
        for address, port in endpoints
        for side in ("source", "destination")  # both: the datastore may be on this very node
    ]
    return "\n".join([f"*{table}", *lines, "COMMIT", ""]) if lines else ""
