"""What one peer should have from us and what ExaBGP holds for it: pure, per session.

Place in the flow: `advertise` ▶ `want` ▶ `take` ▶ commands ▶ `sent` (the event that ExaBGP writes
the UPDATE) or `flushed` (End-of-RIB was written, and with it all that was queued before).

Invariants:

- A prefix has at most one change in flight. The newest wanted state waits behind it; states in
  between are never sent.
- What ExaBGP already holds is not sent again, because that raises no event to wait for. After
  `learn` (ExaBGP's own list of prefixes, read at the start of each session) attributes are unknown:
  wanted prefixes are announced once more, all others withdrawn. Such changes may or may not raise
  an event, and older ones of the same prefix may still be under way; only `flushed` settles them.
- Nothing is commanded and End-of-RIB is not due before the first `want`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from bgpd.announcement import IPV4_UNICAST, IPV6_UNICAST, Announcement, PathAttributes

UNKNOWN = Announcement("", "", PathAttributes())
"""Held, but nobody remembers with which attributes; equal to nothing wanted."""

BATCH = 1000


@dataclass(frozen=True, slots=True)
class Changes:
    """What to command next."""

    announce: tuple[Announcement, ...]
    withdraw: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.announce or self.withdraw)


@dataclass(slots=True)
class AdjRibOut:
    """One peer's state; `families` are those of the session, empty while it is down."""

    families: frozenset[str] = frozenset()
    wanted: dict[str, Announcement] | None = None
    held: dict[str, Announcement] = field(default_factory=dict)
    end_of_rib_commanded: bool = False
    end_of_rib_sent: bool = False
    is_leaving: bool = False
    changes: int = 0
    """How often something was commanded, or what is held was read anew."""
    _in_flight: dict[str, Announcement | None] = field(default_factory=dict)
    _unsure: set[str] = field(default_factory=set)
    _dirty: set[str] = field(default_factory=set)
    _fenced: frozenset[str] | None = None
    _awaited_ends: set[str] = field(default_factory=set)
    _compared: tuple[PathAttributes, PathAttributes, bool] | None = None

    def start(self, families: frozenset[str]) -> None:
        """The session is up; nothing is commanded before `learn`."""
        self.stop()
        self.families = families

    def stop(self) -> None:
        """The session is down: what was in flight is settled by the next session's `learn`."""
        self.families = frozenset()
        self.held = {}
        self._in_flight = {}
        self._unsure = set()
        self._dirty = set()
        self._fenced = None
        self._awaited_ends = set()
        self.end_of_rib_commanded = False
        self.end_of_rib_sent = False

    def learn(self, prefixes: Iterable[str]) -> None:
        """ExaBGP holds these prefixes for this peer, from whoever commanded them."""
        self.changes += 1
        self.held = dict.fromkeys(prefixes, UNKNOWN)
        self._unsure = set(self.held)
        self._note_differences()

    def correct(self, actual: Mapping[str, Announcement | None]) -> frozenset[str]:
        """ExaBGP, asked when nothing was in flight, holds these, None with what attributes nobody
        knows. The prefixes that are not held as commanded; they are commanded again.
        """
        lost = self.held.keys() - actual.keys()
        wrong = {
            prefix
            for prefix, route in actual.items()
            if (commanded := self.held.get(prefix)) is None
            or (route is not None and not self._agrees(commanded, route))
        }
        for prefix in lost:
            del self.held[prefix]
        self.held.update(dict.fromkeys(wrong, UNKNOWN))
        self._unsure |= wrong
        if lost or wrong:
            self._note_differences()
        return frozenset(lost | wrong)

    def want(self, routes: Mapping[str, Announcement]) -> None:
        """The newest whole desired state."""
        self.wanted = dict(routes)
        self._note_differences()

    def want_changes(self, changes: Mapping[str, Announcement | None]) -> None:
        """The newest desired state of these prefixes (None: none). There was a whole one before."""
        assert self.wanted is not None
        for prefix, route in changes.items():
            if route is None:
                self.wanted.pop(prefix, None)
            else:
                self.wanted[prefix] = route
        if not self.families:
            return
        desired = self._desired()
        for prefix in changes:
            if desired.get(prefix) != self.held.get(prefix) and _family(prefix) in self.families:
                self._dirty.add(prefix)
            else:
                self._dirty.discard(prefix)

    def leave(self, *, is_leaving: bool = True) -> None:
        """Withdraw everything before the peer is removed (or want it again after all)."""
        self.is_leaving = is_leaving
        self._note_differences()

    def take(self, limit: int = BATCH) -> Changes:
        """The next changes to command, which are in flight from now on."""
        announce: list[Announcement] = []
        withdraw: list[str] = []
        desired = self._desired()
        self.changes += 1
        # In no order: sorting all that waits, batch after batch, would cost more than the rest.
        for prefix in tuple(islice(self._dirty - self._in_flight.keys(), limit)):
            self._dirty.discard(prefix)
            route = desired.get(prefix)
            self._in_flight[prefix] = route
            if route is None:
                self.held.pop(prefix, None)
                withdraw.append(prefix)
            else:
                self.held[prefix] = route
                announce.append(route)
        return Changes(tuple(announce), tuple(withdraw))

    def sent(self, prefix: str, route: Announcement | None) -> bool:
        """ExaBGP writes this to the peer (None: a withdrawal). True if more can be taken now."""
        if prefix not in self._in_flight or prefix in self._unsure:
            return False
        expected = self._in_flight[prefix]
        if (expected is None) != (route is None):
            return False
        if expected is not None and route is not None and not self._is_same(expected, route):
            return False  # an older state, repeated for a route refresh
        return self._release(prefix)

    def unsettle(self, prefixes: Iterable[str]) -> None:
        """ExaBGP refused a command with these prefixes: nobody knows what it holds of them."""
        for prefix in prefixes:
            self._in_flight.pop(prefix, None)
            self.held[prefix] = UNKNOWN
            self._unsure.add(prefix)
        self._note_differences()

    @property
    def is_fence_due(self) -> bool:
        """Whether all that can be commanded is, and End-of-RIB should follow (again)."""
        if self.wanted is None or not self.families or self._fenced is not None:
            return False
        if any(prefix not in self._in_flight for prefix in self._dirty):
            return False
        if any(prefix not in self._unsure for prefix in self._in_flight):
            return False
        return not self.end_of_rib_commanded or bool(self._in_flight)

    @property
    def is_fenced(self) -> bool:
        """Whether an End-of-RIB is commanded and not yet written."""
        return self._fenced is not None

    def fence(self) -> frozenset[str]:
        """End-of-RIB is commanded now; the families it is to be sent for."""
        self.end_of_rib_commanded = True
        self._fenced = frozenset(self._in_flight)
        self._awaited_ends = set(self.families)
        return self.families

    def ended(self, family: str) -> bool:
        """End-of-RIB of `family` is written. True if more can be taken now."""
        if self._fenced is None:
            return False
        self._awaited_ends.discard(family)
        if self._awaited_ends:
            return False
        fenced, self._fenced = self._fenced, None
        self.end_of_rib_sent = True
        may_go_on = False
        for prefix in fenced & self._in_flight.keys():
            may_go_on |= self._release(prefix)
        return may_go_on or self.is_fence_due

    @property
    def is_settled(self) -> bool:
        """Whether the peer has been sent exactly what is wanted, as far as it may be."""
        return not self._in_flight and not self._dirty and self._fenced is None

    @property
    def confirmed(self) -> int:
        """How many wanted prefixes were written to the peer as they are wanted."""
        return sum(
            self.held.get(prefix) == route and prefix not in self._in_flight
            for prefix, route in self._desired().items()
        )

    @property
    def pending(self) -> int:
        """How many changes are commanded and not yet written, or still to be commanded."""
        return len(self._dirty | self._in_flight.keys())

    @property
    def missing(self) -> int:
        """How many wanted prefixes are neither confirmed nor about to be; 0 unless at fault.

        While the session is down, or ExaBGP was not yet asked what it holds, nothing can be sent:
        then everything is missing. Families that the session does not carry count too.
        """
        return sum(
            self.held.get(prefix) != route
            and prefix not in self._in_flight
            and prefix not in self._dirty
            for prefix, route in self._desired().items()
        )

    def unconfirmed(self, limit: int) -> tuple[str, ...]:
        """Some prefixes, at most `limit`, of which the peer was not yet told what is wanted."""
        desired = self._desired()
        found = (
            prefix
            for prefix in chain(desired, self.held.keys() - desired.keys())
            if prefix in self._in_flight or self.held.get(prefix) != desired.get(prefix)
        )
        return tuple(islice(found, limit))

    @property
    def in_flight(self) -> Collection[str]:
        """Prefixes whose change is commanded and not yet written."""
        return self._in_flight.keys()

    def _is_same(self, commanded: Announcement, written: Announcement) -> bool:
        """Whether the UPDATE carries what was commanded; its prefixes share their attributes."""
        if commanded.next_hop not in (written.next_hop, "self"):
            return False
        said, seen = commanded.attributes, written.attributes
        if self._compared is None or self._compared[0] is not said or self._compared[1] is not seen:
            self._compared = (said, seen, _own(said) == _own(seen))
        return self._compared[2]

    def _agrees(self, commanded: Announcement, actual: Announcement) -> bool:
        """Whether ExaBGP would send what was commanded, also in what it adds only if we do not."""
        said, seen = commanded.attributes, actual.attributes
        if said.as_path and said.as_path != seen.as_path:
            return False
        if None not in (said.local_pref, seen.local_pref) and said.local_pref != seen.local_pref:
            return False
        return self._is_same(commanded, actual)

    def _release(self, prefix: str) -> bool:
        del self._in_flight[prefix]
        self._unsure.discard(prefix)
        return prefix in self._dirty

    def _desired(self) -> Mapping[str, Announcement]:
        if self.is_leaving or self.wanted is None:
            return {}
        return self.wanted

    def _note_differences(self) -> None:
        if not self.families or (self.wanted is None and not self.is_leaving):
            self._dirty = set()
            return
        desired = self._desired()
        self._dirty = {
            prefix
            for prefix in desired.keys() | self.held.keys()
            if desired.get(prefix) != self.held.get(prefix) and _family(prefix) in self.families
        }


def _family(prefix: str) -> str:
    return IPV6_UNICAST if ":" in prefix else IPV4_UNICAST


def _own(said: PathAttributes) -> PathAttributes:
    """Without AS_PATH and LOCAL_PREF, which ExaBGP adds or leaves out by the kind of session."""
    return replace(
        said,
        as_path=(),
        local_pref=None,
        communities=tuple(sorted(said.communities)),
        large_communities=tuple(sorted(said.large_communities)),
        extended_communities=tuple(sorted(said.extended_communities)),
    )
