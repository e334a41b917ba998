"""Objects on trial: in force until a time, and from then on what they were before, or confirmed.

Whoever changes what could cut them off puts three annotations on the object (docs/design/felix.md).
Nodes read them and need nobody to undo the change; to confirm is to take the annotations away.
Everything here works on JSON trees, times are seconds since 1970 (UTC). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

CONFIRM_BY = "cymric.io/confirm-by"
CONFIRM_WITHIN = "cymric.io/confirm-within"
CONFIRM_ELSE = "cymric.io/confirm-else"
ANNOTATIONS = (CONFIRM_BY, CONFIRM_WITHIN, CONFIRM_ELSE)

KINDS = frozenset(
    {
        "FelixConfiguration",
        "GlobalNetworkPolicy",
        "GlobalNetworkSet",
        "HostEndpoint",
        "NetworkPolicy",
        "NetworkSet",
        "Profile",
        "Tier",
    }
)
"""What may be on trial."""

Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Trial:
    """The end of a trial, how long it was meant to last, and what counts from then on."""

    ends_at: float
    within_s: float
    before: Tree | None
    """None: there was no such object."""


def of(annotations: Mapping[str, str]) -> Trial | None:
    """The trial that annotations tell of, None for an ordinary object.

    Raises ValueError if there is one, but not what the object was before. A time that cannot be
    read is over.
    """
    if not any(name in annotations for name in ANNOTATIONS):
        return None
    try:
        before = msgspec.json.decode(annotations.get(CONFIRM_ELSE, ""))
    except msgspec.DecodeError as error:
        raise ValueError(f"{CONFIRM_ELSE}: {error}") from None
    if before is not None and not isinstance(before, dict):
        raise ValueError(f"{CONFIRM_ELSE}: no object")
    try:
        ends_at = parse_time(annotations.get(CONFIRM_BY, ""))
        within_s = float(annotations.get(CONFIRM_WITHIN, "inf"))
    except ValueError:
        ends_at = within_s = 0.0
    if not within_s > 0:  # which no number that is none is
        within_s = 0.0
    return Trial(ends_at, within_s, before)


def put_on(tree: Tree, before: Tree | None, *, now: float, within_s: float) -> Tree:
    """`tree` on trial from now on; `before` is what is in force."""
    metadata = dict(tree.get("metadata") or {})
    told = {
        CONFIRM_BY: time_text(now + within_s),
        CONFIRM_WITHIN: f"{within_s:g}",
        CONFIRM_ELSE: msgspec.json.encode(_told(before)).decode(),
    }
    metadata["annotations"] = {**ended(tree)["metadata"].get("annotations", {}), **told}
    return {**tree, "metadata": metadata}


def ended(tree: Tree) -> Tree:
    """`tree` without a word of a trial."""
    metadata = dict(tree.get("metadata") or {})
    annotations = metadata.pop("annotations", None) or {}
    if kept := {name: text for name, text in annotations.items() if name not in ANNOTATIONS}:
        metadata["annotations"] = kept
    return {**tree, "metadata": metadata}


def in_force(tree: Tree, *, now: float) -> Tree | None:
    """What a stored tree means now: itself, or what it was before. Raises ValueError as `of`."""
    metadata = tree.get("metadata") or {}
    trial = of(metadata.get("annotations") or {})
    if trial is None or now < trial.ends_at:
        return ended(tree)
    return trial.before


def time_text(seconds: float) -> str:
    """RFC 3339, UTC, whole seconds."""
    return datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> float:
    """Seconds of such a text. Raises ValueError."""
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return found.timestamp()


def _told(before: Tree | None) -> Tree | None:
    """The object before, without what only the store knows of it."""
    if before is None:
        return None
    tree = ended(before)
    metadata = {name: value for name, value in tree["metadata"].items() if name != _VERSION}
    return {**tree, "metadata": metadata}


_VERSION = "resourceVersion"
