"""A session, and all sessions of a node: what the expansion of peers ends in.

A session is named by the text of the peer's address (`Session.key`): that is all a BGP speaker's
events say of a peer. So there is one session per address; a second one to another port of the same
address is reported as unsupported, not merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cymric.model.bfd import BfdParameters
from cymric.model.net import Address

DEFAULT_RESTART_TIME_S = 120
"""The graceful restart time Calico's BIRD offers."""
DEFAULT_HOLD_TIME_S = 240
"""The hold time Calico's BIRD offers; the lower of both sides' counts (RFC 4271 §4.2)."""
ANNOTATION_PREFIX = "cymric.io/"
"""Settings for which Calico has no field."""


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


@dataclass(frozen=True, slots=True)
class PasswordRef:
    """Where the password of a session is kept; never the password itself."""

    name: str
    key: str

    def __str__(self) -> str:
        return f"{self.name}/{self.key}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One BGP session of this node, all that speaker and daemon need to know of it.

    `local_asn` is the AS we present. `restart_time_s` is the graceful restart time we offer, 0
    none. `is_passive`: we wait for the peer to connect. `peer_node` names the Cymric or Calico node
    behind the address, if any, and `bgp_peer` the BGPPeer that asked for the session.
    `ttl_security` is the greatest number of hops to the peer under RFC 5082, 0 off.
    `is_source_fixed`: connections leave from `local_address`, not from what the kernel picks.
    `cluster_id` is this node's when it is a route reflector (RFC 4456); `is_reflector_client`: the
    peer is then its client. `max_prefixes` limits what the peer may announce, None: the default.
    `bfd`: how BFD (RFC 5880) watches the peer, None: not at all; `is_bfd_unclear`: what was asked
    for makes no sense.
    `allowed_own_asns`: how often our AS may stand in a received path. `reachable_by`: the gateway
    towards the peer. `filters` are names of BGPFilters, in order. `annotations` holds the
    `cymric.io/` ones of the BGPPeer, or of the cluster's BGPConfiguration for the mesh.
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
    bgp_peer: str = ""
    hold_time_s: int = DEFAULT_HOLD_TIME_S
    ttl_security: int = 0
    is_source_fixed: bool = True
    next_hop_mode: NextHopMode = NextHopMode.AUTO
    max_prefixes: int | None = None
    bfd: BfdParameters | None = None
    is_bfd_unclear: bool = False
    cluster_id: str = ""
    is_reflector_client: bool = False
    allowed_own_asns: int = 0
    reachable_by: Address | None = None
    filters: tuple[str, ...] = ()
    password: PasswordRef | None = None
    annotations: Mapping[str, str] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> str:
        """What speaker and status call this session."""
        return str(self.peer_address)

    @property
    def is_ibgp(self) -> bool:
        """Whether both sides are of one AS."""
        return self.peer_asn == self.local_asn

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.peer_address.version

    @property
    def family(self) -> str:
        """The one address family spoken: that of the addresses, as Calico has it."""
        return f"ipv{self.version} unicast"


@dataclass(frozen=True, slots=True)
class Peering:
    """All sessions of one node, by peer address, and the peers that cannot be honoured, why.

    `listen` holds the addresses to wait for peers on. `ignored_interfaces` are patterns of
    interfaces whose networks routing must not look at. `problems` are wishes that are left out of a
    session that is there all the same, by the BGPPeer's name.
    """

    sessions: tuple[Session, ...]
    unsupported: Mapping[str, str]
    listen: tuple[str, ...] = ()
    ignored_interfaces: tuple[str, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
