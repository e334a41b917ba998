"""Which of several paths to a prefix is used: RFC 4271 §9.1, one function per sentence.

Pure. The result depends on the set of paths only, never on their order: every step keeps the paths
that are not worse than another, and the last step tells any two peers apart. Paths that are equal
up to the last steps, which only break ties, are used together (ECMP), up to a limit.

Paths that must not be considered at all (§9.1.2: loops, unusable next hops) were taken out by the
import policy. Not here: interior cost (§9.1.2.2 e), because nodes have no IGP.

A `Path` is shared by all prefixes of the UPDATE that brought it, so whatever is worked out from a
path alone is worked out once for hundreds of prefixes.

Source: RFC 4271 §9.1.1, §9.1.2.2; RFC 4456 §9 for reflected paths; RFC 8326 §4 for
GRACEFUL_SHUTDOWN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bgpd.announcement import Origin, PathAttributes
from cymric.model.net import Address

DEFAULT_LOCAL_PREF = 100
"""For paths from eBGP, and iBGP paths that lack the attribute; as BIRD."""
DEFAULT_MAX_PATHS = 16
"""How many equal paths share the traffic, unless configured; as BIRD."""
GRACEFUL_SHUTDOWN = (65535, 0)
"""RFC 8326: the sender is about to go away, use it only if there is no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who sent a path. `node` is the cluster node behind the address, "" for outsiders.

    `is_client`: we are a route reflector and the peer is one of our clients (RFC 4456 §4).
    `allowed_own_asns`: how often our AS may stand in its paths.
    """

    address: Address
    asn: int
    local_asn: int
    router_id: Address | None = None
    node: str = ""
    is_client: bool = False
    allowed_own_asns: int = 0

    @property
    def is_ibgp(self) -> bool:
        """Whether the session is within one AS."""
        return self.asn == self.local_asn


@dataclass(frozen=True, slots=True)
class Path:
    """What one peer says of the way to some prefixes: those of one UPDATE share it.

    `preference` is a degree of preference that an import filter set.
    """

    next_hop: Address
    attributes: PathAttributes
    peer: Peer
    preference: int | None = None

    @property
    def local_pref(self) -> int:
        """The degree of preference (§9.1.1). What an eBGP peer claims is ignored (§5.1.5)."""
        if self.preference is not None:
            return self.preference
        if self.is_going_away:
            return 0
        claimed = self.attributes.local_pref
        return claimed if claimed is not None and self.peer.is_ibgp else DEFAULT_LOCAL_PREF

    @property
    def is_going_away(self) -> bool:
        """Whether it is marked GRACEFUL_SHUTDOWN (RFC 8326)."""
        return GRACEFUL_SHUTDOWN in self.attributes.communities

    @property
    def neighbour_asn(self) -> int:
        """The AS the path came in from (§9.1.2.2 c): first of the path; ours if that is empty."""
        path = self.attributes.as_path
        return path[0].asns[0] if path and path[0].asns else self.peer.local_asn

    @property
    def origin_asn(self) -> int:
        """The AS in which the path begins: last of the path; ours if that is empty."""
        path = self.attributes.as_path
        return path[-1].asns[-1] if path and path[-1].asns else self.peer.local_asn

    @property
    def bgp_identifier(self) -> int:
        """The sender's identifier, or the originator's if the path was reflected (RFC 4456 §9)."""
        if self.peer.is_ibgp and self.attributes.originator_id:
            return _as_number(self.attributes.originator_id)
        return int(self.peer.router_id) if self.peer.router_id is not None else 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The best path, the name of the step that settled it, and all paths that share the traffic.

    `used` begins with the best path; each has a next hop of its own.
    """

    path: Path
    settled_by: str
    used: tuple[Path, ...] = ()

    @property
    def next_hops(self) -> tuple[Address, ...]:
        """Where the traffic goes."""
        return tuple(path.next_hop for path in self.used) or (self.path.next_hop,)


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


PREFERENCES: tuple[Step, ...] = (
    highest_local_pref,
    fewest_as_hops,
    lowest_origin,
    lowest_med_per_neighbour,
    external_before_internal,
)
"""The steps that say one path is better; what is left after them may share the traffic."""
TIE_BREAKS: tuple[Step, ...] = (lowest_bgp_identifier, shortest_cluster_list, lowest_peer_address)
STEPS = PREFERENCES + TIE_BREAKS
ONLY_PATH = "only path"

_ORIGIN_RANK = {Origin.IGP: 0, Origin.EGP: 1, Origin.INCOMPLETE: 2}


def best(paths: Paths, *, max_paths: int = 1) -> Choice:
    """The path to use of at least one, at most one per peer; with it up to `max_paths` equals."""
    if len(paths) == 1:
        return Choice(paths[0], ONLY_PATH)
    settled_by = ONLY_PATH
    equals: Paths = ()
    for step in STEPS:
        if step is TIE_BREAKS[0]:
            equals = paths
        if len(paths) == 1:
            break
        paths, settled_by = step(paths), step.__name__
    chosen = paths[0]
    if max_paths > 1 and len(equals) > 1:
        return Choice(chosen, settled_by, _sharing(equals, max_paths))
    return Choice(chosen, settled_by)


def lost_at(paths: Paths) -> dict[Path, str]:
    """For each path that is not the best, the name of the step at which it lost (for `why`)."""
    lost: dict[Path, str] = {}
    for step in STEPS:
        if len(paths) < 2:
            break
        kept = step(paths)
        lost |= {path: step.__name__ for path in paths if path not in kept}
        paths = kept
    return lost


def _sharing(equals: Paths, limit: int) -> tuple[Path, ...]:
    """The first `limit` in tie-break order that have different next hops; () if that is one."""
    order = sorted(
        equals,
        key=lambda path: (
            path.bgp_identifier,
            len(path.attributes.cluster_list) if path.peer.is_ibgp else 0,
            int(path.peer.address),
        ),
    )
    by_next_hop: dict[Address, Path] = {}
    for path in order:
        by_next_hop.setdefault(path.next_hop, path)
    used = tuple(by_next_hop.values())[:limit]
    return used if len(used) > 1 else ()


def _keep_lowest(paths: Paths, key: Callable[[Path], _T]) -> Paths:
    lowest = min(map(key, paths))
    return [path for path in paths if key(path) == lowest]


def _as_number(dotted: str) -> int:
    number = 0
    for part in dotted.split("."):
        number = number << 8 | int(part)
    return number
