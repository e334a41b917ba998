"""The network configuration: what of it concerns us, checked once, with Calico's names.

Fields that are not named here are for others and pass unread, but for those in `unread.py`.
Source: CNI specification 1.1.0 section 1; Calico's network configuration.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from cni.errors import CniError, Code

CNI_VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
OWN_IPAM_TYPES = ("cymric-cni-ipam", "calico-ipam")
MAX_MTU = 65535
MAX_QUEUES = 4096
"""The most that the kernel makes for one link."""

_NETWORK_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_PLUGIN_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")


class Route(msgspec.Struct, frozen=True):
    """A route by its destination; what else it says is for whom it came from."""

    dst: str


class IPAMConf(msgspec.Struct, frozen=True):
    """The `ipam` section. `routes` are those that a delegated plugin (host-local) is given."""

    type: str = ""
    assign_ipv4: str = "true"
    assign_ipv6: str = "false"
    ipv4_pools: tuple[str, ...] = ()
    ipv6_pools: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()

    @property
    def is_own(self) -> bool:
        """Whether the addresses come from our IPAM, not from another plugin."""
        return self.type in OWN_IPAM_TYPES


class Policy(msgspec.Struct, frozen=True):
    """The `policy` section: whose profiles an endpoint gets."""

    type: str = ""


class ContainerSettings(msgspec.Struct, frozen=True):
    """What a container may do with its end."""

    allow_ip_forwarding: bool = False


class FeatureControl(msgspec.Struct, frozen=True):
    """What the owner of a pod may ask for by annotations."""

    ip_addrs_no_ipam: bool = False
    floating_ips: bool = False


class Bandwidth(msgspec.Struct, frozen=True, rename="camel"):
    """The runtime's wish of the capability `bandwidth`: bits a second, and bits."""

    ingress_rate: int = 0
    ingress_burst: int = 0
    egress_rate: int = 0
    egress_burst: int = 0


class RuntimeConfig(msgspec.Struct, frozen=True):
    """The capabilities that concern us. `portMappings` are for `portmap` and pass unread."""

    ips: tuple[str, ...] = ()
    mac: str = ""
    bandwidth: Bandwidth | None = None
    pod_annotations: dict[str, str] = msgspec.field(
        default_factory=dict, name="io.kubernetes.cri.pod-annotations"
    )


class Attachment(msgspec.Struct, frozen=True, rename={"container_id": "containerID"}):
    """One interface of one container, as GC names it."""

    container_id: str
    ifname: str


class ResultInterface(msgspec.Struct, frozen=True):
    """An interface of a former result."""

    name: str
    sandbox: str = ""


class ResultIP(msgspec.Struct, frozen=True):
    """An address of a former result."""

    address: str
    interface: int | None = None


class PreviousResult(msgspec.Struct, frozen=True):
    """The result of the plugins before (ADD), or of the whole chain (CHECK, DEL)."""

    interfaces: tuple[ResultInterface, ...] = ()
    ips: tuple[ResultIP, ...] = ()


class NetConf(msgspec.Struct, frozen=True, rename={"cni_version": "cniVersion"}):
    """The network configuration. `previous_tree` is `previous` with all that we do not read."""

    name: str
    cni_version: str = "0.2.0"
    type: str = ""
    mtu: int = 0
    require_mtu_file: bool = False
    num_queues: int = 0
    ipam: IPAMConf = IPAMConf()
    policy: Policy = Policy()
    labels: dict[str, str] = {}
    container_settings: ContainerSettings = ContainerSettings()
    feature_control: FeatureControl = FeatureControl()
    include_default_routes: bool = False
    announce: bool = True
    args: dict[str, Any] = {}
    runtime: RuntimeConfig = msgspec.field(default=RuntimeConfig(), name="runtimeConfig")
    previous_tree: dict[str, Any] | None = msgspec.field(default=None, name="prevResult")
    valid: tuple[Attachment, ...] | None = msgspec.field(
        default=None, name="cni.dev/valid-attachments"
    )
    valid_too: tuple[Attachment, ...] | None = msgspec.field(
        default=None, name="cni.dev/attachments"
    )

    @property
    def attachments(self) -> tuple[Attachment, ...] | None:
        """What GC must keep; None when the runtime did not say. Runtimes write either name."""
        return self.valid if self.valid is not None else self.valid_too

    @property
    def has(self) -> Features:
        """What the version of the specification knows."""
        return Features(CNI_VERSIONS.index(self.cni_version))


class Features(msgspec.Struct, frozen=True):
    """The differences between the versions; `index` is that in CNI_VERSIONS."""

    index: int

    @property
    def check(self) -> bool:
        """CHECK exists."""
        return self.index >= 1

    @property
    def plain_ips(self) -> bool:
        """Addresses are not marked with their family."""
        return self.index >= 2

    @property
    def gc_and_status(self) -> bool:
        """GC and STATUS exist, and interfaces tell their MTU."""
        return self.index >= 3


def parse(raw: bytes | str) -> NetConf:
    """The configuration in `raw`. Raises CniError."""
    try:
        config = msgspec.json.decode(raw, type=NetConf)
    except msgspec.ValidationError as error:
        raise CniError(
            Code.INVALID_NETWORK_CONFIG, "the network configuration is not valid", str(error)
        ) from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CniError(
            Code.DECODING_FAILURE, "the network configuration is no JSON", str(error)
        ) from None
    if config.cni_version not in CNI_VERSIONS:
        raise CniError(
            Code.INCOMPATIBLE_VERSION,
            f"cniVersion {config.cni_version!r} is not supported",
            f"supported are {', '.join(CNI_VERSIONS)}",
        )
    if not _NETWORK_NAME.fullmatch(config.name):
        raise bad_config(f"name {config.name!r} is no network name")
    if not 0 <= config.mtu <= MAX_MTU:
        raise bad_config(f"mtu {config.mtu} is not between 0 and {MAX_MTU}")
    if not 0 <= config.num_queues <= MAX_QUEUES:
        raise bad_config(f"num_queues {config.num_queues} is not between 0 and {MAX_QUEUES}")
    if not _PLUGIN_NAME.fullmatch(config.ipam.type):
        raise bad_config(f"ipam type {config.ipam.type!r} is no plugin's name")
    for name in ("assign_ipv4", "assign_ipv6"):
        if (text := getattr(config.ipam, name)) not in ("true", "false"):
            raise bad_config(f"{name} is {text!r}, not 'true' or 'false'")
    return config


def previous_result(config: NetConf) -> PreviousResult:
    """The result that came with the call, empty if none did. Raises CniError."""
    try:
        return msgspec.convert(config.previous_tree or {}, PreviousResult)
    except msgspec.ValidationError as error:
        raise CniError(
            Code.INVALID_NETWORK_CONFIG, "prevResult cannot be read", str(error)
        ) from None


def bad_config(message: str, details: str = "") -> CniError:
    """The failure of a configuration that cannot work."""
    return CniError(Code.INVALID_NETWORK_CONFIG, message, details)
