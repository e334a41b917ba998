"""Objects for tests of policy: short specs in, typed updates and pictures out."""

from __future__ import annotations

import json
from typing import Any

from cymric.model import codec
from cymric.model.keys import Key, ResourceKey
from felix.calc.state import Calculation
from felix.calc.values import Desired

NODE = "node1"
Spec = dict[str, Any]
Stored = dict[str, Spec]
"""Specs by `Kind [namespace/]name`; `labels` and `annotations` in them go to the metadata."""


def wep(pod: str, *, node: str = NODE, **spec: Any) -> Spec:
    """The spec of a WorkloadEndpoint; its key is `<namespace>/<node>-k8s-<pod>-eth0`."""
    return {
        "orchestrator": "k8s",
        "node": node,
        "pod": pod,
        "endpoint": "eth0",
        "ipNetworks": ["198.19.16.2/32"],
        "profiles": ["projectcalico-default-allow"],
        "interfaceName": f"cali{pod}",
        "mac": "02:00:00:00:00:01",
        **spec,
    }


def hep(*, node: str = NODE, **spec: Any) -> Spec:
    """The spec of a HostEndpoint."""
    return {"node": node, **spec}


def update(name: str, spec: Spec) -> tuple[Key, object]:
    """The typed pair behind `Kind [namespace/]name`, as the syncer delivers it."""
    kind, _, full = name.partition(" ")
    namespace, _, short = full.rpartition("/")
    key = ResourceKey(kind, short, namespace)
    spec = dict(spec)
    metadata: Spec = {"name": short, "namespace": namespace}
    metadata |= {word: spec.pop(word) for word in ("labels", "annotations") if word in spec}
    tree = {"kind": kind, "apiVersion": "projectcalico.org/v3", "metadata": metadata, "spec": spec}
    try:
        decoded = codec.decode(str(key), json.dumps(tree).encode())
    except codec.Malformed as error:
        if error.damaged is None:
            raise
        return key, error.damaged
    assert decoded is not None
    return decoded


def calculate(stored: Stored, **environment: str) -> Desired:
    """What is wanted when exactly this is stored."""
    calculation = Calculation(NODE, environment)
    for name, spec in stored.items():
        calculation.on_update(*update(name, spec))
    return calculation.desired()
