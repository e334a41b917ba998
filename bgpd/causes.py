"""Why a session ended or does not come up, in words a person can act on. Pure.

    NOTIFICATION, ExaBGP's reason ─▶ of_notification, of_reason ─▶ Cause ─▶ status, bird.ctl, logs

ExaBGP says little: a NOTIFICATION's numbers, or "closing connection" for whatever TCP did. The
numbers become the registry's names and an advice; what TCP does just now is read from the kernel
(`tcp_view`) and told beside it, so a wrong password looks different from a peer that is off.

Source: RFC 4271 §4.5 and §6, RFC 4486 and RFC 9003 (Cease), RFC 6608 (state machine errors).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HOLD_TIMER = 4
CEASE = 6

_CODES = {
    1: "message header error",
    2: "OPEN message error",
    3: "UPDATE message error",
    4: "hold timer expired",
    5: "state machine error",
    6: "cease",
    7: "ROUTE-REFRESH message error",
}

_SUBCODES = {
    (1, 1): "connection not synchronized",
    (1, 2): "bad message length",
    (1, 3): "bad message type",
    (2, 1): "unsupported version number",
    (2, 2): "bad peer AS",
    (2, 3): "bad BGP identifier",
    (2, 4): "unsupported optional parameter",
    (2, 5): "authentication failure",
    (2, 6): "unacceptable hold time",
    (2, 7): "unsupported capability",
    (3, 1): "malformed attribute list",
    (3, 2): "unrecognized well-known attribute",
    (3, 3): "missing well-known attribute",
    (3, 4): "attribute flags error",
    (3, 5): "attribute length error",
    (3, 6): "invalid ORIGIN attribute",
    (3, 7): "AS routing loop",
    (3, 8): "invalid NEXT_HOP attribute",
    (3, 9): "optional attribute error",
    (3, 10): "invalid network field",
    (3, 11): "malformed AS_PATH",
    (5, 1): "unexpected message in OpenSent",
    (5, 2): "unexpected message in OpenConfirm",
    (5, 3): "unexpected message in Established",
    (6, 1): "maximum number of prefixes reached",
    (6, 2): "administrative shutdown",
    (6, 3): "peer de-configured",
    (6, 4): "administrative reset",
    (6, 5): "connection rejected",
    (6, 6): "other configuration change",
    (6, 7): "connection collision resolution",
    (6, 8): "out of resources",
    (6, 9): "hard reset",
    (6, 10): "BFD down",
}

_ADVICE = {
    # What to look at when the peer said it to us, and when we said it to the peer.
    (2, 2): (
        "the AS number it has configured for us is not ours: compare asNumber and localASNumber",
        "its AS number is not the one of the BGPPeer",
    ),
    (2, 3): (
        "it does not accept our router id: is it used twice?",
        "its router id is ours or zero: is it used twice?",
    ),
    (2, 5): ("it does not accept our authentication", "its authentication is not accepted"),
    (2, 6): (
        "it does not accept our hold time: compare keepaliveTime",
        "its hold time is 1 or 2 s, which no speaker may ask for",
    ),
    (2, 7): (
        "it demands a capability that we do not offer",
        "it lacks a capability: does it speak our address family?",
    ),
    (4, 0): (
        "it heard nothing from us for its hold time: is the path lossy, or this node overloaded?",
        "nothing was heard from it for the hold time: link, filter, or the peer itself",
    ),
    (6, 1): (
        "we sent more prefixes than it allows",
        "it sent more prefixes than its limit here allows",
    ),
    (6, 2): ("somebody shut the session down on the other side", "shut down here"),
    (6, 3): ("its configuration of us was removed", "its BGPPeer or Node was removed"),
    (6, 4): ("somebody reset the session on the other side", "reset here"),
    (6, 5): (
        "it refuses us: does it know our address and AS number?",
        "it connected, and no configured session matches it",
    ),
    (6, 6): ("its configuration changed", "our configuration changed"),
    (6, 7): ("both connected at once; one connection is closed", "both connected at once"),
    (6, 8): ("it is out of resources", "we are out of resources"),
    (6, 10): ("its BFD saw the path fail", "our BFD saw the path fail"),
}

_NUMBERS = re.compile(r"notification (sent|received) \((\d+),(\d+)\)")

_REASONS = (
    # The first that is found in ExaBGP's or the system's text, in lower case.
    ("refused", "connection refused: nothing listens on the peer's BGP port, or it rejects us"),
    ("no route to host", "no route to host: the peer's address does not answer on the link"),
    ("network is unreachable", "network is unreachable: this node has no route to the peer"),
    ("timed out", "connection timed out: the peer is off, filtered, or its password differs"),
    ("reset by peer", "connection reset by the peer"),
    ("closed by the remote", "the peer closed the connection without saying why"),
    ("closing connection", "the connection failed or was closed without a NOTIFICATION"),
    ("exabgp is a new process", "our BGP speaker (ExaBGP) was started anew"),
    ("cannot connect", "our BGP speaker (ExaBGP) does not run"),
    ("connection received before", "both connected at once; one connection was closed"),
    ("removed", "the session was removed from the configuration"),
    ("shutting down", "our BGP speaker (ExaBGP) was stopped"),
)


@dataclass(frozen=True, slots=True)
class Cause:
    """What went wrong: `text` for a person, `bird` as BIRD would put it in its info column."""

    text: str
    bird: str


def of_notification(code: int, subcode: int, data: str = "", *, sent: bool) -> Cause:
    """The cause that a NOTIFICATION tells; `data` as ExaBGP shows it (`0x…`, or text)."""
    general = _CODES.get(code, f"error {code}")
    name = _SUBCODES.get((code, subcode), "")
    if not name:
        name = f"{general}, subcode {subcode}" if subcode else general
    elif code != CEASE:
        name = f"{general}: {name}"
    advice = _ADVICE.get((code, subcode), ("", ""))[1 if sent else 0]
    who = "we ended it" if sent else "the peer ended it"
    said = _shutdown_text(data) if (code, subcode) in ((6, 2), (6, 4)) else ""
    text = f"{name}, {who}" + (f": {advice}" if advice else "")
    if said:
        text += f" (it said: {said})"
    return Cause(
        f"{text} [{code}/{subcode}]",
        f"{'BGP Error' if sent else 'Received'}: {name[:1].upper()}{name[1:]}",
    )


def of_reason(reason: str) -> Cause:
    """The cause behind a reason in ExaBGP's words, or in the system's."""
    if numbers := _NUMBERS.search(reason):
        return of_notification(int(numbers[2]), int(numbers[3]), sent=numbers[1] == "sent")
    lower = reason.lower()
    for word, text in _REASONS:
        if word in lower:
            return Cause(text, f"Socket: {text.partition(':')[0].capitalize()}")
    said = _printable(reason)
    return Cause(said or "no reason given", f"Error: {said}" if said else "")


def _shutdown_text(data: str) -> str:
    """The shutdown communication of RFC 9003: a length and UTF-8, made safe to print."""
    if not data.startswith("0x"):
        return _printable(data)
    try:
        octets = bytes.fromhex(data[2:])
    except ValueError:
        return ""
    if not octets or len(octets) < octets[0] + 1:
        return ""
    return _printable(octets[1 : octets[0] + 1].decode(errors="replace"))


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)[:128]
