"""What stands in for policy objects that do not parse: never weaker than what may have been meant.

Calico treats such an object as absent, which opens whatever it closed. Here it is read as far as it
can be, and the rest is read in the strictest way:

- A rule that is not understood: if it allows or logs, it is left out, for without it at most less
  is allowed. If it denies, passes, or nobody knows what it does, everything is denied in its place.
- A policy of which anything else is not understood denies everything, in its place: for all
  endpoints that its readable selectors leave (all of the namespace, or of the cluster), in the
  directions it names or both, at its order if readable, else first, in its tier if readable.
- A profile keeps its readable labels; a direction without readable rules denies.
- Tiers keep their order if readable (else they count as missing), and deny at their end.
- Sets of networks keep what is readable. That can be weaker, where a rule denies by the set: there
  is no stricter reading of a set that serves both sides.
- A host endpoint keeps what is readable; without its node, or any interface, there is none.

Nothing here depends on what was stored before: after a restart the reading is the same. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from cymric.model.endpoints import HostEndpoint, HostEndpointPort
from cymric.model.keys import ResourceKey
from cymric.model.policy import (
    EGRESS,
    INGRESS,
    GlobalNetworkPolicy,
    GlobalNetworkSet,
    NetworkPolicy,
    NetworkSet,
    Profile,
    Tier,
)
from cymric.model.resources import Resource
from cymric.model.rules import Rule, parse_action, parse_net
from cymric.model.selector import parse as parse_selector

Tree = dict[str, Any]

FIRST = -1e308
"""Ahead of every order that anyone writes."""

T = TypeVar("T", bound=Resource)


class Damaged(msgspec.Struct, frozen=True):
    """A stored object that is not as it should be, and what stands in for it."""

    reason: str
    stand_in: Resource


def stand_in(key: ResourceKey, value: bytes) -> Resource | None:
    """The strictest reading of `value`; None for kinds without one, or if there is nothing left."""
    read = _READERS.get(key.kind)
    if read is None:
        return None
    try:
        tree = _object(msgspec.json.decode(value))
    except (msgspec.DecodeError, UnicodeDecodeError):
        tree = {}
    metadata = _object(tree.get("metadata"))
    clean = {
        "name": key.name,
        "namespace": key.namespace,
        "labels": _texts(metadata.get("labels")),
        "annotations": _texts(metadata.get("annotations")),
    }
    try:
        return read({"kind": key.kind, "metadata": clean}, _object(tree.get("spec")))
    except msgspec.ValidationError:
        return None


def _policy(kind: type[NetworkPolicy] | type[GlobalNetworkPolicy]) -> Callable[..., Resource]:
    def read(around: Tree, spec: Tree) -> Resource:
        rules: Tree = {name: _rules(spec[name]) for name in ("ingress", "egress") if name in spec}
        if spec:
            with suppress(msgspec.ValidationError):  # more than rules is broken
                return _convert(kind, around, {**spec, **rules})
        return _convert(kind, around, _deny_everything(kind, spec))

    return read


def _deny_everything(kind: type[NetworkPolicy] | type[GlobalNetworkPolicy], spec: Tree) -> Tree:
    found: Tree = {
        "order": FIRST,
        "ingress": [_DENY],
        "egress": [_DENY],
        "types": [INGRESS, EGRESS],
    }
    readers: dict[str, Callable[[Any], bool]] = {
        "tier": lambda value: isinstance(value, str),
        "order": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
        "selector": _is_selector,
        "serviceAccountSelector": _is_selector,
        "types": lambda value: bool(value) and _is_types(value),
    }
    if kind is GlobalNetworkPolicy:
        readers["namespaceSelector"] = _is_selector
        for name in ("doNotTrack", "preDNAT", "applyOnForward"):
            readers[name] = lambda value: isinstance(value, bool)
        found["applyOnForward"] = True
        if spec.get("doNotTrack") is True and spec.get("preDNAT") is True:
            readers.pop("doNotTrack")
    for name, is_readable in readers.items():
        if spec.get(name) is not None and is_readable(spec[name]):
            found[name] = spec[name]
    if spec and spec.get("order") is None:
        found["order"] = None  # none is readable, too: it means last
    return found


def _is_types(value: object) -> bool:
    return isinstance(value, list) and all(item in (INGRESS, EGRESS) for item in value)


def _is_selector(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(parse_selector(value))
    except ValueError:
        return False


_DENY: Tree = {"action": "Deny"}


def _rules(value: object) -> list[Tree]:
    """The rules of one direction, those that cannot be read in their strictest form."""
    if value is None:
        return []
    if not isinstance(value, list):
        return [_DENY]
    found: list[Tree] = []
    for rule in value:
        try:
            msgspec.convert(rule, Rule)
        except msgspec.ValidationError:
            if not _only_allows(rule):
                found.append(_DENY)
        else:
            found.append(rule)
    return found


def _only_allows(rule: object) -> bool:
    if not isinstance(rule, dict) or not isinstance(rule.get("action", ""), str):
        return False
    try:
        return parse_action(rule.get("action", "")) in ("allow", "log")
    except ValueError:
        return False


def _profile(around: Tree, spec: Tree) -> Resource:
    return _convert(
        Profile,
        around,
        {
            "ingress": _rules(spec.get("ingress")),
            "egress": _rules(spec.get("egress")),
            "labelsToApply": _texts(spec.get("labelsToApply")),
        },
    )


def _tier(around: Tree, spec: Tree) -> Resource | None:
    order = spec.get("order")
    if not spec or isinstance(order, bool) or not isinstance(order, int | float | None):
        return None
    return _convert(Tier, around, {"order": order, "defaultAction": "Deny"})


def _network_set(kind: type[NetworkSet] | type[GlobalNetworkSet]) -> Callable[..., Resource]:
    def read(around: Tree, spec: Tree) -> Resource:
        return _convert(kind, around, {"nets": list(filter(_is_net, _list(spec.get("nets"))))})

    return read


def _is_net(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(parse_net(value))
    except ValueError:
        return False


def _host_endpoint(around: Tree, spec: Tree) -> Resource:
    return _convert(
        HostEndpoint,
        around,
        {
            "node": spec.get("node"),
            "interfaceName": spec.get("interfaceName", ""),
            "expectedIPs": [
                text for text in _list(spec.get("expectedIPs")) if _is_net(text) and "/" not in text
            ],
            "profiles": [name for name in _list(spec.get("profiles")) if isinstance(name, str)],
            "ports": list(filter(_is_port, _list(spec.get("ports")))),
        },
    )


def _is_port(value: object) -> bool:
    try:
        msgspec.convert(value, HostEndpointPort)
    except msgspec.ValidationError:
        return False
    return True


_READERS: Mapping[str, Callable[[Tree, Tree], Resource | None]] = {
    "GlobalNetworkPolicy": _policy(GlobalNetworkPolicy),
    "GlobalNetworkSet": _network_set(GlobalNetworkSet),
    "HostEndpoint": _host_endpoint,
    "NetworkPolicy": _policy(NetworkPolicy),
    "NetworkSet": _network_set(NetworkSet),
    "Profile": _profile,
    "Tier": _tier,
}


def _convert(kind: type[T], around: Tree, spec: Tree) -> T:
    return msgspec.convert({**around, "spec": spec}, kind)


def _object(value: object) -> Tree:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: object) -> dict[str, str]:
    return {name: text for name, text in _object(value).items() if isinstance(text, str)}
