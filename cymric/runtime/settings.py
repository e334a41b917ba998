"""Settings of the daemons: defaults < /etc/cymric/cymric.toml < environment, one frozen object.

Environment names are `CYMRIC_` and the field in capitals; calicoctl's names for etcd
(`ETCD_ENDPOINTS`, `ETCD_CA_CERT_FILE` …) are honoured below them. What the datastore sets
(FelixConfiguration, BGPConfiguration) is applied by the daemon it concerns, on top.
"""

from __future__ import annotations

import os
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

DEFAULT_FILE = Path("/etc/cymric/cymric.toml")
PREFIX = "CYMRIC_"
RUN_DIR = Path("/run/cymric")
CALICO_RUN_DIR = Path("/var/run/calico")

_CALICOCTL_NAMES = {
    "etcd_endpoints": "ETCD_ENDPOINTS",
    "etcd_username": "ETCD_USERNAME",
    "etcd_password": "ETCD_PASSWORD",
    "etcd_key_file": "ETCD_KEY_FILE",
    "etcd_cert_file": "ETCD_CERT_FILE",
    "etcd_ca_cert_file": "ETCD_CA_CERT_FILE",
}


class BadSettings(ValueError):
    """A setting that cannot be used; the message names it and where it came from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything a daemon must know before it can read the datastore.

    `run_dir` holds sockets and rendered files and may vanish at a reboot; `state_dir` must not.
    Ports of 0 switch the HTTP server off. `policy_setup_timeout_s` 0 means that CNI ADD does not
    wait for felix. `bird_socket_dir` is where bgpd serves BIRD's control sockets, `none` nowhere.
    When felix has not heard the datastore for `felix_stale_after_s` it is not ready (its rules
    stay); 0 never.
    `announce_wait_s` is how long bgpd waits, after a boot, for felix to have the data plane up
    before it announces routes all the same; 0 does not wait.

    With less than `ipam_ahead_part` of a block left free on this node the next one is claimed, 0
    claims nothing ahead; `ipam_idle_s` is how long a block stays empty before it is given back,
    `ipam_leak_grace_s` how long an address must be unknown to everybody here before it is released.
    """

    node_name: str = ""
    etcd_endpoints: tuple[str, ...] = ("http://127.0.0.1:2379",)
    etcd_ca_cert_file: str = ""
    etcd_cert_file: str = ""
    etcd_key_file: str = ""
    etcd_username: str = ""
    etcd_password: str = ""
    run_dir: Path = RUN_DIR
    state_dir: Path = Path("/var/lib/cymric")
    bgp_password_dir: Path = Path("/etc/cymric/bgp-passwords")
    endpoint_status_dir: Path = Path("/var/run/calico/endpoint-status")
    policy_setup_timeout_s: float = 5.0
    bird_socket_dir: str = ""
    announce_wait_s: float = 60.0
    ipam_ahead_part: float = 0.25
    ipam_idle_s: float = 900.0
    ipam_leak_grace_s: float = 900.0
    log_level: str = "info"
    log_format: str = "auto"
    http_host: str = "127.0.0.1"
    felix_stale_after_s: float = 300.0
    felix_metrics_port: int = 9091
    felix_health_port: int = 9099
    bgpd_http_port: int = 9191
    confd_http_port: int = 9192
    cnid_http_port: int = 9193

    def __post_init__(self) -> None:
        if self.log_format not in ("auto", "console", "json"):
            raise BadSettings(f"log_format {self.log_format!r} is not auto, console or json")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise BadSettings(f"log_level {self.log_level!r} is not debug, info, warning or error")
        if not 0 <= self.ipam_ahead_part <= 1:
            raise BadSettings(f"ipam_ahead_part {self.ipam_ahead_part} is not between 0 and 1")
        if min(self.ipam_idle_s, self.ipam_leak_grace_s) <= 0:
            raise BadSettings("ipam_idle_s and ipam_leak_grace_s have to be more than 0")
        if not self.etcd_endpoints:
            raise BadSettings("etcd_endpoints is empty")

    @property
    def cni_socket(self) -> Path:
        """Where the CNI executables find cnid."""
        return self.run_dir / "cni.sock"

    @property
    def speaker_socket(self) -> Path:
        """Where bgpd finds the relay inside ExaBGP."""
        return self.run_dir / "speaker.sock"

    @property
    def bgpd_socket(self) -> Path:
        """Where `cymric node status` asks bgpd."""
        return self.run_dir / "bgpd.sock"

    @property
    def felix_status_socket(self) -> Path:
        """Where `cymric felix` and `cymric policy` ask felix."""
        return self.run_dir / "felix-status.sock"

    @property
    def felix_mark(self) -> Path:
        """Where felix marks that its data plane is up since this boot."""
        return self.run_dir / "felix.ready"

    @property
    def confd_status(self) -> Path:
        """Where confd writes what it refused, for people."""
        return self.run_dir / "confd-status.json"

    @property
    def exabgp_config(self) -> Path:
        """The file confd renders and ExaBGP reads."""
        return self.run_dir / "exabgp.conf"

    @property
    def bird_directory(self) -> Path | None:
        """Where BIRD's control sockets are served: as set, else Calico's own directory, where
        calicoctl looks. A run directory of its own marks one node of several on a machine; then
        the sockets are in there. None: not served.
        """
        if self.bird_socket_dir:
            return None if self.bird_socket_dir == "none" else Path(self.bird_socket_dir)
        return CALICO_RUN_DIR if self.run_dir == RUN_DIR else self.run_dir

    @property
    def bears_calico_names(self) -> bool:
        """Whether this machine is one node, where calicoctl looks for Calico's processes."""
        return self.bird_directory == CALICO_RUN_DIR

    def http_ports(self, daemon: str) -> tuple[int, ...]:
        """The ports on which `daemon` serves metrics and health, 0 left out."""
        ports = {
            "felix": (self.felix_metrics_port, self.felix_health_port),
            "bgpd": (self.bgpd_http_port,),
            "confd": (self.confd_http_port,),
            "cnid": (self.cnid_http_port,),
        }.get(daemon, ())
        return tuple(port for port in ports if port)


def load(
    environ: Mapping[str, str] = os.environ, *, path: Path | None = None, **overrides: Any
) -> Settings:
    """The settings of this process. Raises BadSettings.

    The file is `path`, else CYMRIC_CONFIG, else /etc/cymric/cymric.toml if it exists. A node name
    that nothing sets is the host's name in lower case, as Calico has it.
    """
    values: dict[str, Any] = _from_file(path or Path(environ.get(PREFIX + "CONFIG", DEFAULT_FILE)))
    for field in fields(Settings):
        for name in (_CALICOCTL_NAMES.get(field.name, ""), PREFIX + field.name.upper()):
            if environ.get(name):
                values[field.name] = _parse(field.name, environ[name], name)
    values |= overrides
    values.setdefault("node_name", socket.gethostname().lower())
    return Settings(**values)


def _from_file(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        tree = tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadSettings(f"{path}: {error}") from None
    known = {field.name for field in fields(Settings)}
    if unknown := sorted(set(tree) - known):
        raise BadSettings(f"{path}: unknown setting {unknown[0]!r}")
    return {name: _parse(name, value, f"{path}: {name}") for name, value in tree.items()}


def _parse(name: str, value: Any, origin: str) -> Any:
    default = getattr(Settings(), name)
    try:
        if isinstance(default, tuple):
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(part.strip() for part in parts if part.strip())
        return type(default)(value)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadSettings(f"{origin}: {error}") from None
