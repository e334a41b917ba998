"""Which BGP sessions a node has: the mesh and the explicit peers, computed purely.

    Node, BGPPeer, BGPConfiguration ▶ PeeringInputs ▶ expansion ▶ Session, Session, …

confd renders the result into the speaker's file and bgpd commands routes by it, so the two cannot
disagree. The rules are Calico 3.32's. What cannot be honoured is returned as `unsupported`, by name
and reason, never dropped in silence, and never becomes a session with less than was asked for.
"""

from cymric.model.peering.expansion import peering_of
from cymric.model.peering.inputs import PeeringInputs
from cymric.model.peering.values import (
    ANNOTATION_PREFIX,
    DEFAULT_HOLD_TIME_S,
    DEFAULT_RESTART_TIME_S,
    NextHopMode,
    PasswordRef,
    Peering,
    PeerType,
    Session,
)

__all__ = [
    "ANNOTATION_PREFIX",
    "DEFAULT_HOLD_TIME_S",
    "DEFAULT_RESTART_TIME_S",
    "NextHopMode",
    "PasswordRef",
    "PeerType",
    "Peering",
    "PeeringInputs",
    "Session",
    "peering_of",
]
