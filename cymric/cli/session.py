"""What every command needs: the settings, and one connection to the datastore.

Settings come from the places the daemons use (defaults, /etc/cymric/cymric.toml, environment) and
from calicoctl's configuration file. A file named with `--config` wins over everything; calicoctl's
usual file /etc/calico/calicoctl.cfg is read when nothing else says where etcd is.

A command is a coroutine given a datastore; `run` calls asyncio.run once around it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cymric.datastore.api import Datastore
from cymric.runtime.settings import BadSettings, Settings, load

ANSWER_WITHIN_S = 3.0
"""How long a read may take before a person is told that etcd does not answer."""

CALICOCTL_FILE = Path("/etc/calico/calicoctl.cfg")

_SETTING_BY_FIELD = {
    "etcdEndpoints": "etcd_endpoints",
    "etcdUsername": "etcd_username",
    "etcdPassword": "etcd_password",
    "etcdKeyFile": "etcd_key_file",
    "etcdCertFile": "etcd_cert_file",
    "etcdCACertFile": "etcd_ca_cert_file",
}

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Session:
    """One call of the command line. Tests give `store`; then nothing is connected to."""

    config_file: Path | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    store: Datastore | None = None
    calicoctl_file: Path = CALICOCTL_FILE

    def settings(self) -> Settings:
        """The settings of this call. Raises BadSettings."""
        settings = load(self.environ)
        if self.config_file is not None:
            return replace(settings, **_from_calicoctl(self.config_file))
        is_told = any(
            self.environ.get(name) for name in ("CYMRIC_ETCD_ENDPOINTS", "ETCD_ENDPOINTS")
        )
        is_default = settings.etcd_endpoints == Settings().etcd_endpoints
        if is_default and not is_told and self.calicoctl_file.exists():
            return replace(settings, **_from_calicoctl(self.calicoctl_file))
        return settings

    def run(self, work: Callable[[Datastore], Awaitable[T]]) -> T:
        """Do `work` with the datastore connected, and let go of it."""

        async def connected() -> T:
            if self.store is not None:
                return await work(self.store)
            from cymric.datastore.etcd import open_datastore

            async with open_datastore(self.settings(), call_s=ANSWER_WITHIN_S) as store:
                return await work(store)

        return asyncio.run(connected())


def _from_calicoctl(path: Path) -> dict[str, Any]:
    """The settings in a CalicoAPIConfig file. Raises BadSettings, naming the file."""
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise BadSettings(f"{path}: {error}") from None
    if not isinstance(tree, dict) or tree.get("kind") != "CalicoAPIConfig":
        raise BadSettings(f"{path}: not an object of kind CalicoAPIConfig")
    spec = tree.get("spec") or {}
    if not isinstance(spec, dict):
        raise BadSettings(f"{path}: spec is not an object")
    if spec.get("datastoreType", "etcdv3") != "etcdv3":
        raise BadSettings(f"{path}: datastoreType {spec['datastoreType']!r}: only etcdv3 is served")
    found: dict[str, Any] = {}
    for name, value in spec.items():
        if name == "datastoreType" or not value:
            continue
        if name not in _SETTING_BY_FIELD:
            is_inline = name in ("etcdKey", "etcdCert", "etcdCACert")
            hint = " (give certificates as files)" if is_inline else ""
            raise BadSettings(f"{path}: spec.{name} is not supported{hint}")
        found[_SETTING_BY_FIELD[name]] = str(value)
    if "etcd_endpoints" in found:
        urls = found["etcd_endpoints"].split(",")
        found["etcd_endpoints"] = tuple(url.strip() for url in urls if url.strip())
    return found
