"""Route reflection: a node with a cluster ID passes iBGP paths on to iBGP peers (RFC 4456). Pure.

    Loc-RIB ▶ may_reflect ▶ reflected ▶ Adj-RIB-Out of an iBGP peer
    Adj-RIB-In ▶ has_looped ▶ rejected

Without reflection iBGP needs a session between any two nodes, because what came over iBGP is never
passed on over iBGP. A reflector passes it on, to clients everything, to others what clients said,
and marks it so that it never returns: ORIGINATOR_ID names the node where the path entered the AS,
CLUSTER_LIST the reflectors on the way. The next hop and all else stay as they are.

A peer is a client if the session is iBGP, this node has a cluster ID, and the peer's own is another
or none. Reflectors of one cluster ID are thereby no clients of each other, and the cluster ID in
the list keeps them from taking each other's copies.

Source: RFC 4456 §6, §8; the rule for clients is Calico's.
"""

from __future__ import annotations

from dataclasses import replace

from bgpd.announcement import PathAttributes
from bgpd.decision import Path


def is_client(*, own_cluster_id: str, peer_cluster_id: str, is_ibgp: bool) -> bool:
    """Whether we reflect for that peer as for a client."""
    return bool(own_cluster_id) and is_ibgp and peer_cluster_id != own_cluster_id


def may_reflect(path: Path, *, cluster_id: str, is_to_client: bool) -> bool:
    """Whether a path learned over iBGP goes on to an iBGP peer (RFC 4456 §6)."""
    return bool(cluster_id) and (path.peer.is_client or is_to_client)


def reflected(path: Path, *, cluster_id: str) -> PathAttributes | None:
    """The attributes with the marks of RFC 4456 §8; None if nobody knows the originator."""
    attributes = path.attributes
    router_id = path.peer.router_id
    originator = attributes.originator_id or (str(router_id) if router_id is not None else None)
    if originator is None:
        return None
    cluster_list = (cluster_id, *attributes.cluster_list)
    return replace(attributes, originator_id=originator, cluster_list=cluster_list)


def has_looped(path: Path, *, cluster_id: str) -> bool:
    """Whether this cluster reflected the path before (RFC 4456 §8)."""
    return bool(cluster_id) and path.peer.is_ibgp and cluster_id in path.attributes.cluster_list
