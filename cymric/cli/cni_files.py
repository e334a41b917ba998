"""The files a container runtime needs: the executables, and the list that names them.

    cymric.runtime.cni_executables ─▶ /opt/cni/bin/cymric-cni, cymric-cni-ipam and theirs in Python
    Wanted ─▶ conflist (pure) ─▶ /etc/cni/net.d/10-cymric.conflist

Executables come before the list that makes a runtime call them, and go after it. Every file appears
whole or not at all. A file that is not ours (by what is in it, not by its name) is neither
overwritten nor removed.

The list says 1.0.0 to runtimes that know one version only, as many in use refuse a newer one; to
others it offers (`cniVersions`) all that we and the plugins after us know. With 1.1.0 they also
call GC and STATUS. Source: CNI specification 1.1.0, version considerations.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cymric.cli.objects import ObjectError
from cymric.runtime.cni_executables import (
    NAMES,
    SYSTEM_PYTHON,
    CannotCompile,
    compile_client,
    executables,
    find_compiler,
    is_ours,
    write_whole,
)

CONFLIST = "10-cymric.conflist"
CNI_VERSIONS = ("0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""What our executables know, ascending."""
KNOWN_EVERYWHERE = CNI_VERSIONS[:3]
"""What every plugin that cannot be asked is taken to know; the last is said to old runtimes."""
VERSION_TIMEOUT_S = 10
CAPABILITIES = ("bandwidth", "ips", "mac", "io.kubernetes.cri.pod-annotations")
"""What of a container's wishes a runtime hands to us; `bandwidth` only where no plugin of that name
does it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the list says. `mtu` 0 leaves it to cnid; `chained` run after us, by type.

    `versions` of CNI are those that all plugins of the list know, ascending.
    """

    name: str
    socket: Path
    mtu: int = 0
    is_kubernetes: bool = False
    chained: tuple[str, ...] = ()
    versions: tuple[str, ...] = CNI_VERSIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the files go, and the Python that runs the executables (3.9 or newer).

    `client` is a compiled client to use; None compiles it here if there is a compiler.
    """

    bin_dir: Path
    conf_dir: Path
    conf_name: str = CONFLIST
    python: Path = SYSTEM_PYTHON
    client: Path | None = None

    @property
    def conflist(self) -> Path:
        """The list's file."""
        return self.conf_dir / self.conf_name

    @property
    def executables(self) -> tuple[Path, ...]:
        """The executables' files, those in Python first."""
        return tuple(self.bin_dir / name for name in (*(f"{n}.py" for n in NAMES), *NAMES))


class NotOurs(ObjectError):
    """A file in our place that somebody else put there."""


def conflist(wanted: Wanted) -> str:
    """The network configuration list."""
    plugin: dict[str, Any] = {"type": "cymric-cni", "socket": str(wanted.socket)}
    if wanted.mtu:
        plugin["mtu"] = wanted.mtu
    if wanted.is_kubernetes:
        plugin["policy"] = {"type": "k8s"}
    wishes = {name: True for name in CAPABILITIES if name not in wanted.chained}
    plugin["capabilities"] = wishes
    plugin["ipam"] = {"type": "cymric-cni-ipam", "assign_ipv4": "true"}
    chained = [_chained(kind) for kind in wanted.chained]
    old = [version for version in wanted.versions if version in KNOWN_EVERYWHERE]
    tree = {
        "cniVersion": [*wanted.versions[:1], *old][-1],
        "cniVersions": list(wanted.versions),
        "name": wanted.name,
        "plugins": [plugin, *chained],
    }
    return json.dumps(tree, indent=2) + "\n"


def install(places: Places, wanted: Wanted) -> tuple[str, ...]:
    """Write what is missing or different; a line for each file. Raises NotOurs, OSError."""
    _refuse_foreign(places)
    versions, told = _common_versions(places.bin_dir / kind for kind in wanted.chained)
    wanted = replace(wanted, versions=versions)
    client = _client(places)
    files = {
        places.bin_dir / name: content
        for name, content in executables(client, python=places.python).items()
    }
    done = [_write(path, content, mode=0o755) for path, content in files.items()]
    done += [_remove(path) for path in places.executables if path.exists() and path not in files]
    done.append(_write(places.conflist, conflist(wanted).encode(), mode=0o600))
    if client is None:
        done.append("no C compiler here: the executables are Python, a call takes 10 ms more")
    return (*done, *told)


def build(output: Path) -> str:
    """Compile the client into a file; a line about it. Raises ObjectError, OSError."""
    compiler = find_compiler()
    if compiler is None:
        raise ObjectError("there is no C compiler here")
    return _write(output, _compiled(compiler), mode=0o755)


def uninstall(places: Places) -> tuple[str, ...]:
    """Remove what `install` wrote; a line for each file. Raises NotOurs, OSError."""
    _refuse_foreign(places)
    return tuple(_remove(path) for path in (places.conflist, *places.executables))


def _chained(kind: str) -> dict[str, Any]:
    """A plugin after ours, with what the runtime has to hand to it."""
    capabilities = {"portmap": "portMappings", "bandwidth": "bandwidth"}
    if kind in capabilities:
        return {"type": kind, "capabilities": {capabilities[kind]: True}}
    return {"type": kind}


def _common_versions(chained: Iterable[Path]) -> tuple[tuple[str, ...], list[str]]:
    """The versions that we and all of these know, and what to tell. Raises ObjectError."""
    common, told = list(CNI_VERSIONS), []
    for path in chained:
        try:
            known = _versions_of(path)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            known = KNOWN_EVERYWHERE
            told.append(
                f"{path}: does not tell its versions, taken to know none after 1.0.0: {error}"
            )
        common = [version for version in common if version in known]
        if not common:
            raise ObjectError(f"{path} knows no version of CNI that the others know")
    if CNI_VERSIONS[-1] not in common:
        told.append(
            "a plugin in the list is older than CNI 1.1.0: GC and STATUS will not be called"
        )
    return tuple(common), told


def _versions_of(plugin: Path) -> Sequence[str]:
    """What a plugin says it knows. Raises OSError, ValueError, SubprocessError."""
    done = subprocess.run(
        [plugin],
        env={"CNI_COMMAND": "VERSION"},
        input=json.dumps({"cniVersion": KNOWN_EVERYWHERE[-1]}).encode(),
        capture_output=True,
        check=True,
        timeout=VERSION_TIMEOUT_S,
    )
    try:
        return [str(version) for version in json.loads(done.stdout)["supportedVersions"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no supportedVersions: {error!r}") from None


def _client(places: Places) -> bytes | None:
    if places.client is not None:
        content = places.client.read_bytes()
        if not is_ours(content):
            raise NotOurs(f"{places.client} is no CNI client of Cymric")
        return content
    compiler = find_compiler()
    return _compiled(compiler) if compiler else None


def _compiled(compiler: str) -> bytes:
    try:
        return compile_client(compiler)
    except CannotCompile as error:
        raise ObjectError(f"the CNI client cannot be compiled: {error}") from None


def _refuse_foreign(places: Places) -> None:
    for path in places.executables:
        if path.exists() and not is_ours(path.read_bytes()):
            raise NotOurs(f"{path} is not Cymric's: move it away first")
    if places.conflist.exists() and not _is_our_list(places.conflist):
        raise NotOurs(f"{places.conflist} is not Cymric's: move it away first")


def _is_our_list(path: Path) -> bool:
    try:
        plugins: Sequence[Any] = json.loads(path.read_text())["plugins"]
        return any(plugin["type"] == NAMES[0] for plugin in plugins)
    except (ValueError, KeyError, TypeError):
        return False


def _write(path: Path, content: bytes, *, mode: int) -> str:
    is_new = write_whole(path, content, mode=mode)
    return f"{path}: {'written' if is_new else 'as it should be'}"


def _remove(path: Path) -> str:
    try:
        path.unlink()
    except FileNotFoundError:
        return f"{path}: not there"
    return f"{path}: removed"
