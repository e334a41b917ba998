"""One supervisor for every process of a lab: its configuration as text, and a client for it.

supervisord runs in the machine's own namespace and starts each program through nsenter, which
becomes the program: the process id it knows is the daemon's own, so a kill -9 hits the daemon and
nothing else. A group is a machine or a pod, and is one file in conf.d; adding and removing a node
is writing or deleting that file and asking for an update.
"""

from __future__ import annotations

import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labs.topology import Layout, Unknown


class NotRunning(RuntimeError):
    """The supervisor does not answer: the lab is not up."""


@dataclass(frozen=True, slots=True)
class Program:
    """One process: its words, and what is in its environment beside PATH and LANG."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    stop_wait_s: int = 5


@dataclass(frozen=True, slots=True)
class Process:
    """What the supervisor says of one process. `started_at` is in seconds since the epoch."""

    group: str
    name: str
    state: str
    pid: int
    started_at: int
    why: str

    @property
    def running(self) -> bool:
        """True once it has outlived its first moments."""
        return self.state == "RUNNING"


def render_main(layout: Layout) -> str:
    """The configuration of supervisord itself."""
    state = layout.state
    return f"""\
[unix_http_server]
file={state}/supervisor.sock
chmod=0700

[supervisord]
logfile={layout.logs}/supervisord.log
pidfile={state}/supervisord.pid
childlogdir={layout.logs}
identifier={layout.name}
directory=/
user=root
nocleanup=true
minfds=4096

[rpcinterface:supervisor]
supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface

[supervisorctl]
serverurl=unix://{state}/supervisor.sock

[include]
files = {state}/conf.d/*.conf
"""


def render_group(layout: Layout, group: str, programs: Sequence[Program]) -> str:
    """One group, its programs in the order in which they start. Restarted whenever they end."""
    names = ",".join(f"{group}-{program.name}" for program in programs)
    parts = [f"[group:{group}]\nprograms={names}\n"]
    for place, program in enumerate(programs):
        environment = ",".join(
            f'{name}="{_escaped(value)}"' for name, value in program.environment.items()
        )
        parts.append(
            f"[program:{group}-{program.name}]\n"
            f"process_name={program.name}\n"
            f"command={_escaped(shlex.join(program.command))}\n"
            f"environment={environment}\n"
            f"priority={place}\n"
            # A second alive counts as started; ten quick deaths are tried again, each a bit later.
            f"autostart=true\nautorestart=true\nstartsecs=1\nstartretries=10\n"
            # When patience ends the whole group is killed: exabgp has a child.
            f"stopwaitsecs={program.stop_wait_s}\nkillasgroup=true\n"
            f"redirect_stderr=true\n"
            f"stdout_logfile={layout.logs}/{group}-{program.name}.log\n"
            f"stdout_logfile_maxbytes=10MB\nstdout_logfile_backups=1\n"
        )
    return "\n".join(parts)


def _escaped(text: str) -> str:
    """Supervisor expands % in every value."""
    return text.replace("%", "%%")


class Supervisor:
    """The client: reads states, starts and stops, over the supervisor's unix socket."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._socket = layout.state / "supervisor.sock"

    def alive(self) -> bool:
        """True if it answers."""
        try:
            self._call("getState")
        except NotRunning:
            return False
        return True

    def launch(self) -> None:
        """Start supervisord as a daemon with nothing to run yet."""
        state = self._layout.state
        (state / "conf.d").mkdir(parents=True, exist_ok=True)
        self._layout.logs.mkdir(parents=True, exist_ok=True)
        config = state / "supervisord.conf"
        config.write_text(render_main(self._layout))
        environment = {"PATH": os.environ["PATH"], "LANG": "C.UTF-8", "HOME": "/root"}
        program = Path(sys.executable).with_name("supervisord")
        subprocess.run(
            [str(program), "-c", str(config)],
            check=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=30,
        )
        deadline = time.monotonic() + 10
        while not self.alive():
            if time.monotonic() > deadline:
                raise NotRunning(f"supervisord did not come up; see {self._layout.logs}")
            time.sleep(0.05)

    def shut_down(self, *, patience_s: float = 30) -> None:
        """End every program, then the supervisor. Nothing to do if it is gone already."""
        pid = self.pid()
        if pid is None:
            return
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + patience_s
        while self.pid() == pid:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + patience_s
            time.sleep(0.05)

    def pid(self) -> int | None:
        """The process id of our supervisord, proved by its command line; None if it is gone."""
        try:
            pid = int((self._layout.state / "supervisord.pid").read_text())
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            ended = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return None
        ours = str(self._layout.state / "supervisord.conf").encode() in command.split(b"\0")
        return pid if ours and not ended else None

    def write_group(self, group: str, programs: Sequence[Program]) -> None:
        """Define a group, not started before `update`."""
        target = self._layout.state / "conf.d" / f"{group}.conf"
        target.write_text(render_group(self._layout, group, programs))

    def remove_group(self, group: str) -> None:
        """Stop and forget a group. Nothing to do if there is none."""
        (self._layout.state / "conf.d" / f"{group}.conf").unlink(missing_ok=True)
        self.update()

    def update(self) -> None:
        """Make what runs what conf.d says: stop what is gone or changed, start what is new."""
        ((added, changed, removed),) = self._call("reloadConfig")
        for group in (*removed, *changed):
            self._call("stopProcessGroup", group)
            self._call("removeProcessGroup", group)
        for group in (*added, *changed):
            self._call("addProcessGroup", group)

    def processes(self) -> tuple[Process, ...]:
        """Every process of the lab, as the supervisor sees it now."""
        return tuple(
            Process(
                group=info["group"],
                name=info["name"],
                state=info["statename"],
                pid=info["pid"],
                started_at=info["start"],
                why=info["spawnerr"] or info["description"],
            )
            for info in self._call("getAllProcessInfo")
        )

    def process(self, group: str, name: str) -> Process:
        """One process. Raises Unknown if there is none of this name."""
        for process in self.processes():
            if (process.group, process.name) == (group, name):
                return process
        raise Unknown(f"no process {name} in {group}")

    def start(self, group: str, name: str) -> None:
        """Start it and wait until it runs; nothing to do if it does."""
        if not self.process(group, name).running:
            self._call("startProcess", f"{group}:{name}")

    def stop(self, group: str, name: str) -> None:
        """Stop it kindly (SIGTERM) and wait for its end; it stays down until started."""
        if self.process(group, name).state not in ("STOPPED", "EXITED", "FATAL"):
            self._call("stopProcess", f"{group}:{name}")

    def kill(self, group: str, name: str) -> int:
        """Kill -9 the process itself, as a crash does; the supervisor restarts it. Its old pid."""
        process = self.process(group, name)
        if not process.pid:
            raise Unknown(f"{group}:{name} is not running ({process.state})")
        os.kill(process.pid, signal.SIGKILL)
        return process.pid

    def _call(self, method: str, *arguments: str) -> Any:
        try:
            with xmlrpc.client.ServerProxy(
                "http://lab", transport=_UnixTransport(self._socket)
            ) as server:
                return getattr(server.supervisor, method)(*arguments)
        except (OSError, http.client.HTTPException) as failure:
            raise NotRunning(f"no supervisor at {self._socket}: {failure}") from failure
        except xmlrpc.client.Fault as fault:
            raise RuntimeError(f"supervisor: {method} {' '.join(arguments)}: {fault}") from fault


class _UnixTransport(xmlrpc.client.Transport):
    """XML-RPC over the supervisor's unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        """One connection per call is enough here; `host` only names the place."""
        return _UnixConnection(self._path)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("lab", timeout=60)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket in the file system."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
