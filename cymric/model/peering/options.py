"""What a BGPPeer, or the cluster for its mesh, says about each session, and what it may not say.

The result is the part of `Session` that does not depend on who the peer is. A wish that cannot be
honoured raises `Unsupported`: a session without its password or its limits is worse than none. BFD
is different: a session without it, or with it as before, works as it did (`problem`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from cymric.model.bfd import BfdParameters, bfd_of
from cymric.model.durations import duration_s
from cymric.model.net import Address, parse_address
from cymric.model.peering.inputs import PeeringInputs
from cymric.model.peering.values import (
    ANNOTATION_PREFIX,
    DEFAULT_HOLD_TIME_S,
    DEFAULT_RESTART_TIME_S,
    NextHopMode,
    PasswordRef,
)
from cymric.model.resources import BGPPeer, Resource

LONGEST_HOLD_TIME_S = 65535
MAX_PREFIXES = ANNOTATION_PREFIX + "max-prefixes"
"""Annotation of a BGPPeer: how many prefixes its peers may announce."""
_SOURCES = ("", "UseNodeIP", "None")


class Unsupported(ValueError):
    """A session that cannot be what was asked for; the message says why."""


class Options(TypedDict, total=False):
    """Fields of `Session`."""

    hold_time_s: int
    restart_time_s: int
    ttl_security: int
    is_source_fixed: bool
    next_hop_mode: NextHopMode
    max_prefixes: int | None
    bfd: BfdParameters | None
    is_bfd_unclear: bool
    allowed_own_asns: int
    reachable_by: Address | None
    filters: tuple[str, ...]
    password: PasswordRef | None
    annotations: Mapping[str, str]


def refusal(peer: BGPPeer) -> str:
    """Why no session at all can come of this BGPPeer; empty if one can."""
    spec = peer.spec
    if spec.local_workload_selector:
        return "peers that are local workloads are not supported"
    if not spec.peer_ip and not spec.peer_selector:
        return "has neither peerIP nor peerSelector"
    if spec.peer_selector and spec.asn:
        return "asNumber and peerSelector exclude each other"
    return ""


def of_peer(peer: BGPPeer, *, is_ibgp: bool) -> Options:
    """What a BGPPeer says. Raises Unsupported."""
    spec = peer.spec
    if spec.source_address not in _SOURCES:
        raise Unsupported(f"sourceAddress {spec.source_address!r} is unknown")
    return Options(
        hold_time_s=_hold_time_s(spec.keepalive_time),
        restart_time_s=_restart_time_s(spec.max_restart_time),
        ttl_security=spec.ttl_security or 0,
        is_source_fixed=spec.source_address != "None",
        next_hop_mode=_next_hop_mode(peer, is_ibgp=is_ibgp),
        max_prefixes=_max_prefixes(peer.annotations.get(MAX_PREFIXES)),
        bfd=_bfd(peer),
        is_bfd_unclear=bool(problem(peer)),
        allowed_own_asns=spec.num_allowed_local_as_numbers if spec.peer_ip else 0,
        reachable_by=parse_address(spec.reachable_by) if spec.reachable_by else None,
        filters=spec.filters,
        password=_password(spec.password),
        annotations=_annotations(peer.annotations),
    )


def of_mesh(inputs: PeeringInputs) -> Options:
    """What the cluster says about every mesh session. Raises Unsupported."""
    cluster = inputs.cluster
    default = inputs.configurations.get("default")
    return Options(
        restart_time_s=_restart_time_s(cluster.node_mesh_max_restart_time),
        password=_password(cluster.node_mesh_password),
        bfd=None if default is None else _bfd(default),
        is_bfd_unclear=default is not None and bool(problem(default)),
        annotations=_annotations({} if default is None else default.annotations),
    )


def _hold_time_s(keepalive: str) -> int:
    """Three keepalives, as RFC 4271 §10 suggests; the speaker sends one each third of it."""
    if not keepalive:
        return DEFAULT_HOLD_TIME_S
    return min(LONGEST_HOLD_TIME_S, 3 * max(1, round(duration_s(keepalive))))


def _restart_time_s(text: str) -> int:
    return round(duration_s(text)) if text else DEFAULT_RESTART_TIME_S


def _max_prefixes(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise Unsupported(f"annotation {MAX_PREFIXES} {text!r} is no positive number")
    return int(text)


def problem(resource: Resource) -> str:
    """What is left out of the session, although the resource asks for it; empty if nothing."""
    try:
        bfd_of(resource)
    except ValueError as error:
        return f"BFD is left as it was: annotation {error}"
    return ""


def _bfd(resource: Resource) -> BfdParameters | None:
    return None if problem(resource) else bfd_of(resource)


def _next_hop_mode(peer: BGPPeer, *, is_ibgp: bool) -> NextHopMode:
    if peer.spec.next_hop_mode:
        try:
            return NextHopMode(peer.spec.next_hop_mode)
        except ValueError:
            raise Unsupported(f"nextHopMode {peer.spec.next_hop_mode!r} is unknown") from None
    keeps = peer.spec.keep_original_next_hop and not is_ibgp
    return NextHopMode.KEEP if keeps else NextHopMode.AUTO


def _password(tree: Mapping[str, Any] | None) -> PasswordRef | None:
    if not tree:
        return None
    reference = tree.get("secretKeyRef")
    match reference:
        case {"name": str(name), "key": str(key)} if _is_word(name) and _is_word(key):
            return PasswordRef(name, key)
        case _:
            raise Unsupported("password.secretKeyRef does not name a secret and a key in it")


def _is_word(text: str) -> bool:
    """Whether it can be a file's name: it becomes one."""
    return bool(text) and "/" not in text and "\0" not in text and not text.startswith(".")


def _annotations(given: Mapping[str, str]) -> dict[str, str]:
    return {name: text for name, text in given.items() if name.startswith(ANNOTATION_PREFIX)}
