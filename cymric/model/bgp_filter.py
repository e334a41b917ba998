"""BGPFilter: what an operator lets in and out of a BGP session, as stored.

A filter holds four lists of rules, by direction and family. In each list the first rule whose
conditions all hold decides; what the conditions mean is told in `bgpd/filters.py`, which compiles
them. Here the form is checked, so that a value that cannot be meant never becomes an object.

Source: Calico 3.32 BGPFilter; each field keeps its name there.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from cymric.model.net import parse_asn, parse_network
from cymric.model.resources import Resource, Spec, parse_community

MOST_OPERATIONS = 10
MOST_PRIORITY = 2**31 - 2


class MatchOperator(StrEnum):
    """How a route's prefix is compared with the rule's."""

    EQUAL = "Equal"
    NOT_EQUAL = "NotEqual"
    IN = "In"
    NOT_IN = "NotIn"


class FilterAction(StrEnum):
    """What happens to a route that a rule matches."""

    ACCEPT = "Accept"
    REJECT = "Reject"


class PrefixLength(Spec, frozen=True, kw_only=True):
    """Bounds of a route's prefix length, both inclusive; absent means unbounded."""

    min: int | None = None
    max: int | None = None


class CommunityMatch(Spec, frozen=True, kw_only=True):
    """The community that a route must carry."""

    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.values) != 1:
            raise ValueError("communities must list exactly one value")
        parse_community(self.values[0])


class AddCommunity(Spec, frozen=True, kw_only=True):
    """Add this community."""

    value: str

    def __post_init__(self) -> None:
        parse_community(self.value)


class PrependASPath(Spec, frozen=True, kw_only=True):
    """Put these ASes in front of the AS path, in this order."""

    prefix: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if not self.asns:
            raise ValueError("prependASPath names no AS")

    @property
    def asns(self) -> tuple[int, ...]:
        """The AS numbers."""
        return tuple(map(parse_asn, self.prefix))


class SetPriority(Spec, frozen=True, kw_only=True):
    """Give the route the preference that belongs to a kernel metric."""

    value: int

    def __post_init__(self) -> None:
        if not 1 <= self.value <= MOST_PRIORITY:
            raise ValueError(f"priority {self.value} is not between 1 and {MOST_PRIORITY}")


class FilterOperation(Spec, frozen=True, kw_only=True):
    """One change of a route that is accepted: exactly one of the fields."""

    add_community: AddCommunity | None = None
    prepend_as_path: PrependASPath | None = msgspec.field(default=None, name="prependASPath")
    set_priority: SetPriority | None = None

    def __post_init__(self) -> None:
        given = (self.add_community, self.prepend_as_path, self.set_priority)
        if sum(one is not None for one in given) != 1:
            raise ValueError("an operation does exactly one thing")


class FilterRule(Spec, frozen=True, kw_only=True):
    """Conditions, all of which must hold, and what happens then."""

    cidr: str = ""
    prefix_length: PrefixLength | None = None
    source: str = ""
    interface: str = ""
    peer_type: str = ""
    communities: CommunityMatch | None = None
    as_path_prefix: tuple[int | str, ...] = ()
    priority: int | None = None
    match_operator: MatchOperator | None = None
    action: FilterAction
    operations: tuple[FilterOperation, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.cidr) != (self.match_operator is not None):
            raise ValueError("cidr and matchOperator belong together")
        if self.prefix_length is not None and not self.cidr:
            raise ValueError("prefixLength needs a cidr")
        if self.source not in ("", "RemotePeers"):
            raise ValueError(f"source {self.source!r} is not RemotePeers")
        if self.peer_type not in ("", "eBGP", "iBGP"):
            raise ValueError(f"peerType {self.peer_type!r} is neither eBGP nor iBGP")
        if self.priority is not None and not 1 <= self.priority <= MOST_PRIORITY:
            raise ValueError(f"priority {self.priority} is not between 1 and {MOST_PRIORITY}")
        if self.operations and self.action is not FilterAction.ACCEPT:
            raise ValueError("operations belong to rules that accept")
        if len(self.operations) > MOST_OPERATIONS:
            raise ValueError(f"a rule has at most {MOST_OPERATIONS} operations")
        _ = self.as_path_start

    @property
    def as_path_start(self) -> tuple[int, ...]:
        """The AS numbers with which the path must start."""
        return tuple(map(parse_asn, self.as_path_prefix))

    def check(self, version: int) -> None:
        """Raises ValueError if the rule cannot stand in a list of this family."""
        most = 32 if version == 4 else 128
        if self.cidr and parse_network(self.cidr).version != version:
            raise ValueError(f"cidr {self.cidr} is not IPv{version}")
        if self.prefix_length is not None:
            for bound in (self.prefix_length.min, self.prefix_length.max):
                if bound is not None and not 0 <= bound <= most:
                    raise ValueError(f"prefix length {bound} is not between 0 and {most}")


class BGPFilterSpec(Spec, frozen=True, kw_only=True):
    """The rules by direction and family."""

    export_v4: tuple[FilterRule, ...] = msgspec.field(default=(), name="exportV4")
    import_v4: tuple[FilterRule, ...] = msgspec.field(default=(), name="importV4")
    export_v6: tuple[FilterRule, ...] = msgspec.field(default=(), name="exportV6")
    import_v6: tuple[FilterRule, ...] = msgspec.field(default=(), name="importV6")

    def __post_init__(self) -> None:
        for version, rules in (
            (4, (*self.export_v4, *self.import_v4)),
            (6, (*self.export_v6, *self.import_v6)),
        ):
            for rule in rules:
                rule.check(version)


class BGPFilter(Resource, frozen=True, kw_only=True):
    """A named set of rules that BGPPeers refer to."""

    kind: str = "BGPFilter"
    spec: BGPFilterSpec = BGPFilterSpec()
