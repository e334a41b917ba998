"""The routing tables of RFC 4271 §3.2: what each peer sent, and what we chose from it.

    RoutesReceived ▶ Adj-RIB-In (one per peer) ▶ import policy ▶ decision ▶ Loc-RIB ▶ fib, exports

Receiving only notes: a path is stored and its prefixes marked dirty. `settle` then judges and
decides every dirty prefix anew from what is known now, so the order of arrival leaves no trace.

All prefixes of one UPDATE share one `Path` object. What follows from the path alone (policy's
opinion of it, the choice where it is the only one) is worked out once per `settle` and object, and
prefixes that are new and have no other path are settled as a group, by operations on whole sets.

Invariants
- Rejected paths stay in Adj-RIB-In with their reason: a change of policy needs no route refresh.
- A stale path (RFC 4724 §4.2) is used as any other until it is swept.
- The Loc-RIB holds exactly the prefixes for which some accepted path exists, once settled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain
from typing import Any, Protocol

from bgpd.decision import ONLY_PATH, Choice, Path, Peer, best
from cymric.model.net import Address, Network
from cymric.model.prefix import prefixes_inside

DEFAULT_MAX_PREFIXES = 100_000
"""How many prefixes a peer may announce, unless configured."""


class Rejection(StrEnum):
    """Why a received path is not used, in the words shown to people and in metrics."""

    LOOP = "own AS in the path"
    OWN_ORIGINATOR = "originated by this node"
    OWN_CLUSTER = "reflected by this node before"
    NEXT_HOP_IS_OURS = "next hop is this node"
    NEXT_HOP_UNUSABLE = "next hop is no usable address"
    NEXT_HOP_UNREACHABLE = "next hop cannot be reached"
    NEXT_HOP_IN_POOL = "next hop is inside a pool"
    DEFAULT_ROUTE = "default route"
    MARTIAN = "prefix is never routed"
    OUTSIDE_POOLS = "outside pools and service ranges"
    INSIDE_OWN_BLOCK = "inside a block of this node"
    NOT_BORROWED = "address in a block of this node, not borrowed by the announcing node"
    NOT_THE_OWNER = "inside a block of a node that did not announce it"
    LOCAL_WORKLOAD = "address of a workload on this node"
    FILTERED = "rejected by a BGPFilter"
    FILTER_MISSING = "a BGPFilter of this peer does not exist"


class Policy(Protocol):
    """The import policy, in two steps so that the first is taken once for many prefixes."""

    def opinion(self, path: Path) -> Rejection | Any:
        """Why the path is of no use to any prefix, or what `judge_prefix` wants to know of it."""

    def judge_prefix(self, prefix: Network, path: Path, opinion: Any) -> Path | Rejection:
        """The path as it takes part in the decision, or why it does not."""


@dataclass(frozen=True, slots=True)
class Settled:
    """What a `settle` changed: prefixes by their new choice; None: no path is left."""

    groups: tuple[tuple[Choice | None, Collection[Network]], ...] = ()

    @property
    def prefixes(self) -> frozenset[Network]:
        """All of them."""
        return frozenset(chain.from_iterable(prefixes for _, prefixes in self.groups))

    def __bool__(self) -> bool:
        return bool(self.groups)


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

    def __init__(self, *, max_prefixes: int = DEFAULT_MAX_PREFIXES) -> None:
        self.adj_ribs_in: dict[str, AdjRibIn] = {}
        self.loc_rib: dict[Network, Choice] = {}
        self.over_limit: Counter[str] = Counter()
        self.max_prefixes = max_prefixes
        self.max_prefixes_by_peer: Mapping[str, int] = {}
        self._dirty: set[Network] = set()
        self._new: list[tuple[AdjRibIn, Path, set[Network]]] = []
        self._policy: Policy | None = None

    @property
    def is_dirty(self) -> bool:
        """Whether there is something to settle."""
        return bool(self._dirty or self._new)

    def limit(self, peer: str) -> int:
        """How many prefixes the peer may announce."""
        return self.max_prefixes_by_peer.get(peer, self.max_prefixes)

    def receive(
        self,
        peer: str,
        announced: Iterable[tuple[Path, Sequence[Network]]] = (),
        withdrawn: Iterable[Network] = (),
    ) -> None:
        """One UPDATE: withdrawals first (RFC 4271 §4.3), then announcements, which replace.

        Beyond the limit per peer new prefixes are not even stored, only counted (`over_limit`).
        """
        table = self.adj_ribs_in.setdefault(peer, AdjRibIn())
        for prefix in withdrawn:
            if table.remove(prefix):
                self._dirty.add(prefix)
        for path, prefixes in announced:
            if len(prefixes) > 1:
                prefixes = self._receive_new(peer, table, path, prefixes)
            for prefix in prefixes:
                before = table.paths.get(prefix)
                if before is None and len(table.paths) >= self.limit(peer):
                    self.over_limit[peer] += 1
                    continue
                if table.stale:
                    table.stale.discard(prefix)
                if before != path:
                    table.paths[prefix] = path
                    self._dirty.add(prefix)

    def _receive_new(
        self, peer: str, table: AdjRibIn, path: Path, prefixes: Sequence[Network]
    ) -> Sequence[Network]:
        """Store what the peer had not announced before, all at once; returns the rest."""
        group = dict.fromkeys(prefixes, path)
        # Not difference_update, which walks the whole table.
        fresh = set(group).difference(table.paths)
        if len(fresh) != len(group) or len(table.paths) + len(group) > self.limit(peer):
            return prefixes
        # From dictionary to dictionary and set, kept hashes go along: no call per prefix.
        table.paths.update(group)
        self._new.append((table, path, fresh))
        return ()

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
        renamed: dict[int, tuple[Path, Path]] = {}
        for prefix, path in tuple(table.paths.items()):
            if path.peer != peer:
                if id(path) not in renamed:
                    renamed[id(path)] = path, replace(path, peer=peer)
                table.paths[prefix] = renamed[id(path)][1]
                self._dirty.add(prefix)

    def judge_again(self) -> None:
        """The policy changed: settle every prefix at the next occasion."""
        for table in self.adj_ribs_in.values():
            self._dirty.update(table.paths)

    def judge_again_inside(self, networks: Iterable[Network]) -> None:
        """The policy changed for these networks and all prefixes inside them."""
        for network in networks:
            bits = network.max_prefixlen - network.prefixlen
            for table in self.adj_ribs_in.values():
                if 2 << bits <= len(table.paths):
                    inside = prefixes_inside(network)
                    self._dirty.update(prefix for prefix in inside if prefix in table.paths)
                else:
                    number = int(network.network_address) >> bits
                    self._dirty.update(
                        prefix
                        for prefix in table.paths
                        if prefix.version == network.version
                        and prefix.prefixlen >= network.prefixlen
                        and int(prefix.network_address) >> bits == number
                    )

    def next_hops(self) -> frozenset[Address]:
        """Every next hop of any path."""
        return frozenset(
            path.next_hop
            for table in self.adj_ribs_in.values()
            for path in {id(path): path for path in table.paths.values()}.values()
        )

    def judge_again_through(self, hops: Collection[Address]) -> None:
        """The policy changed for paths with these next hops."""
        for table in self.adj_ribs_in.values():
            self._dirty.update(p for p, path in table.paths.items() if path.next_hop in hops)

    def settle(self, policy: Policy, *, max_paths: int = 1) -> Settled:
        """Judge and decide all dirty prefixes; the prefixes whose choice changed."""
        self._policy = policy
        opinions: dict[int, Any] = {}  # by path object: all of them are held in tables meanwhile
        groups = self._settle_new(policy, opinions)
        dirty, self._dirty = self._dirty, set()
        changed: dict[int, tuple[Choice | None, list[Network]]] = {}
        only: dict[int, Choice] = {}  # a choice holds its path
        tables = tuple(self.adj_ribs_in.values())
        loc_rib = self.loc_rib
        for prefix in dirty:
            candidates: list[Path] = []
            for table in tables:
                path = table.paths.get(prefix)
                if path is None:
                    continue
                opinion = opinions.get(id(path))
                if opinion is None:
                    opinion = opinions[id(path)] = policy.opinion(path)
                verdict = (
                    opinion
                    if isinstance(opinion, Rejection)
                    else policy.judge_prefix(prefix, path, opinion)
                )
                if isinstance(verdict, Rejection):
                    table.rejected[prefix] = verdict
                else:
                    if table.rejected:
                        table.rejected.pop(prefix, None)
                    candidates.append(verdict)
            before, after = loc_rib.get(prefix), None
            if len(candidates) > 1:
                after = best(candidates, max_paths=max_paths)
            elif candidates:
                after = only.get(id(candidates[0]))
                if after is None:
                    after = only[id(candidates[0])] = Choice(candidates[0], ONLY_PATH)
            if after is None:
                if before is None:
                    continue
                del loc_rib[prefix]
            else:
                loc_rib[prefix] = after
                if before is not None and before.path == after.path and before.used == after.used:
                    continue
            group = changed.get(id(after))
            if group is None:
                changed[id(after)] = after, [prefix]
            else:
                group[1].append(prefix)
        return Settled((*groups, *changed.values()))

    def _settle_new(
        self, policy: Policy, opinions: dict[int, Any]
    ) -> list[tuple[Choice | None, set[Network]]]:
        """Prefixes that came together and that nobody else has; the others become dirty."""
        groups: list[tuple[Choice | None, set[Network]]] = []
        new, self._new = self._new, []
        for table, path, prefixes in new:
            alone = prefixes.difference(self._dirty).difference(self.loc_rib)
            for other in self.adj_ribs_in.values():
                if other is not table:
                    alone = alone.difference(other.paths)
            if len(alone) != len(prefixes):
                self._dirty |= prefixes - alone
            opinion = opinions[id(path)] = policy.opinion(path)
            if isinstance(opinion, Rejection):
                table.rejected.update(dict.fromkeys(alone, opinion))
                continue
            judged: dict[int, tuple[Choice | None, set[Network]]] = {}
            for prefix in alone:
                verdict = policy.judge_prefix(prefix, path, opinion)
                if verdict is path:
                    continue
                if isinstance(verdict, Rejection):
                    table.rejected[prefix] = verdict
                    judged.setdefault(0, (None, set()))[1].add(prefix)
                else:
                    choice = Choice(verdict, ONLY_PATH)
                    judged.setdefault(id(verdict), (choice, set()))[1].add(prefix)
            for choice_or_none, some in judged.values():
                alone -= some
                if choice_or_none is not None:
                    self.loc_rib.update(dict.fromkeys(some, choice_or_none))
                    groups.append((choice_or_none, some))
            if alone:
                choice = Choice(path, ONLY_PATH)
                self.loc_rib.update(dict.fromkeys(alone, choice))
                groups.append((choice, alone))
        return groups

    def candidates(self, prefix: Network) -> Sequence[tuple[Path, Rejection | None, bool]]:
        """Every path to the prefix, why it was rejected (if so), and whether it is stale.

        An accepted path is shown as import filters made it.
        """
        found = []
        for table in self.adj_ribs_in.values():
            path = table.paths.get(prefix)
            if path is None:
                continue
            rejection = table.rejected.get(prefix)
            if rejection is None and self._policy is not None:
                opinion = self._policy.opinion(path)
                if not isinstance(opinion, Rejection):
                    verdict = self._policy.judge_prefix(prefix, path, opinion)
                    path = path if isinstance(verdict, Rejection) else verdict
            found.append((path, rejection, prefix in table.stale))
        return found

    def _remove(self, table: AdjRibIn, prefixes: Sequence[Network]) -> int:
        for prefix in prefixes:
            table.remove(prefix)
        self._dirty.update(prefixes)
        return len(prefixes)
