"""`cymric ipam split`: one pool becomes several of equal size, while nothing may move.

The plan is pure. It is carried out in one transaction: the pool goes and its parts come in the same
moment, only while the datastore is still locked and neither pool nor parts were touched. Blocks and
addresses stay what they are, because the parts have the pool's block size; a block that would not
lie in one part alone forbids the split. Source: `calicoctl ipam split`, which takes several writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import click

from cymric.cli.ipam_check import look
from cymric.cli.kinds import find
from cymric.cli.objects import ObjectError, Objects
from cymric.cli.schema import Tree
from cymric.cli.session import Session
from cymric.datastore.api import ABSENT, Compare, Conflict, Datastore, Delete, Put, Transaction
from cymric.model import codec
from cymric.model.keys import ResourceKey
from cymric.model.net import Network, contains, network_of
from cymric.model.resources import IPPool
from ipam.snapshot import Snapshot

MAX_PARTS = 64
"""So that all parts, the pool and the lock fit into one transaction."""

_MAX_NAME = 253
_OWN_IDENTITY = (
    "uid", "resourceVersion", "creationTimestamp", "generation", "selfLink", "generateName",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """One of the pools to come."""

    name: str
    network: Network


class CannotSplit(ObjectError):
    """The pool cannot be split so."""


@click.command("split")
@click.argument("number", type=int)
@click.option("--cidr", default="", help="CIDR of the IP pool to split.")
@click.option("--name", default="", help="Name of the IP pool to split.")
@click.pass_obj
def split(session: Session, number: int, cidr: str, name: str) -> None:
    """Split an IP pool into NUMBER pools of equal size; NUMBER is a power of 2.

    The datastore must be locked.
    """
    if not cidr and not name:
        raise click.UsageError(
            "no name or CIDR provided. Provide a name or CIDR to denote the IP pool to split"
        )
    pool, parts = session.run(lambda store: _split(store, number, cidr, name))
    click.echo(f"IP Pool {pool} was successfully split into {number} smaller pools.")
    for part in parts:
        click.echo(f"Created {part.name} with CIDR {part.network}.")
    click.echo("You may now unlock the data store.")


def plan(pool: IPPool, number: int, blocks: Iterable[Network]) -> tuple[Part, ...]:
    """The pools that `number` equal parts make. Raises CannotSplit."""
    network, name = pool.spec.network, pool.metadata.name
    bits = number.bit_length() - 1
    if number < 2 or number != 1 << bits:
        raise CannotSplit(f"number to split CIDR into is not a valid power of 2: {number}")
    if number > MAX_PARTS:
        raise CannotSplit(f"{number} parts are more than {MAX_PARTS}; split the parts again")
    length = network.prefixlen + bits
    if length > pool.spec.block_prefix_length:
        raise CannotSplit(
            f"the CIDR {network} is not large enough to be split into {number} parts of whole "
            f"/{pool.spec.block_prefix_length} blocks"
        )
    for block in blocks:
        if block.prefixlen < length and contains(network, block):
            raise CannotSplit(f"block {block} would lie in more than one part")
    size = network.num_addresses >> bits
    return tuple(
        Part(_name(name, index), network_of(network[index * size], length))
        for index in range(number)
    )


def _name(pool: str, index: int) -> str:
    room = _MAX_NAME - len(f"split--{index}")
    return f"split-{pool[:room]}-{index}"


async def _split(store: Datastore, number: int, cidr: str, name: str) -> tuple[str, Sequence[Part]]:
    seen = await look(store)
    if not seen.is_locked:
        raise ObjectError(
            "datastore is not locked. Run `cymric datastore lock` in order to split the IP pools"
        )
    pool = _wanted(seen, cidr, name)
    parts = plan(pool, number, seen.blocks)
    objects = Objects(store)
    key = ResourceKey("IPPool", pool.metadata.name)
    tree = await objects.get(key)
    keys = {part: str(ResourceKey("IPPool", part.name)) for part in parts}
    lock = str(ResourceKey("ClusterInformation", "default"))
    compares = (
        Compare(lock, seen.revisions[lock]),
        Compare(str(key), seen.revisions[str(key)]),
        *(Compare(text, ABSENT) for text in keys.values()),
    )
    puts = [Put(text, _stored(objects, tree, part)) for part, text in keys.items()]
    try:
        await store.commit(Transaction(compares, (Delete(str(key)), *puts)))
    except Conflict as conflict:
        raise ObjectError(f"nothing was split: {conflict}") from None
    return pool.metadata.name, parts


def _wanted(seen: Snapshot, cidr: str, name: str) -> IPPool:
    for pool in seen.pools.values():
        if (not name or pool.metadata.name == name) and (not cidr or pool.spec.cidr == cidr):
            return pool
    if name and not cidr:
        raise ObjectError(f"unable to find IP pool with name {name}")
    raise ObjectError(f"unable to find IP pool {name} covering the specified CIDR {cidr}")


def _stored(objects: Objects, tree: Tree, part: Part) -> bytes:
    """The part as an object: all that the pool says, but for name, identity and range."""
    kept = {field: value for field, value in tree["metadata"].items() if field not in _OWN_IDENTITY}
    made = {
        **tree,
        "metadata": {**kept, "name": part.name},
        "spec": {**tree["spec"], "cidr": str(part.network)},
    }
    return codec.encode_tree(objects.fresh(find("IPPool"), made))
