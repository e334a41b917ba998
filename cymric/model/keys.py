"""Every key we know in etcd, in one table: typed key to text and back.

Source: Calico's etcdv3 data model. Names are not escaped in these keys. A text that is no key of
ours parses to None; a text that should be one but is broken raises MalformedKey, so that it can be
reported by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cymric.model.net import Network, from_dashed, to_dashed

RESOURCES = "/calico/resources/v3/projectcalico.org/"
IPAM = "/calico/ipam/v2/"
BLOCKS = IPAM + "assignment/"
HOSTS = IPAM + "host/"
VIRTUAL = IPAM + "virtual/"
HANDLES = IPAM + "handle/"
IPAM_CONFIG = IPAM + "config"
BGP_PASSWORDS = "/cymric/bgp-passwords/"
"""Ours, beside Calico's keys: only nodes may read it (docs/etcd.md)."""

PLURALS = {
    "BGPConfiguration": "bgpconfigurations",
    "BGPFilter": "bgpfilters",
    "BGPPeer": "bgppeers",
    "BlockAffinity": "blockaffinities",
    "CalicoNodeStatus": "caliconodestatuses",
    "ClusterInformation": "clusterinformations",
    "FelixConfiguration": "felixconfigurations",
    "GlobalNetworkPolicy": "globalnetworkpolicies",
    "GlobalNetworkSet": "globalnetworksets",
    "HostEndpoint": "hostendpoints",
    "IPAMConfiguration": "ipamconfigurations",
    "IPPool": "ippools",
    "IPReservation": "ipreservations",
    "KubeControllersConfiguration": "kubecontrollersconfigurations",
    "LiveMigration": "livemigrations",
    "NetworkPolicy": "networkpolicies",
    "NetworkSet": "networksets",
    "Node": "nodes",
    "Profile": "profiles",
    "StagedGlobalNetworkPolicy": "stagedglobalnetworkpolicies",
    "StagedKubernetesNetworkPolicy": "stagedkubernetesnetworkpolicies",
    "StagedNetworkPolicy": "stagednetworkpolicies",
    "Tier": "tiers",
    "WorkloadEndpoint": "workloadendpoints",
}
KIND_BY_PLURAL = {plural: kind for kind, plural in PLURALS.items()}
NAMESPACED = frozenset(
    {
        "NetworkPolicy",
        "NetworkSet",
        "StagedKubernetesNetworkPolicy",
        "StagedNetworkPolicy",
        "WorkloadEndpoint",
    }
)

_HANDLE = re.compile(re.escape(HANDLES) + r"([^/]+)")
_BLOCK = re.compile(re.escape(BLOCKS) + r"ipv([46])/block/([^/]+)")
_AFFINITY = re.compile(re.escape(IPAM) + r"(host|virtual)/([^/]+)/ipv([46])/block/([^/]+)")


class MalformedKey(ValueError):
    """A key in one of our places whose text cannot be right."""


@dataclass(frozen=True, slots=True)
class ResourceKey:
    """A v3 resource; `namespace` is empty for cluster-scoped kinds."""

    kind: str
    name: str
    namespace: str = ""

    def __str__(self) -> str:
        place = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{RESOURCES}{PLURALS[self.kind]}/{place}"


@dataclass(frozen=True, slots=True)
class BlockKey:
    """An allocation block."""

    cidr: Network

    def __str__(self) -> str:
        return f"{BLOCKS}ipv{self.cidr.version}/block/{to_dashed(self.cidr)}"


@dataclass(frozen=True, slots=True)
class AffinityKey:
    """A node's (or virtual owner's) claim on a block. `owner_type` is "host" or "virtual"."""

    owner: str
    cidr: Network
    owner_type: str = "host"

    def __str__(self) -> str:
        version = self.cidr.version
        return f"{IPAM}{self.owner_type}/{self.owner}/ipv{version}/block/{to_dashed(self.cidr)}"


@dataclass(frozen=True, slots=True)
class HandleKey:
    """An allocation handle; its id must not contain a slash."""

    handle_id: str

    def __post_init__(self) -> None:
        if not self.handle_id or "/" in self.handle_id:
            raise MalformedKey(f"handle id {self.handle_id!r} is empty or contains a slash")

    def __str__(self) -> str:
        return f"{HANDLES}{self.handle_id}"


@dataclass(frozen=True, slots=True)
class IPAMConfigKey:
    """The one IPAM configuration object."""

    def __str__(self) -> str:
        return IPAM_CONFIG


@dataclass(frozen=True, slots=True)
class PasswordKey:
    """The password of BGP sessions: `key` within the secret `name`. The value is raw bytes."""

    name: str
    key: str

    def __str__(self) -> str:
        return f"{BGP_PASSWORDS}{self.name}/{self.key}"


Key = PasswordKey | ResourceKey | BlockKey | AffinityKey | HandleKey | IPAMConfigKey


def resource_prefix(kind: str, namespace: str = "") -> str:
    """The prefix under which all resources of `kind` (in `namespace`) lie, with its slash."""
    prefix = f"{RESOURCES}{PLURALS[kind]}/"
    return f"{prefix}{namespace}/" if namespace else prefix


def affinity_prefix(host: str, version: int | None = None) -> str:
    """The prefix of one host's affinities, of one family or of both."""
    return f"{HOSTS}{host}/" if version is None else f"{HOSTS}{host}/ipv{version}/block/"


def block_prefix(version: int | None = None) -> str:
    """The prefix of all blocks, of one family or of both."""
    return BLOCKS if version is None else f"{BLOCKS}ipv{version}/block/"


def parse_key(text: str) -> Key | None:
    """The typed key behind `text`; None if it is none of ours. Raises MalformedKey."""
    if text.startswith(RESOURCES):
        return _parse_resource(text)
    if text.startswith(BLOCKS):
        return BlockKey(_parse_cidr(text, _BLOCK.fullmatch(text), version=1, cidr=2))
    if text.startswith((HOSTS, VIRTUAL)):
        match = _AFFINITY.fullmatch(text)
        if match is None and text.startswith(HOSTS) and text.count("/") == HOSTS.count("/"):
            return None  # the legacy per-host key, only ever deleted
        cidr = _parse_cidr(text, match, version=3, cidr=4)
        assert match is not None
        return AffinityKey(owner=match[2], cidr=cidr, owner_type=match[1])
    if text.startswith(HANDLES):
        match = _HANDLE.fullmatch(text)
        if match is None:
            raise MalformedKey(f"{text} is not the key of a handle")
        return HandleKey(match[1])
    if text.startswith(BGP_PASSWORDS):
        name, _, key = text[len(BGP_PASSWORDS) :].partition("/")
        if not name or not key or "/" in key:
            raise MalformedKey(f"{text} is not the key of a password")
        return PasswordKey(name, key)
    return IPAMConfigKey() if text == IPAM_CONFIG else None


def _parse_resource(text: str) -> ResourceKey | None:
    plural, *names = text[len(RESOURCES) :].split("/")
    kind = KIND_BY_PLURAL.get(plural)
    if kind is None:
        return None
    if len(names) != (2 if kind in NAMESPACED else 1) or not all(names):
        raise MalformedKey(f"{text} is not the key of a {kind}")
    return ResourceKey(kind, names[-1], names[0] if kind in NAMESPACED else "")


def _parse_cidr(text: str, match: re.Match[str] | None, *, version: int, cidr: int) -> Network:
    if match is None:
        raise MalformedKey(f"{text} is not the key of a block")
    try:
        network = from_dashed(match[cidr])
    except ValueError as error:
        raise MalformedKey(f"{text}: {error}") from None
    if str(network.version) != match[version] or to_dashed(network) != match[cidr]:
        raise MalformedKey(
            f"{text} does not hold the canonical text of an IPv{match[version]} block"
        )
    return network
