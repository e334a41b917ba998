"""A CNI call, parsed and checked once: message, environment, network configuration.

Everything that reaches the daemon from outside becomes a frozen `Call` here or is refused with the
code that the specification asks for. Source: CNI specification 1.0.0 sections 1 to 3; Calico's
names in the network configuration.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from cni.errors import CniError, Code
from cymric.model.endpoints import MAX_INTERFACE_NAME
from cymric.model.net import parse_address

PROTOCOL = 1
CNI_VERSIONS = ("0.3.1", "0.4.0", "1.0.0")
IPAM_TYPES = ("cymric-cni-ipam", "calico-ipam")
MAX_MTU = 65535

_NETWORK_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_INTERFACE_NAME = re.compile(r"[^\s/:]+")
_KUBERNETES_NAME = re.compile(r"[a-z0-9]([a-z0-9.\-]*[a-z0-9])?")

T = TypeVar("T")


class Command(StrEnum):
    """What is asked for. VERSION is answered by the executable alone."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"


class Message(msgspec.Struct, frozen=True):
    """What the executable sends."""

    version: int
    plugin: str
    env: dict[str, str]
    config: str


class IPAMConf(msgspec.Struct, frozen=True):
    """The `ipam` section, with Calico's names."""

    type: str = ""
    assign_ipv4: str = "true"
    assign_ipv6: str = "false"
    ipv4_pools: tuple[str, ...] = ()


class Policy(msgspec.Struct, frozen=True):
    """The `policy` section: whose profiles an endpoint gets."""

    type: str = ""


class PreviousIP(msgspec.Struct, frozen=True):
    """An address of a former result."""

    address: str


class PreviousResult(msgspec.Struct, frozen=True):
    """The result of the ADD that a CHECK is about."""

    ips: tuple[PreviousIP, ...] = ()


class NetConf(msgspec.Struct, frozen=True, rename={"cni_version": "cniVersion"}):
    """The network configuration; unknown fields are for others."""

    name: str
    cni_version: str = "0.2.0"
    type: str = ""
    mtu: int = 0
    ipam: IPAMConf = IPAMConf()
    policy: Policy = Policy()
    labels: dict[str, str] = {}
    previous: PreviousResult | None = msgspec.field(default=None, name="prevResult")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of one of the two executables. `netns` is None when the runtime gave none."""

    command: Command
    is_ipam_only: bool
    container_id: str
    interface: str
    netns: Path | None
    config: NetConf
    pod: str = ""
    namespace: str = ""
    service_account: str = ""
    address: IPv4Address | None = None
    args: dict[str, str] = field(default_factory=dict)

    @property
    def handle(self) -> str:
        """Calico's IPAM handle of a container in a network."""
        return f"{self.config.name}.{self.container_id}"

    @property
    def is_kubernetes(self) -> bool:
        """Whether the call is about a pod."""
        return bool(self.pod)


def parse(line: bytes) -> Call:
    """The call in one line from an executable. Raises CniError."""
    try:
        message = msgspec.json.decode(line, type=Message)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CniError(Code.DECODING_FAILURE, "the request cannot be read", str(error)) from None
    if message.version != PROTOCOL:
        raise CniError(
            Code.DECODING_FAILURE,
            f"the executable speaks protocol {message.version}, cnid speaks {PROTOCOL}",
            "install the executables of this version",
        )
    config = _config(message)
    env = message.env
    args = _arguments(env.get("CNI_ARGS", ""))
    command = _command(env.get("CNI_COMMAND", ""), config)
    return Call(
        command=command,
        is_ipam_only=message.plugin == "ipam",
        container_id=_matching(_CONTAINER_ID, env, "CNI_CONTAINERID"),
        interface=_interface(env),
        netns=_netns(env, command),
        config=config,
        pod=_kubernetes(args, "K8S_POD_NAME"),
        namespace=_kubernetes(args, "K8S_POD_NAMESPACE"),
        service_account=args.get("K8S_POD_SERVICE_ACCOUNT", ""),
        address=_address(args),
        args=args,
    )


def version_of(line: bytes) -> str:
    """The cniVersion to answer an unreadable call in: the call's own if it can be found."""
    try:
        return _config(msgspec.json.decode(line, type=Message)).cni_version
    except (msgspec.MsgspecError, UnicodeDecodeError, CniError):
        return CNI_VERSIONS[-1]


def _config(message: Message) -> NetConf:
    try:
        config = msgspec.json.decode(message.config, type=NetConf)
    except msgspec.ValidationError as error:
        raise CniError(
            Code.INVALID_NETWORK_CONFIG, "the network configuration is not valid", str(error)
        ) from None
    except msgspec.MsgspecError as error:
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
        raise _bad_config(f"name {config.name!r} is no network name")
    if not 0 <= config.mtu <= MAX_MTU:
        raise _bad_config(f"mtu {config.mtu} is not between 0 and {MAX_MTU}")
    if config.ipam.type not in IPAM_TYPES:
        raise _bad_config(f"ipam type {config.ipam.type!r} is none of {', '.join(IPAM_TYPES)}")
    if config.ipam.assign_ipv4 != "true" or config.ipam.assign_ipv6 == "true":
        raise _bad_config(
            "only IPv4 addresses can be assigned: assign_ipv4 true, assign_ipv6 false"
        )
    return config


def _bad_config(message: str) -> CniError:
    return CniError(Code.INVALID_NETWORK_CONFIG, message)


def _bad_environment(message: str) -> CniError:
    return CniError(Code.INVALID_ENVIRONMENT, message)


def _command(text: str, config: NetConf) -> Command:
    try:
        command = Command(text)
    except ValueError:
        raise _bad_environment(f"CNI_COMMAND {text!r} is none of ADD, DEL, CHECK") from None
    if command is Command.CHECK:
        if config.cni_version == "0.3.1":
            raise CniError(Code.INCOMPATIBLE_VERSION, "CHECK needs cniVersion 0.4.0 or later")
        if config.previous is None:
            raise _bad_config("CHECK needs prevResult in the network configuration")
    return command


def _matching(pattern: re.Pattern[str], env: dict[str, str], name: str) -> str:
    text = env.get(name, "")
    if not pattern.fullmatch(text):
        raise _bad_environment(f"{name} {text!r} is missing or not valid")
    return text


def _interface(env: dict[str, str]) -> str:
    name = _matching(_INTERFACE_NAME, env, "CNI_IFNAME")
    if len(name) > MAX_INTERFACE_NAME or name in (".", ".."):
        raise _bad_environment(f"CNI_IFNAME {name!r} is no interface name")
    return name


def _netns(env: dict[str, str], command: Command) -> Path | None:
    text = env.get("CNI_NETNS", "")
    if text:
        return Path(text)
    if command is Command.DEL:
        return None
    raise _bad_environment("CNI_NETNS is missing")


def _arguments(text: str) -> dict[str, str]:
    args = {}
    for pair in filter(None, text.split(";")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise _bad_environment(f"CNI_ARGS holds {pair!r}, which is no NAME=VALUE")
        args[name] = value
    return args


def _kubernetes(args: dict[str, str], name: str) -> str:
    if not (args.get("K8S_POD_NAME") and args.get("K8S_POD_NAMESPACE")):
        return ""
    text = args[name]
    if not _KUBERNETES_NAME.fullmatch(text):
        raise _bad_environment(f"{name} {text!r} in CNI_ARGS is no Kubernetes name")
    return text


def _address(args: dict[str, Any]) -> IPv4Address | None:
    if not args.get("IP"):
        return None
    try:
        address = parse_address(args["IP"])
    except ValueError as error:
        raise _bad_environment(f"IP in CNI_ARGS: {error}") from None
    if not isinstance(address, IPv4Address):
        raise _bad_environment(f"IP {address} in CNI_ARGS is not IPv4")
    return address
