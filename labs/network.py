"""Namespaces, the bridge between them, and a way to open sockets inside one.

Links are made by `ip -batch`, one process for a whole namespace. `inside` moves only the calling
thread, and a socket stays for ever in the namespace in which it was opened, so a probe needs no
process of its own.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

from labs.topology import HOST_ADDRESS, UNDERLAY, mac_for

NAMED = Path("/run/netns")
BRIDGE = "br0"
UPLINK = "eth0"
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class CommandFailed(RuntimeError):
    """A program ended with an error; the text has its words."""


def run(
    *command: str, stdin: str = "", env: Mapping[str, str] | None = None, timeout_s: float = 30
) -> str:
    """Standard output of `command`. Raises CommandFailed with what it said on standard error."""
    done = subprocess.run(
        command, input=stdin, env=env, capture_output=True, text=True, timeout=timeout_s
    )
    if done.returncode != 0:
        words = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise CommandFailed(f"{' '.join(command)}: exit {done.returncode}: {words}")
    return done.stdout


def entering(namespace: str) -> tuple[str, ...]:
    """The words before a command that make it run in `namespace` (network only)."""
    return ("nsenter", f"--net={NAMED / namespace}", "--")


def exists(namespace: str) -> bool:
    """True if a namespace of this name is there."""
    return (NAMED / namespace).exists()


def all_namespaces() -> tuple[str, ...]:
    """Every named namespace on this machine."""
    return tuple(sorted(entry.name for entry in NAMED.iterdir())) if NAMED.exists() else ()


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Open sockets in `namespace`; nothing may be awaited inside."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(NAMED / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(there)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(there)
        os.close(home)


def _enter(namespace_fd: int) -> None:
    if _libc.setns(namespace_fd, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def make_bridge(namespace: str) -> None:
    """A namespace with a bridge and no address: the wire everybody is plugged into."""
    run("ip", "netns", "add", namespace)
    run(
        "ip",
        "-netns",
        namespace,
        "-batch",
        "-",
        stdin=f"link set lo up\nlink add {BRIDGE} type bridge\nlink set {BRIDGE} up\n",
    )
    _write_sysctl(namespace, "net/ipv6/conf/all/disable_ipv6", "1")
    # A bridge that shows frames to iptables would be a router in disguise.
    _write_sysctl(namespace, "net/bridge/bridge-nf-call-iptables", "0")


def make_machine(
    namespace: str, *, bridge_namespace: str, port: str, address: IPv4Address, router: bool
) -> None:
    """A namespace with `eth0` plugged into the bridge under the name `port`.

    A node (`router`) forwards. Its default route leads to the host outside, which forwards
    nothing: so a packet that no pod route and no blackhole catches leaves visibly and dies.
    """
    run("ip", "netns", "add", namespace)
    default = f"route add default via {HOST_ADDRESS}\n" if address != HOST_ADDRESS else ""
    run(
        "ip",
        "-netns",
        namespace,
        "-batch",
        "-",
        stdin=(
            f"link set lo up\n"
            f"link add {UPLINK} address {mac_for(address)} type veth"
            f" peer name {port} netns {bridge_namespace}\n"
            f"address add {address}/{UNDERLAY.prefixlen} dev {UPLINK}\n"
            f"link set {UPLINK} up\n{default}"
        ),
    )
    run(
        "ip",
        "-netns",
        bridge_namespace,
        "-batch",
        "-",
        stdin=f"link set {port} master {BRIDGE} up\n",
    )
    _write_sysctl(namespace, "net/ipv4/ip_forward", "1" if router else "0")


def make_pod_namespace(namespace: str) -> None:
    """An empty sandbox, as a container runtime hands it to the plugin."""
    run("ip", "netns", "add", namespace)
    run("ip", "-netns", namespace, "link", "set", "lo", "up")


def _write_sysctl(namespace: str, path: str, value: str) -> None:
    """Set a sysctl of `namespace`; one that this kernel does not have is left out."""
    run(
        *entering(namespace),
        "sh",
        "-c",
        f"test ! -e /proc/sys/{path} || echo {value} > /proc/sys/{path}",
    )


def pids_in(namespace: str) -> tuple[int, ...]:
    """Processes whose network is `namespace`."""
    return tuple(int(pid) for pid in run("ip", "netns", "pids", namespace).split())


def destroy(namespaces: Sequence[str], *, patience_s: float = 5) -> None:
    """End every process in the namespaces (kindly, then not) and remove them with their links."""
    present = [namespace for namespace in namespaces if exists(namespace)]
    for sig in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + patience_s
        while left := [pid for namespace in present for pid in pids_in(namespace)]:
            for pid in left:
                _signal(pid, sig)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    for namespace in present:
        run("ip", "netns", "delete", namespace)


def _signal(pid: int, sig: signal.Signals) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        return  # it ended by itself


def unplug(bridge_namespace: str, port: str) -> None:
    """Unplug `port`; it may be gone already, with the namespace at its other end."""
    if not exists(bridge_namespace):
        return
    try:
        run("ip", "-netns", bridge_namespace, "link", "delete", port)
    except CommandFailed as failure:
        if "Cannot find device" not in str(failure):
            raise
