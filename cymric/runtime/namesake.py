"""A process that bears a name others look for, for exactly as long as we run.

Some programs find a daemon by the name of its process: calicoctl wants `bird`, `bird6` and
`calico-felix`. Renaming our own processes would hide them from whoever looks for them by their own
names, and one process cannot bear two. So a child bears the name and does nothing: `cat`, reading
a pipe that nobody writes to. The pipe ends with us, also when we are killed, and so does the child.
"""

from __future__ import annotations

import asyncio
import shutil

import structlog

from cymric.runtime.pacing import Backoff

log = structlog.get_logger()


async def namesake(name: str) -> None:
    """Keep one process whose argv[0] is `name`, until cancelled."""
    program = shutil.which("cat")
    if program is None:
        log.warning("nothing bears the name: there is no cat", name=name)
        return
    backoff = Backoff(first_s=1.0, most_s=60.0)
    while True:
        bearer = await asyncio.create_subprocess_exec(
            name,
            executable=program,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            cwd="/",
        )
        try:
            status = await bearer.wait()
        finally:
            if bearer.stdin is not None:
                bearer.stdin.close()
        log.warning("the bearer of a name ended", name=name, status=status)
        await asyncio.sleep(backoff.next_s())
