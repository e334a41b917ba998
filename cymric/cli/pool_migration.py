"""`cymric ipam migrate --plan`: what the way from one pool to another takes. Nothing is changed.

An address cannot move under a running workload: a workload moves by being made anew. So the way is
always the same: offer the new pool, close the old one, make the workloads anew node by node, and
remove the old pool when it is empty. The plan tells whether the new pool can take them, names the
workloads in that order, the nodes with the fewest first, and what stands in the way. Pure but for
the command itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import click

from cymric.cli.ipam_check import look
from cymric.cli.objects import ObjectError
from cymric.cli.session import Session
from cymric.model import selector
from cymric.model.net import Network, contains
from cymric.model.resources import IPPool
from ipam.audit import Allocation, allocations_of
from ipam.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What lies in the old pool, by node, and what stands in the way of moving it."""

    old: IPPool
    new: IPPool
    held: Mapping[str, tuple[Allocation, ...]]
    blocks: Mapping[str, tuple[Network, ...]]
    obstacles: tuple[str, ...]


@click.command("migrate")
@click.option("--plan", "only_plans", is_flag=True, help="Say what would have to be done.")
@click.option("--from", "old", required=True, help="Name of the pool to leave.")
@click.option("--to", "new", required=True, help="Name of the pool to go to.")
@click.pass_obj
def migrate(session: Session, only_plans: bool, old: str, new: str) -> None:
    """Plan the way of all workloads from one pool to another; the steps are the operator's."""
    if not only_plans:
        raise click.UsageError("workloads are moved by whoever runs them: only --plan is offered")
    seen = session.run(look)
    found = plan(seen, _pool(seen, old), _pool(seen, new))
    for line in lines(found):
        click.echo(line)


def plan(seen: Snapshot, old: IPPool, new: IPPool) -> Plan:
    """The plan, from what is stored now."""
    held: dict[str, list[Allocation]] = {}
    for allocation in allocations_of(seen):
        if allocation.address in old.spec.network:
            held.setdefault(allocation.node, []).append(allocation)
    blocks: dict[str, list[Network]] = {}
    for network, block in seen.blocks.items():
        if contains(old.spec.network, network):
            blocks.setdefault(block.owner_host or "", []).append(network)
    by_effort = sorted(held, key=lambda node: (len(held[node]), node))
    return Plan(
        old=old,
        new=new,
        held={node: tuple(held[node]) for node in by_effort},
        blocks={node: tuple(found) for node, found in sorted(blocks.items())},
        obstacles=tuple(_obstacles(seen, old, new, held)),
    )


def lines(found: Plan) -> Iterator[str]:
    """The plan as a person reads it."""
    old, new = found.old, found.new
    total = sum(map(len, found.held.values()))
    number = sum(map(len, found.blocks.values()))
    yield f"From {old.metadata.name} ({old.spec.cidr}) to {new.metadata.name} ({new.spec.cidr}):"
    yield f"{total} addresses in {number} blocks, on {len(found.held)} nodes."
    yield from ("", "What stands in the way:" if found.obstacles else "Nothing stands in the way.")
    yield from (f"  - {obstacle}" for obstacle in found.obstacles)
    yield ""
    step = 1
    if not old.spec.disabled:
        yield f"{step}. Close the old pool: set `disabled: true` on IPPool {old.metadata.name}."
        step += 1
    for node, allocations in found.held.items():
        yield f"{step}. Make anew on {node or '(node not known)'}:"
        yield from (f"     {_told(allocation)}" for allocation in allocations)
        step += 1
    yield f"{step}. When `cymric ipam show --show-blocks` shows no address of it in use:"
    yield f"     cymric delete ippool {old.metadata.name}"
    for node, networks in found.blocks.items():
        names = ", ".join(map(str, networks))
        yield f"     gives back {names} of {node or 'nobody'}"


def _obstacles(
    seen: Snapshot,
    old: IPPool,
    new: IPPool,
    held: Mapping[str, Sequence[Allocation]],
) -> Iterator[str]:
    name = new.metadata.name
    if old.spec.network.version != new.spec.network.version:
        yield f"{name} is of another IP version"
    if not new.is_allocatable:
        yield f"{name} is disabled"
    if new.spec.assignment_mode not in ("", "Automatic"):
        yield f"{name} is used only when asked for by name (assignmentMode Manual)"
    if missing := set(old.spec.allowed_uses) - set(new.spec.allowed_uses):
        yield f"{name} may not be used for {', '.join(sorted(missing))}"
    if new.spec.namespace_selector != old.spec.namespace_selector:
        yield f"{name} selects other namespaces: {new.spec.namespace_selector or 'all'}"
    labels = seen.node_labels
    wants = selector.parse(new.spec.node_selector)
    for node in sorted(held):
        if node and node not in seen.nodes:
            yield f"node {node} does not exist: collect what it left with `cymric ipam gc`"
        elif node and not wants.matches(labels.get(node, {})):
            yield f"{name} does not select node {node}"
    needed = sum(map(len, held.values()))
    taken = sum(1 for a in allocations_of(seen) if a.address in new.spec.network)
    free = new.spec.network.num_addresses - taken
    if free < needed:
        yield f"{name} has {free} free addresses, {needed} are needed"
    size = 1 << new.spec.network.max_prefixlen - new.spec.block_prefix_length
    blocks = sum(-(-len(allocations) // size) for allocations in held.values())
    cut = sum(1 for network in seen.blocks if contains(new.spec.network, network))
    room = (1 << new.spec.block_prefix_length - new.spec.network.prefixlen) - cut
    if free >= needed and room < blocks:
        yield f"{name} has room for {room} more blocks, {blocks} are needed: nodes will borrow"
    unused = [a for allocations in held.values() for a in allocations if not a.users]
    if unused:
        yield f"{len(unused)} addresses are used by nobody: see `cymric ipam check`"


def _told(allocation: Allocation) -> str:
    attributes = allocation.attributes
    pod = attributes.get("pod", "")
    workload = f"{attributes.get('namespace', '')}/{pod}" if pod else attributes.get("type", "")
    whose = workload or " ".join(allocation.users) or f"handle {allocation.handle or '<none>'}"
    return f"{allocation.address}  {whose}"


def _pool(seen: Snapshot, name: str) -> IPPool:
    if name not in seen.pools:
        raise ObjectError(f"there is no IPPool {name}")
    return seen.pools[name]
