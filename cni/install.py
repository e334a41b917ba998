"""Writes the CNI executables into a directory, each in one step."""

from __future__ import annotations

import os
from pathlib import Path

from cni import plugin

NAMES = ("cymric-cni", "cymric-cni-ipam")
SYSTEM_PYTHON = Path("/usr/bin/python3")


def install_executables(
    directory: Path, python: Path = SYSTEM_PYTHON, *, socket: Path | None = None
) -> tuple[Path, ...]:
    """Write both executables; `socket` is where they look for cnid unless the netconf says so.

    They need only the standard library, so `python` may be any Python from 3.9 on. A runtime that
    calls one meanwhile finds the old file or the new one, never half of it.
    """
    body = Path(plugin.__file__).read_text()
    if socket is not None:
        default = f'DEFAULT_SOCKET = "{plugin.DEFAULT_SOCKET}"'
        assert default in body
        body = body.replace(default, f"DEFAULT_SOCKET = {str(socket)!r}")
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for name in NAMES:
        path = directory / name
        half = directory / f".{name}.{os.getpid()}"
        half.write_text(f"#!{python} -IS\n{body}")
        half.chmod(0o755)
        half.replace(path)
        written.append(path)
    return tuple(written)
