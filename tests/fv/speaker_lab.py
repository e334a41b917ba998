"""A bridge, our node and BIRD peers in namespaces of their own, with real processes.

Namespaces start with `cyspk-`; everything is gone after `close`. BIRD's sockets, configurations and
logs, and our run directory, are in the test's temporary directory.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

import bgpd.relay
from bgpd.announcement import Announcement, PathAttributes
from bgpd.exabgp import ExaBGPSpeaker
from bgpd.speaker import SessionState, SpeakerEvent
from confd.render import SpeakerInputs, render_exabgp
from cymric.model.peering import PeerType, Session
from tests.support.eventually import eventually_now

E = TypeVar("E")

OUR_ADDRESS = "198.19.8.1"
OUR_ASN = 64512


def run(*command: str, check: bool = True) -> str:
    """Run a short command and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def session(
    address: str,
    *,
    asn: int = OUR_ASN,
    port: int = 179,
    is_passive: bool = False,
    restart_time_s: int = 120,
) -> Session:
    """Our session with the peer at `address`."""
    return Session(
        name=f"Global_{address.replace('.', '_')}",
        peer_type=PeerType.GLOBAL,
        peer_address=ip_address(address),
        peer_port=port,
        peer_asn=asn,
        local_address=ip_address(OUR_ADDRESS),
        local_asn=OUR_ASN,
        router_id=ip_address(OUR_ADDRESS),
        listen_port=179,
        is_passive=is_passive,
        restart_time_s=restart_time_s,
    )


@dataclass
class Bird:
    """One BIRD, asked through its control socket."""

    name: str
    address: str
    namespace: str
    socket: Path
    configuration: Path
    process: subprocess.Popen[bytes]

    def ask(self, command: str) -> str:
        """What birdc prints."""
        return run("birdc", "-s", str(self.socket), *command.split(), check=False)

    @property
    def is_up(self) -> bool:
        """Whether the session with us is Established."""
        return "Established" in self.ask("show protocols cymric")

    @property
    def since(self) -> str:
        """When the session last changed its state, as BIRD tells it; a restart changes it."""
        match = re.search(
            r"^cymric\s+BGP\s+\S+\s+\S+\s+(\S+)", self.ask("show protocols cymric"), re.M
        )
        return match[1] if match else ""

    def routes(self) -> dict[str, str]:
        """Prefixes received from us, with BIRD's full description."""
        text = self.ask("show route all protocol cymric")
        parts = re.split(r"^(\d+\.\d+\.\d+\.\d+/\d+)", text, flags=re.M)
        return dict(zip(parts[1::2], parts[2::2], strict=True))

    def pause(self) -> None:
        """SIGSTOP."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        self.process.send_signal(signal.SIGCONT)


@dataclass
class SpeakerLab:
    """See the module."""

    directory: Path
    name: str = field(default_factory=lambda: f"cyspk-{secrets.token_hex(2)}")
    birds: dict[str, Bird] = field(default_factory=dict)
    _namespaces: list[str] = field(default_factory=list)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _links: int = 0
    _has_small_buffers: bool = False

    def __post_init__(self) -> None:
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self._namespace("net")
        run(*self._in("net"), "ip", "link", "add", "lan", "type", "bridge")
        run(*self._in("net"), "ip", "link", "set", "lan", "up")
        self.attach("us", OUR_ADDRESS)
        self.run_directory = self.directory / "run"
        self.run_directory.mkdir()
        self.configuration = self.run_directory / "exabgp.conf"
        self.socket = self.run_directory / "speaker.sock"

    def small_buffers(self) -> None:
        """Let TCP hold little, so that a peer that does not read closes its window at once.

        Before any peer is started: a listening socket passes on the buffers it was made with.
        """
        assert not self.birds
        self._has_small_buffers = True
        for namespace in self._namespaces:
            self._shrink_buffers(namespace)

    def _shrink_buffers(self, namespace: str) -> None:
        for which in ("tcp_rmem", "tcp_wmem"):
            run(
                "nsenter", f"--net=/run/netns/{namespace}", "sysctl", "-qw",
                f"net.ipv4.{which}=4096 4608 8192",
            )  # fmt: skip

    def connections_to(self, address: str) -> list[str]:
        """Established TCP connections of ours with that address, as `ss` lists them."""
        listing = run(*self._in("us"), "ss", "-Htn", "state", "established", "dst", address)
        return listing.splitlines()

    def lose_packets_to(self, address: str) -> None:
        """Packets to `address` leave and never arrive, as behind a dead link."""
        run(
            *self._in("us"), "ip", "neigh", "replace", address,
            "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent",
        )  # fmt: skip

    def attach(self, name: str, address: str) -> None:
        """A namespace with that address on the bridge."""
        self._namespace(name)
        self._links += 1
        inner, outer = f"cys{self.name[-4:]}i{self._links}", f"cys{self.name[-4:]}o{self._links}"
        run("ip", "link", "add", inner, "type", "veth", "peer", "name", outer)
        run("ip", "link", "set", inner, "netns", f"{self.name}-{name}")
        run("ip", "link", "set", outer, "netns", f"{self.name}-net")
        run(*self._in("net"), "ip", "link", "set", outer, "master", "lan", "up")
        run(*self._in(name), "ip", "link", "set", inner, "name", "eth0")
        run(*self._in(name), "ip", "addr", "add", f"{address}/20", "dev", "eth0")
        run(*self._in(name), "ip", "link", "set", "eth0", "up")
        run(*self._in(name), "ip", "link", "set", "lo", "up")

    def bird(
        self,
        name: str,
        address: str,
        *,
        asn: int = OUR_ASN,
        routes: Sequence[str] = (),
        extra: str = "",
    ) -> Bird:
        """Start BIRD at `address`, peering with us and announcing `routes`."""
        self.attach(name, address)
        directory = self.directory / name
        directory.mkdir()
        configuration = directory / "bird.conf"
        statics = "\n".join(f"  route {prefix} blackhole;" for prefix in routes)
        configuration.write_text(
            f'log "{directory}/bird.log" all;\nrouter id {address};\n'
            # Whole seconds: BIRD works the moment out anew each time, a millisecond off at times.
            'timeformat protocol "%T";\nprotocol device {}\n'
            f"protocol static st {{\n  ipv4;\n{statics}\n}}\n"
            f"protocol bgp cymric {{\n  local {address} as {asn};\n"
            f"  neighbor {OUR_ADDRESS} as {OUR_ASN};\n  {extra}\n  graceful restart on;\n"
            "  connect delay time 1; connect retry time 1; error wait time 1, 2;\n"
            "  ipv4 { import all; export where source = RTS_STATIC; };\n}\n"
        )
        socket = directory / "bird.ctl"
        process = self.start(
            name, "bird", "-f", "-c", str(configuration), "-s", str(socket),
            "-P", str(directory / "bird.pid"), log=directory / "output",
        )  # fmt: skip
        bird = Bird(name, address, f"{self.name}-{name}", socket, configuration, process)
        self.birds[name] = bird
        eventually_now(lambda: "ready" in bird.ask("show status"), what="BIRD answers")
        return bird

    def write_configuration(self, *sessions: Session, port: int = 179) -> None:
        """Install what confd would for these sessions."""
        self.install(
            render_exabgp(
                SpeakerInputs(
                    node="us",
                    sessions=sessions,
                    listen_address="0.0.0.0",
                    listen_port=port,
                    relay_command=(
                        sys.executable,
                        "-I",
                        "-S",
                        bgpd.relay.__file__,
                        str(self.socket),
                    ),
                )
            )
        )

    def install(self, text: str) -> None:
        """Put a file in the place of the configuration, by rename."""
        temporary = self.configuration.with_suffix(".new")
        temporary.write_text(text)
        temporary.rename(self.configuration)

    def exabgp(self) -> subprocess.Popen[bytes]:
        """Start cymric-exabgp in our namespace."""
        return self.start(
            "us", sys.executable, "-m", "bgpd.launcher", log=self.directory / "exabgp.log"
        )

    @property
    def exabgp_log(self) -> str:
        """What cymric-exabgp said so far."""
        return (self.directory / "exabgp.log").read_text()

    def relay_pid(self, exabgp: subprocess.Popen[bytes]) -> int:
        """The process id of the relay of this ExaBGP."""
        return int(run("pgrep", "-P", str(exabgp.pid), "-f", "relay.py").split()[0])

    def start(self, name: str, *command: str, log: Path) -> subprocess.Popen[bytes]:
        """Run a program in a namespace; it is killed at the end."""
        environment = {
            **os.environ,
            "CYMRIC_RUN_DIR": str(self.run_directory),
            "CYMRIC_NODE_NAME": "us",
            "CYMRIC_LOG_FORMAT": "json",
        }
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self._in(name), *command], stdout=output, stderr=output, env=environment
            )
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End all processes and remove all namespaces."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait(timeout=10)
        for namespace in self._namespaces:
            run("ip", "netns", "delete", namespace, check=False)

    def _namespace(self, name: str) -> None:
        run("ip", "netns", "add", f"{self.name}-{name}")
        self._namespaces.append(f"{self.name}-{name}")
        if self._has_small_buffers:
            self._shrink_buffers(f"{self.name}-{name}")

    def _in(self, name: str) -> tuple[str, ...]:
        return ("nsenter", f"--net=/run/netns/{self.name}-{name}")


def our(prefix: str, **attributes: Any) -> Announcement:
    """A route of ours."""
    return Announcement(prefix, OUR_ADDRESS, PathAttributes(**attributes))


def wanted(*prefixes: str, **attributes: Any) -> dict[str, Announcement]:
    """Routes of ours by prefix, as `advertise` takes them."""
    return {prefix: our(prefix, **attributes) for prefix in prefixes}


class Listener:
    """A running adapter and all events it told."""

    def __init__(self, lab: SpeakerLab) -> None:
        self.speaker = ExaBGPSpeaker(lab.socket, lab.configuration)
        self.events: list[SpeakerEvent] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Listener:
        self._tasks = [
            asyncio.create_task(self.speaker.run()),
            asyncio.create_task(self._listen()),
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    def told(self, kind: type[E], peer: str = "") -> list[E]:
        """The events of one kind, of one peer."""
        return [
            event
            for event in self.events
            if isinstance(event, kind) and (not peer or getattr(event, "peer", "") == peer)
        ]

    def is_settled(self, peer: str) -> bool:
        """Whether everything wanted was written to the peer, End-of-RIB included."""
        status = self.speaker.status().peers.get(peer)
        return (
            status is not None
            and status.state is SessionState.UP
            and status.end_of_rib_sent
            and self.speaker.is_settled([peer])
        )

    async def _listen(self) -> None:
        async for event in self.speaker.events():
            self.events.append(event)
