"""Values to and from etcd's bytes, in Calico's exact JSON form, and the one decoder by key.

Encoding follows Go's encoding/json as Calico uses it: no white space, struct fields in declaration
order, map keys sorted, and `<`, `>`, `&`, U+2028, U+2029 escaped inside strings. Decoding is
lenient as Calico's: unknown fields are ignored, missing fields take their default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from cymric.model import bgp_filter, endpoints, ipam, policy, resources, strictest
from cymric.model.keys import (
    AffinityKey,
    BlockKey,
    HandleKey,
    IPAMConfigKey,
    Key,
    MalformedKey,
    PasswordKey,
    ResourceKey,
    parse_key,
)

TYPE_BY_KIND: dict[str, type[resources.Resource]] = {
    "BGPConfiguration": resources.BGPConfiguration,
    "BGPFilter": bgp_filter.BGPFilter,
    "BGPPeer": resources.BGPPeer,
    "ClusterInformation": resources.ClusterInformation,
    "FelixConfiguration": resources.FelixConfiguration,
    "GlobalNetworkPolicy": policy.GlobalNetworkPolicy,
    "GlobalNetworkSet": policy.GlobalNetworkSet,
    "HostEndpoint": endpoints.HostEndpoint,
    "IPPool": resources.IPPool,
    "IPReservation": resources.IPReservation,
    "NetworkPolicy": policy.NetworkPolicy,
    "NetworkSet": policy.NetworkSet,
    "Node": resources.Node,
    "Profile": policy.Profile,
    "StagedGlobalNetworkPolicy": policy.StagedGlobalNetworkPolicy,
    "StagedKubernetesNetworkPolicy": policy.StagedKubernetesNetworkPolicy,
    "StagedNetworkPolicy": policy.StagedNetworkPolicy,
    "Tier": policy.Tier,
    "WorkloadEndpoint": endpoints.WorkloadEndpoint,
}
"""The kinds that have a typed form; all others decode to `Unmodelled`."""

T = TypeVar("T")

_ENCODER = msgspec.json.Encoder(order="deterministic")
_TREE_ENCODER = msgspec.json.Encoder()
_DECODERS: dict[type, msgspec.json.Decoder[Any]] = {}
_GO_ESCAPES = (
    (b"<", b"\\u003c"),
    (b">", b"\\u003e"),
    (b"&", b"\\u0026"),
    ("\u2028".encode(), b"\\u2028"),
    ("\u2029".encode(), b"\\u2029"),
)


class Malformed(ValueError):
    """A key or value that cannot be right; the message names the key.

    `damaged` is what an agent that must never be weaker than written uses in its place.
    """

    def __init__(self, key: str, reason: str, damaged: strictest.Damaged | None = None) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key
        self.reason = reason
        self.damaged = damaged


class Unmodelled(msgspec.Struct, frozen=True):
    """A resource of a kind that no program reads yet; kept as its JSON tree."""

    tree: dict[str, Any]


class Unknown(msgspec.Struct, frozen=True):
    """A key that is none of the data model's."""


def encode(value: object) -> bytes:
    """The bytes Calico would store for a struct: its fields in order, the keys of maps sorted."""
    return _escaped(_ENCODER.encode(value))


def encode_tree(tree: Mapping[str, Any]) -> bytes:
    """The bytes Calico would store for a JSON tree whose fields are in their order already."""
    return _escaped(_TREE_ENCODER.encode(tree))


def _escaped(encoded: bytes) -> bytes:
    for plain, escaped in _GO_ESCAPES:
        encoded = encoded.replace(plain, escaped)
    return encoded


def decode_as(kind: type[T], value: bytes) -> T:
    """`value` as a `kind`. Raises msgspec.MsgspecError (a ValueError for bad JSON or fields)."""
    decoder = _DECODERS.get(kind)
    if decoder is None:
        decoder = _DECODERS[kind] = msgspec.json.Decoder(kind, strict=True)
    decoded: T = decoder.decode(value)
    return decoded


def decode(key: str, value: bytes) -> tuple[Key, object] | None:
    """The typed key and value behind one stored pair; None if the key is none of ours.

    Raises Malformed, naming the key, when either cannot be read or the two contradict.
    """
    try:
        parsed = parse_key(key)
    except MalformedKey as error:
        raise Malformed(key, str(error)) from None
    if parsed is None:
        return None
    try:
        return parsed, _decode_value(parsed, value)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError) as error:
        raise Malformed(key, str(error), _damaged(parsed, value, str(error))) from None


def _damaged(key: Key, value: bytes, reason: str) -> strictest.Damaged | None:
    found = strictest.stand_in(key, value) if isinstance(key, ResourceKey) else None
    return None if found is None else strictest.Damaged(reason, found)


def _decode_value(key: Key, value: bytes) -> object:
    match key:
        case BlockKey():
            block = decode_as(ipam.AllocationBlock, value)
            if block.network != key.cidr:
                raise ValueError(f"the value is of block {block.cidr}")
            return block
        case AffinityKey():
            return decode_as(ipam.BlockAffinity, value or b"{}")
        case HandleKey():
            return decode_as(ipam.AllocationHandle, value)
        case IPAMConfigKey():
            return decode_as(ipam.IPAMConfig, value)
        case PasswordKey():
            return value
        case ResourceKey():
            return _decode_resource(key, value)


def _decode_resource(key: ResourceKey, value: bytes) -> object:
    kind = TYPE_BY_KIND.get(key.kind)
    if kind is None:
        return Unmodelled(decode_as(dict[str, Any], value))
    resource = decode_as(kind, value)
    if resource.kind != key.kind:
        raise ValueError(f"the value is a {resource.kind}")
    if (resource.metadata.name, resource.metadata.namespace) != (key.name, key.namespace):
        raise ValueError(f"the value is named {resource.metadata.full_name}")
    return resource
