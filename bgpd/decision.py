"""Which of several paths to a prefix is used: RFC 4271 §9.1, one function per sentence.

Pure. The result depends on the set of paths only, never on their order: every step keeps the paths
that are not worse than another, and the last step tells any two peers apart.

Paths that must not be considered at all (§9.1.2: loops, unusable next hops) were taken out by the
import policy. Not here: interior cost (§9.1.2.2 e), because nodes have no IGP and every next hop
that the kernel takes is directly connected; several equal paths at once (ECMP), whose place is
`Choice`.

Source: RFC 4271 §9.1.1, §9.1.2.2; RFC 4456 §9 for reflected paths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bgpd.speaker import Origin, PathAttributes
from cymric.model.net import Address, Network

DEFAULT_LOCAL_PREF = 100
"""For paths from eBGP, and iBGP paths that lack the attribute; as BIRD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who sent a path. `node` is the cluster node behind the address, "" for outsiders."""

    address: Address
    asn: int
    local_asn: int
    router_id: Address | None = None
    node: str = ""

    @property
    def is_ibgp(self) -> bool:
        """Whether the session is within one AS."""
        return self.asn == self.local_asn


@dataclass(frozen=True, slots=True)
class Path:
    """One peer's route to one prefix."""

    prefix: Network
    next_hop: Address
    attributes: PathAttributes
    peer: Peer

    @property
    def local_pref(self) -> int:
        """The degree of preference (§9.1.1). What an eBGP peer claims is ignored (§5.1.5)."""
        claimed = self.attributes.local_pref
        return claimed if self.peer.is_ibgp and claimed is not None else DEFAULT_LOCAL_PREF

    @property
    def neighbour_asn(self) -> int:
        """The AS the path came in from (§9.1.2.2 c): first of the path; ours if that is empty."""
        path = self.attributes.as_path
        return path[0].asns[0] if path and path[0].asns else self.peer.local_asn

    @property
    def bgp_identifier(self) -> int:
        """The sender's identifier, or the originator's if the path was reflected (RFC 4456 §9)."""
        if self.peer.is_ibgp and self.attributes.originator_id:
            return _as_number(self.attributes.originator_id)
        return int(self.peer.router_id) if self.peer.router_id is not None else 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The path in use and the name of the step that settled it. Equal paths would go here."""

    path: Path
    settled_by: str


Paths = Sequence[Path]
Step = Callable[[Paths], Paths]
_T = TypeVar("_T", int, bool)


def highest_local_pref(paths: Paths) -> Paths:
    """§9.1.1, §9.1.2: the highest degree of preference."""
    return _keep_lowest(paths, lambda path: -path.local_pref)


def fewest_as_hops(paths: Paths) -> Paths:
    """§9.1.2.2 (a). An AS_SET counts as one hop."""
    return _keep_lowest(paths, lambda path: path.attributes.as_hops)


def lowest_origin(paths: Paths) -> Paths:
    """§9.1.2.2 (b). IGP before EGP before INCOMPLETE."""
    return _keep_lowest(paths, lambda path: _ORIGIN_RANK[path.attributes.origin])


def lowest_med_per_neighbour(paths: Paths) -> Paths:
    """§9.1.2.2 (c). Compared among paths from one neighbouring AS only; none counts as 0."""
    lowest: dict[int, int] = {}
    for path in paths:
        med, asn = path.attributes.med or 0, path.neighbour_asn
        lowest[asn] = min(med, lowest.get(asn, med))
    return [path for path in paths if (path.attributes.med or 0) == lowest[path.neighbour_asn]]


def external_before_internal(paths: Paths) -> Paths:
    """§9.1.2.2 (d). If any path came over eBGP, those over iBGP lose."""
    return _keep_lowest(paths, lambda path: path.peer.is_ibgp)


def lowest_bgp_identifier(paths: Paths) -> Paths:
    """§9.1.2.2 (f); the ORIGINATOR_ID takes the sender's place (RFC 4456 §9)."""
    return _keep_lowest(paths, lambda path: path.bgp_identifier)


def shortest_cluster_list(paths: Paths) -> Paths:
    """RFC 4456 §9. A path that was not reflected has length 0."""
    return _keep_lowest(
        paths, lambda path: len(path.attributes.cluster_list) if path.peer.is_ibgp else 0
    )


def lowest_peer_address(paths: Paths) -> Paths:
    """§9.1.2.2 (g)."""
    return _keep_lowest(paths, lambda path: int(path.peer.address))


STEPS: tuple[Step, ...] = (
    highest_local_pref,
    fewest_as_hops,
    lowest_origin,
    lowest_med_per_neighbour,
    external_before_internal,
    lowest_bgp_identifier,
    shortest_cluster_list,
    lowest_peer_address,
)
ONLY_PATH = "only path"

_ORIGIN_RANK = {Origin.IGP: 0, Origin.EGP: 1, Origin.INCOMPLETE: 2}


def best(paths: Paths) -> Choice:
    """The path to use of at least one, at most one per peer."""
    settled_by = ONLY_PATH
    for step in STEPS:
        if len(paths) == 1:
            break
        paths, settled_by = step(paths), step.__name__
    return Choice(paths[0], settled_by)


def lost_at(paths: Paths) -> dict[Path, str]:
    """For each path that is not used, the name of the step at which it lost (for `why`)."""
    lost: dict[Path, str] = {}
    for step in STEPS:
        if len(paths) < 2:
            break
        kept = step(paths)
        lost |= {path: step.__name__ for path in paths if path not in kept}
        paths = kept
    return lost


def _keep_lowest(paths: Paths, key: Callable[[Path], _T]) -> Paths:
    lowest = min(map(key, paths))
    return [path for path in paths if key(path) == lowest]


def _as_number(dotted: str) -> int:
    number = 0
    for part in dotted.split("."):
        number = number << 8 | int(part)
    return number
