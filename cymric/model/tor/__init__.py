"""The other side of a BGPPeer: what a top-of-rack router must be told, for six kinds of router.

    Node, BGPPeer, BGPConfiguration ▶ peering_of each node ▶ turned round ─┐
    IPPool, service ranges, communities ───────────────────────────────────┴▶ TorConfig ▶ text

Each node's session is worked out as confd does and then seen from the router, so the two sides
cannot disagree. Filters let through our pools and service ranges and nothing else, both ways, but
for what the router shall announce on its own; a limit per node stops what slips through. Passwords
are not read: their places are marked. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

import jinja2

from cymric.model.bfd import BfdParameters
from cymric.model.net import Address, Network, parse_network
from cymric.model.peering import PeeringInputs, peering_of
from cymric.model.resources import BGPConfigurationSpec, IPPool

DIALECTS = ("frr", "bird", "eos", "junos", "nxos", "ios-xr")
MAX_PREFIXES = 1000
"""What one node may announce: its blocks and borrowed addresses are some dozens."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.:/-]")


class NoRouter(ValueError):
    """There is nothing to configure; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbor:
    """One node, as the router sees it. `password` marks where it is kept, empty for none."""

    node: str
    address: Address
    router: Address
    asn: int
    port: int
    hold_time_s: int
    ttl_security: int
    password: str
    bfd: BfdParameters | None
    is_client: bool

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.address.version

    @property
    def word(self) -> str:
        """A name without any special character."""
        return re.sub(r"[^A-Za-z0-9]", "_", f"{self.node}_v{self.version}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TorConfig:
    """All that a router must know. Prefixes are taken with everything inside them.

    `prefixes` are ours, let through both ways; `announced` are what it tells the nodes beside them.
    """

    peer: str
    asn: int
    neighbors: tuple[Neighbor, ...]
    prefixes: Mapping[int, tuple[str, ...]]
    communities: tuple[str, ...]
    announced: Mapping[int, tuple[str, ...]]
    max_prefixes: int = MAX_PREFIXES

    @property
    def versions(self) -> tuple[int, ...]:
        """The families that are spoken."""
        return tuple(sorted({neighbor.version for neighbor in self.neighbors}))


def tor_config(
    peer: str,
    inputs: PeeringInputs,
    pools: Iterable[IPPool],
    *,
    node: str = "",
    max_prefixes: int = MAX_PREFIXES,
    announced: Iterable[Network] = (),
) -> TorConfig:
    """What the router behind BGPPeer `peer` must know; of one node, or all. Raises NoRouter."""
    if peer not in inputs.peers:
        raise NoRouter(f"there is no BGPPeer {peer}")
    if node and node not in inputs.nodes:
        raise NoRouter(f"there is no node {node}")
    if inputs.peers[peer].spec.peer_selector:
        raise NoRouter(f"BGPPeer {peer} means nodes, not a router: they need nothing told")
    neighbors: list[Neighbor] = []
    asns: set[int] = set()
    reasons: set[str] = set()
    for name in [node] if node else sorted(inputs.nodes):
        peering = peering_of(name, inputs)
        reasons |= {why for owner, why in peering.unsupported.items() if owner == peer}
        for session in peering.sessions:
            if session.bgp_peer != peer or session.peer_node:
                continue
            asns.add(session.peer_asn)
            neighbors.append(
                Neighbor(
                    node=_UNSAFE.sub("_", name),
                    address=session.local_address,
                    router=session.peer_address,
                    asn=session.local_asn,
                    port=session.listen_port,
                    hold_time_s=session.hold_time_s,
                    ttl_security=session.ttl_security,
                    password=_mark(str(session.password)) if session.password else "",
                    bfd=session.bfd,
                    is_client=session.is_ibgp,
                )
            )
    if not neighbors:
        said = "; ".join(sorted(reasons)) or "no node has a session with it that is not a node's"
        raise NoRouter(f"BGPPeer {peer}: {said}")
    return TorConfig(
        peer=_UNSAFE.sub("_", peer),
        asn=asns.pop(),
        neighbors=tuple(neighbors),
        prefixes=_prefixes(pools, inputs.cluster),
        communities=_communities(inputs.cluster),
        announced=_by_version(announced),
        max_prefixes=max_prefixes,
    )


def render(config: TorConfig, dialect: str) -> str:
    """The text for that kind of router. Raises KeyError for one we do not know."""
    if dialect not in DIALECTS:
        raise KeyError(dialect)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cymric.model.tor"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - plain text; every value is an address, a number or checked
    )
    return environment.get_template(f"{dialect}.j2").render(tor=config)


def _prefixes(pools: Iterable[IPPool], cluster: BGPConfigurationSpec) -> dict[int, tuple[str, ...]]:
    services = chain(
        cluster.service_cluster_ips, cluster.service_external_ips, cluster.service_load_balancer_ips
    )
    networks = {pool.spec.network for pool in pools if not pool.spec.disable_bgp_export}
    networks |= {parse_network(block.cidr) for block in services}
    return _by_version(networks)


def _by_version(networks: Iterable[Network]) -> dict[int, tuple[str, ...]]:
    known = set(networks)
    return {
        version: tuple(
            str(network)
            for network in sorted(
                (each for each in known if each.version == version),
                key=lambda each: (int(each.network_address), each.prefixlen),
            )
        )
        for version in (4, 6)
    }


def _communities(cluster: BGPConfigurationSpec) -> tuple[str, ...]:
    value_by_name = {named.name: named.value for named in cluster.communities}
    used = chain.from_iterable(each.communities for each in cluster.prefix_advertisements)
    return tuple(sorted({_UNSAFE.sub("_", value_by_name.get(text, text)) for text in used}))


def _mark(ref: str) -> str:
    """Stands where the password goes."""
    return f"PASSWORD-OF-{_UNSAFE.sub('_', ref)}"
