"""Who is where around one node: pods, the node itself, and everybody else on two links.

    pod a, b (prod), c (IPv4 only), d (test) ── node ┬ up0 ── east: remote pod e, others
                                                     └ up1 ── west: remote pod w, others

The same places are the addresses of generated objects, of packets worked out in memory, and of the
namespaces in which real packets are sent.
"""

from __future__ import annotations

from dataclasses import dataclass

from cymric.model.net import Address, parse_address
from felix.calc.journey import Way

NODE = "node1"


@dataclass(frozen=True)
class Place:
    """Somewhere packets come from and go to."""

    name: str
    kind: str
    """pod, host or outside."""
    interface: str
    """The node's interface that leads there; empty for the node itself."""
    addresses: tuple[str, ...]
    namespace: str = ""
    """Of the pod's endpoint."""
    mac: str = ""
    """The pod's."""

    def of(self, ip_version: int) -> tuple[Address, ...]:
        """Its addresses of one family."""
        found = map(parse_address, self.addresses)
        return tuple(address for address in found if address.version == ip_version)


PODS = (
    Place("a", "pod", "cali0a", ("198.19.16.2", "fd00:198:16::2"), "prod", "02:00:00:00:10:00"),
    Place("b", "pod", "cali0b", ("198.19.16.3", "fd00:198:16::3"), "prod", "02:00:00:00:10:01"),
    Place("c", "pod", "cali0c", ("198.19.16.4",), "test", "02:00:00:00:10:02"),
    Place("d", "pod", "cali0d", ("198.19.16.5", "fd00:198:16::5"), "test", "02:00:00:00:10:03"),
)
UP0, UP1 = ("198.19.0.2", "fd00:198::2"), ("198.19.1.2", "fd00:198:1::2")
HOST = Place("host", "host", "", (*UP0, *UP1))
EAST = Place(
    "east", "outside", "up0",
    ("198.19.0.1", "198.19.8.1", "198.19.20.1", "fd00:198::1", "fd00:198:8::1", "fd00:198:20::1"),
)  # fmt: skip
WEST = Place(
    "west", "outside", "up1",
    ("198.19.1.1", "198.19.9.1", "198.19.21.1", "fd00:198:1::1", "fd00:198:9::1",
     "fd00:198:21::1"),
)  # fmt: skip
PLACES = (*PODS, HOST, EAST, WEST)
OUTSIDE = (EAST, WEST)
REMOTE_PODS = {"e": (EAST, 2), "w": (WEST, 2)}
"""Pods of other nodes: where they are, and which of its addresses of a family they have."""

INTERFACES = {
    "up0": frozenset(map(parse_address, UP0)),
    "up1": frozenset(map(parse_address, UP1)),
    "lo": frozenset(map(parse_address, ("127.0.0.1", "::1"))),
}
"""The node's own."""


def way(source: Place, destination: Place) -> Way:
    """How a packet crosses the node."""
    return Way(source.interface, destination.interface)
