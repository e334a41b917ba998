"""Forgetting connections: by the kernel where it can, by program where it cannot."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from ipaddress import ip_address

from cymric.kernel.command import FakeCommands, Finished
from cymric.kernel.conntrack import FakeConnections, Unsupported
from cymric.kernel.links import KernelError
from felix.dataplane.conntrack import Conntrack

ONE, TWO, FAR = map(ip_address, ("198.19.16.1", "198.19.16.2", "198.19.0.9"))


def deleted(argv: Sequence[str], stdin: str) -> Finished:
    """A conntrack program that finds something each time."""
    return Finished(tuple(argv), 0, "", "1 flow entries have been deleted")


async def forget(conntrack: Conntrack) -> None:
    async with asyncio.TaskGroup() as tasks:
        conntrack.forget(tasks, [ONE])
        await conntrack.wait_for([ONE])


async def test_the_kernel_forgets() -> None:
    """Connections of the address are gone when waited for, others stay, no program ran."""
    connections, commands = FakeConnections(), FakeCommands({"conntrack": deleted})
    connections.pairs = {(ONE, FAR), (FAR, ONE), (TWO, FAR)}
    await forget(Conntrack(commands, connections))
    assert connections.pairs == {(TWO, FAR)}
    assert commands.calls == []


async def test_an_old_kernel() -> None:
    """A kernel that cannot is asked once; from then on the program does it, both ways."""
    connections, commands = FakeConnections(), FakeCommands({"conntrack": deleted})
    connections.error = Unsupported(errno.EINVAL, "forget", "too old")
    conntrack = Conntrack(commands, connections)
    await forget(conntrack)
    connections.error = KernelError(errno.EPERM, "forget", "would be told in the log")
    await forget(conntrack)
    ways = [call.argv[4] for call in commands.calls]
    assert ways == ["--orig-src", "--reply-src"] * 2


async def test_a_refusal_is_no_end() -> None:
    """Another refusal is told and leaves the entries to time out; felix goes on."""
    connections, commands = FakeConnections(), FakeCommands({"conntrack": deleted})
    connections.error = KernelError(errno.EPERM, "forget", "not permitted")
    await forget(Conntrack(commands, connections))
    assert commands.calls == []
