"""Long answers of bgpd.sock: one row a route, made while they are written.

    AdjRibIn, Adj-RIB-Out, Loc-RIB ─▶ rows ─▶ Stream ─▶ bgpd.sock, a few hundred at a time

A hundred thousand routes must not stop the loop, so what is copied at once are the prefixes alone,
and each row is made when its turn comes, of what is so then; a route that is gone by then is left
out. Rows are in no order; whoever shows them sorts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from bgpd.announcement import Announcement, PathAttributes
from bgpd.decision import Choice
from bgpd.rib import AdjRibIn
from cymric.model.net import Network

ROWS_AT_ONCE = 200

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Stream:
    """One JSON object: the fields of `head`, and under `name` the rows."""

    head: Mapping[str, Any]
    name: str
    rows: Iterable[Row]

    def chunks(self) -> Iterator[bytes]:
        """The object's text in parts; between two of them others may run."""
        yield msgspec.json.encode(self.head)[:-1] + (b"," if self.head else b"")
        yield msgspec.json.encode(self.name) + b":["
        part: list[bytes] = []
        is_first = True
        for row in self.rows:
            part.append((b"" if is_first else b",") + msgspec.json.encode(row))
            is_first = False
            if len(part) == ROWS_AT_ONCE:
                yield b"".join(part)
                part = []
        yield b"".join(part) + b"]}"


def received(table: AdjRibIn) -> Iterator[Row]:
    """What a peer sent, and why what is not used is not."""
    for prefix in list(table.paths):
        if (path := table.paths.get(prefix)) is None:
            continue
        reason = table.rejected.get(prefix)
        yield {
            "prefix": str(prefix),
            "next_hop": str(path.next_hop),
            **described(path.attributes),
            "rejected": "" if reason is None else str(reason.value),
            "stale": prefix in table.stale,
        }


def advertised(routes: Mapping[str, Announcement], why: Callable[[str], str]) -> Iterator[Row]:
    """What a peer should have from us, and why."""
    for prefix in list(routes):
        if (route := routes.get(prefix)) is None:
            continue
        yield {
            "prefix": prefix,
            "next_hop": route.next_hop,
            **described(route.attributes),
            "why": why(prefix),
        }


def chosen(loc_rib: Mapping[Network, Choice]) -> Iterator[Row]:
    """The routes in use."""
    for prefix in list(loc_rib):
        if (choice := loc_rib.get(prefix)) is None:
            continue
        yield {
            "prefix": str(prefix),
            "next_hop": str(choice.path.next_hop),
            "peer": str(choice.path.peer.address),
            "settled_by": choice.settled_by,
        }


def described(said: PathAttributes) -> Row:
    """The attributes people look at; communities as they are written by people."""
    return {
        "as_path": [asn for segment in said.as_path for asn in segment.asns],
        "local_pref": said.local_pref,
        "med": said.med,
        "origin": said.origin,
        "communities": [f"{high}:{low}" for high, low in said.communities]
        + [f"{a}:{b}:{c}" for a, b, c in said.large_communities],
    }
