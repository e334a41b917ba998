"""Fields of Calico's network configuration that we do not act on: refused, or told once.

A list written for Calico is taken as it is where that does no harm. A field that would change what
a pod gets and that nobody here acts on is refused at ADD (never at DEL: a pod must be able to go).
One whose matter is settled elsewhere, as cnid is one daemon with settings of its own, is named in
the log once for each network.
"""

from __future__ import annotations

from typing import Any

import msgspec
import structlog

from cni.netconf import bad_config
from cni.request import Call

log = structlog.get_logger()


class _IPAM(msgspec.Struct, frozen=True):
    subnet: Any = None
    ipam_lock_file: Any = None


class _Settled(msgspec.Struct, frozen=True, omit_defaults=True):
    """cnid's settings and the node's name settle these."""

    mode: Any = None
    etcd_endpoints: Any = None
    etcd_discovery_srv: Any = None
    etcd_key_file: Any = None
    etcd_cert_file: Any = None
    etcd_ca_cert_file: Any = None
    log_level: Any = None
    log_file_path: Any = None
    log_file_max_size: Any = None
    log_file_max_count: Any = None
    log_file_max_age: Any = None
    nodename: Any = None
    nodename_file: Any = None
    nodename_file_optional: Any = None
    hostname: Any = None
    kubernetes: Any = None
    policy_setup_timeout_seconds: Any = None
    endpoint_status_dir: Any = None


class _Fields(_Settled, frozen=True, omit_defaults=True):
    datastore_type: str = "etcdv3"
    readiness_gates: Any = None
    ipam: _IPAM = _IPAM()


class Unread:
    """Remembers which networks were told of."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def look(self, call: Call) -> None:
        """Refuse or tell. Raises CniError. To be asked at ADD."""
        raw = call.request.raw_config
        try:
            fields = msgspec.json.decode(raw, type=_Fields)
        except msgspec.ValidationError as error:
            raise bad_config("the network configuration is not valid", str(error)) from None
        if fields.datastore_type not in ("", "etcdv3"):
            raise bad_config(
                f"datastore_type {fields.datastore_type!r} is not supported", "etcdv3 is"
            )
        if fields.readiness_gates:
            raise bad_config(
                "readiness_gates are not supported",
                "ADD itself waits until policy and routes are in place",
            )
        if call.config.ipam.is_own and fields.ipam.subnet is not None:
            raise bad_config("ipam.subnet is for host-local", "pools say where addresses are from")
        name = call.config.name
        if name in self._told:
            return
        self._told.add(name)
        settled = sorted(_named(fields))
        if settled:
            log.warning(
                "fields without effect: cnid's settings decide", network=name, fields=settled
            )


def _named(fields: _Fields) -> list[str]:
    found = [name for name in _Settled.__struct_fields__ if getattr(fields, name) is not None]
    if fields.ipam.ipam_lock_file is not None:
        found.append("ipam.ipam_lock_file")
    return found
