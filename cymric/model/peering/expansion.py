"""From BGPPeer objects and the mesh to the sessions of one node.

    BGPPeer ▶ forward (we are selected) ─┐
            ▶ reverse (we are the peer) ─┼▶ Candidate ▶ first per address ▶ Session
    mesh ────────────────────────────────┘

Which candidate wins an address: global peers, then node-specific ones, then the automatic reverse
of peers that others have with us, then the mesh; among equals the first by name. A peer that is
refused still holds its address: the mesh, which knows nothing of its filters or password, does not
take its place.

Of two nodes the one whose address *text* is smaller waits for the other to connect, on every kind
of session. Calico applies this rule to the mesh and to global peers only and lets both sides
connect otherwise; with the rule everywhere exactly one of two Cymric nodes connects, and towards a
Calico node the side that waits always faces one that does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cymric.model.net import Address, parse_address
from cymric.model.peering import options
from cymric.model.peering.inputs import VERSIONS, PeeringInputs
from cymric.model.peering.values import Peering, PeerType, Session
from cymric.model.resources import DEFAULT_BGP_PORT, BGPPeer, Node, split_peer_address
from cymric.model.selector import parse as parse_selector

MESH_OWNER = "BGPConfiguration default"
"""The name under which a mesh that cannot be honoured is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A session that some rule asks for. `peer` None: the mesh. `named_port`: as in peerIP."""

    peer: BGPPeer | None
    peer_type: PeerType
    address: Address
    port: int
    asn: int
    node: str
    named_port: int | None = None
    is_reverse: bool = False

    @property
    def owner(self) -> str:
        """Whom to report when it cannot be honoured."""
        return MESH_OWNER if self.peer is None else self.peer.metadata.name

    @property
    def name(self) -> str:
        """Calico's name for the session."""
        word = {PeerType.MESH: "Mesh", PeerType.GLOBAL: "Global", PeerType.NODE: "Node"}
        address = str(self.address).replace(".", "_").replace(":", "_")
        suffix = f"_port_{self.named_port}" if self.named_port else ""
        return f"{word[self.peer_type]}_{address}{suffix}"


def peering_of(node: str, inputs: PeeringInputs) -> Peering:
    """The sessions of `node`. Empty when the node is unknown or has no BGP address."""
    unsupported: dict[str, str] = {}
    problems: dict[str, str] = {}
    holder: dict[Address, Candidate] = {}
    sessions: list[Session] = []
    own = frozenset(inputs.addresses(node))
    for candidate in _candidates(node, inputs, unsupported) if own else ():
        if candidate.address in own:
            continue
        earlier = holder.setdefault(candidate.address, candidate)
        if earlier is not candidate:
            is_other_port = earlier.port != candidate.port
            if is_other_port and candidate.peer is not None and not candidate.is_reverse:
                unsupported[candidate.owner] = (
                    f"{candidate.address} has the session {earlier.name} already; "
                    "a second port on one address is not supported"
                )
            continue
        try:
            sessions.append(_session(node, candidate, inputs))
        except options.Unsupported as error:
            unsupported[candidate.owner] = str(error)
            continue
        asking = candidate.peer or inputs.configurations.get("default")
        if asking is not None and (problem := options.problem(asking)):
            problems[candidate.owner] = problem
    sessions.sort(key=lambda session: (session.version, int(session.peer_address)))
    return Peering(
        tuple(sessions),
        unsupported,
        listen=inputs.listen_addresses(node),
        ignored_interfaces=inputs.cluster.ignored_interfaces,
        problems=problems,
    )


def _candidates(
    node: str, inputs: PeeringInputs, unsupported: dict[str, str]
) -> Iterator[Candidate]:
    ordered = sorted(
        inputs.peers.values(),
        key=lambda peer: (bool(peer.spec.node or peer.spec.node_selector), peer.metadata.name),
    )
    nodes_by_address: dict[Address, list[str]] = {}
    for name in sorted(inputs.nodes):
        for address in inputs.addresses(name):
            nodes_by_address.setdefault(address, []).append(name)
    is_whole: list[BGPPeer] = []
    for peer in ordered:
        if not (reason := options.refusal(peer)):
            is_whole.append(peer)
        elif _is_local(peer, inputs.nodes[node]):
            unsupported[peer.metadata.name] = reason
    for peer in is_whole:
        if _is_local(peer, inputs.nodes[node]):
            yield from _forward(node, peer, inputs, nodes_by_address)
    for peer in is_whole:
        if peer.spec.reverse_peering != "Manual":
            yield from _reverse(node, peer, inputs, nodes_by_address)
    yield from _mesh(node, inputs)


def _forward(
    node: str, peer: BGPPeer, inputs: PeeringInputs, nodes: dict[Address, list[str]]
) -> Iterator[Candidate]:
    is_global = not (peer.spec.node or peer.spec.node_selector)
    kind = PeerType.GLOBAL if is_global else PeerType.NODE
    if peer.spec.peer_selector:
        for other in _selected(peer.spec.peer_selector, inputs):
            if other == node:
                continue
            for address in inputs.addresses(other):
                if inputs.address(node, address.version) is not None:
                    yield Candidate(
                        peer=peer, peer_type=kind, address=address, node=other,
                        port=inputs.listen_port(other), asn=inputs.asn(other),
                    )  # fmt: skip
        return
    address, named_port = _peer_address(peer)
    asn = peer.spec.asn or inputs.cluster.asn
    behind = _node_behind(address, named_port, asn, inputs, nodes)
    default_port = inputs.listen_port(behind) if behind else DEFAULT_BGP_PORT
    yield Candidate(
        peer=peer, peer_type=kind, address=address, node=behind, asn=asn,
        port=named_port or default_port, named_port=named_port,
    )  # fmt: skip


def _reverse(
    node: str, peer: BGPPeer, inputs: PeeringInputs, nodes: dict[Address, list[str]]
) -> Iterator[Candidate]:
    """Sessions back to the nodes that have this peer, if this node is what they peer with."""
    versions: tuple[int, ...]
    if peer.spec.peer_selector:
        if not parse_selector(peer.spec.peer_selector).matches(inputs.nodes[node].labels):
            return
        versions = VERSIONS
    else:
        address, port = _peer_address(peer)
        asn = peer.spec.asn or inputs.cluster.asn
        if address not in inputs.addresses(node):
            return
        if _node_behind(address, port, asn, inputs, nodes) != node:
            return
        versions = (address.version,)
    for other in sorted(inputs.nodes):
        if other == node or not _is_local(peer, inputs.nodes[other]):
            continue
        for version in versions:
            back = inputs.address(other, version)
            if back is None or inputs.address(node, version) is None:
                continue
            # What the other side presents to us is what its BGPPeer says, if it says anything.
            asn = peer.spec.local_asn or inputs.asn(other)
            yield Candidate(
                peer=peer, peer_type=PeerType.NODE, address=back, node=other,
                port=inputs.listen_port(other), asn=asn, is_reverse=True,
            )  # fmt: skip


def _mesh(node: str, inputs: PeeringInputs) -> Iterator[Candidate]:
    if not inputs.cluster.node_to_node_mesh_enabled or inputs.cluster_id(node):
        return
    for other in sorted(inputs.nodes):
        if other == node or inputs.cluster_id(other):
            continue
        own_asn = inputs.own_asn(other)
        for address in inputs.addresses(other):
            if inputs.address(node, address.version) is None:
                continue
            yield Candidate(
                peer=None, peer_type=PeerType.MESH, address=address, node=other,
                port=inputs.listen_port(other),
                # Calico: a mesh peer without an AS of its own is taken to share ours.
                asn=inputs.asn(node) if own_asn is None else own_asn,
            )  # fmt: skip


def _session(node: str, candidate: Candidate, inputs: PeeringInputs) -> Session:
    """Raises `options.Unsupported`."""
    address = candidate.address
    own = inputs.address(node, address.version)
    if own is None:
        raise options.Unsupported(f"this node has no IPv{address.version} address")
    asn = inputs.asn(node)
    chosen = options.of_mesh(inputs)
    if candidate.peer is not None:
        if candidate.peer.spec.local_asn is not None and not candidate.is_reverse:
            asn = candidate.peer.spec.local_asn
        chosen = options.of_peer(candidate.peer, is_ibgp=candidate.asn == asn)
    cluster_id = inputs.cluster_id(node)
    return Session(
        name=candidate.name,
        peer_type=candidate.peer_type,
        peer_address=address,
        peer_port=candidate.port,
        peer_asn=candidate.asn,
        local_address=own,
        local_asn=asn,
        router_id=inputs.router_id(node),
        listen_port=inputs.listen_port(node),
        is_passive=bool(candidate.node) and str(address) > str(own),
        peer_node=candidate.node,
        bgp_peer="" if candidate.peer is None else candidate.peer.metadata.name,
        cluster_id=cluster_id,
        is_reflector_client=bool(cluster_id)
        and candidate.asn == asn
        and inputs.cluster_id(candidate.node) != cluster_id,
        **chosen,
    )


def _node_behind(
    address: Address,
    port: int | None,
    asn: int,
    inputs: PeeringInputs,
    nodes: dict[Address, list[str]],
) -> str:
    """The node that a peerIP means: same address and AS, and the port if one is given."""
    for name in nodes.get(address, ()):
        if inputs.asn(name) == asn and port in (None, inputs.listen_port(name)):
            return name
    return ""


def _peer_address(peer: BGPPeer) -> tuple[Address, int | None]:
    text, port = split_peer_address(peer.spec.peer_ip)
    return parse_address(text), port


def _is_local(peer: BGPPeer, node: Node) -> bool:
    """Whether `node` is one of those that have this peer."""
    if peer.spec.node:
        return peer.spec.node == node.metadata.name
    return parse_selector(peer.spec.node_selector).matches(node.labels)


def _selected(selector: str, inputs: PeeringInputs) -> Iterable[str]:
    parsed = parse_selector(selector)
    return [name for name in sorted(inputs.nodes) if parsed.matches(inputs.nodes[name].labels)]
