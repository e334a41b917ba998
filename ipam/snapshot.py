"""All that bears on addresses, as it stood at one revision of etcd, typed. Pure.

    one listing of /calico/ ─▶ Snapshot ─▶ audit ─▶ report
                                  └─▶ what a dead node left, what a pool holds

Everything that compares keys with each other starts from here: two listings at different revisions
would show contradictions that never were. A value that cannot be read is kept by key with its
reason, and what can still be told of it is: a node exists whatever its value says, and an endpoint
uses the addresses it names even when the rest of it is broken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cymric.model import codec, keys
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.ipam import AllocationBlock, AllocationHandle, BlockAffinity
from cymric.model.keys import AffinityKey, BlockKey, HandleKey, Key, MalformedKey, ResourceKey
from cymric.model.net import Address, Network, contains, parse_interface
from cymric.model.resources import ClusterInformation, IPPool, Node

PREFIX = "/calico/"
"""What one listing has to cover: resources and IPAM both lie below."""

_TUNNELS = (
    ("bgp", "ipv4IPIPTunnelAddr"),
    ("ipv4VXLANTunnelAddr",),
    ("ipv6VXLANTunnelAddr",),
    ("wireguard", "interfaceIPv4Address"),
    ("wireguard", "interfaceIPv6Address"),
)


class Pair(Protocol):
    """One key as listed."""

    @property
    def key(self) -> str:
        """The key's text."""
        ...

    @property
    def value(self) -> bytes:
        """What is stored."""
        ...

    @property
    def revision(self) -> int:
        """The revision that last wrote it."""
        ...


@dataclass(frozen=True, slots=True)
class Use:
    """Somebody who uses an address: an endpoint of a workload, or a node for its tunnel."""

    address: Address
    user: str
    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What etcd said at `revision`. `uses` are of endpoints and tunnels, readable or not;
    `nodes` are all that exist, `node_labels` of those that can be read.

    `unreadable` tells by key why a value cannot be read; `blind` are the endpoints and nodes among
    these of which not even the addresses are known. `revisions` are those that last wrote a key.
    """

    revision: int
    blocks: Mapping[Network, AllocationBlock]
    affinities: Mapping[AffinityKey, BlockAffinity]
    handles: Mapping[str, AllocationHandle]
    pools: Mapping[str, IPPool]
    nodes: frozenset[str]
    node_labels: Mapping[str, Mapping[str, str]]
    endpoints: Mapping[ResourceKey, WorkloadEndpoint]
    uses: tuple[Use, ...]
    cluster: ClusterInformation | None
    unreadable: Mapping[str, str]
    blind: frozenset[str]
    revisions: Mapping[str, int]

    @property
    def is_locked(self) -> bool:
        """Whether an operator locked the datastore; without ClusterInformation it is not."""
        return self.cluster is not None and self.cluster.spec.datastoreReady is False

    @property
    def cluster_revision(self) -> str:
        """ClusterInformation's resourceVersion, empty if there is none."""
        revision = self.revisions.get(str(ResourceKey("ClusterInformation", "default")))
        return "" if revision is None else str(revision)

    def pool_of(self, network: Network) -> IPPool | None:
        """The pool that contains the whole of `network`, disabled or not."""
        found = (pool for pool in self.pools.values() if contains(pool.spec.network, network))
        return next(found, None)


def read(pairs: Iterable[Pair], revision: int) -> Snapshot:
    """The snapshot behind one listing; keys that are none of ours are passed over."""
    found: dict[type, dict[Any, Any]] = {}
    unreadable: dict[str, str] = {}
    blind: set[str] = set()
    revisions: dict[str, int] = {}
    nodes: set[str] = set()
    uses: list[Use] = []
    for pair in pairs:
        if not pair.key.startswith((keys.IPAM, keys.RESOURCES)):
            continue
        revisions[pair.key] = pair.revision
        try:
            decoded = codec.decode(pair.key, pair.value)
        except codec.Malformed as error:
            unreadable[pair.key] = error.reason
            decoded, key = None, _key(pair.key)
        else:
            key = None if decoded is None else decoded[0]
        if isinstance(key, ResourceKey) and key.kind == "Node":
            nodes.add(key.name)
        try:
            uses += _uses(key, pair.value, None if decoded is None else decoded[1])
        except (ValueError, TypeError):
            blind.add(pair.key)
        if decoded is not None:
            found.setdefault(type(decoded[1]), {})[decoded[0]] = decoded[1]
    clusters = found.get(ClusterInformation, {})
    return Snapshot(
        revision=revision,
        blocks={key.cidr: value for key, value in found.get(AllocationBlock, {}).items()},
        affinities=found.get(BlockAffinity, {}),
        handles={key.handle_id: value for key, value in found.get(AllocationHandle, {}).items()},
        pools={key.name: value for key, value in found.get(IPPool, {}).items()},
        nodes=frozenset(nodes),
        node_labels={key.name: value.labels for key, value in found.get(Node, {}).items()},
        endpoints=found.get(WorkloadEndpoint, {}),
        uses=tuple(uses),
        cluster=clusters.get(ResourceKey("ClusterInformation", "default")),
        unreadable=unreadable,
        blind=frozenset(blind),
        revisions=revisions,
    )


def affinity_text(key: AffinityKey) -> str:
    """The claimant as its block would name it: `host:node1`."""
    return f"{key.owner_type}:{key.owner}"


def has_handle_key(handle: str | None) -> bool:
    """Whether a handle can be counted at all: a text with a slash is no key."""
    return bool(handle) and "/" not in (handle or "")


def block_key(network: Network) -> str:
    """The key of a block, as in `revisions`."""
    return str(BlockKey(network))


def handle_key(handle: str) -> str:
    """The key of a handle, as in `revisions`."""
    return str(HandleKey(handle))


def _key(text: str) -> Key | None:
    try:
        return keys.parse_key(text)
    except MalformedKey:
        return None  # decoding it reports why


def _uses(key: Key | None, raw: bytes, value: object) -> Iterator[Use]:
    """Who uses which address: by the typed value, else by the raw one as far as it can be told.

    Raises ValueError, TypeError if it is unclear.
    """
    if isinstance(key, ResourceKey) and key.kind == "WorkloadEndpoint":
        user = f"Workload({key.namespace}/{key.name})"
        if isinstance(value, WorkloadEndpoint):
            spec = value.spec
            yield from (Use(address, user, spec.node) for address in spec.addresses)
            return
        tree = _spec(raw)
        for text in tree.get("ipNetworks") or ():
            yield Use(parse_interface(text).ip, user, str(tree.get("node", "")))
    elif isinstance(key, ResourceKey) and key.kind == "Node":
        tree = _spec(raw)
        for path in _TUNNELS:
            said: Any = tree
            for name in path:
                said = said.get(name) if isinstance(said, dict) else None
            if said:
                yield Use(parse_interface(said).ip, f"Node({key.name})", key.name)


def _spec(raw: bytes) -> Mapping[str, Any]:
    spec = codec.decode_as(dict[str, Any], raw).get("spec") or {}
    if not isinstance(spec, dict):
        raise TypeError("spec is not an object")
    return spec
