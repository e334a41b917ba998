"""What bgpd counts, for Prometheus. Bounded: labels are configured peers and fixed words.

    Router, Speaker, SessionLog ─▶ measure_once, every few seconds ─▶ /metrics

A peer that is not configured any more leaves no series behind. docs/operating.md tells what each
means and what to do about it.
"""

from __future__ import annotations

from prometheus_client import Gauge

from bgpd.drain import Phase
from bgpd.outgoing import Outgoing
from bgpd.router import Router
from bgpd.session_log import SessionLog
from bgpd.speaker import Speaker

SESSION_UP = Gauge("cymric_bgp_session_up", "Whether a session is Established.", ["peer"])
CHANGED = Gauge(
    "cymric_bgp_session_changed_timestamp_seconds",
    "When the session last came up or went down, Unix time.",
    ["peer"],
)
FLAPS = Gauge("cymric_bgp_session_flaps", "Times it went down since bgpd started.", ["peer"])
UPDATES = Gauge("cymric_bgp_session_updates", "UPDATEs received since bgpd started.", ["peer"])
PATHS = Gauge("cymric_bgp_paths", "Paths in Adj-RIB-In.", ["peer"])
LIMIT = Gauge("cymric_bgp_paths_limit", "Paths that the peer may send.", ["peer"])
STALE = Gauge("cymric_bgp_paths_stale", "Paths that wait to be confirmed or swept.", ["peer"])
REJECTED = Gauge("cymric_bgp_paths_rejected", "Paths that policy rejects.", ["peer", "reason"])
TOLD = Gauge("cymric_bgp_told_prefixes", "Prefixes that the peer should have from us.", ["peer"])
UNCONFIRMED = Gauge(
    "cymric_bgp_unconfirmed_prefixes", "Of those, not yet written to the peer as wanted.", ["peer"]
)
MISSING = Gauge(
    "cymric_bgp_missing_prefixes", "Of those, neither written nor on their way.", ["peer"]
)
REPAIRED = Gauge(
    "cymric_bgp_repaired_prefixes", "Differences found in the speaker and repaired.", ["peer"]
)
CHOSEN = Gauge("cymric_bgp_loc_rib_prefixes", "Prefixes with a path in use.")
ADVERTISED = Gauge("cymric_bgp_advertised_prefixes", "Prefixes this node advertises.")
WAITING = Gauge("cymric_bgp_waits_for_felix", "1 while nothing is announced because of felix.")
DRAINING = Gauge("cymric_bgp_drain", "1 for the phase the node's drain is in.", ["phase"])

_BY_PEER = (
    *(SESSION_UP, CHANGED, FLAPS, UPDATES, PATHS, LIMIT, STALE, REJECTED),
    *(TOLD, UNCONFIRMED, MISSING, REPAIRED),
)


def measure_once(router: Router, speaker: Speaker, log: SessionLog, outgoing: Outgoing) -> None:
    """Set every gauge to what is so now."""
    for gauge in _BY_PEER:
        gauge.clear()
    proofs = speaker.proof()
    for peer in router.sessions:
        record = log.of(peer)
        SESSION_UP.labels(peer).set(peer in router.up)
        CHANGED.labels(peer).set(record.since_s)
        FLAPS.labels(peer).set(record.flaps)
        UPDATES.labels(peer).set(record.updates)
        LIMIT.labels(peer).set(router.rib.limit(peer))
        if (proof := proofs.get(peer)) is not None:
            TOLD.labels(peer).set(proof.desired)
            UNCONFIRMED.labels(peer).set(proof.desired - proof.confirmed)
            MISSING.labels(peer).set(proof.missing if peer in router.up else 0)
            REPAIRED.labels(peer).set(proof.repaired)
        if (table := router.rib.adj_ribs_in.get(peer)) is not None:
            PATHS.labels(peer).set(len(table.paths))
            STALE.labels(peer).set(len(table.stale))
            for reason, count in table.rejections().items():
                REJECTED.labels(peer, reason).set(count)
    CHOSEN.set(len(router.rib.loc_rib))
    ADVERTISED.set(len(router.advertising))
    WAITING.set(bool(outgoing.waits_for))
    for phase in Phase:
        DRAINING.labels(phase.value or "none").set(outgoing.drain.phase is phase)
