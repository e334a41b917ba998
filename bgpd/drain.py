"""What a node advertises while it is being emptied: announcements in, announcements out. Pure.

    Node annotation cymric.io/drain ─▶ Drain ─┐
    Adj-RIB-Out as exports made it ───────────┴▶ drained ─▶ Adj-RIB-Out as it is told to peers

A drain has three phases. *Marking*: service routes, and single addresses (pods that come now, or
borrow), carry GRACEFUL_SHUTDOWN and the lowest LOCAL_PREF, so that whoever has another way takes
it while ours still works. *Leaving*, when every peer was told and had time to move: service routes
are withdrawn. *Left*: that, too, was told to every peer. The aggregates of the node's blocks stay
as they are, because no other node has a way to these pods; when the whole node goes (`reboot`)
they are marked as well, and withdrawn once no pod lives in them.

Invariants
- The result depends on announcements, wish and phase only; ending the drain restores everything.
- What is passed on from others is not ours to mark.
- A phase never goes back while the wish stays. A new process goes on where the Node says that the
  one before had left; from any earlier phase it starts with marking.

Source: RFC 8326 §4 (sender: community 65535:0, LOCAL_PREF 0).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from bgpd.announcement import Announcement

ANNOTATION = "cymric.io/drain"
STATUS_ANNOTATION = "cymric.io/drain-status"

GRACEFUL_SHUTDOWN = (65535, 0)
LAST_RESORT = 0
"""The LOCAL_PREF of a marked route (RFC 8326 §4.3)."""

MOVE_S = 10.0
"""How long peers have to move after the last of them was told: many of them, working one by one."""


class Wish(StrEnum):
    """What the operator wants of the node."""

    NONE = ""
    SERVICES = "services"
    REBOOT = "reboot"


class Phase(StrEnum):
    """How far it is, as shown and stored."""

    NONE = ""
    MARKING = "marking"
    LEAVING = "leaving"
    LEFT = "left"


class Role(StrEnum):
    """What a prefix is to this node."""

    BLOCK = "block"
    ADDRESS = "address"
    SERVICE = "service"
    PASSED_ON = "passed on"


def wish(annotations: Mapping[str, str]) -> Wish:
    """What a Node's annotations ask for. Raises ValueError for a value that is no wish."""
    value = annotations.get(ANNOTATION, "").strip().lower()
    if value in ("", "false"):
        return Wish.NONE
    return Wish.SERVICES if value == "true" else Wish(value)


@dataclass(frozen=True, slots=True)
class Drain:
    """A wish and how far it is. `since_s`: monotonic time at which the phase began, and
    `told_s` at which all peers were seen to know it, None before.
    """

    wish: Wish = Wish.NONE
    phase: Phase = Phase.NONE
    since_s: float = 0.0
    told_s: float | None = None

    @property
    def is_active(self) -> bool:
        """Whether anything is advertised differently."""
        return self.phase is not Phase.NONE


def advance(drain: Drain, wanted: Wish, *, is_told: bool, now_s: float) -> Drain:
    """The drain a moment later. `is_told`: every session that is up confirmed everything.

    A phase is left only after a look at which peers were told *in* it, so a caller that changes
    the announcements with the phase must call again afterwards.
    """
    if wanted is Wish.NONE:
        return drain if drain == Drain() else Drain()
    if drain.wish is not wanted:
        # From services to reboot, blocks are marked anew: peers need their time again.
        return Drain(wish=wanted, phase=Phase.MARKING, since_s=now_s)
    told_s = drain.told_s
    if drain.phase is not Phase.LEFT:
        told_s = (now_s if told_s is None else told_s) if is_told else None
    drain = drain if told_s == drain.told_s else replace(drain, told_s=told_s)
    if drain.phase is Phase.MARKING and told_s is not None and now_s - told_s >= MOVE_S:
        return replace(drain, phase=Phase.LEAVING, since_s=now_s, told_s=None)
    if drain.phase is Phase.LEAVING and told_s is not None:
        return replace(drain, phase=Phase.LEFT, since_s=now_s)
    return drain


def resumed(wanted: Wish, stored: str, *, now_s: float) -> Drain:
    """The drain of a process that starts; `stored` is what the one before it wrote last."""
    if wanted is Wish.NONE:
        return Drain()
    phase = Phase.LEFT if stored == described(wanted, Phase.LEFT) else Phase.MARKING
    return Drain(wish=wanted, phase=phase, since_s=now_s)


def described(wanted: Wish, phase: Phase) -> str:
    """A drain's state as it is stored: two words, nothing for no drain."""
    return f"{wanted.value} {phase.value}".strip()


def drained(
    routes: Mapping[str, Announcement],
    role: Callable[[str], Role],
    drain: Drain,
    *,
    is_empty: Callable[[str], bool] = lambda _: False,
) -> Mapping[str, Announcement]:
    """One session's Adj-RIB-Out under a drain. `is_empty` tells whether no pod lives in a block.

    LOCAL_PREF is lowered only where it was said, on iBGP sessions.
    """
    if not drain.is_active:
        return routes
    has_left = drain.phase in (Phase.LEAVING, Phase.LEFT)
    found: dict[str, Announcement] = {}
    for prefix, route in routes.items():
        match role(prefix):
            case Role.PASSED_ON:
                found[prefix] = route
            case Role.SERVICE:
                if not has_left:
                    found[prefix] = marked(route)
            case Role.ADDRESS:
                found[prefix] = marked(route)
            case Role.BLOCK:
                if drain.wish is not Wish.REBOOT:
                    found[prefix] = route
                elif not (has_left and is_empty(prefix)):
                    found[prefix] = marked(route)
    return found


def marked(route: Announcement) -> Announcement:
    """The same way, as the last to be taken."""
    said = route.attributes
    communities = said.communities
    if GRACEFUL_SHUTDOWN not in communities:
        communities = (*communities, GRACEFUL_SHUTDOWN)
    local_pref = None if said.local_pref is None else LAST_RESORT
    return replace(route, attributes=replace(said, communities=communities, local_pref=local_pref))


def is_told(proofs: Mapping[str, tuple[int, int]], up: Collection[str]) -> bool:
    """Whether every session that is up was sent everything: (wanted, confirmed) by peer.

    Sessions that are down need no telling: their peers have no route of ours, or keep it as stale
    only as long as their graceful restart lasts.
    """
    return all(peer in proofs and proofs[peer][0] == proofs[peer][1] for peer in up)
