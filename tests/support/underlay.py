"""A bridge and hosts on it, each in a network namespace of its own, for tests with real routers.

Every host has an IPv4 address in 198.19.0.0/20 and an IPv6 address in fd19::/64 that ends alike.
Everything is gone after `close`: processes first, then namespaces.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


def run(*command: str, check: bool = True) -> str:
    """Run a short command and return its output."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@dataclass(frozen=True, slots=True)
class Host:
    """One namespace. `number` is the last byte of both its addresses."""

    namespace: str
    number: int
    directory: Path

    @property
    def v4(self) -> str:
        """Its IPv4 address."""
        return f"198.19.0.{self.number}"

    @property
    def v6(self) -> str:
        """Its IPv6 address."""
        return f"fd19::{self.number:x}"

    @property
    def enter(self) -> tuple[str, ...]:
        """What to put before a command so that it runs there."""
        return ("nsenter", f"--net=/run/netns/{self.namespace}")


@dataclass
class Underlay:
    """See the module. `prefix` begins the names of all namespaces."""

    directory: Path
    prefix: str = "cybs-"
    _name: str = field(default_factory=lambda: secrets.token_hex(2))
    _namespaces: list[str] = field(default_factory=list)
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _scratch: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        try:
            self._namespace("net")
            run(*self._in("net"), "ip", "link", "add", "lan", "type", "bridge")
            run(*self._in("net"), "ip", "link", "set", "lan", "up")
        except BaseException:
            self.close()
            raise

    def host(self, name: str, number: int) -> Host:
        """A new namespace on the bridge."""
        self._namespace(name)
        inner, outer = f"cb{self._name}i{number}", f"cb{self._name}o{number}"
        run("ip", "link", "add", inner, "type", "veth", "peer", "name", outer)
        run("ip", "link", "set", inner, "netns", self._full(name))
        run("ip", "link", "set", outer, "netns", self._full("net"))
        run(*self._in("net"), "ip", "link", "set", outer, "master", "lan", "up")
        directory = self.directory / name
        directory.mkdir()
        host = Host(self._full(name), number, directory)
        inside = self._in(name)
        # Duplicate address detection would keep the address unusable for a second.
        run(*inside, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        run(*inside, "ip", "link", "set", inner, "name", "eth0")
        run(*inside, "sysctl", "-qw", "net.ipv6.conf.eth0.accept_dad=0")
        run(*inside, "ip", "addr", "add", f"{host.v4}/20", "dev", "eth0")
        run(*inside, "ip", "addr", "add", f"{host.v6}/64", "dev", "eth0", "nodad")
        run(*inside, "ip", "link", "set", "eth0", "up")
        run(*inside, "ip", "link", "set", "lo", "up")
        return host

    def start(
        self, host: Host, *command: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run a program on a host, its output in `<program>.log`; it is killed at the end."""
        log = host.directory / f"{Path(command[0]).name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*host.enter, *command],
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(environment or {})},
            )
        self._processes.append(process)
        return process

    def scratch(self, user: str) -> Path:
        """A directory of `user`, for a program that gives up being root; removed at the end.

        A test's own directory is closed to all others.
        """
        path = Path(tempfile.mkdtemp(prefix=self.prefix))
        path.chmod(0o700)
        shutil.chown(path, user, user)
        self._scratch.append(path)
        return path

    def close(self) -> None:
        """End all processes and remove all namespaces."""
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait(timeout=10)
        for namespace in self._namespaces:
            run("ip", "netns", "delete", namespace, check=False)
        for path in self._scratch:
            shutil.rmtree(path, ignore_errors=True)

    def _namespace(self, name: str) -> None:
        run("ip", "netns", "add", self._full(name))
        self._namespaces.append(self._full(name))

    def _full(self, name: str) -> str:
        return f"{self.prefix}{self._name}-{name}"

    def _in(self, name: str) -> tuple[str, ...]:
        return ("nsenter", f"--net=/run/netns/{self._full(name)}")
