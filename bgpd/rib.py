"""The routing tables of RFC 4271 §3.2: what each peer sent, and what we chose from it.

    RoutesReceived ▶ Adj-RIB-In (one per peer) ▶ import policy ▶ decision ▶ Loc-RIB ▶ fib

Receiving only notes: a path is stored and its prefix marked dirty. `settle` then judges and decides
every dirty prefix anew from what is known now, so the order of arrival leaves no trace.

Invariants
- Rejected paths stay in Adj-RIB-In with their reason: a change of policy needs no route refresh.
- A stale path (RFC 4724 §4.2) is used as any other until it is swept.
- The Loc-RIB holds exactly the prefixes for which some accepted path exists, once settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from bgpd.decision import Choice, Path, Peer, best
from cymric.model.net import Network


class Rejection(StrEnum):
    """Why a received path is not used, in the words shown to people and in metrics."""

    LOOP = "own AS in the path"
    OWN_ORIGINATOR = "originated by this node"
    NEXT_HOP_IS_OURS = "next hop is this node"
    NEXT_HOP_UNUSABLE = "next hop is no usable address"
    DEFAULT_ROUTE = "default route"
    MARTIAN = "prefix is never routed"
    OUTSIDE_POOLS = "outside pools and service ranges"
    INSIDE_OWN_BLOCK = "inside a block of this node"
    NOT_BORROWED = "address in a block of this node, not borrowed by the announcing node"
    LOCAL_WORKLOAD = "address of a workload on this node"


Judge = Callable[[Path], Rejection | None]
"""The import policy: why not, or None to accept."""


@dataclass(slots=True)
class AdjRibIn:
    """Everything one peer has announced and not withdrawn."""

    paths: dict[Network, Path] = field(default_factory=dict)
    stale: set[Network] = field(default_factory=set)
    rejected: dict[Network, Rejection] = field(default_factory=dict)

    @property
    def accepted(self) -> int:
        """How many paths take part in the decision."""
        return len(self.paths) - len(self.rejected)

    def rejections(self) -> Mapping[Rejection, int]:
        """How many paths are unused, by reason."""
        return Counter(self.rejected.values())

    def remove(self, prefix: Network) -> bool:
        """Forget one path; False if there was none."""
        self.stale.discard(prefix)
        self.rejected.pop(prefix, None)
        return self.paths.pop(prefix, None) is not None


class Rib:
    """All Adj-RIB-In and the Loc-RIB. Peers are named by the text of their address."""

    def __init__(self, *, max_prefixes_per_peer: int = 100_000) -> None:
        self.adj_ribs_in: dict[str, AdjRibIn] = {}
        self.loc_rib: dict[Network, Choice] = {}
        self.over_limit: Counter[str] = Counter()
        self._max_prefixes = max_prefixes_per_peer
        self._dirty: set[Network] = set()

    @property
    def is_dirty(self) -> bool:
        """Whether there is something to settle."""
        return bool(self._dirty)

    def receive(
        self, peer: str, announced: Iterable[Path] = (), withdrawn: Iterable[Network] = ()
    ) -> None:
        """One UPDATE: withdrawals first (RFC 4271 §4.3), then announcements, which replace.

        Beyond the limit per peer new prefixes are not even stored, only counted (`over_limit`).
        """
        table = self.adj_ribs_in.setdefault(peer, AdjRibIn())
        for prefix in withdrawn:
            if table.remove(prefix):
                self._dirty.add(prefix)
        for path in announced:
            prefix = path.prefix
            before = table.paths.get(prefix)
            if before is None and len(table.paths) >= self._max_prefixes:
                self.over_limit[peer] += 1
                continue
            table.stale.discard(prefix)
            if before != path:
                table.paths[prefix] = path
                self._dirty.add(prefix)

    def mark_stale(self, peer: str) -> None:
        """All paths of the peer are unconfirmed until announced again."""
        table = self.adj_ribs_in.get(peer)
        if table is not None:
            table.stale |= table.paths.keys()

    def sweep(self, peer: str) -> int:
        """Remove what was marked and not announced since; how many paths that were."""
        table = self.adj_ribs_in.get(peer)
        return 0 if table is None else self._remove(table, tuple(table.stale))

    def drop(self, peer: str) -> int:
        """Remove everything the peer announced; how many paths that were."""
        table = self.adj_ribs_in.pop(peer, None)
        self.over_limit.pop(peer, None)
        return 0 if table is None else self._remove(table, tuple(table.paths))

    def name_peer(self, name: str, peer: Peer) -> None:
        """Paths of `name` are from `peer` now; settles them again where that is news."""
        table = self.adj_ribs_in.get(name)
        if table is None:
            return
        for prefix, path in tuple(table.paths.items()):
            if path.peer != peer:
                table.paths[prefix] = replace(path, peer=peer)
                self._dirty.add(prefix)

    def peers_below_limit(self) -> tuple[str, ...]:
        """Peers that were cut short and now have room: their rest should be asked for again."""
        roomy = tuple(
            name
            for name in self.over_limit
            if len(self.adj_ribs_in[name].paths) < 0.9 * self._max_prefixes
        )
        for name in roomy:
            del self.over_limit[name]
        return roomy

    def judge_again(self) -> None:
        """The policy changed: settle every prefix at the next occasion."""
        for table in self.adj_ribs_in.values():
            self._dirty |= table.paths.keys()

    def settle(self, judge: Judge) -> frozenset[Network]:
        """Judge and decide all dirty prefixes; the prefixes whose choice changed."""
        dirty, self._dirty = self._dirty, set()
        changed = set()
        for prefix in dirty:
            candidates = self._accepted(prefix, judge)
            before = self.loc_rib.get(prefix)
            if candidates:
                after = best(candidates)
                self.loc_rib[prefix] = after
                is_changed = before is None or before.path != after.path
            else:
                is_changed = self.loc_rib.pop(prefix, None) is not None
            if is_changed:
                changed.add(prefix)
        return frozenset(changed)

    def candidates(self, prefix: Network) -> Sequence[tuple[Path, Rejection | None, bool]]:
        """Every path to the prefix, why it was rejected (if so), and whether it is stale."""
        return [
            (table.paths[prefix], table.rejected.get(prefix), prefix in table.stale)
            for table in self.adj_ribs_in.values()
            if prefix in table.paths
        ]

    def _accepted(self, prefix: Network, judge: Judge) -> list[Path]:
        accepted = []
        for table in self.adj_ribs_in.values():
            path = table.paths.get(prefix)
            if path is None:
                continue
            rejection = judge(path)
            if rejection is None:
                if table.rejected:
                    table.rejected.pop(prefix, None)
                accepted.append(path)
            else:
                table.rejected[prefix] = rejection
        return accepted

    def _remove(self, table: AdjRibIn, prefixes: Sequence[Network]) -> int:
        for prefix in prefixes:
            table.remove(prefix)
        self._dirty.update(prefixes)
        return len(prefixes)
