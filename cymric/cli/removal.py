"""Deleting an object, with what Calico's client does around it: pools and nodes own IPAM data.

A pool is disabled first, so that nobody takes a new block from it while its blocks are given back;
addresses in use stay allocated, in blocks without an owner, until their holders release them.
A node takes along its endpoints and their addresses, its blocks, and every object that names it.
Each step may be repeated: a deletion that was cut short is finished by asking for it again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cymric.cli import output
from cymric.cli.ipam import blocks_of
from cymric.cli.kinds import find
from cymric.cli.objects import NotFound, ObjectError, Objects
from cymric.cli.schema import Tree
from cymric.datastore import api
from cymric.datastore.api import Datastore
from cymric.model import codec, keys
from cymric.model.keys import AffinityKey, ResourceKey
from cymric.model.net import Network, contains, parse_address, parse_network
from cymric.model.resources import DEFAULT_ALLOW_PROFILE

DISABLED_FOR_S = 0.5
"""How long a pool stays disabled before its blocks go: nodes learn of it through their watch."""


async def remove(objects: Objects, key: ResourceKey, revision: int | None) -> None:
    """Delete `key`, at `revision` if given, with what belongs to it. Raises ObjectError."""
    if key == ResourceKey("Profile", DEFAULT_ALLOW_PROFILE):
        raise ObjectError("this profile is built in and cannot be deleted")
    if key.kind in ("IPPool", "Node"):
        found = await objects.get(key)  # nothing of it is touched when it does not exist
        version = int(found["metadata"]["resourceVersion"])
        if revision not in (None, version):
            raise ObjectError(f"update conflict: {key.kind}({key.name}): it is at {version}")
        await (_empty_pool if key.kind == "IPPool" else _empty_node)(objects, key, found)
        revision = None  # we changed it ourselves
    await objects.delete(key, revision)


async def _empty_pool(objects: Objects, key: ResourceKey, pool: Tree) -> None:
    try:
        network = parse_network(pool["spec"]["cidr"])
    except (KeyError, TypeError, ValueError):
        return  # a pool that nobody could read has no blocks
    if not pool["spec"].get("disabled"):
        await objects.apply(find("IPPool"), {**pool, "spec": {**pool["spec"], "disabled": True}})
        await asyncio.sleep(DISABLED_FOR_S)
    for block in await blocks_of(objects.store):
        if contains(network, block.network) and block.owner_host:
            await _release_block(objects.store, block.owner_host, block.network)


async def _empty_node(objects: Objects, key: ResourceKey, node: Tree) -> None:
    from ipam.client import IPAM, Release

    addresses = IPAM(objects.store)
    endpoints = [
        tree
        for tree in (await objects.list(find("WorkloadEndpoint"))).trees
        if tree["spec"].get("node") == key.name
    ]
    networks = [text for tree in endpoints for text in tree["spec"].get("ipNetworks", ())]
    held = [parse_address(text.partition("/")[0]) for text in networks]
    await addresses.release([Release(address) for address in held])
    for handle in ("ipip-tunnel-addr", "vxlan-tunnel-addr", "vxlan-v6-tunnel-addr",
                   "wireguard-tunnel-addr", "wireguard-v6-tunnel-addr"):  # fmt: skip
        await addresses.release_handle(f"{handle}-{key.name}")
    for tree in endpoints:
        metadata = tree["metadata"]
        await _forget(
            objects, [ResourceKey("WorkloadEndpoint", metadata["name"], metadata["namespace"])]
        )
    for network in await _claimed(objects.store, key.name):
        await _release_block(objects.store, key.name, network)
    await api.delete(objects.store, keys.HOSTS + key.name)  # the legacy key, if ever written
    await _forget(
        objects,
        [
            *await _that_name(objects, "BGPPeer", key.name),
            *await _that_name(objects, "HostEndpoint", key.name),
            ResourceKey("FelixConfiguration", f"node.{key.name}"),
            ResourceKey("BGPConfiguration", f"node.{key.name}"),
        ],
    )


async def _release_block(store: Datastore, host: str, network: Network) -> None:
    from ipam.affinity import Released, release

    outcome = await release(store, host, network, require_empty=False)
    if outcome is Released.NOT_OURS:  # a claim without its block: only the key is left
        await api.delete(store, str(AffinityKey(host, network)))
    elif outcome is Released.ORPHANED:
        output.note(f"block {network} of {host}: {outcome}")


async def _claimed(store: Datastore, host: str) -> list[Network]:
    """The blocks of a host, by its affinities and by what the blocks say."""
    found = {block.network for block in await blocks_of(store) if block.owner_host == host}
    for item in (await store.list(keys.affinity_prefix(host))).items:
        try:
            key = keys.parse_key(item.key)
        except keys.MalformedKey as error:
            output.note(f"Passed over: {error}")
            continue
        if isinstance(key, AffinityKey):
            found.add(key.cidr)
    return sorted(found, key=str)


async def _that_name(objects: Objects, kind: str, node: str) -> list[ResourceKey]:
    """The objects of a kind whose `spec.node` is the node."""
    listing = await objects.store.list(keys.resource_prefix(kind))
    found = []
    for item in listing.items:
        try:
            tree = codec.decode_as(dict, item.value)
        except ValueError as error:
            output.note(f"Passed over: {item.key}: {error}")
            continue
        if isinstance(tree.get("spec"), dict) and tree["spec"].get("node") == node:
            found.append(ResourceKey(kind, item.key.rpartition("/")[2]))
    return found


async def _forget(objects: Objects, resources: Sequence[ResourceKey]) -> None:
    for key in resources:
        try:
            await objects.delete(key)
        except NotFound:
            continue  # gone already, or never there
