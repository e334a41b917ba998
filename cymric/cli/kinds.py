"""The kinds of the command line: names people type, fields, names an object may have, columns.

Aliases and columns are calicoctl's. A column is a heading and a function of the object's tree;
objects come from the store and may hold anything, so the functions ask politely (`_at`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cymric.cli import fields
from cymric.cli.schema import Fields, Tree
from cymric.model.keys import NAMESPACED

Column = tuple[str, Callable[[Tree], str]]

GLOBAL_ASN = "(global)"
"""Stands for the cluster's AS number in a node's row until it is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of object. `is_read_only` kinds may be shown, never written by a user."""

    name: str
    aliases: tuple[str, ...]
    fields: Fields
    columns: tuple[Column, ...]
    wide: tuple[Column, ...] = ()
    is_read_only: bool = False

    @property
    def is_namespaced(self) -> bool:
        """Whether objects of this kind lie in namespaces."""
        return self.name in NAMESPACED

    @property
    def wide_columns(self) -> tuple[Column, ...]:
        """The columns of `-o wide`."""
        return self.wide or self.columns


class UnknownKind(ValueError):
    """A word that names no kind."""


def find(word: str) -> Kind:
    """The kind behind a name or alias, in any case. Raises UnknownKind."""
    try:
        return _BY_WORD[word.lower()]
    except KeyError:
        known = ", ".join(kind.aliases[0] for kind in KINDS)
        raise UnknownKind(f"unknown kind {word!r}; known are: {known}") from None


def row(kind: Kind, tree: Tree, *, wide: bool = False) -> tuple[str, ...]:
    """The cells of one object's line."""
    return tuple(cell(tree) for _, cell in (kind.wide_columns if wide else kind.columns))


def _at(tree: object, path: str) -> Any:
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(_text(item) for item in value)
    return "" if value is None else str(value)


def _show(path: str, *, absent: object = "") -> Callable[[Tree], str]:
    def cell(tree: Tree) -> str:
        value = _at(tree, path)
        return _text(absent if value in (None, "") else value)

    return cell


def _column(heading: str, path: str, *, absent: object = "") -> Column:
    return heading, _show(path, absent=absent)


def _peer_nodes(tree: Tree) -> str:
    return _text(_at(tree, "spec.node") or _at(tree, "spec.nodeSelector") or "(global)")


def _workload(tree: Tree) -> str:
    by_orchestrator = {"k8s": "pod", "cni": "containerID"}
    name = by_orchestrator.get(_text(_at(tree, "spec.orchestrator")), "workload")
    return _text(_at(tree, f"spec.{name}"))


def _labels_to_apply(tree: Tree) -> str:
    labels = _at(tree, "spec.labelsToApply")
    return ",".join(f"{k}={v}" for k, v in labels.items()) if isinstance(labels, Mapping) else ""


def _nats(tree: Tree) -> str:
    nats = _at(tree, "spec.ipNATs") or ()
    return ",".join(f"{_text(_at(n, 'internalIP'))}:{_text(_at(n, 'externalIP'))}" for n in nats)


_NAME = _column("NAME", "metadata.name")
_POOL = (
    _NAME,
    _column("CIDR", "spec.cidr"),
    _column("SELECTOR", "spec.nodeSelector", absent="all()"),
)
_ENDPOINT: tuple[Column, ...] = (
    ("WORKLOAD", _workload),
    _column("NODE", "spec.node"),
    _column("NETWORKS", "spec.ipNetworks"),
    _column("INTERFACE", "spec.interfaceName"),
)

_POLICY = (_NAME, _column("TIER", "spec.tier", absent="default"))
_POLICY_WIDE = (*_POLICY, _column("ORDER", "spec.order"), _column("SELECTOR", "spec.selector"))
_NETWORK_SET = (_NAME, _column("NETS", "spec.nets"))
_HOST_ENDPOINT = (_NAME, _column("NODE", "spec.node"))

_POLICY_KINDS = (
    Kind(
        name="NetworkPolicy",
        aliases=("networkpolicy", "networkpolicies", "policy", "policies", "np", "pol", "pols"),
        fields=fields.resource(fields.NETWORK_POLICY),
        columns=_POLICY,
        wide=_POLICY_WIDE,
    ),
    Kind(
        name="GlobalNetworkPolicy",
        aliases=("globalnetworkpolicy", "globalnetworkpolicies", "gnp", "gnps"),
        fields=fields.resource(fields.GLOBAL_NETWORK_POLICY),
        columns=_POLICY,
        wide=_POLICY_WIDE,
    ),
    Kind(
        name="StagedNetworkPolicy",
        aliases=("stagednetworkpolicy", "stagednetworkpolicies", "snp", "snps"),
        fields=fields.resource(fields.STAGED_NETWORK_POLICY),
        columns=_POLICY,
        wide=_POLICY_WIDE,
    ),
    Kind(
        name="StagedGlobalNetworkPolicy",
        aliases=("stagedglobalnetworkpolicy", "stagedglobalnetworkpolicies", "sgnp", "sgnps"),
        fields=fields.resource(fields.STAGED_GLOBAL_NETWORK_POLICY),
        columns=_POLICY,
        wide=_POLICY_WIDE,
    ),
    Kind(
        name="StagedKubernetesNetworkPolicy",
        aliases=("stagedkubernetesnetworkpolicy", "stagedkubernetesnetworkpolicies", "sknp",
                 "sknps"),
        fields=fields.resource(fields.STAGED_KUBERNETES_NETWORK_POLICY),
        columns=(_NAME,),
    ),
    Kind(
        name="Tier",
        aliases=("tier", "tiers"),
        fields=fields.resource(fields.TIER, status=True),
        columns=(_NAME, _column("ORDER", "spec.order")),
        wide=(
            _NAME,
            _column("ORDER", "spec.order"),
            _column("DEFAULTACTION", "spec.defaultAction", absent="Deny"),
        ),
    ),
    Kind(
        name="NetworkSet",
        aliases=("networkset", "networksets", "netset", "netsets"),
        fields=fields.resource(fields.NETWORK_SET),
        columns=(_NAME,),
        wide=_NETWORK_SET,
    ),
    Kind(
        name="GlobalNetworkSet",
        aliases=("globalnetworkset", "globalnetworksets"),
        fields=fields.resource(fields.NETWORK_SET),
        columns=(_NAME,),
        wide=_NETWORK_SET,
    ),
    Kind(
        name="HostEndpoint",
        aliases=("hostendpoint", "hostendpoints", "hep", "heps"),
        fields=fields.resource(fields.HOST_ENDPOINT),
        columns=_HOST_ENDPOINT,
        wide=(
            *_HOST_ENDPOINT,
            _column("INTERFACE", "spec.interfaceName"),
            _column("IPS", "spec.expectedIPs"),
            _column("PROFILES", "spec.profiles"),
        ),
    ),
)  # fmt: skip

KINDS: tuple[Kind, ...] = (
    Kind(
        name="Node",
        aliases=("node", "nodes", "no"),
        fields=fields.resource(fields.NODE, status=True),
        columns=(_NAME,),
        wide=(
            _NAME,
            _column("ASN", "spec.bgp.asNumber", absent=GLOBAL_ASN),
            _column("IPV4", "spec.bgp.ipv4Address"),
            _column("IPV6", "spec.bgp.ipv6Address"),
        ),
    ),
    Kind(
        name="IPPool",
        aliases=("ippool", "ippools", "ipp", "ipps", "pool", "pools"),
        fields=fields.resource(fields.IP_POOL),
        columns=_POOL,
        wide=(
            *_POOL[:2],
            _column("NAT", "spec.natOutgoing", absent=False),
            _column("IPIPMODE", "spec.ipipMode", absent="Never"),
            _column("VXLANMODE", "spec.vxlanMode", absent="Never"),
            _column("DISABLED", "spec.disabled", absent=False),
            _column("DISABLEBGPEXPORT", "spec.disableBGPExport", absent=False),
            _POOL[2],
            _column("ASSIGNMENTMODE", "spec.assignmentMode", absent="Automatic"),
        ),
    ),
    Kind(
        name="BGPPeer",
        aliases=("bgppeer", "bgppeers", "bgpp", "bgpps", "bp", "bps"),
        fields=fields.resource(fields.BGP_PEER),
        columns=(
            _NAME,
            _column("PEERIP", "spec.peerIP"),
            ("NODE", _peer_nodes),
            _column("ASN", "spec.asNumber", absent=0),
        ),
    ),
    Kind(
        name="BGPFilter",
        aliases=("bgpfilter", "bgpfilters"),
        fields=fields.resource(fields.BGP_FILTER),
        columns=(_NAME,),
    ),
    Kind(
        name="BGPConfiguration",
        aliases=("bgpconfig", "bgpconfigs", "bgpconfiguration", "bgpconfigurations"),
        fields=fields.resource(fields.BGP_CONFIGURATION),
        columns=(
            _NAME,
            _column("LOGSEVERITY", "spec.logSeverityScreen", absent="-"),
            _column("MESHENABLED", "spec.nodeToNodeMeshEnabled", absent="-"),
            _column("ASNUMBER", "spec.asNumber", absent="-"),
        ),
    ),
    Kind(
        name="WorkloadEndpoint",
        aliases=("workloadendpoint", "workloadendpoints", "wep", "weps"),
        fields=fields.resource(fields.WORKLOAD_ENDPOINT),
        columns=_ENDPOINT,
        wide=(_NAME, *_ENDPOINT, _column("PROFILES", "spec.profiles"), ("NATS", _nats)),
    ),
    Kind(
        name="ClusterInformation",
        aliases=("clusterinfo", "clusterinfos", "clusterinformation", "clusterinformations"),
        fields=fields.resource(fields.CLUSTER_INFORMATION),
        columns=(
            _NAME,
            _column("CLUSTERGUID", "spec.clusterGUID"),
            _column("CLUSTERTYPE", "spec.clusterType"),
            _column("CALICOVERSION", "spec.calicoVersion"),
            _column("DATASTOREREADY", "spec.datastoreReady"),
        ),
        is_read_only=True,
    ),
    Kind(
        name="FelixConfiguration",
        aliases=(
            "felixconfig", "felixconfigs", "felixconfiguration", "felixconfigurations",
            "fconfig", "fconfigs",
        ),
        fields=fields.resource(fields.FELIX_CONFIGURATION),
        columns=(_NAME,),
    ),
    Kind(
        name="Profile",
        aliases=("profile", "profiles", "pro", "pros"),
        fields=fields.resource(fields.PROFILE),
        columns=(_NAME,),
        wide=(_NAME, ("LABELS", _labels_to_apply)),
    ),
    Kind(
        name="IPReservation",
        aliases=("ipreservation", "ipreservations", "reservation", "reservations"),
        fields=fields.resource(fields.IP_RESERVATION),
        columns=(_NAME, _column("RESERVEDCIDRS", "spec.reservedCIDRs")),
    ),
    *_POLICY_KINDS,
)  # fmt: skip

_BY_WORD = {alias: kind for kind in KINDS for alias in kind.aliases}
