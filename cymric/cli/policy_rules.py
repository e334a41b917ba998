"""What policies, tiers, sets of networks and host endpoints must satisfy to be written. Pure.

Only what concerns several fields at once is here: each field by itself, and each rule, is checked
by the decoding that the agents use. Source: Calico 3.32 libcalico-go validator.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cymric.cli.schema import Problem, Tree
from cymric.model.net import parse_network

Problems = Iterator[Problem]

BUILT_IN_TIERS = frozenset({"default", "kube-admin", "kube-baseline"})
_BLANKS = re.compile(r"\s")


def policy(tree: Tree) -> Problems:
    """NetworkPolicy, GlobalNetworkPolicy and their staged forms."""
    spec = tree["spec"]
    types = spec.get("types", [])
    if len(set(types)) != len(types):
        yield Problem("spec.types", "names a direction twice")
    if spec.get("doNotTrack") and spec.get("preDNAT"):
        yield Problem("spec.preDNAT", "not together with doNotTrack")
    for name in ("doNotTrack", "preDNAT"):
        if spec.get(name) and not spec.get("applyOnForward"):
            yield Problem("spec.applyOnForward", f"must be true with {name}")
    if spec.get("preDNAT") and (spec.get("egress") or "Egress" in types):
        yield Problem("spec.egress", "preDNAT policy is for ingress only")
    staged = spec.get("stagedAction", "Set")
    if staged not in ("Set", "Delete", "Learn", "Ignore"):
        yield Problem("spec.stagedAction", f"{staged!r} is not Set, Delete, Learn, Ignore")
    is_global = tree["kind"].endswith("GlobalNetworkPolicy")
    yield from rules(spec, is_global=is_global)


def rules(spec: Tree, *, is_global: bool) -> Problems:
    """Both lists of rules."""
    for direction in ("ingress", "egress"):
        for index, rule in enumerate(spec.get(direction, ())):
            path = f"spec.{direction}[{index}]"
            action = rule.get("action")
            if action not in ("Allow", "Deny", "Log", "Pass"):
                yield Problem(f"{path}.action", f"{action!r} is not Allow, Deny, Log or Pass")
            if rule.get("http") and (direction == "egress" or action != "Allow"):
                yield Problem(f"{path}.http", "only in Allow rules for ingress")
            for side in ("source", "destination"):
                yield from _side(rule.get(side, {}), direction, side, path, is_global)


def _side(entity: Tree, direction: str, side: str, path: str, is_global: bool) -> Problems:
    at = f"{path}.{side}"
    if "global()" in _BLANKS.sub("", entity.get("selector", "")):
        yield Problem(f"{at}.selector", "global() is for namespaceSelector")
    namespaces = _BLANKS.sub("", entity.get("namespaceSelector", ""))
    if "global()" in namespaces and namespaces != "global()":
        yield Problem(f"{at}.namespaceSelector", "global() stands alone")
    for index, net in enumerate(entity.get("notNets", ())):
        if _is_everything(net):
            yield Problem(f"{at}.notNets[{index}]", "would exclude everything")
    services = entity.get("services")
    if services is None:
        return
    if (direction, side) not in (("egress", "destination"), ("ingress", "source")):
        yield Problem(f"{at}.services", "only where egress goes to or ingress comes from")
    if is_global and not services.get("namespace"):
        yield Problem(f"{at}.services.namespace", "is required in a policy of the cluster")
    excluded = [
        "selector",
        "notSelector",
        "namespaceSelector",
        "serviceAccounts",
        "nets",
        "notNets",
    ]
    excluded += ["ports", "notPorts"] if side == "destination" else []
    for name in excluded:
        if entity.get(name):
            yield Problem(f"{at}.services", f"not together with {name}")


def _is_everything(net: Any) -> bool:
    try:
        return parse_network(net).prefixlen == 0
    except ValueError:
        return False  # told by the decoding


def tier(tree: Tree) -> Problems:
    """A tier's name is one label; those of Calico keep their place."""
    name, spec = tree["metadata"].get("name", ""), tree["spec"]
    if "." in name or len(name) > 63:
        yield Problem("metadata.name", f"{name!r} is no single label of at most 63 characters")
    if name in BUILT_IN_TIERS:
        action = "Deny" if name == "default" else "Pass"
        if spec.get("defaultAction", action) != action:
            yield Problem("spec.defaultAction", f"of tier {name} is {action}")


def network_set(tree: Tree) -> Problems:
    """Its namespace is not for the user to set as a label."""
    if "projectcalico.org/namespace" in tree["metadata"].get("labels", {}):
        yield Problem("metadata.labels", "projectcalico.org/namespace cannot be set")
