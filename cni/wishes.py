"""What a container may wish for beside the network's configuration: addresses, pools, MAC, limits.

Wishes come from four sides and are gathered here, in `gather`, the one place that a reader of
Kubernetes objects will extend:

    CNI_ARGS                `IP=`, `MAC=`, `cni.projectcalico.org/<name>=`
    runtimeConfig           `ips`, `mac`, `bandwidth`, and the pod's annotations where the runtime
                            hands them over (capability `io.kubernetes.cri.pod-annotations`)
    args, args.cni          `cni.projectcalico.org/<name>` of the network configuration

Beside these annotations there are those of limits, `qos.projectcalico.org/<name>` (`qos.py`), and
of named ports, `cymric.io/ports`.
Annotations win over capabilities, these over `IP` and `MAC`; of annotations CNI_ARGS win over the
runtime's over the configuration's. Names and meanings are Calico's. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from cni import qos
from cni.errors import CniError, Code
from cni.netconf import NetConf, bad_config
from cymric.model.endpoints import EndpointNAT, EndpointPort, QoSControls
from cymric.model.net import Address, parse_address, parse_interface

PREFIX = "cni.projectcalico.org/"
OWN_PREFIX = "cymric.io/"
NAMES = (
    "ipv4pools",
    "ipv6pools",
    "ipFamilies",
    "ipAddrs",
    "ipAddrsNoIpam",
    "floatingIPs",
    "hwAddr",
    "allowedSourcePrefixes",
)
PORTS = "ports"
"""Named ports, `cymric.io/ports`: a pod's own are in its Kubernetes object, others' nowhere."""
PROTOCOLS = ("TCP", "UDP", "SCTP")
MAX_PORT = 65535
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """All wishes, checked. `families` are those to take an address of when none is named.

    `addresses` go through IPAM, `unmanaged` past it; at most one of each family, and never both.
    """

    families: tuple[int, ...] = (4,)
    ipv4_pools: tuple[str, ...] = ()
    ipv6_pools: tuple[str, ...] = ()
    addresses: tuple[Address, ...] = ()
    unmanaged: tuple[Address, ...] = ()
    floating: tuple[Address, ...] = ()
    mac: str = ""
    source_prefixes: tuple[str, ...] = ()
    qos: QoSControls | None = None
    ports: tuple[EndpointPort, ...] = ()

    def nats(self, addresses: tuple[Address, ...]) -> tuple[EndpointNAT, ...]:
        """Each floating address with the endpoint's address of its family. Raises CniError."""
        internal = {address.version: str(address) for address in addresses}
        missing = [f for f in self.floating if f.version not in internal]
        if missing:
            raise bad_config(f"{missing[0]} floats to no address of its family")
        return tuple(
            EndpointNAT(internal_ip=internal[f.version], external_ip=str(f)) for f in self.floating
        )


NO_WISHES = Wishes()
"""What a call that makes nothing wishes for."""


def gather(config: NetConf, args: Mapping[str, str]) -> Wishes:
    """The wishes of one call. Raises CniError."""
    notes = _annotations(config, args, PREFIX, NAMES)
    ports = _annotations(config, args, OWN_PREFIX, (PORTS,))
    limits = _annotations(config, args, qos.PREFIX, qos.NAMES)
    runtime, features = config.runtime, config.feature_control
    unmanaged = _addresses("ipAddrsNoIpam", _listed(notes, "ipAddrsNoIpam"))
    if unmanaged and not features.ip_addrs_no_ipam:
        raise bad_config("ipAddrsNoIpam is not allowed here", "feature_control.ip_addrs_no_ipam")
    floating = _addresses("floatingIPs", _listed(notes, "floatingIPs"))
    if floating and not features.floating_ips:
        raise bad_config("floatingIPs are not allowed here", "feature_control.floating_ips")
    named = _addresses("ipAddrs", _listed(notes, "ipAddrs"))
    if named and unmanaged:
        raise bad_config("ipAddrs and ipAddrsNoIpam exclude each other")
    if not unmanaged and not named:
        named = _addresses("ips", runtime.ips)
    if not unmanaged and not named and args.get("IP"):
        named = _addresses("IP in CNI_ARGS", (args["IP"],), code=Code.INVALID_ENVIRONMENT)
    return Wishes(
        families=_families(config, notes),
        ipv4_pools=_listed(notes, "ipv4pools") or config.ipam.ipv4_pools,
        ipv6_pools=_listed(notes, "ipv6pools") or config.ipam.ipv6_pools,
        addresses=named,
        unmanaged=unmanaged,
        floating=floating,
        mac=_mac(notes.get("hwAddr") or runtime.mac or args.get("MAC", "")),
        source_prefixes=_prefixes(_listed(notes, "allowedSourcePrefixes")),
        qos=qos.controls(limits, runtime.bandwidth),
        ports=_ports(ports.get(PORTS)),
    )


def _annotations(
    config: NetConf, args: Mapping[str, str], prefix: str, names: Sequence[str]
) -> dict[str, str]:
    """The annotations that have a meaning here, without their prefix."""
    sides: list[Mapping[str, object]] = [config.args]
    if isinstance(inner := config.args.get("cni"), dict):
        sides.append(inner)
    found: dict[str, str] = {}
    for side in (*sides, config.runtime.pod_annotations, args):
        for name in names:
            value = side.get(prefix + name)
            if value is None:
                continue
            # A configuration may hold the list itself where an annotation holds its text.
            found[name] = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return found


def _listed(notes: Mapping[str, str], name: str) -> tuple[str, ...]:
    text = notes.get(name)
    if not text:
        return ()
    try:
        return msgspec.json.decode(text, type=tuple[str, ...])
    except msgspec.MsgspecError as error:
        raise bad_config(f"{PREFIX}{name} {text!r} is no JSON list of texts", str(error)) from None


def _addresses(
    name: str, texts: tuple[str, ...], code: Code = Code.INVALID_NETWORK_CONFIG
) -> tuple[Address, ...]:
    found: list[Address] = []
    for text in texts:
        try:
            found.append(parse_address(text.partition("/")[0]))
        except ValueError as error:
            raise CniError(code, f"{name}: {error}") from None
    versions = [address.version for address in found]
    if len(set(versions)) < len(versions) and name != "floatingIPs":
        raise CniError(code, f"{name} has more than one address of a family")
    return tuple(found)


def _families(config: NetConf, notes: Mapping[str, str]) -> tuple[int, ...]:
    words = _listed(notes, "ipFamilies")
    if unknown := sorted(set(words) - {"IPv4", "IPv6"}):
        raise bad_config(f"{PREFIX}ipFamilies has {unknown[0]!r}, which is no family")
    wanted = {
        4: "IPv4" in words if words else config.ipam.assign_ipv4 == "true",
        6: "IPv6" in words if words else config.ipam.assign_ipv6 == "true",
    }
    families = tuple(version for version, is_wanted in wanted.items() if is_wanted)
    if not families:
        raise bad_config("neither IPv4 nor IPv6 is to be assigned")
    return families


def _ports(text: str | None) -> tuple[EndpointPort, ...]:
    if not text:
        return ()
    try:
        ports = msgspec.json.decode(text, type=tuple[EndpointPort, ...])
    except msgspec.MsgspecError as error:
        raise bad_config(f"{OWN_PREFIX}{PORTS} {text!r} is no list of ports", str(error)) from None
    for port in ports:
        if not port.name or port.protocol not in PROTOCOLS or not 0 < port.port <= MAX_PORT:
            raise bad_config(f"{OWN_PREFIX}{PORTS}: {port} needs name, protocol and port")
        if not 0 <= port.host_port <= MAX_PORT:
            raise bad_config(f"{OWN_PREFIX}{PORTS}: {port} has no port as its hostPort")
    return ports


def _mac(text: str) -> str:
    mac = text.lower()
    if not mac:
        return ""
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
        raise bad_config(f"{text!r} is no MAC of one interface")
    return mac


def _prefixes(texts: tuple[str, ...]) -> tuple[str, ...]:
    try:
        return tuple(str(parse_interface(text).network) for text in texts)
    except ValueError as error:
        raise bad_config(f"{PREFIX}allowedSourcePrefixes: {error}") from None
