"""What tests in a lab do again and again: change the datastore, wait, capture, make pods."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Any, TypeVar

from labs import observe
from labs.lab import Lab
from labs.network import inside
from labs.topology import Pod

T = TypeVar("T")

POLL_S = 0.1
_ETH_P_ALL = 0x0003
_ETH_P_IP = 0x0800


def wait_for(question: Callable[[], T], *, patience_s: float = 15, what: str = "") -> T:
    """Ask until the answer is true, and return it; AssertionError with the last answer if not."""
    deadline = time.monotonic() + patience_s
    while not (answer := question()):
        assert time.monotonic() < deadline, f"not within {patience_s} s: {what} (now {answer!r})"
        time.sleep(POLL_S)
    return answer


def wait_equal(question: Callable[[], T], wanted: T, *, patience_s: float = 15) -> None:
    """Ask until the answer is `wanted`; AssertionError that shows the difference if it never is."""
    deadline = time.monotonic() + patience_s
    while (answer := question()) != wanted and time.monotonic() < deadline:
        time.sleep(POLL_S)
    assert answer == wanted


def kill(lab: Lab, group: str, name: str) -> None:
    """Kill -9, and wait until the supervisor has a new one that stays."""
    old = lab.supervisor.kill(group, name)

    def is_new() -> bool:
        process = lab.supervisor.process(group, name)
        return process.running and process.pid not in (0, old)

    wait_for(is_new, what=f"{group}:{name} started again", patience_s=30)


def pool_key(name: str) -> str:
    """Where etcd keeps an IPPool."""
    return f"/calico/resources/v3/projectcalico.org/ippools/{name}"


@contextmanager
def changed(lab: Lab, key: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """The value under `key` changed as any etcd client could, and put back afterwards."""
    text = lab.etcdctl("get", "--print-value-only", key).strip()
    value = json.loads(text)
    lab.etcdctl("put", key, json.dumps(change(value)))
    try:
        yield
    finally:
        lab.etcdctl("put", key, text)


def with_nat_outgoing(on: bool) -> Callable[[Any], Any]:
    """A change of a stored IPPool."""
    return lambda pool: {**pool, "spec": {**pool["spec"], "natOutgoing": on}}


@contextmanager
def pod(lab: Lab, node: str, name: str, pools: tuple[str, ...] = ()) -> Iterator[Pod]:
    """A pod for the length of a test."""
    made = lab.add_pod(node, name, pools=pools)
    try:
        yield made
    finally:
        if any(known.name == name for known in lab.records.pods):
            lab.delete_pod(name)


def wait_seen(lab: Lab, pod_name: str, address: str, *, patience_s: float = 15) -> None:
    """Wait until host1 sees `pod_name` as `address`."""
    wait_equal(
        lambda: observe.seen_outside(lab, [pod_name])[pod_name].seen, address, patience_s=patience_s
    )


@dataclass(frozen=True, slots=True)
class Packet:
    """The outermost IPv4 header of a frame, and its ports if it is TCP or UDP."""

    source: IPv4Address
    target: IPv4Address
    protocol: int
    ports: tuple[int, int] = (0, 0)


class Capture:
    """All frames on the bridge, by a raw socket of our own in its namespace."""

    def __init__(self, lab: Lab) -> None:
        with inside(lab.layout.bridge_namespace):
            self._socket = socket.socket(
                socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)
            )
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._socket.setblocking(False)

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def packets(self) -> list[Packet]:
        """The IPv4 packets since the last call."""
        found: list[Packet] = []
        while True:
            try:
                frame = self._socket.recv(65536)
            except BlockingIOError:
                return found
            if len(frame) >= 34 and struct.unpack_from("!H", frame, 12)[0] == _ETH_P_IP:
                found.append(_packet(frame[14:]))


def _packet(data: bytes) -> Packet:
    header_bytes = (data[0] & 0x0F) * 4
    protocol = data[9]
    ports = (0, 0)
    if protocol in (6, 17) and len(data) >= header_bytes + 4:
        ports = struct.unpack_from("!HH", data, header_bytes)
    return Packet(IPv4Address(data[12:16]), IPv4Address(data[16:20]), protocol, ports)
