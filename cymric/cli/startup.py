"""What must be in the datastore before a node's daemons start: the work of `cymric node init`.

The objects are those that a Calico node creates at its start, so that either may come first:

    ClusterInformation default   who the cluster is; `calicoVersion` stays empty, because calicoctl
                                 refuses to work with any other version than its own; the type is
                                 "bgp", the word a Calico node without an orchestrator adds
    Node                         with this machine's address, after a look that no other node has it
    IPPool                       a default one, if there is none
    FelixConfiguration           default: no status reports into etcd; node.<name>: traffic from
                                 pods to their host is returned to the host's own rules, not dropped
    BGPConfiguration default     empty: everything at its default
    nodename                     a file, so that a renamed host stays the same node

Invariants: a field that anybody set is never changed, but for the node's own address and AS number
when these were asked for; every write is guarded by the revision that was read; running it twice,
or on all nodes at once, is harmless.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_network
from pathlib import Path
from typing import Any

from cymric.cli import kinds
from cymric.cli.defaults import empty_resource
from cymric.cli.objects import APPLY_ATTEMPTS, AlreadyExists, Changed, ObjectError, Objects
from cymric.cli.schema import Tree
from cymric.model.keys import ResourceKey
from cymric.model.net import Interface, parse_interface

DEFAULT_POOL = "default-ipv4-ippool"
CLUSTER_TYPE = "bgp"
_FIRST_CHOICE = IPv4Network("192.168.0.0/16")
_OTHER_CHOICES = tuple(IPv4Network(f"172.{n}.0.0/16") for n in range(16, 32))


class AddressConflict(ObjectError):
    """Another node has our address: both would answer for the same routes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """The pool to create if there is none. An empty `cidr` means: choose a free one."""

    cidr: str = ""
    block_size: int = 0
    nat_outgoing: bool = True
    node_selector: str = "all()"
    disable_bgp_export: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `initialise` is to bring about. `address` None keeps the one in the datastore."""

    node_name: str
    address: Interface | None
    as_number: int | None = None
    checks_address: bool = True
    pool: PoolPlan | None = PoolPlan()


Change = Callable[[Tree | None], Tree | None]


async def initialise(objects: Objects, plan: Plan, seen: Sequence[Interface]) -> list[str]:
    """Bring everything about and say, a line each, what was done. Raises ObjectError.

    `seen` are this machine's addresses: the default pool must not contain one.
    """
    if plan.checks_address and plan.address is not None:
        await _refuse_taken(objects, plan.node_name, plan.address)
    done = [
        await _ensure(objects, "ClusterInformation", "default", _cluster_information),
        await _ensure(objects, "Node", plan.node_name, lambda tree: _node(tree, plan)),
        await _pool(objects, plan.pool, seen),
        await _ensure(objects, "FelixConfiguration", "default", _felix_default),
        await _ensure(
            objects,
            "FelixConfiguration",
            f"node.{plan.node_name}",
            lambda tree: _felix_node(tree, plan.node_name),
        ),
        await _ensure(objects, "BGPConfiguration", "default", _bgp_default),
    ]
    return [line for line in done if line]


async def set_ready(objects: Objects, *, is_ready: bool) -> None:
    """Unlock or lock the datastore; ClusterInformation is written if there is none yet."""

    def change(stored: Tree | None) -> Tree | None:
        tree = _cluster_information(stored) or stored
        assert tree is not None
        if stored is not None and stored["spec"].get("datastoreReady") is is_ready:
            return None
        return {**tree, "spec": {**tree["spec"], "datastoreReady": is_ready}}

    await _ensure(objects, "ClusterInformation", "default", change)


def write_nodename(path: Path, name: str) -> None:
    """Keep the node's name in a file, whole or not at all."""
    if path.exists() and path.read_text().strip() == name:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}")
    written.write_text(name)
    written.rename(path)


async def _ensure(objects: Objects, kind_name: str, name: str, change: Change) -> str:
    """Write what `change` makes of the object (None: leave it), whoever else writes meanwhile."""
    kind, key = kinds.find(kind_name), ResourceKey(kind_name, name)
    for _ in range(APPLY_ATTEMPTS):
        stored = await objects.find(key)
        wanted = change(stored)
        if wanted is None:
            return f"{kind_name} {name}: as it should be"
        try:
            if stored is None:
                await objects.create(kind, wanted)
                return f"{kind_name} {name}: created"
            await objects.replace(kind, wanted)
        except (AlreadyExists, Changed):
            continue  # another node's init was quicker: see what it left
        return f"{kind_name} {name}: completed"
    raise Changed(key, f"others kept changing it, {APPLY_ATTEMPTS} times")


def _with_missing(tree: Tree, **wanted: Any) -> Tree | None:
    """The tree with these spec fields set where they are unset; None if all are set."""
    missing = {name: value for name, value in wanted.items() if tree["spec"].get(name) is None}
    return {**tree, "spec": {**tree["spec"], **missing}} if missing else None


def _cluster_information(stored: Tree | None) -> Tree | None:
    tree = stored or empty_resource("ClusterInformation", "default")
    completed = _with_missing(
        tree, clusterGUID=secrets.token_hex(16), datastoreReady=True, clusterType=CLUSTER_TYPE
    )
    types = str((completed or tree)["spec"]["clusterType"]).split(",")
    if CLUSTER_TYPE in types:
        return completed
    spec = {**(completed or tree)["spec"], "clusterType": ",".join([*types, CLUSTER_TYPE])}
    return {**tree, "spec": spec}


def _node(stored: Tree | None, plan: Plan) -> Tree | None:
    tree = stored or empty_resource("Node", plan.node_name)
    bgp = dict(tree["spec"].get("bgp") or {})
    if plan.address is not None:
        bgp["ipv4Address"] = str(plan.address)
    if plan.as_number is not None:
        bgp["asNumber"] = plan.as_number
    if stored is not None and bgp == (tree["spec"].get("bgp") or {}):
        return None
    return {**tree, "spec": {**tree["spec"], **({"bgp": bgp} if bgp else {})}}


def _felix_default(stored: Tree | None) -> Tree | None:
    tree = stored or empty_resource("FelixConfiguration", "default")
    return _with_missing(tree, reportingInterval="0s", logSeverityScreen="Info")


def _felix_node(stored: Tree | None, name: str) -> Tree | None:
    tree = stored or empty_resource("FelixConfiguration", f"node.{name}")
    return _with_missing(tree, defaultEndpointToHostAction="Return")


def _bgp_default(stored: Tree | None) -> Tree | None:
    return None if stored else empty_resource("BGPConfiguration", "default")


async def _refuse_taken(objects: Objects, name: str, address: Interface) -> None:
    for tree in (await objects.list(kinds.find("Node"))).trees:
        other = tree["metadata"].get("name")
        text = (tree["spec"].get("bgp") or {}).get("ipv4Address")
        if other != name and text and parse_interface(text).ip == address.ip:
            raise AddressConflict(f"node {other} already has the address {address.ip}")


async def _pool(objects: Objects, plan: PoolPlan | None, seen: Sequence[Interface]) -> str:
    pools = await objects.pools()
    if plan is None or any(network.version == 4 for network in pools.values()):
        return ""
    spec: Tree = {
        "cidr": plan.cidr or str(_free_range(seen)),
        "natOutgoing": plan.nat_outgoing,
        "nodeSelector": plan.node_selector,
        "blockSize": plan.block_size,
        "disableBGPExport": plan.disable_bgp_export,
    }
    try:
        tree = empty_resource("IPPool", DEFAULT_POOL, spec)
        await objects.create(kinds.find("IPPool"), tree)
    except AlreadyExists:
        return ""  # another node's init was quicker
    return f"IPPool {DEFAULT_POOL}: created, {spec['cidr']}"


def _free_range(seen: Sequence[Interface]) -> IPv4Network:
    """The first of Calico's ranges in which this machine has no address."""
    mine = [ip_network(interface.ip) for interface in seen if interface.version == 4]
    for network in (_FIRST_CHOICE, *_OTHER_CHOICES):
        if not any(network.overlaps(address) for address in mine):
            return network
    raise ObjectError("every usual pool range holds an address of this machine: name one yourself")
