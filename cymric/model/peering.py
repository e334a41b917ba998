"""Which BGP sessions a node has: the mesh and the explicit peers, computed purely.

confd renders the result into the speaker's file and bgpd commands routes by it, so the two cannot
disagree. Rules: Calico's mesh and BGPPeer expansion. Route reflectors, selectors on the remote
side and automatic reverse peering are not computed yet; a BGPPeer that needs them is returned as
`unsupported`, by name, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from cymric.model.durations import duration_s
from cymric.model.net import Address, parse_address
from cymric.model.resources import (
    DEFAULT_BGP_PORT,
    BGPConfiguration,
    BGPConfigurationSpec,
    BGPPeer,
    Node,
    split_peer_address,
)
from cymric.model.selector import parse as parse_selector

DEFAULT_RESTART_TIME_S = 120
"""The graceful restart time Calico's BIRD offers."""


class PeerType(StrEnum):
    """How a session came to be, in `calicoctl node status`' words."""

    MESH = "node-to-node mesh"
    GLOBAL = "global"
    NODE = "node specific"


class NextHopMode(StrEnum):
    """Which next hop goes with routes that are passed on: BGPPeer's `nextHopMode`.

    Auto: ourselves towards another AS, unchanged within ours.
    """

    AUTO = "Auto"
    SELF = "Self"
    KEEP = "Keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One BGP session of this node, all that speaker and daemon need to know of it.

    `restart_time_s` is the graceful restart time we offer. `is_passive` means that we wait for
    the peer to connect. `peer_node` names the Cymric or Calico node behind the address, if any.

    `filters` are the names of BGPFilters, in order. `max_prefixes` is the limit for what the peer
    may announce, None for the cluster's default. `cluster_id` is this node's when it is a route
    reflector; the peer is then a client (`is_reflector_client`) if the session is iBGP and the
    peer's own cluster ID is another or none.
    """

    name: str
    peer_type: PeerType
    peer_address: Address
    peer_port: int
    peer_asn: int
    local_address: Address
    local_asn: int
    router_id: Address
    listen_port: int
    is_passive: bool
    restart_time_s: int = DEFAULT_RESTART_TIME_S
    peer_node: str = ""
    filters: tuple[str, ...] = ()
    next_hop_mode: NextHopMode = NextHopMode.AUTO
    max_prefixes: int | None = None
    cluster_id: str = ""
    is_reflector_client: bool = False

    @property
    def is_ibgp(self) -> bool:
        """Whether both sides are of one AS."""
        return self.peer_asn == self.local_asn


@dataclass(frozen=True, slots=True)
class Peering:
    """All sessions of one node, by peer address, and the peers that cannot be honoured, why."""

    sessions: tuple[Session, ...]
    unsupported: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class PeeringInputs:
    """What the datastore says about peering; objects by name."""

    nodes: Mapping[str, Node]
    peers: Mapping[str, BGPPeer]
    configurations: Mapping[str, BGPConfiguration]

    def listen_port(self, node: str) -> int:
        """The port on which `node` listens: its own configuration, else the cluster's."""
        own = self.configurations.get(f"node.{node}")
        if own is not None and own.spec.listen_port != DEFAULT_BGP_PORT:
            return own.spec.listen_port
        return self.cluster.listen_port

    @property
    def cluster(self) -> BGPConfigurationSpec:
        """The cluster-wide settings."""
        default = self.configurations.get("default")
        return BGPConfigurationSpec() if default is None else default.spec

    def asn(self, node: str) -> int:
        """The AS number of `node`: its own, else the cluster's."""
        bgp = self.nodes[node].spec.bgp
        own = None if bgp is None else bgp.asn
        return self.cluster.asn if own is None else own

    def address(self, node: str) -> Address | None:
        """The IPv4 address of `node`; None means that it speaks no BGP."""
        bgp = self.nodes[node].spec.bgp
        interface = None if bgp is None else bgp.ipv4_interface
        return None if interface is None else interface.ip


def peering_of(node: str, inputs: PeeringInputs) -> Peering:
    """The sessions of `node`. Empty when the node is unknown or has no BGP address.

    One session per peer address: a global peer wins over a node-specific one, both over the mesh,
    and among equals the first by name.
    """
    unsupported: dict[str, str] = {}
    if node not in inputs.nodes or (own := inputs.address(node)) is None:
        return Peering((), unsupported)
    by_address: dict[Address, Session] = {}
    for peer in _in_order(inputs.peers.values()):
        if reason := _unsupported(peer):
            unsupported[peer.metadata.name] = reason
        elif _applies(peer, inputs.nodes[node]):
            session = _explicit_session(node, own, peer, inputs)
            if session.peer_address != own:
                by_address.setdefault(session.peer_address, session)
    for session in _mesh_sessions(node, own, inputs):
        by_address.setdefault(session.peer_address, session)
    ordered = sorted(by_address.values(), key=lambda session: int(session.peer_address))
    return Peering(tuple(ordered), unsupported)


def _mesh_sessions(node: str, own: Address, inputs: PeeringInputs) -> Iterable[Session]:
    if not inputs.cluster.node_to_node_mesh_enabled:
        return
    restart = inputs.cluster.node_mesh_max_restart_time
    for other in sorted(inputs.nodes):
        address = inputs.address(other)
        if other == node or address is None or address == own:
            continue
        bgp = inputs.nodes[other].spec.bgp
        has_own_asn = bgp is not None and bgp.asn is not None
        yield Session(
            name=f"Mesh_{str(address).replace('.', '_')}",
            peer_type=PeerType.MESH,
            peer_address=address,
            peer_port=inputs.listen_port(other),
            # Calico: a mesh peer without an AS of its own is taken to share ours.
            peer_asn=inputs.asn(other) if has_own_asn else inputs.asn(node),
            local_address=own,
            local_asn=inputs.asn(node),
            router_id=own,
            listen_port=inputs.listen_port(node),
            is_passive=_waits_for(own, address),
            restart_time_s=round(duration_s(restart)) if restart else DEFAULT_RESTART_TIME_S,
            peer_node=other,
        )


def _explicit_session(node: str, own: Address, peer: BGPPeer, inputs: PeeringInputs) -> Session:
    text, port = split_peer_address(peer.spec.peer_ip)
    address = parse_address(text)
    peer_asn = peer.spec.asn or inputs.cluster.asn
    behind = next(
        (
            name
            for name in sorted(inputs.nodes)
            if inputs.address(name) == address and inputs.asn(name) == peer_asn
        ),
        "",
    )
    default_port = inputs.listen_port(behind) if behind else DEFAULT_BGP_PORT
    is_global = not (peer.spec.node or peer.spec.node_selector)
    suffix = f"_port_{port}" if port else ""
    restart = peer.spec.max_restart_time
    return Session(
        name=f"{'Global' if is_global else 'Node'}_{text.replace('.', '_')}{suffix}",
        peer_type=PeerType.GLOBAL if is_global else PeerType.NODE,
        peer_address=address,
        peer_port=port or default_port,
        peer_asn=peer_asn,
        local_address=own,
        local_asn=inputs.asn(node),
        router_id=own,
        listen_port=inputs.listen_port(node),
        is_passive=bool(behind) and _waits_for(own, address),
        restart_time_s=round(duration_s(restart)) if restart else DEFAULT_RESTART_TIME_S,
        peer_node=behind,
    )


def _in_order(peers: Iterable[BGPPeer]) -> list[BGPPeer]:
    return sorted(
        peers,
        key=lambda peer: (bool(peer.spec.node or peer.spec.node_selector), peer.metadata.name),
    )


def _applies(peer: BGPPeer, node: Node) -> bool:
    if peer.spec.node:
        return peer.spec.node == node.metadata.name
    return parse_selector(peer.spec.node_selector).matches(node.labels)


def _unsupported(peer: BGPPeer) -> str:
    spec = peer.spec
    if spec.peer_selector or spec.local_workload_selector:
        return "peers chosen by selector are not supported yet"
    if not spec.peer_ip:
        return "has neither peerIP nor peerSelector"
    if parse_address(split_peer_address(spec.peer_ip)[0]).version != 4:
        return "IPv6 peers are not supported yet"
    if spec.filters:
        return "filters are not supported yet, and a session without them would leak routes"
    if spec.password:
        return "passwords are not supported yet"
    if spec.local_as_number is not None:
        return "localASNumber is not supported yet"
    if spec.ttl_security is not None:
        return "ttlSecurity is not supported yet"
    return ""


def _waits_for(own: Address, other: Address) -> bool:
    """Calico's passive rule: of two nodes the one whose address *text* is smaller waits."""
    return str(other) > str(own)
