"""The files a container runtime calls: from source to the bytes that go into its folder.

    cni/client.c  ─ C compiler ─▶ cymric-cni,    cymric-cni-ipam       the ordinary call
    cni/plugin.py ──────────────▶ cymric-cni.py, cymric-cni-ipam.py    everything else

Of the time a call takes, the start of an interpreter is the largest part: ten milliseconds, where
the compiled client needs half a one. So the client is compiled wherever that can be done, and as it
is static, it runs on any Linux of the same processor. Without a compiler plugin.py itself stands in
its place: the same calls and answers, only slower. Both sources are parts of this distribution that
are copied, not modules that are imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

NAMES = ("cymric-cni", "cymric-cni-ipam")
SYSTEM_PYTHON = Path("/usr/bin/python3")
COMPILERS = ("cc", "gcc", "clang", "tcc")
DEFAULT_SOCKET = "/run/cymric/cni.sock"
MAX_SOCKET_BYTES = 107
"""The longest path that a UNIX socket can have (unix(7))."""

_SCRIPT_MARK = b"cymric-cni"
_SCRIPT_MARK_WITHIN_BYTES = 4096
_CLIENT_MARK = b"cymric-cni socket="


class CannotCompile(Exception):
    """The compiler refused the client; its words."""


def find_compiler() -> str | None:
    """The first C compiler in the PATH."""
    found = (shutil.which(name) for name in COMPILERS)
    return next((path for path in found if path is not None), None)


def compile_client(compiler: str) -> bytes:
    """The compiled client. Raises CannotCompile."""
    with TemporaryDirectory(prefix="cymric-cni-") as scratch:
        output = Path(scratch) / NAMES[0]
        command = [compiler, "-O2", "-static", "-s", "-x", "c", "-", "-o", str(output)]
        done = subprocess.run(
            command, input=_source("client.c"), capture_output=True, check=False, timeout=60
        )
        if done.returncode != 0:
            raise CannotCompile(f"{compiler}: {done.stderr.decode(errors='replace').strip()}")
        return output.read_bytes()


def executables(
    client: bytes | None,
    *,
    python: Path = SYSTEM_PYTHON,
    socket: Path | None = None,
) -> Mapping[str, bytes]:
    """Name and content of each file, in the order to write them.

    `client` None: there is none, Python answers all. `python` may be any from 3.9 on. `socket` is
    where cnid is asked unless the network configuration says otherwise. Raises ValueError.
    """
    script = _script(python, socket)
    if client is None:
        return dict.fromkeys(NAMES, script)
    body = _with_socket(client, socket)
    return {f"{name}.py": script for name in NAMES} | dict.fromkeys(NAMES, body)


def is_ours(content: bytes) -> bool:
    """Whether a file is one of ours, of whatever version."""
    if content.startswith(b"#!"):
        return _SCRIPT_MARK in content[:_SCRIPT_MARK_WITHIN_BYTES]
    return content.startswith(b"\x7fELF") and _CLIENT_MARK in content


def write_executables(
    directory: Path, python: Path = SYSTEM_PYTHON, *, socket: Path | None = None
) -> tuple[Path, ...]:
    """Compile if possible, and write all; each appears whole. Raises CannotCompile, OSError."""
    compiler = find_compiler()
    client = compile_client(compiler) if compiler else None
    written = []
    for name, content in executables(client, python=python, socket=socket).items():
        write_whole(directory / name, content, mode=0o755)
        written.append(directory / name)
    return tuple(written)


def write_whole(path: Path, content: bytes, *, mode: int) -> bool:
    """Make a file what it should be, in one step. False: it was already. Raises OSError."""
    if path.exists() and path.read_bytes() == content and path.stat().st_mode & 0o777 == mode:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")  # a runtime passes over hidden files
    try:
        half.write_bytes(content)
        half.chmod(mode)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)
    return True


def _script(python: Path, socket: Path | None) -> bytes:
    body = _source("plugin.py").decode()
    if socket is not None:
        default = f'DEFAULT_SOCKET = "{DEFAULT_SOCKET}"'
        assert default in body
        body = body.replace(default, f"DEFAULT_SOCKET = {str(socket)!r}")
    return f"#!{python} -IS\n{body}".encode()


def _with_socket(client: bytes, socket: Path | None) -> bytes:
    """The client with another default socket written over its own."""
    path = str(socket or DEFAULT_SOCKET).encode()
    if len(path) > MAX_SOCKET_BYTES:
        raise ValueError(f"socket path {socket} is over {MAX_SOCKET_BYTES} bytes")
    at = client.find(_CLIENT_MARK + DEFAULT_SOCKET.encode())
    if at < 0:
        raise ValueError("this is no CNI client of Cymric")
    at += len(_CLIENT_MARK)
    return client[:at] + path.ljust(MAX_SOCKET_BYTES, b"\0") + client[at + MAX_SOCKET_BYTES :]


def _source(name: str) -> bytes:
    found = find_spec("cni")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("the CNI executable is not part of this installation")
    return (Path(found.submodule_search_locations[0]) / name).read_bytes()
