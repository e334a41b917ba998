"""`cymric ipam gc`: what nodes that are gone have left behind in IPAM.

    one listing ─▶ leavings (pure) ─▶ addresses, as seen ─▶ another listing ─▶ blocks, as seen

A node is gone when its Node object is. Its addresses are freed only as they were seen (handle and
sequence number), its blocks only if nobody wrote them since the second listing: a node that comes
back meanwhile makes every such write fail. Addresses that other nodes borrowed stay theirs; their
block stays, without owner. An address that an endpoint elsewhere uses is left alone.
Endpoints of the node are not taken away unless forced: they say that something may run there still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import click

from cymric.cli.ipam_check import look
from cymric.cli.ipam_release import refuse_if_blind
from cymric.cli.objects import NotFound, ObjectError, Objects
from cymric.cli.releasing import release_seen
from cymric.cli.session import Session
from cymric.datastore import api
from cymric.datastore.api import Datastore
from cymric.model import keys
from cymric.model.keys import AffinityKey, ResourceKey
from cymric.model.net import Network
from ipam.audit import Allocation, allocations_of
from ipam.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Leavings:
    """What one node has. `addresses` are those that nobody uses, but for its own endpoints."""

    node: str
    addresses: tuple[Allocation, ...]
    blocks: tuple[Network, ...]
    endpoints: tuple[ResourceKey, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.addresses)} addresses, {len(self.blocks)} blocks, "
            f"{len(self.endpoints)} workload endpoints"
        )


@click.command("gc")
@click.option("--node", default="", help="The node whose leavings are collected.")
@click.option("--dead-nodes", is_flag=True, help="Of every node that has no Node object any more.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--force", is_flag=True, help="Remove the node's workload endpoints as well.")
@click.pass_obj
def collect(session: Session, node: str, dead_nodes: bool, dry_run: bool, force: bool) -> None:
    """Give back the addresses and blocks of nodes that do not exist any more."""
    if bool(node) == dead_nodes:
        raise click.UsageError("give one of --node and --dead-nodes")
    session.run(lambda store: _collect(store, node, is_dry=dry_run, is_forced=force))


def leavings(snapshot: Snapshot) -> Mapping[str, Leavings]:
    """What each node has that is named by IPAM or endpoints and has no Node object; by name."""
    endpoints: dict[str, dict[ResourceKey, str]] = {}
    for key, endpoint in snapshot.endpoints.items():
        user = f"Workload({key.namespace}/{key.name})"
        endpoints.setdefault(endpoint.spec.node, {})[key] = user
    claimed: dict[str, set[Network]] = {}
    for network, block in snapshot.blocks.items():
        if block.owner_host:
            claimed.setdefault(block.owner_host, set()).add(network)
    for claim in snapshot.affinities:
        if claim.owner_type == "host":
            claimed.setdefault(claim.owner, set()).add(claim.cidr)
    users = {name: frozenset(found.values()) for name, found in endpoints.items()}
    addresses: dict[str, list[Allocation]] = {}
    for allocation in allocations_of(snapshot):
        own = users.get(allocation.node, frozenset())
        if allocation.node and own.issuperset(allocation.users):
            addresses.setdefault(allocation.node, []).append(allocation)
    names = (claimed.keys() | addresses.keys() | endpoints.keys()) - snapshot.nodes
    return {
        name: Leavings(
            node=name,
            addresses=tuple(addresses.get(name, ())),
            blocks=tuple(sorted(claimed.get(name, ()), key=str)),
            endpoints=tuple(endpoints.get(name, {})),
        )
        for name in sorted(names)
    }


async def _collect(store: Datastore, node: str, *, is_dry: bool, is_forced: bool) -> None:
    seen = await look(store)
    refuse_if_blind(seen)
    if node in seen.nodes:
        raise ObjectError(
            f"node {node} exists; `cymric delete node {node}` removes it with all that is its"
        )
    found = leavings(seen)
    if node:
        found = {name: left for name, left in found.items() if name == node}
    if not found:
        click.echo(f"Nothing is left of {f'node {node}' if node else 'nodes that are gone'}.")
        return
    kept = [left for left in found.values() if left.endpoints and not is_forced]
    for left in found.values():
        if is_dry:
            click.echo(f"{left.node}: has left {left}")
        elif left not in kept:
            await _collect_node(store, seen, left)
    if kept and not is_dry:
        told = "".join(f"\n  {left.node}: {left}" for left in kept)
        raise ObjectError(
            f"workload endpoints say that something may still run there; nothing was collected "
            f"(--force removes them as well):{told}"
        )


async def _collect_node(store: Datastore, seen: Snapshot, left: Leavings) -> None:
    objects = Objects(store)
    for key in left.endpoints:
        try:
            await objects.delete(key, seen.revisions[str(key)])
        except NotFound:
            continue  # another collector was quicker
    outcome = await release_seen(store, left.addresses)
    again = await look(store)  # the blocks as they are without those addresses
    if left.node in again.nodes:
        raise ObjectError(f"node {left.node} is back; its blocks were left alone")
    given, orphaned, kept = await _release_blocks(store, again, left)
    await api.delete(store, keys.HOSTS + left.node)  # the legacy key, if ever written
    click.echo(f"{left.node}: released {len(outcome.released)} addresses and {given} blocks")
    if orphaned:
        click.echo(f"  {orphaned} blocks stay without owner: other nodes hold addresses in them")
    if kept or outcome.changed:
        click.echo(f"  {kept} blocks and {len(outcome.changed)} addresses changed, and stay")


async def _release_blocks(store: Datastore, seen: Snapshot, left: Leavings) -> tuple[int, int, int]:
    """How many blocks were given back, lost their owner only, and were left alone."""
    from ipam.affinity import Released, release

    outcomes: list[Released] = []
    for network in left.blocks:
        block = seen.blocks.get(network)
        number = None if block is None else block.sequence_number
        outcomes.append(
            await release(store, left.node, network, require_empty=False, sequence_number=number)
        )
        if outcomes[-1] is Released.NOT_OURS:
            await api.delete(store, str(AffinityKey(left.node, network)))
    kept = outcomes.count(Released.CHANGED)
    orphaned = outcomes.count(Released.ORPHANED)
    return len(outcomes) - orphaned - kept, orphaned, kept
