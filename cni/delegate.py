"""Addresses from another IPAM plugin: its executable is called as a runtime would call ours.

The plugin `ipam.type` is looked for in CNI_PATH and gets our environment and configuration. It
must answer within a bounded time; its refusal is passed on under its own code and name. What it
gives is used as single addresses, whatever their prefix length.
Source: CNI specification 1.1.0 section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cni.errors import CniError, Code
from cni.netconf import Route
from cni.request import Command, Request
from cymric.kernel.command import CommandFailed, Commands
from cymric.model.net import Address, Network, parse_interface

TIMEOUT_S = 20.0
OLDER_VERSION = "1.0.0"
"""What nearly every plugin that is installed today understands."""
LACKS_COMMAND = (Code.INCOMPATIBLE_VERSION, Code.UNKNOWN_CONTAINER, Code.INVALID_ENVIRONMENT)
"""How a plugin answers a command that is younger than itself and names no container."""
_ENVIRONMENT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class _IP(msgspec.Struct, frozen=True):
    address: str


class _Result(msgspec.Struct, frozen=True):
    ips: tuple[_IP, ...] = ()
    routes: tuple[Route, ...] = ()


class _Error(msgspec.Struct, frozen=True):
    code: int = 0
    msg: str = ""
    details: str = ""


class Delegate(msgspec.Struct, frozen=True, kw_only=True):
    """A call of another plugin, with all that is needed to repeat it: it is kept on disk."""

    type: str
    env: dict[str, str]
    config: str


@dataclass(frozen=True, slots=True)
class Given:
    """What the plugin gave; its routes are the destinations that the pod shall reach."""

    addresses: tuple[Address, ...]
    routes: tuple[Network, ...] = ()


def delegate_of(
    kind: str, request: Request, *, container_id: str = "", interface: str = ""
) -> Delegate:
    """The plugin `kind`, about the container of the request or, when it names none, about that."""
    env: dict[str, str] = {k: v for k, v in request.env.items() if k.startswith("CNI_")}
    if container_id:
        env |= {"CNI_CONTAINERID": container_id, "CNI_IFNAME": interface}
    return Delegate(type=kind, env=env, config=request.raw_config.decode())


async def add(commands: Commands, delegate: Delegate) -> Given:
    """Ask for addresses. Raises CniError."""
    said = await _call(commands, delegate, Command.ADD)
    try:
        result = msgspec.json.decode(said, type=_Result)
        addresses = tuple(parse_interface(ip.address).ip for ip in result.ips)
        routes = tuple(parse_interface(route.dst).network for route in result.routes)
    except (msgspec.MsgspecError, ValueError) as error:
        raise _refusal(delegate, "its result cannot be read", str(error)) from None
    if not addresses:
        raise _refusal(delegate, "it gave no address")
    return Given(addresses, routes)


async def run(commands: Commands, delegate: Delegate, command: Command) -> None:
    """Call for anything else. Raises CniError."""
    await _call(commands, delegate, command)


async def _call(commands: Commands, delegate: Delegate, command: Command) -> str:
    """Standard output. A plugin that is older than our version is asked in its own."""
    try:
        return await _call_as_it_is(commands, delegate, command)
    except CniError as error:
        if error.code != Code.INCOMPATIBLE_VERSION:
            raise
        config = msgspec.json.decode(delegate.config)
        if config.get("cniVersion") == OLDER_VERSION:
            raise
        older = msgspec.json.encode({**config, "cniVersion": OLDER_VERSION}).decode()
    return await _call_as_it_is(commands, msgspec.structs.replace(delegate, config=older), command)


async def _call_as_it_is(commands: Commands, delegate: Delegate, command: Command) -> str:
    executable = _find(delegate.type, delegate.env)
    if executable is None:
        path = delegate.env.get("CNI_PATH", "")
        raise _refusal(delegate, "no such executable in CNI_PATH", path)
    env = {**delegate.env, "CNI_COMMAND": command.value, "PATH": _ENVIRONMENT_PATH}
    try:
        done = await commands.run(
            [str(executable)], stdin=delegate.config, env=env, timeout_s=TIMEOUT_S
        )
    except CommandFailed as error:
        raise CniError(
            Code.TRY_AGAIN_LATER, f"ipam plugin {delegate.type} failed", error.reason
        ) from None
    if done.ok:
        return done.stdout
    try:
        refused = msgspec.json.decode(done.stdout or "{}", type=_Error)
    except msgspec.MsgspecError:
        refused = _Error()
    text = refused.msg or f"exit code {done.code}: {done.stderr.strip()[-500:]}"
    raise CniError(
        refused.code or Code.NO_ADDRESS, f"ipam plugin {delegate.type}: {text}", refused.details
    )


def _find(kind: str, env: Mapping[str, str]) -> Path | None:
    for directory in filter(None, env.get("CNI_PATH", "").split(":")):
        candidate = Path(directory) / kind
        if candidate.is_file():
            return candidate
    return None


def _refusal(delegate: Delegate, why: str, details: str = "") -> CniError:
    return CniError(Code.NO_ADDRESS, f"ipam plugin {delegate.type}: {why}", details)
