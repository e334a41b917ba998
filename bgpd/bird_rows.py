"""Our sessions as the rows that BIRD would list. Pure.

    Router, SessionLog ─▶ rows ─▶ bird_socket

Names are BIRD's by Calico's templates (`Mesh_10_0_0_12`); confd and `cymric.model.peering` give
them. Beside the sessions stand the protocols that a Calico node's BIRD always has and whose work
bgpd does: own blocks (`static1`), the kernel (`kernel1`), links (`device1`).
"""

from __future__ import annotations

from collections.abc import Iterable

from bgpd.bird_socket import Row
from bgpd.session_log import Record
from cymric.model.peering import Session

_ALWAYS = (("static1", "Static"), ("kernel1", "Kernel"), ("device1", "Device"))


def rows(
    family: int, sessions: Iterable[tuple[Session, Record]], *, started_s: float
) -> tuple[Row, ...]:
    """What `show protocols` lists on the socket of `family` (4 or 6). Times are Unix seconds."""
    always = tuple(
        Row(name=name, proto=proto, state="up", since_s=started_s) for name, proto in _ALWAYS
    )
    return always + tuple(
        _row(session, record, started_s)
        for session, record in sessions
        if session.peer_address.version == family
    )


def _row(session: Session, record: Record, started_s: float) -> Row:
    if record.is_up:
        state, doing = "up", "Established"
    else:
        state, doing = "start", "Passive" if session.is_passive else "Active"
    error = "" if record.is_up or record.last_error is None else record.last_error.bird
    return Row(
        name=session.name,
        proto="BGP",
        state=state,
        since_s=record.since_s or started_s,
        info=f"{doing:<14}{error}",
    )
