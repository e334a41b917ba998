"""One of our nodes with all that makes its sessions: confd, ExaBGP, bgpd, a datastore in memory.

confd and bgpd run in the test's own process; ExaBGP and the kernel routes are in the host's
namespace.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

import bgpd.daemon
import confd.daemon
from bgpd.exabgp import ExaBGPSpeaker
from cymric.datastore.memory import MemoryDatastore
from cymric.kernel.command import HostCommands
from cymric.kernel.namespace import opened, visiting
from cymric.kernel.routes import RouteTable
from cymric.kernel.underlay import KernelUnderlay
from cymric.runtime.health import Health
from cymric.runtime.settings import Settings
from tests.support.underlay import Host, Underlay, run


@dataclass
class BgpNode:
    """The node called `us`."""

    underlay: Underlay
    host: Host
    store: MemoryDatastore = field(default_factory=MemoryDatastore)

    @property
    def settings(self) -> Settings:
        """Those of all its daemons."""
        directory = self.host.directory
        made = Settings(
            node_name="us",
            run_dir=directory / "run",
            bgp_password_dir=directory / "bgp-passwords",
        )
        return replace(made, announce_wait_s=0)

    @property
    def exabgp_log(self) -> str:
        """What cymric-exabgp said so far."""
        path = self.host.directory / f"{Path(sys.executable).name}.log"
        return path.read_text() if path.exists() else ""

    def exabgp(self) -> subprocess.Popen[bytes]:
        """Start cymric-exabgp."""
        environment = {
            "CYMRIC_RUN_DIR": str(self.settings.run_dir),
            "CYMRIC_NODE_NAME": "us",
            "CYMRIC_LOG_FORMAT": "json",
        }
        command = (sys.executable, "-m", "bgpd.launcher")
        return self.underlay.start(self.host, *command, environment=environment)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """All three for as long as the block lasts; a failure of any fails the block."""
        settings = self.settings
        settings.run_dir.mkdir(exist_ok=True)
        exabgp = self.exabgp()
        speaker = ExaBGPSpeaker(settings.speaker_socket, settings.exabgp_config)
        with opened(f"/run/netns/{self.host.namespace}") as descriptor, visiting(descriptor):
            routes, under = RouteTable(), KernelUnderlay()
        tasks = [
            asyncio.create_task(
                confd.daemon.run(settings, Health(), self.store, HostCommands()), name="confd"
            ),
            asyncio.create_task(
                bgpd.daemon.run(
                    settings,
                    Health(),
                    self.store,
                    speaker,
                    routes,
                    underlay=under,
                    proc_net=Path(f"/proc/{exabgp.pid}/net"),
                ),
                name="bgpd",
            ),
        ]
        try:
            yield
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
            routes.close()
            under.close()

    async def ask(self, question: str = "status") -> dict[str, Any]:
        """What bgpd answers on its socket."""
        reader, writer = await asyncio.open_unix_connection(self.settings.bgpd_socket)
        writer.write(question.encode() + b"\n")
        answer = await reader.read()
        writer.close()
        return msgspec.json.decode(answer, type=dict[str, Any])

    def confd_status(self) -> dict[str, Any]:
        """The file that confd writes for people."""
        path = self.settings.run_dir / confd.daemon.STATUS_FILE
        return msgspec.json.decode(path.read_bytes()) if path.exists() else {}

    def kernel(self, version: int = 4) -> set[str]:
        """Prefixes of our routing protocol in the kernel, blackholes left out."""
        shown = run(*self.host.enter, "ip", f"-{version}", "route", "show", "proto", "179")
        return {words[0] for line in shown.splitlines() if "/" in (words := line.split())[0]}
