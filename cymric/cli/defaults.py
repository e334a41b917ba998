"""What is filled in before an object is written, as Calico's client does. Pure.

A function per kind takes the conformed tree (and what is stored now, or None) and changes it in
place: the tree is the caller's own copy. Calico 3.32 also writes a few defaults of the CRD schema
into FelixConfiguration and BGPConfiguration; older releases do not, and every reader takes an
absent field for its default, so they are left out here. Source: Calico 3.32 clientv3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cymric.cli.schema import Tree
from cymric.model import endpoints, policy
from cymric.model.net import parse_network
from cymric.model.resources import API_VERSION

DEFAULT_NAMESPACE = "default"
LABEL_TIER = "projectcalico.org/tier"


def fill(tree: Tree, stored: Tree | None) -> None:
    """Fill in the defaults of the tree's kind."""
    _FILLERS.get(tree["kind"], _nothing)(tree, stored)


def empty_resource(kind: str, name: str, spec: Tree | None = None) -> Tree:
    """A fresh object as a user would write it."""
    return {
        "kind": kind,
        "apiVersion": API_VERSION,
        "metadata": {"name": name},
        "spec": spec or {},
    }


def _ip_pool(tree: Tree, stored: Tree | None) -> None:
    spec = tree["spec"]
    spec.setdefault("vxlanMode", "Never")
    spec.setdefault("ipipMode", "Never")
    spec.setdefault("nodeSelector", "all()")
    spec.setdefault("allowedUses", ["Workload", "Tunnel"])
    spec.setdefault("assignmentMode", "Automatic")
    if not spec.get("blockSize"):
        kept = (stored or {}).get("spec", {}).get("blockSize")
        spec["blockSize"] = kept or _default_block_size(spec.get("cidr"))


def _default_block_size(cidr: object) -> int:
    try:
        return 122 if parse_network(str(cidr)).version == 6 else 26
    except ValueError:
        return 26  # the check of the cidr will tell what is wrong


def _node(tree: Tree, stored: Tree | None) -> None:
    tree.setdefault("status", {})


def _workload_endpoint(tree: Tree, stored: Tree | None) -> None:
    metadata, spec = tree["metadata"], tree["spec"]
    metadata.setdefault("namespace", DEFAULT_NAMESPACE)
    labels = dict(metadata.get("labels", {}))
    labels[endpoints.LABEL_NAMESPACE] = metadata["namespace"]
    labels[endpoints.LABEL_ORCHESTRATOR] = spec.get("orchestrator", "")
    metadata["labels"] = dict(sorted(labels.items()))


def workload_endpoint_name(spec: Tree) -> str:
    """The name that the endpoint's fields make; empty while fields are missing."""
    by_orchestrator = {"k8s": "pod", "cni": "containerID"}
    orchestrator = spec.get("orchestrator", "")
    workload = spec.get(by_orchestrator.get(orchestrator, "workload"), "")
    if orchestrator == "libnetwork":
        workload = orchestrator
    try:
        return endpoints.endpoint_name(
            spec.get("node", ""), orchestrator, workload, spec.get("endpoint", "")
        )
    except ValueError:
        return ""


def _policy(tree: Tree, stored: Tree | None) -> None:
    metadata, spec = tree["metadata"], tree["spec"]
    spec["tier"] = spec.get("tier") or policy.DEFAULT_TIER
    if not spec.get("types"):
        if spec.get("egress") and not spec.get("ingress"):
            spec["types"] = [policy.EGRESS]
        elif spec.get("egress"):
            spec["types"] = [policy.INGRESS, policy.EGRESS]
        else:
            spec["types"] = [policy.INGRESS]
    labels = {**metadata.get("labels", {}), LABEL_TIER: spec["tier"]}
    metadata["labels"] = dict(sorted(labels.items()))
    # Calico of every version since 3.30 finds the user's name here, whatever the key says.
    hidden = f'{{"name":"{metadata["name"]}"}}'
    annotations = {policy.NAME_ANNOTATION: hidden, **metadata.get("annotations", {})}
    metadata["annotations"] = dict(sorted(annotations.items()))


def _tier(tree: Tree, stored: Tree | None) -> None:
    tree["spec"].setdefault("defaultAction", "Deny")
    tree.setdefault("status", {})


def _nothing(tree: Tree, stored: Tree | None) -> None:
    pass


_FILLERS: Mapping[str, Callable[[Tree, Tree | None], None]] = {
    "GlobalNetworkPolicy": _policy,
    "IPPool": _ip_pool,
    "NetworkPolicy": _policy,
    "Node": _node,
    "StagedGlobalNetworkPolicy": _policy,
    "StagedNetworkPolicy": _policy,
    "Tier": _tier,
    "WorkloadEndpoint": _workload_endpoint,
}
