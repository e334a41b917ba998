"""The Adj-RIB-Out: what one peer is to hear, of our own routes and of those we learned. Pure.

    local routes (exports) ─┬▶ filters of the session ▶ default policy ▶ announcement
    Loc-RIB choices ────────┘

Our own routes go to everybody. A learned route goes on

- to another AS: with our AS in front, next hop ourselves (or, where both are our neighbours, as it
  was), without LOCAL_PREF and the reflectors' marks, and with a MED so that a router which hears
  the owner as well prefers the owner;
- from another AS to iBGP peers: with our LOCAL_PREF for it, next hop unchanged;
- from iBGP to iBGP: only by a route reflector, with its marks, all else unchanged;

never back to the peer it came from, and only inside exported pools (a reflector also inside the
ranges of load balancers), never inside our own blocks. `nextHopMode` overrides the next hop.
NO_ADVERTISE and NO_EXPORT are honoured. A filter that accepts skips the default policy and the
communities of `prefixAdvertisements`.

What is said of a path is worked out once for all prefixes that share it.

Source: Calico 3.32's export filter; RFC 4271 §5.1, §9.2; RFC 4456 §8; RFC 1997 (well-known
communities); RFC 4360 §6 (extended communities that do not leave an AS).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from bgpd.announcement import Announcement, PathAttributes, SegmentKind
from bgpd.decision import Choice, Path
from bgpd.exports import LOCAL_PREF, Local
from bgpd.filters import NO_RULES, Candidate, Changes, Rules, prepended
from bgpd.reflection import may_reflect, reflected
from bgpd.rib import Settled
from cymric.model.net import Network, parse_network
from cymric.model.peering import NextHopMode, Session
from cymric.model.prefix import PrefixSet
from cymric.model.resources import BGPConfiguration, parse_community

NO_EXPORT = (65535, 65281)
NO_ADVERTISE = (65535, 65282)
REPEATED_MED = 100
"""The MED of routes that we pass on to another AS; our own carry none, which counts as 0."""

_NOT_TRANSITIVE = 1 << 62  # in the type octet of an extended community (RFC 4360 §2)


@dataclass(frozen=True, slots=True)
class Advertisement:
    """Communities for all routes inside a prefix: one of `prefixAdvertisements`."""

    inside: PrefixSet
    communities: tuple[tuple[int, int], ...] = ()
    large_communities: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPolicy:
    """What decides the Adj-RIB-Out of one session, apart from the routes themselves.

    `open` and `closed` are pools with and without export, `reflected_ranges` those of load
    balancers if this node is a reflector, `aggregates` our own blocks. `subnet` is the node's own
    network if the peer is in it, too.
    """

    session: Session
    rules: Rules = NO_RULES
    open: PrefixSet = field(default_factory=lambda: PrefixSet.of(()))
    closed: PrefixSet = field(default_factory=lambda: PrefixSet.of(()))
    reflected_ranges: PrefixSet = field(default_factory=lambda: PrefixSet.of(()))
    aggregates: PrefixSet = field(default_factory=lambda: PrefixSet.of(()))
    advertisements: tuple[Advertisement, ...] = ()
    local_pref: int = LOCAL_PREF
    subnet: Network | None = None


class Exporter:
    """Asks the policy of one session, and remembers what it said of paths and which it passed on.

    `whole` works everything out; `changes` follows from there.
    """

    def __init__(self, policy: ExportPolicy) -> None:
        self._policy = policy
        self._session = policy.session
        self._said: dict[int, tuple[Path, PathAttributes | None]] = {}
        self._passing_on: set[Network] = set()

    def whole(
        self, local: Mapping[Network, Local], loc_rib: Mapping[Network, Choice]
    ) -> dict[str, Announcement]:
        """All the peer is to hear, by prefix. A route of our own goes before a learned one."""
        self._said.clear()
        wanted: dict[str, Announcement] = {}
        for prefix, own in local.items():
            announcement = self.announcement(prefix, own, loc_rib.get(prefix))
            if announcement is not None:
                wanted[announcement.prefix] = announcement
        self._passing_on.clear()
        for prefix, choice in loc_rib.items():
            if prefix in local or not self.is_passed_on(choice.path):
                continue
            announcement = self.announcement(prefix, None, choice)
            if announcement is not None:
                wanted[announcement.prefix] = announcement
                self._passing_on.add(prefix)
        return wanted

    def changes(
        self,
        settled: Settled,
        local: Mapping[Network, Local],
        loc_rib: Mapping[Network, Choice],
        told: Mapping[str, Announcement],
    ) -> dict[str, Announcement | None]:
        """What the peer should be told after these choices, as far as it differs; None: withdrawn.

        Most paths go to no other peer at all; then nothing is asked prefix by prefix.
        """
        self._said.clear()  # paths that are gone should not be kept
        news: dict[str, Announcement | None] = {}
        for choice, prefixes in settled.groups:
            if choice is not None and self.is_passed_on(choice.path):
                asked: Collection[Network] = prefixes
            else:
                asked = self._known(prefixes, local)
            for prefix in asked:
                announcement = self.announcement(prefix, local.get(prefix), loc_rib.get(prefix))
                text = str(prefix)
                if announcement is None:
                    self._passing_on.discard(prefix)
                    if text in told:
                        news[text] = None
                    continue
                if prefix not in local:
                    self._passing_on.add(prefix)
                if told.get(text) != announcement:
                    news[text] = announcement
        return news

    def _known(
        self, prefixes: Collection[Network], local: Mapping[Network, Local]
    ) -> Collection[Network]:
        """Those of the prefixes that the peer heard of as learned, or hears of as ours."""
        if len(prefixes) > len(local):
            own = [prefix for prefix in local if prefix in prefixes]
        else:
            own = [prefix for prefix in prefixes if prefix in local]
        return self._passing_on.intersection(prefixes).union(own) if self._passing_on else own

    def is_passed_on(self, path: Path) -> bool:
        """Whether the peer may hear of the path, whatever its prefix."""
        known = self._said.get(id(path))
        if known is None:
            known = self._said[id(path)] = path, self._passed_on(path)
        return known[1] is not None

    def announcement(
        self, prefix: Network, local: Local | None, choice: Choice | None
    ) -> Announcement | None:
        """What the peer is to hear of the prefix; None: nothing."""
        if prefix.version != self._session.version:
            return None
        if local is not None:
            own = self._own(prefix, local)
            if own is not None:
                return own
        return None if choice is None else self._learned(prefix, choice.path)

    def _own(self, prefix: Network, local: Local) -> Announcement | None:
        policy = self._policy
        attributes = PathAttributes()
        if policy.rules:
            verdict = policy.rules.judge(
                Candidate(
                    prefix=prefix,
                    attributes=attributes,
                    local_pref=policy.local_pref,
                    is_learned=False,
                    interface=local.interface,
                )
            )
            if verdict == "reject":
                return None
            if verdict is not None:
                return self._accepted(prefix, attributes, verdict, policy.local_pref, None)
        if local.why is None:
            return None
        attributes = self._with_communities(prefix, attributes)
        return self._finished(prefix, attributes, policy.local_pref, None)

    def _learned(self, prefix: Network, path: Path) -> Announcement | None:
        if not self.is_passed_on(path):
            return None
        attributes = self._said[id(path)][1]
        assert attributes is not None
        policy = self._policy
        if policy.rules:
            verdict = policy.rules.judge(
                Candidate(
                    prefix=prefix,
                    attributes=path.attributes,
                    local_pref=path.local_pref,
                    is_learned=True,
                )
            )
            if verdict == "reject":
                return None
            if verdict is not None:
                return self._accepted(prefix, attributes, verdict, path.local_pref, path)
        if policy.closed.covers(prefix) or policy.aggregates.covers(prefix):
            return None
        if not (policy.open.covers(prefix) or policy.reflected_ranges.covers(prefix)):
            return None
        attributes = self._with_communities(prefix, attributes)
        return self._finished(prefix, attributes, path.local_pref, path)

    def _passed_on(self, path: Path) -> PathAttributes | None:
        """The attributes for others, without what depends on the prefix; None: not for them."""
        session, attributes = self._session, path.attributes
        if path.peer.address == session.peer_address or NO_ADVERTISE in attributes.communities:
            return None
        if any(segment.kind not in _PLAIN for segment in attributes.as_path):
            return None  # of a confederation, which we are none of
        if session.is_ibgp and path.peer.is_ibgp:
            if not may_reflect(
                path, cluster_id=session.cluster_id, is_to_client=session.is_reflector_client
            ):
                return None
            return reflected(path, cluster_id=session.cluster_id)
        attributes = replace(attributes, originator_id=None, cluster_list=())
        if session.is_ibgp:
            return attributes
        if NO_EXPORT in attributes.communities:
            return None
        extended = tuple(c for c in attributes.extended_communities if not c & _NOT_TRANSITIVE)
        return replace(attributes, med=REPEATED_MED, extended_communities=extended)

    def _accepted(
        self,
        prefix: Network,
        attributes: PathAttributes,
        changes: Changes,
        local_pref: int,
        path: Path | None,
    ) -> Announcement:
        """As an export filter lets it out."""
        if changes.local_pref is not None:
            local_pref = changes.local_pref
        return self._finished(prefix, changes.apply(attributes), local_pref, path)

    def _finished(
        self, prefix: Network, attributes: PathAttributes, local_pref: int, path: Path | None
    ) -> Announcement:
        session = self._session
        if session.is_ibgp:
            if attributes.local_pref != local_pref:
                attributes = replace(attributes, local_pref=local_pref)
        elif attributes.as_path:
            # An empty path is left to the speaker, which puts our AS there.
            as_path = prepended(attributes.as_path, (session.local_asn,))
            attributes = replace(attributes, as_path=as_path, local_pref=None)
        elif attributes.local_pref is not None:
            attributes = replace(attributes, local_pref=None)
        return Announcement(str(prefix), self._next_hop(path), attributes)

    def _next_hop(self, path: Path | None) -> str:
        session = self._session
        if path is None or not self._keeps_next_hop(path):
            return str(session.local_address)
        return str(path.next_hop)

    def _keeps_next_hop(self, path: Path) -> bool:
        """Whether the peer is told the next hop of a learned path (RFC 4271 §5.1.3)."""
        session, subnet = self._session, self._policy.subnet
        if session.next_hop_mode is not NextHopMode.AUTO:
            return session.next_hop_mode is NextHopMode.KEEP
        if session.is_ibgp:
            return True
        # A third party: the peer sends straight to it. Never the peer itself.
        hop = path.next_hop
        return subnet is not None and hop in subnet and hop != session.peer_address

    def _with_communities(self, prefix: Network, attributes: PathAttributes) -> PathAttributes:
        for one in self._policy.advertisements:
            if one.inside.covers(prefix):
                changes = Changes(one.communities, one.large_communities)
                attributes = changes.apply(attributes)
        return attributes


_PLAIN = (SegmentKind.SEQUENCE, SegmentKind.SET)


def advertisements(
    cluster: BGPConfiguration | None, node: BGPConfiguration | None
) -> tuple[Advertisement, ...]:
    """`prefixAdvertisements` of the node if it lists any, else of the cluster.

    Names are looked up in `communities` of both, the node's first; one that nobody defined adds
    nothing.
    """
    values = {
        named.name: named.value
        for configuration in (cluster, node)
        if configuration is not None
        for named in configuration.spec.communities
    }
    chosen = next(
        (
            configuration.spec.prefix_advertisements
            for configuration in (node, cluster)
            if configuration is not None and configuration.spec.prefix_advertisements
        ),
        (),
    )
    return tuple(_advertisement(one.cidr, one.communities, values) for one in chosen)


def _advertisement(
    cidr: str, communities: Iterable[str], values: Mapping[str, str]
) -> Advertisement:
    plain: list[tuple[int, int]] = []
    large: list[tuple[int, int, int]] = []
    for word in communities:
        text = values.get(word, word)
        if ":" not in text:
            continue
        match parse_community(text):
            case (high, low):
                plain.append((high, low))
            case (one, two, three):
                large.append((one, two, three))
    return Advertisement(PrefixSet.of([parse_network(cidr)]), tuple(plain), tuple(large))
