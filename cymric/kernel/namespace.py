"""Network namespaces and their sysctls, from a process that lives in another one.

A thread can visit a namespace for a moment: what it opens there (a netlink socket, a file below
/proc/sys/net) stays bound to it. So `visiting` switches, runs a few lines that must not await, and
switches back; the daemon never forks and its other tasks never see the difference. If the way back
failed the daemon would go on in the wrong namespace, so that ends the process.

Sources: setns(2), network_namespaces(7).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_PROC_SYS = Path("/proc/sys")
_OWN = Path("/proc/thread-self/ns/net")


def _setns(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot enter the network namespace: {os.strerror(code)}")


@contextmanager
def opened(path: str | Path) -> Iterator[int]:
    """A descriptor of the namespace behind `path`. Raises FileNotFoundError, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def visiting(descriptor: int) -> Iterator[None]:
    """Run the body in the namespace behind `descriptor`. The body must not await."""
    with opened(_OWN) as home:
        _setns(descriptor)
        try:
            yield
        finally:
            try:
                _setns(home)
            except OSError as error:
                raise SystemExit(f"lost in another network namespace: {error}") from error


def identity(descriptor: int | None = None) -> tuple[int, int]:
    """Device and inode of a namespace (by default our own): equal exactly for the same one."""
    stat = os.fstat(descriptor) if descriptor is not None else _OWN.stat()
    return stat.st_dev, stat.st_ino


def read_sysctl(name: str) -> str:
    """A setting below /proc/sys, such as `net/ipv4/ip_forward`. Raises OSError."""
    return (_PROC_SYS / name).read_text().strip()


def write_sysctl(name: str, value: str) -> None:
    """Change a setting below /proc/sys. Raises OSError that names it."""
    path = f"{_PROC_SYS}/{name}"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, f"cannot set {path} to {value}: {error.strerror}") from error
