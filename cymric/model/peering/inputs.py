"""What the datastore says about peering, and the questions that the expansion asks of it.

Defaults are Calico's: AS 64512, port 179, mesh on. A node's own BGPConfiguration (`node.<name>`)
wins for the listen port; all else that concerns sessions comes from the cluster's (`default`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address

from cymric.model.net import Address, parse_interface
from cymric.model.resources import (
    DEFAULT_BGP_PORT,
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPPeer,
    Node,
)

VERSIONS = (4, 6)
_ANY = {4: "0.0.0.0", 6: "::"}


@dataclass(frozen=True, slots=True)
class PeeringInputs:
    """What the datastore says about peering; objects by name."""

    nodes: Mapping[str, Node]
    peers: Mapping[str, BGPPeer]
    configurations: Mapping[str, BGPConfiguration]

    @property
    def cluster(self) -> BGPConfigurationSpec:
        """The cluster-wide settings."""
        default = self.configurations.get("default")
        return BGPConfigurationSpec() if default is None else default.spec

    def listen_port(self, node: str) -> int:
        """The port on which `node` listens: its own configuration, else the cluster's."""
        own = self.configurations.get(f"node.{node}")
        own_port = 0 if own is None else own.spec.listen_port
        return own_port or self.cluster.listen_port or DEFAULT_BGP_PORT

    def listen_addresses(self, node: str) -> tuple[str, ...]:
        """Where `node` listens, by the cluster's bind mode: any address, or its own alone."""
        own = {version: self.address(node, version) for version in VERSIONS}
        if self.cluster.bind_mode == "NodeIP":
            return tuple(str(address) for address in own.values() if address is not None)
        return tuple(_ANY[version] for version in VERSIONS if version == 4 or own[version])

    def asn(self, node: str) -> int:
        """The AS number of `node`: its own, else the cluster's."""
        own = self.own_asn(node)
        return self.cluster.asn if own is None else own

    def own_asn(self, node: str) -> int | None:
        """The AS number that the Node object itself gives."""
        bgp = self.nodes[node].spec.bgp
        return None if bgp is None else bgp.asn

    def address(self, node: str, version: int = 4) -> Address | None:
        """The address of `node` in a family; None means that it speaks no BGP in it."""
        known = self.nodes.get(node)
        bgp = None if known is None else known.spec.bgp
        if bgp is None:
            return None
        text = bgp.ipv4_address if version == 4 else bgp.ipv6_address
        return _address(text) if text else None

    def addresses(self, node: str) -> Iterator[Address]:
        """The addresses of `node`, IPv4 first."""
        for version in VERSIONS:
            if (address := self.address(node, version)) is not None:
                yield address

    def cluster_id(self, node: str) -> str:
        """The route reflector cluster of `node`; empty if it reflects nothing."""
        known = self.nodes.get(node)
        bgp = None if known is None else known.spec.bgp
        return "" if bgp is None else bgp.route_reflector_cluster_id

    def router_id(self, node: str) -> Address:
        """The node's IPv4 address; without one, Calico's hash of its name.

        The hash is the first four bytes of SHA-256, kept out of the multicast range and above.
        """
        address = self.address(node, 4)
        if address is not None:
            return address
        digest = hashlib.sha256(node.encode()).digest()
        first = digest[0] - 32 if digest[0] > 223 else digest[0]
        return IPv4Address(bytes([first]) + digest[1:4])


@lru_cache(maxsize=16_384)
def _address(text: str) -> Address:
    return parse_interface(text).ip
