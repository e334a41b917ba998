"""What an UPDATE says of a route: its prefix, next hop and path attributes. Pure values.

Place in the flow: the speaker's events carry them in, the routing tables keep them as they came,
and `advertise` carries them out. They are compared, hashed and shared by all prefixes of an UPDATE.

Source: RFC 4271 §4.3 and §5 (attributes), RFC 5065 (confederations), RFC 8092 (large communities).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

IPV4_UNICAST = "ipv4 unicast"
IPV6_UNICAST = "ipv6 unicast"


class Origin(StrEnum):
    """RFC 4271 §5.1.1, in order of preference."""

    IGP = "igp"
    EGP = "egp"
    INCOMPLETE = "incomplete"


class SegmentKind(StrEnum):
    """The kinds of AS_PATH segment: RFC 4271 §4.3 b, RFC 5065 §3 for confederations."""

    SEQUENCE = "as-sequence"
    SET = "as-set"
    CONFED_SEQUENCE = "as-confed-sequence"
    CONFED_SET = "as-confed-set"


@dataclass(frozen=True, slots=True)
class AsPathSegment:
    """One segment of an AS_PATH."""

    kind: SegmentKind
    asns: tuple[int, ...]


def as_sequence(*asns: int) -> tuple[AsPathSegment, ...]:
    """The usual AS_PATH: one sequence, nearest AS first; empty without ASes."""
    return (AsPathSegment(SegmentKind.SEQUENCE, asns),) if asns else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PathAttributes:
    """What an UPDATE says about its prefixes besides the next hop. None: not present.

    For a route we advertise, `as_path` empty lets the speaker do what RFC 4271 §5.1.2 says for a
    route we originate (our AS towards eBGP, nothing towards iBGP). A path that is not empty goes
    out exactly as given, so whoever passes on a route prepends the own AS first.
    """

    origin: Origin = Origin.IGP
    as_path: tuple[AsPathSegment, ...] = ()
    local_pref: int | None = None
    med: int | None = None
    atomic_aggregate: bool = False
    aggregator: str | None = None
    communities: tuple[tuple[int, int], ...] = ()
    large_communities: tuple[tuple[int, int, int], ...] = ()
    extended_communities: tuple[int, ...] = ()
    originator_id: str | None = None
    cluster_list: tuple[str, ...] = ()

    @property
    def as_hops(self) -> int:
        """The length of the path for the decision: a set counts one (RFC 4271 §9.1.2.2 a)."""
        return sum(
            len(segment.asns) if segment.kind is SegmentKind.SEQUENCE else 1
            for segment in self.as_path
            if segment.kind in (SegmentKind.SEQUENCE, SegmentKind.SET)
        )

    @property
    def asns(self) -> frozenset[int]:
        """Every AS in the path, for loop detection (RFC 4271 §9.1.2)."""
        return frozenset(asn for segment in self.as_path for asn in segment.asns)


@dataclass(frozen=True, slots=True)
class Announcement:
    """One prefix as one peer announces it, or as we announce it to one peer."""

    prefix: str
    next_hop: str
    attributes: PathAttributes = PathAttributes()
