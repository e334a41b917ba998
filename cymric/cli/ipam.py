"""`cymric ipam`: the group, and `show`: what addresses are given, and to whom."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from cymric.cli import output, utilization
from cymric.cli.collection import collect
from cymric.cli.ipam_check import check
from cymric.cli.ipam_configure import configure
from cymric.cli.ipam_release import release
from cymric.cli.objects import Objects
from cymric.cli.pool_migration import migrate
from cymric.cli.pool_split import split
from cymric.cli.session import Session
from cymric.datastore.api import Datastore
from cymric.model import codec, keys
from cymric.model.ipam import DEFAULT_IPAM_CONFIG, AllocationBlock, IPAMConfig
from cymric.model.keys import IPAMConfigKey
from cymric.model.net import Address, parse_address


@click.group("ipam")
def group() -> None:
    """Addresses: what is given, and to whom."""


for _command in (check, release, configure, split, migrate, collect):
    group.add_command(_command)


@group.command("show")
@click.option("--show-blocks", is_flag=True, help="A line for each block, too.")
@click.option("--ip", default="", help="Who holds this address.")
@click.option("--show-borrowed", is_flag=True, help="Addresses held by others than block owners.")
@click.option("--show-configuration", is_flag=True, help="The settings of IPAM.")
@click.pass_obj
def show(
    session: Session, show_blocks: bool, ip: str, show_borrowed: bool, show_configuration: bool
) -> None:
    """How full the pools are."""
    if ip:
        try:
            address = parse_address(ip)
        except ValueError as error:
            raise click.UsageError(f"--ip: {error}") from None
        session.run(lambda store: _show_address(store, address))
    elif show_borrowed:
        session.run(_show_borrowed)
    elif show_configuration:
        session.run(_show_configuration)
    else:
        session.run(lambda store: _show_usage(store, with_blocks=show_blocks))


async def blocks_of(store: Datastore) -> list[AllocationBlock]:
    """Every block that can be read, in key order; the others are told by key."""
    found = []
    for item in (await store.list(keys.block_prefix())).items:
        try:
            decoded = codec.decode(item.key, item.value)
        except codec.Malformed as error:
            output.note(f"Malformed, passed over: {error}")
            continue
        if decoded is not None and isinstance(decoded[1], AllocationBlock):
            found.append(decoded[1])
    return found


async def _show_usage(store: Datastore, *, with_blocks: bool) -> None:
    usages = utilization.utilization(await Objects(store).pools(), await blocks_of(store))
    output.boxed(utilization.HEADINGS, utilization.rows(usages, with_blocks=with_blocks))


async def _show_borrowed(store: Datastore) -> None:
    blocks = await blocks_of(store)
    output.boxed(utilization.BORROWED_HEADINGS, utilization.borrowed_rows(blocks))
    if unknown := utilization.without_node(blocks):
        click.echo(
            f"\nNote: found {unknown} IP allocations without an explicit node association. "
            "Unable to determine if they are borrowed."
        )


async def _show_configuration(store: Datastore) -> None:
    key = IPAMConfigKey()
    read = await store.get(str(key))
    config = DEFAULT_IPAM_CONFIG
    if read is not None:
        decoded = codec.decode(read.key, read.value)
        assert decoded is not None
        assert isinstance(decoded[1], IPAMConfig)
        config = decoded[1]
    rows = [
        ("StrictAffinity", str(config.strict_affinity).lower()),
        ("AutoAllocateBlocks", str(config.auto_allocate_blocks).lower()),
        ("MaxBlocksPerHost", str(config.maxBlocksPerHost)),
    ]
    if config.kubeVirtVMAddressPersistence:
        rows.append(("KubeVirtVMAddressPersistence", config.kubeVirtVMAddressPersistence))
    output.boxed(("PROPERTY", "VALUE"), rows)


async def _show_address(store: Datastore, address: Address) -> None:
    for block in await blocks_of(store):
        if address not in block.network:
            continue
        holder = block.holder_of(block.ordinal(address))
        if holder is None:
            break
        click.echo(f"IP {address} is in use\nHandle ID: {holder.handle or '<none>'}")
        if not holder.attributes:
            click.echo("No Active Owner attributes defined")
        _echo_attributes("Active Owner Attributes", holder.attributes)
        others = holder.alternateOwnerAttrs
        _echo_attributes("Alternate Owner Attributes", others if isinstance(others, dict) else {})
        return
    click.echo(f"{address} is not assigned")


def _echo_attributes(heading: str, attributes: Mapping[str, Any]) -> None:
    if attributes:
        click.echo(f"{heading}:")
    for name, value in sorted(attributes.items()):
        click.echo(f"  {name}: {value}")
