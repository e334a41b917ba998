"""What must hold before an object is written, as Calico's validation has it. Pure.

`check` looks at one conformed and filled tree, at what is stored now, and at the little of the
rest of the cluster that a rule needs (`Surroundings`). It returns every problem it finds, by field.
The typed structs that the daemons decode with are the last check: nothing is written that a daemon
would then report as malformed. Source: Calico 3.32 libcalico-go validator and clientv3.
"""

from __future__ import annotations

import re

from cymric.cli.kinds import Kind
from cymric.cli.rules import RULES, Problems, Surroundings
from cymric.cli.schema import Problem, Tree
from cymric.model import codec
from cymric.model.keys import ResourceKey
from cymric.model.resources import API_VERSION

MAX_NAME_LENGTH = 253
MAX_ANNOTATION_BYTES = 256 * 1024

_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_FREE_NAME = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]*[A-Za-z0-9])?")
_LABEL_NAME = re.compile(r"[A-Za-z0-9]([-_.A-Za-z0-9]{0,61}[A-Za-z0-9])?")


def check(kind: Kind, tree: Tree, stored: Tree | None, around: Surroundings) -> list[Problem]:
    """Every reason not to write `tree` over `stored` (None: create it)."""
    problems = [*_envelope(kind, tree), *RULES[kind.name](tree, stored, around)]
    if not problems:
        problems += _as_daemons_read(kind, tree)
    return problems


def warnings(tree: Tree) -> list[str]:
    """What is legal and stored, but will not do here what it does in Calico."""
    spec = tree["spec"]
    if tree["kind"] == "IPPool" and not {spec.get("ipipMode"), spec.get("vxlanMode")} <= {"Never"}:
        name = tree["metadata"]["name"]
        return [f"IPPool {name} asks for encapsulation, which Cymric does not do: pods are routed"]
    return []


def key_of(kind: Kind, tree: Tree) -> ResourceKey:
    """The key a tree is stored under."""
    metadata = tree["metadata"]
    namespace = metadata.get("namespace", "") if kind.is_namespaced else ""
    return ResourceKey(kind.name, metadata["name"], namespace)


def _as_daemons_read(kind: Kind, tree: Tree) -> Problems:
    try:
        codec.decode(str(key_of(kind, tree)), codec.encode_tree(tree))
    except codec.Malformed as error:
        text, _, path = error.reason.partition(" - at `$.")
        yield Problem(path.rstrip("`"), text)


# --- what all kinds share -------------------------------------------------------------------------


def _envelope(kind: Kind, tree: Tree) -> Problems:
    metadata = tree["metadata"]
    if tree.get("apiVersion") != API_VERSION:
        yield Problem("apiVersion", f"must be {API_VERSION}, not {tree.get('apiVersion')!r}")
    yield from _name(kind, metadata.get("name", ""), tree["spec"])
    if kind.is_namespaced and not _DNS_NAME.fullmatch(metadata.get("namespace", "")):
        yield Problem("metadata.namespace", f"{metadata.get('namespace')!r} is no namespace name")
    if not kind.is_namespaced and metadata.get("namespace"):
        yield Problem("metadata.namespace", f"{kind.name} objects have no namespace")
    for label, value in metadata.get("labels", {}).items():
        prefix, slash, name = label.rpartition("/")
        if not _LABEL_NAME.fullmatch(name) or (slash and not _DNS_NAME.fullmatch(prefix)):
            yield Problem("metadata.labels", f"{label!r} is no label name")
        if value and not _LABEL_NAME.fullmatch(value):
            yield Problem("metadata.labels", f"{value!r} is no value for label {label!r}")
    annotations = metadata.get("annotations", {})
    if (
        sum(len(k.encode()) + len(v.encode()) for k, v in annotations.items())
        > MAX_ANNOTATION_BYTES
    ):
        yield Problem("metadata.annotations", f"more than {MAX_ANNOTATION_BYTES} bytes in all")


def _name(kind: Kind, name: str, spec: Tree) -> Problems:
    path = "metadata.name"
    pattern = _FREE_NAME if kind.name == "Profile" else _DNS_NAME
    if kind.name == "WorkloadEndpoint":
        return  # computed from the spec, and compared with it when decoded
    if not name:
        yield Problem(path, "is required")
    elif len(name) > MAX_NAME_LENGTH or not pattern.fullmatch(name):
        yield Problem(path, f"{name!r} is no name: lower case letters, digits, '-' and '.'")
    is_node_scoped = name.startswith("node.")
    if kind.name == "ClusterInformation" and name != "default":
        yield Problem(path, "the only ClusterInformation is called default")
    if kind.name == "BGPConfiguration" and name != "default" and not is_node_scoped:
        yield Problem(path, f"must be default or node.<node name>, not {name!r}")
    if kind.name == "FelixConfiguration":
        is_scoped = name == "default" or is_node_scoped
        if not is_scoped and not spec.get("nodeSelector"):
            yield Problem(path, f"{name!r} is not default or node.<node name> and no nodeSelector")
        if is_scoped and spec.get("nodeSelector"):
            yield Problem("spec.nodeSelector", f"not allowed on {name}")
