"""A real etcd for tests: on free loopback ports, in a data directory of its own, killable.

`EtcdServer` runs the installed binary; nothing else on the machine is touched. It can be killed,
paused, restarted on the same data, wiped, and run with TLS or with users. `etcdctl` (run as the
operator) is the way tests do what an agent must not: compact, manage users.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.eventually import eventually_now

START_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """A certificate authority with one server and one client certificate, as PEM files."""

    ca_cert: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path


class EtcdServer:
    """One etcd process. `start` returns when it answers; a later `start` reuses data and ports."""

    def __init__(
        self,
        directory: Path,
        *,
        flags: Sequence[str] = (),
        tls: TlsFiles | None = None,
        binary: str = "/usr/bin/etcd",
    ) -> None:
        self._directory = directory
        self._flags = tuple(flags)
        self._tls = tls
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None
        self.client_port = free_port()
        self._peer_port = free_port()
        self._name = "test"
        self._cluster = f"test={self._peer_url}"

    @property
    def endpoint(self) -> str:
        """The URL for clients."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.client_port}"

    @property
    def _peer_url(self) -> str:
        return f"http://127.0.0.1:{self._peer_port}"

    @property
    def log(self) -> str:
        """What the server said so far, of all its runs."""
        return (self._directory / "etcd.log").read_text()

    @classmethod
    def cluster(cls, directory: Path, size: int, **options: Any) -> Sequence[EtcdServer]:
        """Members of one cluster, started and healthy."""
        members = [cls(directory / f"member{n}", **options) for n in range(size)]
        for number, member in enumerate(members):
            member._name = f"member{number}"
        cluster = ",".join(f"{member._name}={member._peer_url}" for member in members)
        for member in members:
            member._cluster = cluster
            member._run()
        for member in members:
            member.wait_until_healthy()
        return members

    @property
    def is_leader(self) -> bool:
        """Whether this member leads its cluster, by its own word."""
        (answer,) = json.loads(self.etcdctl("endpoint", "status", "--write-out=json"))
        status = answer["Status"]
        return bool(status["leader"] == status["header"]["member_id"])

    def start(self) -> EtcdServer:
        """Run it and wait until it answers a read."""
        self._run()
        self.wait_until_healthy()
        return self

    def wait_until_healthy(self) -> None:
        """Return when it can read and write, which in a cluster takes a majority."""
        eventually_now(self._answers, START_TIMEOUT_S, what=f"etcd answers at {self.endpoint}")

    def _run(self) -> None:
        assert self._process is None, "already running"
        self._directory.mkdir(parents=True, exist_ok=True)
        arguments = [
            self._binary,
            f"--name={self._name}",
            f"--data-dir={self._directory / 'data'}",
            f"--listen-client-urls={self.endpoint}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={self._peer_url}",
            f"--initial-advertise-peer-urls={self._peer_url}",
            f"--initial-cluster={self._cluster}",
            "--logger=zap",
            *self._tls_flags(),
            *self._flags,
        ]
        with (self._directory / "etcd.log").open("ab") as log:
            self._process = subprocess.Popen(arguments, stdout=log, stderr=log)

    def stop(self) -> None:
        """End it gently, if it runs; the data stays."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL; the data stays."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Remove all data; only while it does not run."""
        assert self._process is None, "stop it first"
        shutil.rmtree(self._directory / "data", ignore_errors=True)

    def etcdctl(self, *arguments: str, user: str = "", stdin: str | None = None) -> str:
        """Run etcdctl against this server and return its output."""
        command = ["etcdctl", f"--endpoints={self.endpoint}", *self._client_flags(), *arguments]
        if user:
            command.insert(1, f"--user={user}")
        done = subprocess.run(
            command,
            env={**os.environ, "ETCDCTL_API": "3"},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout

    def enable_auth(self, *users: tuple[str, str, str]) -> None:
        """Turn on authentication: root:root, and for each (user, password, readable prefix)."""
        self.etcdctl("user", "add", "root:root")
        self.etcdctl("user", "grant-role", "root", "root")
        for user, password, prefix in users:
            self.etcdctl("role", "add", user)
            self.etcdctl("role", "grant-permission", "--prefix=true", user, "readwrite", prefix)
            self.etcdctl("user", "add", f"{user}:{password}")
            self.etcdctl("user", "grant-role", user, user)
        self.etcdctl("auth", "enable")

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"etcd ended: {self.log[-2000:]}"
        context = None
        if self._tls:
            context = ssl.create_default_context(cafile=self._tls.ca_cert)
            context.load_cert_chain(self._tls.client_cert, self._tls.client_key)
        # The port is open long before etcd serves, so ask it.
        try:
            with urllib.request.urlopen(  # noqa: S310 - our own loopback URL
                f"{self.endpoint}/health", timeout=1, context=context
            ) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False

    def _end(self, with_signal: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGCONT)  # a paused process cannot end gently
        self._process.send_signal(with_signal)
        self._process.wait(timeout=10)
        self._process = None

    def _tls_flags(self) -> Sequence[str]:
        if self._tls is None:
            return ()
        return (
            f"--cert-file={self._tls.server_cert}",
            f"--key-file={self._tls.server_key}",
            f"--trusted-ca-file={self._tls.ca_cert}",
            "--client-cert-auth",
        )

    def _client_flags(self) -> Sequence[str]:
        if self._tls is None:
            return ()
        return (
            f"--cacert={self._tls.ca_cert}",
            f"--cert={self._tls.client_cert}",
            f"--key={self._tls.client_key}",
        )


def free_port() -> int:
    """A TCP port of the loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_certificates(directory: Path, *, client_name: str = "cymric") -> TlsFiles:
    """An authority, a server certificate for 127.0.0.1 and localhost, a client certificate."""
    directory.mkdir(parents=True, exist_ok=True)
    ca = _certificate(directory, "ca", "Test authority", "basicConstraints=CA:TRUE", issuer=None)
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    server = _certificate(directory, "server", "localhost", names, issuer=ca)
    usage = "extendedKeyUsage=clientAuth"
    client = _certificate(directory, "client", client_name, usage, issuer=ca)
    return TlsFiles(ca[0], *server, *client)


def _certificate(
    directory: Path, name: str, common_name: str, extension: str, issuer: tuple[Path, Path] | None
) -> tuple[Path, Path]:
    cert, key, request = (directory / f"{name}.{suffix}" for suffix in ("crt", "key", "csr"))
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    subject = ["-subj", f"/CN={common_name}", "-keyout", str(key)]
    if issuer is None:
        _openssl("req", "-x509", "-days", "2", *new_key, *subject, "-out", str(cert))
        return cert, key
    extensions = directory / f"{name}.ext"
    extensions.write_text(extension + "\n")
    _openssl("req", "-new", *new_key, *subject, "-out", str(request))
    authority = ["-CA", str(issuer[0]), "-CAkey", str(issuer[1]), "-CAcreateserial"]
    written = ["-in", str(request), "-out", str(cert), "-extfile", str(extensions)]
    _openssl("x509", "-req", "-days", "2", *authority, *written)
    return cert, key


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=10)
