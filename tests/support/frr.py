"""FRR as a router of a test: zebra and bgpd (bfdd on request) in a namespace, asked through vtysh.

Its programs give up being root, so their state is in a scratch directory of the user frr; nothing
under /etc or /run is touched.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.eventually import eventually_now
from tests.support.underlay import Host, Underlay, run

PROGRAMS = Path("/usr/lib/frr")


@dataclass(frozen=True, slots=True)
class Frr:
    """A running FRR."""

    host: Host
    directory: Path
    processes: dict[str, subprocess.Popen[bytes]]

    @classmethod
    def start(
        cls, underlay: Underlay, host: Host, configuration: str, *, daemons: Sequence[str] = ()
    ) -> Frr:
        """Start it with the text of its frr.conf; it answers when this returns.

        `daemons` are started beside zebra and bgpd.
        """
        directory = underlay.scratch("frr")
        (directory / "vtysh.conf").write_text("")
        processes = {}
        for name in ("zebra", *daemons, "bgpd"):
            words = (
                "-P", "0", "-A", "127.0.0.1",
                "-f", f"{directory}/none.conf", "-i", f"{directory}/{name}.pid",
                "-z", f"{directory}/zserv.api", "--vty_socket", str(directory),
                "--log", "stdout",
            )  # fmt: skip
            processes[name] = underlay.start(host, str(PROGRAMS / name), *words)
            if name == "zebra":
                eventually_now(lambda: (directory / "zserv.api").exists(), 30, what="zebra runs")
        made = cls(host, directory, processes)
        # Each of them: vtysh gives configuration to those that answer, and is content with that.
        for name in processes:
            eventually_now(partial(made.answers, name), 30, what=f"{name} answers")
        made.load(configuration)
        return made

    def load(self, configuration: str) -> None:
        """Read configuration text as an operator would; every line must be accepted."""
        path = self.directory / "frr.conf"
        path.write_text(configuration)
        said = run(*self._vtysh, "-f", str(path), check=False)
        wrong = [line for line in said.splitlines() if "%" in line or "rror" in line]
        assert not wrong, said

    def answers(self, daemon: str) -> bool:
        """Whether that daemon takes commands."""
        said = run(*self._vtysh, "-d", daemon, "-c", "show version", check=False)
        return "FRRouting" in said

    def ask(self, command: str) -> str:
        """What vtysh prints."""
        return run(*self._vtysh, "-c", command, check=False)

    def json(self, command: str) -> Any:
        """The JSON answer to a show command."""
        text = self.ask(f"{command} json")
        return json.loads(text) if text.strip().startswith("{") else {}

    def neighbor(self, address: str) -> dict[str, Any]:
        """`show bgp neighbors`, of one neighbour."""
        found: dict[str, Any] = self.json(f"show bgp neighbors {address}").get(address, {})
        return found

    def is_up(self, address: str) -> bool:
        """Whether the session with that neighbour is Established."""
        return self.neighbor(address).get("bgpState") == "Established"

    def routes(self, version: int = 4) -> dict[str, Any]:
        """The BGP table of a family: paths by prefix."""
        routes: dict[str, Any] = self.json(f"show bgp ipv{version} unicast").get("routes", {})
        return routes

    @property
    def _vtysh(self) -> tuple[str, ...]:
        directory = str(self.directory)
        return (*self.host.enter, "vtysh", "--vty_socket", directory, "--config_dir", directory)
