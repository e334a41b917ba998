"""The files a container runtime needs: two executables, and the list that names them.

    cni/plugin.py (text) ─▶ /opt/cni/bin/cymric-cni, cymric-cni-ipam
    Wanted ─▶ conflist (pure) ─▶ /etc/cni/net.d/10-cymric.conflist

The executable is a file of this distribution that is copied, not a module that is imported: it
runs under the system's Python, and nothing of it runs here. Executables come before the list that
makes a runtime call them, and go after it. Every file appears whole or not at all. A file that is
not ours (by what is in it, not by its name) is neither overwritten nor removed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cymric.cli.objects import ObjectError

EXECUTABLES = ("cymric-cni", "cymric-cni-ipam")
CONFLIST = "10-cymric.conflist"
SYSTEM_PYTHON = Path("/usr/bin/python3")
CNI_VERSION = "1.0.0"
_MARK = b"cymric-cni"
_MARK_WITHIN_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the list says. `mtu` 0 leaves it to cnid; `chained` run after us, by type."""

    name: str
    socket: Path
    mtu: int = 0
    is_kubernetes: bool = False
    chained: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the files go, and the Python that runs the executables (3.9 or newer)."""

    bin_dir: Path
    conf_dir: Path
    conf_name: str = CONFLIST
    python: Path = SYSTEM_PYTHON

    @property
    def conflist(self) -> Path:
        """The list's file."""
        return self.conf_dir / self.conf_name

    @property
    def executables(self) -> tuple[Path, ...]:
        """The executables' files."""
        return tuple(self.bin_dir / name for name in EXECUTABLES)


class NotOurs(ObjectError):
    """A file in our place that somebody else put there."""


def conflist(wanted: Wanted) -> str:
    """The network configuration list."""
    plugin: dict[str, Any] = {"type": "cymric-cni", "socket": str(wanted.socket)}
    if wanted.mtu:
        plugin["mtu"] = wanted.mtu
    if wanted.is_kubernetes:
        plugin["policy"] = {"type": "k8s"}
    plugin["ipam"] = {"type": "cymric-cni-ipam", "assign_ipv4": "true"}
    chained = [_chained(kind) for kind in wanted.chained]
    tree = {"cniVersion": CNI_VERSION, "name": wanted.name, "plugins": [plugin, *chained]}
    return json.dumps(tree, indent=2) + "\n"


def install(places: Places, wanted: Wanted) -> tuple[str, ...]:
    """Write what is missing or different; a line for each file. Raises NotOurs, OSError."""
    _refuse_foreign(places)
    body = f"#!{places.python} -IS\n{_plugin_text()}"
    done = [_write(path, body, mode=0o755) for path in places.executables]
    done.append(_write(places.conflist, conflist(wanted), mode=0o600))
    return tuple(done)


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


def _plugin_text() -> str:
    found = find_spec("cni.plugin")
    if found is None or found.origin is None:
        raise ObjectError("the CNI executable is not part of this installation")
    return Path(found.origin).read_text()


def _refuse_foreign(places: Places) -> None:
    for path in places.executables:
        if path.exists() and not _is_our_executable(path):
            raise NotOurs(f"{path} is not Cymric's: move it away first")
    if places.conflist.exists() and not _is_our_list(places.conflist):
        raise NotOurs(f"{places.conflist} is not Cymric's: move it away first")


def _is_our_executable(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_MARK_WITHIN_BYTES)
    return start.startswith(b"#!") and _MARK in start


def _is_our_list(path: Path) -> bool:
    try:
        plugins: Sequence[Any] = json.loads(path.read_text())["plugins"]
        return any(plugin["type"] == EXECUTABLES[0] for plugin in plugins)
    except (ValueError, KeyError, TypeError):
        return False


def _write(path: Path, text: str, *, mode: int) -> str:
    if path.exists() and path.read_text() == text and path.stat().st_mode & 0o777 == mode:
        return f"{path}: as it should be"
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")  # a runtime passes over hidden files
    try:
        half.write_text(text)
        half.chmod(mode)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return f"{path}: written"


def _remove(path: Path) -> str:
    try:
        path.unlink()
    except FileNotFoundError:
        return f"{path}: not there"
    return f"{path}: removed"
