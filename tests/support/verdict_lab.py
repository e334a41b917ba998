"""A node with felix' real drivers, its pods and everybody else, in namespaces; and packets there.

    a, b, c, d ── cali0a … ── node ── up0 ── east
                                   └─ up1 ── west      (felix_places has the addresses)

Neighbours are known beforehand on all links, for policy of host endpoints may forbid to ask for
them. Nothing here speaks to etcd: what is stored is told to felix_driver, in the node's namespace.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from cymric.model.net import parse_address
from tests.support.felix_lab import HOST_LINK_LOCAL, HOST_MAC, run
from tests.support.felix_places import EAST, OUTSIDE, PODS, UP0, UP1, WEST, Place
from tests.support.felix_policy import Spec, Stored
from tests.support.felix_walk import ENVIRONMENT
from tests.support.wire import Wire

PREFIX = "cyfv"
_GATEWAY = "169.254.1.1"


@dataclass
class VerdictLab:
    """See the chapter. `backend` is nft or legacy."""

    directory: Path
    backend: str
    tag: str = field(default_factory=lambda: secrets.token_hex(2))
    stored: Stored = field(default_factory=dict)
    staged: int = 0
    """Changes for which rules looked at copies of sets, so far."""
    _namespaces: list[str] = field(default_factory=list)
    _felix: subprocess.Popen[str] | None = None
    _wire: Wire | None = None

    def open(self) -> VerdictLab:
        """Make it all and start felix."""
        for name in ("node", *(place.name for place in (*PODS, EAST, WEST))):
            run("ip", "netns", "add", self.namespace(name))
            self._namespaces.append(self.namespace(name))
            self._ip(name, "link", "set", "lo", "up")
            self._switch(name, "net/ipv6/conf/default/accept_dad", "0")
        for place, own in ((EAST, UP0), (WEST, UP1)):
            self._add_outside(place, own)
        for pod in PODS:
            self._add_pod(pod)
        self._wire = Wire(self._namespaces)
        self._start_felix()
        return self

    def close(self) -> None:
        """Take it all down."""
        if self._wire is not None:
            self._wire.close()
        if self._felix is not None:
            self._felix.kill()
            self._felix.wait()
        for name in self._namespaces:
            run("ip", "netns", "del", name, check=False)

    def namespace(self, place: str) -> str:
        """Where a place (or the node) is."""
        return f"{PREFIX}-{self.tag}-{'node' if place == 'host' else place}"

    @property
    def wire(self) -> Wire:
        """Sends and receives."""
        assert self._wire is not None
        return self._wire

    @property
    def log(self) -> str:
        """What felix said."""
        return (self.directory / "felix.log").read_text()

    def store(self, stored: Stored) -> None:
        """Exactly this is stored from now on; returns when it is in force."""
        self.begin(stored)
        self.finish()

    def begin(self, stored: Stored) -> None:
        """Tell felix of the next cluster; `finish` waits until it is in force."""
        change: dict[str, Spec | None] = {name: None for name in self.stored if name not in stored}
        change |= {name: spec for name, spec in stored.items() if self.stored.get(name) != spec}
        self.stored = stored
        self._pipe("stdin").write(json.dumps(change) + "\n")
        self._pipe("stdin").flush()

    def finish(self) -> None:
        """Wait until felix says that the kernel is as wanted."""
        words = self._pipe("stdout").readline().split()
        assert words[:1] == ["applied"], f"felix ended: {self.log[-3000:]}"
        self.staged = int(words[1])

    @property
    def answers(self) -> IO[str]:
        """Where `finish` reads from, to be polled."""
        return self._pipe("stdout")

    def forget_connections(self) -> None:
        """No packet from now on belongs to a connection of before."""
        run("ip", "netns", "exec", self.namespace("node"), "conntrack", "-F")

    # --- how it is made ---------------------------------------------------------------------------

    def _pipe(self, name: str) -> IO[str]:
        assert self._felix is not None
        found = getattr(self._felix, name)
        assert found is not None
        return found  # type: ignore[no-any-return]

    def _start_felix(self) -> None:
        environment = {
            **os.environ,
            **ENVIRONMENT,
            "FELIX_IPTABLESBACKEND": self.backend,
        }
        words = ("-m", "tests.support.felix_driver", str(self.directory))
        with (self.directory / "felix.log").open("ab") as log:
            self._felix = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{self.namespace('node')}", sys.executable, *words],
                env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True,
            )  # fmt: skip

    def _add_outside(self, place: Place, own: tuple[str, str]) -> None:
        link, number = place.interface, OUTSIDE.index(place)
        macs = [f"02:00:00:00:{number:02x}:{end:02x}" for end in (1, 2)]
        self._ip("node", "link", "add", link, "address", macs[0], "type", "veth", "peer", "name",
                 "eth0", "address", macs[1], "netns", self.namespace(place.name))  # fmt: skip
        for where, device in (("node", link), (place.name, "eth0")):
            self._ip(where, "link", "set", device, "up")
        for address in own:
            self._ip("node", "address", "add", f"{address}/{_bits(address)}", "dev", link)
            self._ip(place.name, "route", "add", f"{address}/{_bits(address)}", "dev", "eth0")
            self._ip(place.name, "neigh", "replace", address, "lladdr", macs[0], "dev", "eth0",
                     "nud", "permanent")  # fmt: skip
            self._ip(place.name, "route", "add", "default", "via", address, "dev", "eth0")
        for version in (4, 6):
            for theirs in map(str, place.of(version)):
                text = f"{theirs}/{_bits(theirs)}"
                self._ip(place.name, "address", "add", text, "dev", "lo")
                self._ip("node", "route", "add", text, "dev", link)
                self._ip("node", "neigh", "replace", theirs, "lladdr", macs[1], "dev", link,
                         "nud", "permanent")  # fmt: skip

    def _add_pod(self, pod: Place) -> None:
        self._ip("node", "link", "add", pod.interface, "address", HOST_MAC, "type", "veth", "peer",
                 "name", "eth0", "address", pod.mac, "netns", self.namespace(pod.name))  # fmt: skip
        self._ip(pod.name, "link", "set", "eth0", "up")
        self._ip("node", "link", "set", pod.interface, "up")
        for address in pod.addresses:
            is_6 = ":" in address
            gateway = HOST_LINK_LOCAL if is_6 else _GATEWAY
            self._ip(pod.name, "address", "add", f"{address}/{_bits(address)}", "dev", "eth0")
            if not is_6:
                self._ip(pod.name, "route", "add", gateway, "dev", "eth0", "scope", "link")
            self._ip(pod.name, "neigh", "replace", gateway, "lladdr", HOST_MAC, "dev", "eth0",
                     "nud", "permanent")  # fmt: skip
            self._ip(pod.name, "route", "add", "default", "via", gateway, "dev", "eth0")
            if is_6:  # as the CNI plugin's host side is known in IPv4 by felix
                self._ip("node", "neigh", "replace", address, "lladdr", pod.mac, "dev",
                         pod.interface, "nud", "permanent")  # fmt: skip

    def _ip(self, place: str, *words: str) -> None:
        family = ("-6",) if any(":" in word and _is_address(word) for word in words) else ()
        run("ip", *family, "-n", self.namespace(place), *words)

    def _switch(self, place: str, path: str, value: str) -> None:
        command = f"echo {value} > /proc/sys/{path}"
        run("ip", "netns", "exec", self.namespace(place), "sh", "-c", command)


def _bits(address: str) -> int:
    return 128 if ":" in address else 32


def _is_address(word: str) -> bool:
    try:
        parse_address(word.partition("/")[0])
    except ValueError:
        return False
    return True
