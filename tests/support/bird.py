"""BIRD 2 as a router of a test: one process in a namespace, asked through its control socket."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from tests.support.eventually import eventually_now
from tests.support.underlay import Host, Underlay, run

# Whole seconds: BIRD works the moment out anew each time, a millisecond off at times.
PREAMBLE = 'timeformat protocol "%T";\nprotocol device {}\n'


@dataclass(frozen=True, slots=True)
class BirdRouter:
    """A running BIRD."""

    host: Host
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, underlay: Underlay, host: Host, configuration: str) -> BirdRouter:
        """Start it with this text after a preamble; it answers when this returns."""
        directory = host.directory
        path = directory / "bird.conf"
        path.write_text(cls._whole(host, configuration))
        process = underlay.start(
            host, "bird", "-f", "-c", str(path), "-s", f"{directory}/bird.ctl",
            "-P", f"{directory}/bird.pid",
        )  # fmt: skip
        made = cls(host, process)
        eventually_now(lambda: "ready" in made.ask("show status"), 30, what="BIRD answers")
        return made

    def load(self, configuration: str) -> None:
        """Another configuration; BIRD must accept it."""
        (self.host.directory / "bird.conf").write_text(self._whole(self.host, configuration))
        said = self.ask("configure")
        assert "Reconfigur" in said, said

    def ask(self, command: str) -> str:
        """What birdc prints."""
        socket = str(self.host.directory / "bird.ctl")
        return run("birdc", "-s", socket, *command.split(), check=False)

    def is_up(self, protocol: str) -> bool:
        """Whether that BGP session is Established."""
        return "Established" in self.ask(f"show protocols {protocol}")

    def since(self, protocol: str) -> str:
        """When that session last changed its state, as BIRD tells it; a restart changes it."""
        found = re.search(
            rf"^{protocol}\s+BGP\s+\S+\s+\S+\s+(\S+)", self.ask(f"show protocols {protocol}"), re.M
        )
        return found[1] if found else ""

    def routes(self, protocol: str) -> dict[str, str]:
        """Prefixes imported from that session, with BIRD's full description."""
        text = self.ask(f"show route all protocol {protocol}")
        parts = re.split(r"^([0-9a-f.:]+/\d+)", text, flags=re.M)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    @staticmethod
    def _whole(host: Host, configuration: str) -> str:
        log = f'log "{host.directory}/bird.messages" all;\n'
        return f"{log}router id {host.v4};\n{PREAMBLE}{configuration}"
