"""The text of ExaBGP's configuration: pure, sorted, the same for the same input.

Place in the flow: datastore ▶ `cymric.model.peering` ▶ here ▶ `install` ▶ the file that ExaBGP
reads and bgpd watches.

What the header says, ExaBGP skips and bgpd reads: where to listen, and a label per peer. The label
is a hash of the peer's block and also its `description`, so that a running ExaBGP can be asked
whether it loaded this very block.

- Hold time 90 s (RFC 4271 §10). Calico's BIRD proposes 240 s and the lower value wins: a dead node
  without BFD is noticed in 90 s instead of 240, and 90 s is far above any pause of ExaBGP.
- The port to connect to is always written: left out, ExaBGP uses the port it listens on itself.
- `manual-eor`: bgpd sends End-of-RIB after the routes. `adj-rib-in` is bgpd's; `adj-rib-out` lets
  ExaBGP repeat our routes by itself after a reconnect and answer a route refresh.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from cymric.model.peering import Session

HOLD_TIME_S = 90
LONGEST_RESTART_S = 4095
"""The restart time has 12 bits (RFC 4724 §3)."""

_PEER_LINE = re.compile(r"^# cymric-peer (\S+) (\S+)$", re.MULTILINE)
_UNSAFE_IN_COMMENT = re.compile(r"[^A-Za-z0-9_.:/ -]")
_SAFE_WORD = re.compile(r"[A-Za-z0-9_./:=@%+-]+")

_environment = jinja2.Environment(
    loader=jinja2.PackageLoader("confd"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # noqa: S701 - plain text; every value is an address, a number or checked
)
# ExaBGP interprets backslashes even in comments.
_environment.filters["comment"] = lambda text: _UNSAFE_IN_COMMENT.sub("?", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeakerInputs:
    """All that the file depends on. `relay_command`: what ExaBGP runs as its API process."""

    node: str
    sessions: Sequence[Session]
    listen_address: str
    listen_port: int
    relay_command: Sequence[str]


def render_exabgp(inputs: SpeakerInputs) -> str:
    """The whole file. Raises ValueError if a word of the command would need quoting."""
    for word in inputs.relay_command:
        if not _SAFE_WORD.fullmatch(word):
            raise ValueError(f"{word!r} cannot be written into ExaBGP's configuration")
    sessions = sorted(inputs.sessions, key=lambda session: int(session.peer_address))
    template = _environment.get_template("exabgp.conf.j2")
    constants = {"hold_time_s": HOLD_TIME_S, "longest_restart_s": LONGEST_RESTART_S}
    values = {
        **constants,
        "node": inputs.node,
        "listen_address": inputs.listen_address,
        "listen_port": inputs.listen_port,
        "relay_command": inputs.relay_command,
    }
    # The macros of the template, without the file around them.
    macros = vars(template.make_module({**values, "sessions": (), "label_by_name": {}}))
    label_by_name = {
        session.name: label(str(macros["neighbor"](session, ""))) for session in sessions
    }
    return template.render({**values, "sessions": sessions, "label_by_name": label_by_name})


def labels_of(text: str) -> dict[str, str]:
    """Peers and labels in the header of a rendered file."""
    return dict(_PEER_LINE.findall(text))


def label(block: str) -> str:
    """A name for the content of a peer's block."""
    return f"cymric-{hashlib.sha256(block.encode()).hexdigest()[:12]}"
