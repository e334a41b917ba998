"""The text of ExaBGP's configuration: pure, sorted, the same for the same input.

Place in the flow: datastore ▶ `cymric.model.peering` ▶ here ▶ `install` ▶ the file that ExaBGP
reads and bgpd watches.

What the header says, ExaBGP skips and bgpd reads: where to listen, and a label per peer. The label
is a hash of the peer's block and also its `description`, so that a running ExaBGP can be asked
whether it loaded this very block.

- One family per session, that of its addresses, as Calico has it. ADD-PATH is not offered: bgpd
  keeps one path per peer and prefix, and Calico's nodes have only one to tell.
- A password is written in base64, in which nothing needs quoting. The label holds a slow hash of
  it: labels are logged, and must not help to guess it.
- TTL security N (RFC 5082): nothing below 256 - N is taken, and we send 255. ExaBGP takes the
  greatest distance from nothing else, so other sessions may be any number of hops long.
- The port to connect to is always written: left out, ExaBGP uses the port it listens on itself.
- `manual-eor`: bgpd sends End-of-RIB after the routes. `adj-rib-in` is bgpd's; `adj-rib-out` lets
  ExaBGP repeat our routes by itself after a reconnect and answer a route refresh.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import jinja2

from cymric.model.peering import PasswordRef, Session

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
    """All that the file depends on.

    `relay_command`: what ExaBGP runs as its API process. `listen_address`: one address or several,
    separated by commas. `passwords` holds that of every session that names one.
    """

    node: str
    sessions: Sequence[Session]
    listen_address: str
    listen_port: int
    relay_command: Sequence[str]
    passwords: Mapping[PasswordRef, bytes] = field(default_factory=dict, repr=False)


def render_exabgp(inputs: SpeakerInputs) -> str:
    """The whole file.

    Raises ValueError if a word of the command would need quoting, KeyError for a session whose
    password is not given.
    """
    for word in inputs.relay_command:
        if not _SAFE_WORD.fullmatch(word):
            raise ValueError(f"{word!r} cannot be written into ExaBGP's configuration")
    sessions = sorted(inputs.sessions, key=_order)
    template = _environment.get_template("exabgp.conf.j2")
    values = {
        "longest_restart_s": LONGEST_RESTART_S,
        "node": inputs.node,
        "listen_address": inputs.listen_address,
        "listen_port": inputs.listen_port,
        "relay_command": inputs.relay_command,
    }
    passwords = {
        session.name: inputs.passwords[session.password]
        for session in sessions
        if session.password is not None
    }
    # The macros of the template, without the file around them.
    empty: dict[str, object] = {"sessions": (), "label_by_name": {}, "password_by_name": {}}
    macros = vars(template.make_module(values | empty))
    label_by_name = {}
    for session in sessions:
        password = passwords.get(session.name)
        stand_in = fingerprint(password, inputs.node) if password else ""
        label_by_name[session.name] = label(str(macros["neighbor"](session, "", stand_in)))
    return template.render(
        {
            **values,
            "sessions": sessions,
            "label_by_name": label_by_name,
            "password_by_name": {
                name: base64.b64encode(password).decode() for name, password in passwords.items()
            },
        }
    )


@lru_cache(maxsize=64)
def fingerprint(password: bytes, salt: str) -> str:
    """Something that differs when the password does, and is slow to find the password by."""
    return hashlib.pbkdf2_hmac("sha256", password, salt.encode(), 100_000).hex()


def _order(session: Session) -> tuple[int, int]:
    return session.version, int(session.peer_address)


def labels_of(text: str) -> dict[str, str]:
    """Peers and labels in the header of a rendered file."""
    return dict(_PEER_LINE.findall(text))


def label(block: str) -> str:
    """A name for the content of a peer's block."""
    return f"cymric-{hashlib.sha256(block.encode()).hexdigest()[:12]}"
