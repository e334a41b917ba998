"""A CNI call, parsed and checked once: header, environment, network configuration.

Everything that reaches the daemon from outside becomes a frozen `Call` (about one container) or
`NodeCall` (about the node) here, or is refused with the code that the specification asks for.
Source: CNI specification 1.1.0 sections 1 to 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cni import netconf
from cni.errors import CniError, Code
from cni.netconf import NetConf, bad_config
from cni.wishes import NO_WISHES, Wishes, gather
from cymric.model.endpoints import MAX_INTERFACE_NAME

_CONTAINER_ID = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_INTERFACE_NAME = re.compile(r"[^\s/:]+")
_KUBERNETES_NAME = re.compile(r"[a-z0-9]([a-z0-9.\-]*[a-z0-9])?")


class Command(StrEnum):
    """What is asked for. VERSION is answered by the executable alone."""

    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"


NODE_COMMANDS = (Command.GC, Command.STATUS)


@dataclass(frozen=True, slots=True)
class Request:
    """What an executable sent: which of the two it is, its CNI_ variables, its standard input."""

    is_ipam_only: bool
    env: Mapping[str, str]
    raw_config: bytes

    @classmethod
    def of(cls, kind: bytes, env: bytes, raw_config: bytes) -> Request:
        """From the parts of a message. Raises CniError."""
        if kind not in (b"main", b"ipam"):
            raise CniError(Code.DECODING_FAILURE, "the request is of neither executable")
        try:
            pairs = [pair.decode().partition("=") for pair in env.split(b"\0") if pair]
        except UnicodeDecodeError as error:
            raise CniError(
                Code.DECODING_FAILURE, "the environment is no text", str(error)
            ) from None
        return cls(kind == b"ipam", {name: text for name, _, text in pairs}, raw_config)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCall:
    """GC or STATUS: about all containers of a network on this node, or about none."""

    command: Command
    is_ipam_only: bool
    config: NetConf
    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call about one container. `netns` is None when the runtime gave none."""

    command: Command
    is_ipam_only: bool
    container_id: str
    interface: str
    netns: Path | None
    config: NetConf
    request: Request
    wishes: Wishes = NO_WISHES
    pod: str = ""
    namespace: str = ""
    service_account: str = ""
    args: Mapping[str, str] = field(default_factory=dict)

    @property
    def handle(self) -> str:
        """Calico's IPAM handle of a container in a network."""
        return f"{self.config.name}.{self.container_id}"

    @property
    def is_kubernetes(self) -> bool:
        """Whether the call is about a pod."""
        return bool(self.pod)


def parse(request: Request) -> Call | NodeCall:
    """The call in a request. Raises CniError."""
    config = netconf.parse(request.raw_config)
    env = request.env
    command = _command(env.get("CNI_COMMAND", ""), config)
    if command in NODE_COMMANDS:
        return NodeCall(
            command=command, is_ipam_only=request.is_ipam_only, config=config, request=request
        )
    args = _arguments(env.get("CNI_ARGS", ""))
    return Call(
        command=command,
        is_ipam_only=request.is_ipam_only,
        container_id=_matching(_CONTAINER_ID, env, "CNI_CONTAINERID"),
        interface=_interface(env),
        netns=_netns(env, command),
        config=config,
        request=request,
        wishes=gather(config, args) if command is Command.ADD else NO_WISHES,
        pod=_kubernetes(args, "K8S_POD_NAME"),
        namespace=_kubernetes(args, "K8S_POD_NAMESPACE"),
        service_account=args.get("K8S_POD_SERVICE_ACCOUNT", ""),
        args=args,
    )


def version_of(raw_config: bytes) -> str:
    """The cniVersion to answer an unreadable call in: the call's own if it can be found."""
    try:
        return netconf.parse(raw_config).cni_version
    except CniError:
        return netconf.CNI_VERSIONS[-1]


def _bad_environment(message: str) -> CniError:
    return CniError(Code.INVALID_ENVIRONMENT, message)


def _command(text: str, config: NetConf) -> Command:
    try:
        command = Command(text)
    except ValueError:
        raise _bad_environment(f"CNI_COMMAND {text!r} is none of {', '.join(Command)}") from None
    if command is Command.CHECK:
        if not config.has.check:
            raise CniError(Code.INCOMPATIBLE_VERSION, "CHECK needs cniVersion 0.4.0 or later")
        if config.previous_tree is None:
            raise bad_config("CHECK needs prevResult in the network configuration")
    if command in NODE_COMMANDS and not config.has.gc_and_status:
        raise CniError(Code.INCOMPATIBLE_VERSION, f"{command} needs cniVersion 1.1.0 or later")
    if command is Command.GC and config.attachments is None:
        # Taking "not said" for "none" would remove every container's network.
        raise bad_config("GC needs cni.dev/valid-attachments in the network configuration")
    return command


def _matching(pattern: re.Pattern[str], env: Mapping[str, str], name: str) -> str:
    text = env.get(name, "")
    if not pattern.fullmatch(text):
        raise _bad_environment(f"{name} {text!r} is missing or not valid")
    return text


def _interface(env: Mapping[str, str]) -> str:
    name = _matching(_INTERFACE_NAME, env, "CNI_IFNAME")
    if len(name) > MAX_INTERFACE_NAME or name in (".", ".."):
        raise _bad_environment(f"CNI_IFNAME {name!r} is no interface name")
    return name


def _netns(env: Mapping[str, str], command: Command) -> Path | None:
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


def _kubernetes(args: Mapping[str, str], name: str) -> str:
    if not (args.get("K8S_POD_NAME") and args.get("K8S_POD_NAMESPACE")):
        return ""
    text = args[name]
    if not _KUBERNETES_NAME.fullmatch(text):
        raise _bad_environment(f"{name} {text!r} in CNI_ARGS is no Kubernetes name")
    return text
