"""What each kind's fields must satisfy: one function a kind, one sentence of Calico's a line. Pure.

A function takes the conformed and filled tree, what is stored now (None: nothing) and the
surroundings, and yields a problem for each rule broken. `checks.py` calls them.
Source: Calico 3.32 libcalico-go validator and clientv3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from cymric.cli import policy_rules
from cymric.cli.schema import Problem, Tree
from cymric.model.bgp_filter import BGPFilterSpec, FilterRule
from cymric.model.net import Network, contains, parse_address, parse_network
from cymric.model.resources import DEFAULT_ALLOW_PROFILE
from cymric.model.selector import SelectorError
from cymric.model.selector import parse as parse_selector

_COMMUNITY = re.compile(r"\d{1,5}:\d{1,5}|\d{1,10}:\d{1,10}:\d{1,10}")
_LINK_LOCAL = (parse_network("169.254.0.0/16"), parse_network("fe80::/10"))
_ENCAPSULATION = ("Never", "Always", "CrossSubnet")
_DEFAULT_ONLY = (
    "nodeToNodeMeshEnabled",
    "asNumber",
    "serviceLoadBalancerIPs",
    "serviceExternalIPs",
    "serviceClusterIPs",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What rules need to know of other objects. Pools are every other pool by name."""

    pools: Mapping[str, Network]
    blocks: Sequence[Network]
    filters: frozenset[str]


NOWHERE = Surroundings(pools={}, blocks=(), filters=frozenset())

Problems = Iterator[Problem]


def _ip_pool(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    spec = tree["spec"]
    try:
        network = _masked_network(spec.get("cidr", ""))
    except ValueError as error:
        yield Problem("spec.cidr", str(error))
        return
    yield from _selectors(spec, "nodeSelector", "namespaceSelector")
    yield from _encapsulation(spec, network)
    yield from _uses(spec)
    yield from _one_of(spec, "assignmentMode", ("Automatic", "Manual"))
    if any(network.version == local.version and network.overlaps(local) for local in _LINK_LOCAL):
        yield Problem("spec.cidr", f"{network} overlaps the link local range")
    low, high = (20, 32) if network.version == 4 else (116, 128)
    size = spec["blockSize"]
    if not low <= size <= high:
        yield Problem("spec.blockSize", f"{size} is not between {low} and {high}")
    elif size < network.prefixlen and not spec.get("disabled"):
        yield Problem("spec.blockSize", f"a /{size} block is larger than the pool {network}")
    if stored is None:
        yield from _room(network, size, around)
    else:
        yield from _unchanged(spec, stored["spec"], network)


def _encapsulation(spec: Tree, network: Network) -> Problems:
    yield from _one_of(spec, "ipipMode", _ENCAPSULATION)
    yield from _one_of(spec, "vxlanMode", _ENCAPSULATION)
    has_ipip = spec["ipipMode"] != "Never"
    if has_ipip and network.version == 6:
        yield Problem("spec.ipipMode", "IPIP is for IPv4 only")
    if has_ipip and spec["vxlanMode"] != "Never":
        yield Problem("spec.vxlanMode", "not together with ipipMode")


def _uses(spec: Tree) -> Problems:
    uses = spec["allowedUses"]
    if unknown := set(uses) - {"Workload", "Tunnel", "LoadBalancer"}:
        yield Problem("spec.allowedUses", f"{min(unknown)!r} is not Workload, Tunnel, LoadBalancer")
    if "LoadBalancer" in uses:
        if len(uses) > 1:
            yield Problem("spec.allowedUses", "LoadBalancer excludes other uses")
        if {spec["ipipMode"], spec["vxlanMode"]} != {"Never"}:
            yield Problem("spec.allowedUses", "a LoadBalancer pool has no encapsulation")
        if spec.get("disableBGPExport"):
            yield Problem("spec.disableBGPExport", "a LoadBalancer pool is always exported")
        if spec["nodeSelector"] != "all()":
            yield Problem("spec.nodeSelector", "must be all() for a LoadBalancer pool")
    if spec.get("namespaceSelector"):
        if uses == ["Tunnel"]:
            yield Problem("spec.namespaceSelector", "a pool for tunnels has no namespaces")
        if "global()" in re.sub(r"\s", "", spec["namespaceSelector"]):
            yield Problem("spec.namespaceSelector", "global() is not allowed here")


def _room(network: Network, block_size: int, around: Surroundings) -> Problems:
    for name, other in around.pools.items():
        if other.version == network.version and other.overlaps(network):
            yield Problem("spec.cidr", f"{network} overlaps IPPool {name} ({other})")
    for block in around.blocks:
        if contains(network, block) and block.prefixlen != block_size:
            yield Problem("spec.blockSize", f"block {block} exists in {network} with another size")
            return


def _unchanged(spec: Tree, before: Tree, network: Network) -> Problems:
    if before.get("cidr") != str(network):
        yield Problem("spec.cidr", f"cannot be changed (it is {before.get('cidr')})")
    if before.get("blockSize") and before["blockSize"] != spec["blockSize"]:
        yield Problem("spec.blockSize", f"cannot be changed (it is {before['blockSize']})")
    was = "LoadBalancer" in (before.get("allowedUses") or ())
    if was != ("LoadBalancer" in spec["allowedUses"]):
        yield Problem("spec.allowedUses", "cannot change to or from LoadBalancer")


def _ip_reservation(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    yield from _networks(tree["spec"].get("reservedCIDRs", ()), "spec.reservedCIDRs")


def _bgp_peer(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    spec = tree["spec"]
    for one, other in (
        ("node", "nodeSelector"),
        ("peerIP", "peerSelector"),
        ("asNumber", "peerSelector"),
        ("keepOriginalNextHop", "nextHopMode"),
        ("localWorkloadSelector", "peerIP"),
        ("localWorkloadSelector", "peerSelector"),
    ):
        if spec.get(one) and spec.get(other):
            yield Problem(f"spec.{one}", f"not together with {other}")
    if not any(spec.get(name) for name in ("peerIP", "peerSelector", "localWorkloadSelector")):
        yield Problem("spec.peerIP", "one of peerIP, peerSelector, localWorkloadSelector is needed")
    if not spec.get("peerSelector") and not spec.get("asNumber"):
        yield Problem("spec.asNumber", "is required unless peerSelector chooses nodes")
    if spec.get("reachableBy"):
        if not spec.get("peerIP"):
            yield Problem("spec.reachableBy", "needs peerIP")
        try:
            parse_address(spec["reachableBy"])
        except ValueError as error:
            yield Problem("spec.reachableBy", str(error))
    if not 0 <= spec.get("ttlSecurity", 0) <= 255:
        yield Problem("spec.ttlSecurity", "is not between 0 and 255")
    yield from _selectors(spec, "nodeSelector", "peerSelector", "localWorkloadSelector")
    yield from _one_of(spec, "nextHopMode", ("Auto", "Self", "Keep"))
    yield from _one_of(spec, "sourceAddress", ("UseNodeIP", "None"))
    yield from _one_of(spec, "reversePeering", ("Auto", "Manual"))
    for name in spec.get("filters", ()):
        if name not in around.filters:
            yield Problem("spec.filters", f"there is no BGPFilter {name!r}")


def _bgp_filter(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    for name in BGPFilterSpec.__struct_encode_fields__:
        for index, rule in enumerate(tree["spec"].get(name, ())):
            try:
                msgspec.convert(rule, FilterRule).check(4 if name.endswith("V4") else 6)
            except (msgspec.ValidationError, ValueError) as error:
                yield Problem(f"spec.{name}[{index}]", str(error))


def _bgp_configuration(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    spec, name = tree["spec"], tree["metadata"].get("name")
    for entry in _DEFAULT_ONLY:
        if name != "default" and entry in spec:
            yield Problem(f"spec.{entry}", "can be set on the BGPConfiguration default only")
    levels = ("Debug", "Info", "Warning", "Error", "Fatal")
    yield from _one_of(spec, "logSeverityScreen", levels)
    yield from _one_of(spec, "bindMode", ("None", "NodeIP"))
    yield from _one_of(spec, "serviceLoadBalancerAggregation", ("Enabled", "Disabled"))
    yield from _one_of(spec, "programClusterRoutes", ("Enabled", "Disabled"))
    for entry in ("serviceLoadBalancerIPs", "serviceExternalIPs", "serviceClusterIPs"):
        yield from _networks(
            [item.get("cidr", "") for item in spec.get(entry, ())], f"spec.{entry}"
        )
    if spec.get("nodeToNodeMeshEnabled") is False:
        for entry in ("nodeMeshPassword", "nodeMeshMaxRestartTime"):
            if spec.get(entry):
                yield Problem(f"spec.{entry}", "not with the node to node mesh disabled")
    for entry in ("ipv4NormalRoutePriority", "ipv6NormalRoutePriority"):
        if not 1 <= spec.get(entry, 1) <= 2147483646:
            yield Problem(f"spec.{entry}", "is not between 1 and 2147483646")
    yield from _communities(spec)


def _communities(spec: Tree) -> Problems:
    advertised = spec.get("prefixAdvertisements", ())
    defined = spec.get("communities", ())
    if defined and not advertised:
        yield Problem("spec.communities", "are of no use without prefixAdvertisements")
    for index, item in enumerate(defined):
        if not _is_community(item.get("value", "")):
            yield Problem(f"spec.communities[{index}].value", "is not aa:nn or aa:nn:mm")
    names = {item.get("name") for item in defined}
    for index, item in enumerate(advertised):
        path = f"spec.prefixAdvertisements[{index}]"
        yield from _networks([item.get("cidr", "")], f"{path}.cidr")
        for name in item.get("communities", ()):
            if name not in names and not _is_community(name):
                yield Problem(f"{path}.communities", f"{name!r} is neither defined nor a community")


def _is_community(text: str) -> bool:
    if not _COMMUNITY.fullmatch(text):
        return False
    parts = [int(part) for part in text.split(":")]
    return max(parts) < (2**16 if len(parts) == 2 else 2**32)


def _node(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    bgp = tree["spec"].get("bgp")
    if bgp is not None and not bgp:
        yield Problem("spec.bgp", "is empty; leave it out instead")
    for index, item in enumerate(tree["spec"].get("addresses", ())):
        try:
            parse_address(item.get("address", ""))
        except ValueError as error:
            yield Problem(f"spec.addresses[{index}].address", str(error))
    if cluster_id := (bgp or {}).get("routeReflectorClusterID"):
        try:
            is_ipv4 = parse_address(cluster_id).version == 4
        except ValueError:
            is_ipv4 = False
        if not is_ipv4:
            yield Problem(
                "spec.bgp.routeReflectorClusterID", f"{cluster_id!r} is not like 244.0.0.1"
            )


def _workload_endpoint(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    spec = tree["spec"]
    for entry in ("orchestrator", "node", "endpoint"):
        if not spec.get(entry):
            yield Problem(f"spec.{entry}", "is required")
    by_orchestrator = {"k8s": "pod", "cni": "containerID", "libnetwork": ""}
    needed = by_orchestrator.get(spec.get("orchestrator", ""), "workload")
    if needed and not spec.get(needed):
        yield Problem(f"spec.{needed}", f"is required by orchestrator {spec.get('orchestrator')!r}")
    addresses = {network.split("/")[0] for network in spec.get("ipNetworks", ())}
    for index, nat in enumerate(spec.get("ipNATs", ())):
        if nat.get("internalIP") not in addresses:
            yield Problem(f"spec.ipNATs[{index}].internalIP", "is none of ipNetworks")


def _profile(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    if tree["metadata"].get("name") == DEFAULT_ALLOW_PROFILE:
        yield Problem("metadata.name", "this profile is built in and cannot be written")
    yield from policy_rules.rules(tree["spec"], is_global=True)


def _of_tree(
    rule: Callable[[Tree], Problems],
) -> Callable[[Tree, Tree | None, Surroundings], Problems]:
    """A rule that needs to know of nothing else."""
    return lambda tree, stored, around: rule(tree)


def _felix_configuration(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    spec = tree["spec"]
    yield from _selectors(spec, "nodeSelector")
    for entry in ("failsafeInboundHostPorts", "failsafeOutboundHostPorts"):
        for index, item in enumerate(spec.get(entry, ())):
            if not 0 < item.get("port", 0) < 65536:
                yield Problem(f"spec.{entry}[{index}].port", "is not between 1 and 65535")
    for index, item in enumerate(spec.get("routeTableRanges", ())):
        if not 1 <= item.get("min", 0) <= item.get("max", 0):
            yield Problem(f"spec.routeTableRanges[{index}]", "needs 1 <= min <= max")


def _nothing(tree: Tree, stored: Tree | None, around: Surroundings) -> Problems:
    return iter(())


RULES: Mapping[str, Callable[[Tree, Tree | None, Surroundings], Problems]] = {
    "BGPConfiguration": _bgp_configuration,
    "BGPFilter": _bgp_filter,
    "BGPPeer": _bgp_peer,
    "ClusterInformation": _nothing,
    "FelixConfiguration": _felix_configuration,
    "GlobalNetworkPolicy": _of_tree(policy_rules.policy),
    "GlobalNetworkSet": _of_tree(policy_rules.network_set),
    "HostEndpoint": _nothing,
    "IPPool": _ip_pool,
    "IPReservation": _ip_reservation,
    "NetworkPolicy": _of_tree(policy_rules.policy),
    "NetworkSet": _of_tree(policy_rules.network_set),
    "Node": _node,
    "Profile": _profile,
    "StagedGlobalNetworkPolicy": _of_tree(policy_rules.policy),
    "StagedKubernetesNetworkPolicy": _nothing,
    "StagedNetworkPolicy": _of_tree(policy_rules.policy),
    "Tier": _of_tree(policy_rules.tier),
    "WorkloadEndpoint": _workload_endpoint,
}


# --- single fields --------------------------------------------------------------------------------


def _masked_network(text: str) -> Network:
    if "/" not in text:
        raise ValueError(f"{text!r} is no prefix such as 10.0.0.0/16" if text else "is required")
    network = parse_network(text)
    if str(network) != text:
        raise ValueError(f"{text!r} must be written {network}")
    return network


def _networks(texts: Sequence[str], path: str) -> Problems:
    for text in texts:
        try:
            parse_network(text)
        except ValueError as error:
            yield Problem(path, str(error))


def _selectors(spec: Tree, *names: str) -> Problems:
    for name in names:
        try:
            parse_selector(spec.get(name, ""))
        except SelectorError as error:
            yield Problem(f"spec.{name}", str(error))


def _one_of(spec: Mapping[str, Any], name: str, allowed: Sequence[str]) -> Problems:
    if name in spec and spec[name] not in allowed:
        yield Problem(f"spec.{name}", f"{spec[name]!r} is not {', '.join(allowed)}")
