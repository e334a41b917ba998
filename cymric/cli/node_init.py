"""`cymric node init`: run once on a node, before its daemons.

Waits for etcd, finds the node's address, and hands both to `startup.py`, which writes what is
missing. The environment names are Calico's where it has one.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cymric.cli import autodetect, output
from cymric.cli.objects import ObjectError, Objects
from cymric.cli.session import Session
from cymric.datastore.api import Datastore, Unavailable
from cymric.model.keys import ResourceKey
from cymric.model.net import Address, Interface, parse_address, parse_asn
from cymric.runtime.pacing import Backoff

if TYPE_CHECKING:
    from cymric.cli.startup import Plan

_ANY_PORT = 53
_FIRST_PATIENCE_S = 1.0


@click.command("init")
@click.option(
    "--ip",
    "method",
    envvar="CYMRIC_NODE_IP",
    default="",
    help="Address with prefix length, or how to find it: autodetect, interface=REGEX, "
    "skip-interface=REGEX, cidr=PREFIX, can-reach=ADDRESS. Empty: what etcd has, else autodetect.",
)
@click.option("--as-number", envvar="CYMRIC_AS_NUMBER", default="", help="The node's own AS.")
@click.option("--no-default-pools", envvar="NO_DEFAULT_POOLS", is_flag=True, help="Create no pool.")
@click.option("--pool-cidr", envvar="CALICO_IPV4POOL_CIDR", default="", help="The default pool.")
@click.option("--pool-block-size", envvar="CALICO_IPV4POOL_BLOCK_SIZE", type=int, default=0)
@click.option("--pool-nat-outgoing", envvar="CALICO_IPV4POOL_NAT_OUTGOING", type=bool, default=True)
@click.option("--pool-node-selector", envvar="CALICO_IPV4POOL_NODE_SELECTOR", default="all()")
@click.option(
    "--pool-disable-bgp-export",
    envvar="CALICO_IPV4POOL_DISABLE_BGP_EXPORT",
    type=bool,
    default=False,
)
@click.option(
    "--no-address-check",
    envvar="DISABLE_NODE_IP_CHECK",
    is_flag=True,
    help="Do not look whether another node has the address.",
)
@click.option(
    "--calico-nodename-file",
    envvar="CYMRIC_CALICO_NODENAME_FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the node's name there as well: Calico's is /var/lib/calico/nodename.",
)
@click.option("--wait", "wait_s", type=float, default=60.0, show_default=True,
              help="How long to wait for etcd, in seconds.")  # fmt: skip
@click.pass_obj
def init(
    session: Session,
    method: str,
    as_number: str,
    no_default_pools: bool,
    pool_cidr: str,
    pool_block_size: int,
    pool_nat_outgoing: bool,
    pool_node_selector: str,
    pool_disable_bgp_export: bool,
    no_address_check: bool,
    calico_nodename_file: Path | None,
    wait_s: float,
) -> None:
    """Put in etcd what this node's daemons need; run it before them. Repeating it is harmless."""
    from cymric.cli.startup import Plan, PoolPlan, initialise, write_nodename

    settings = session.settings()
    pool = PoolPlan(
        cidr=pool_cidr,
        block_size=pool_block_size,
        nat_outgoing=pool_nat_outgoing,
        node_selector=pool_node_selector,
        disable_bgp_export=pool_disable_bgp_export,
    )
    plan = Plan(
        node_name=settings.node_name,
        address=None,
        as_number=_as_number(as_number),
        checks_address=not no_address_check,
        pool=None if no_default_pools or pool_cidr.lower() == "none" else pool,
    )

    async def work(store: Datastore) -> list[str]:
        await _wait_for(store, wait_s)
        objects = Objects(store)
        seen = await _interfaces()
        chosen = await _with_address(objects, plan, method, seen)
        mine = [address for interface in seen for address in interface.addresses]
        return await initialise(objects, chosen, mine)

    for line in session.run(work):
        click.echo(line)
    write_nodename(settings.state_dir / "nodename", settings.node_name)
    if calico_nodename_file is not None:
        write_nodename(calico_nodename_file, settings.node_name)


async def _wait_for(store: Datastore, wait_s: float) -> None:
    """Until the datastore answers; raises Unavailable when `wait_s` are over."""
    loop, backoff = asyncio.get_running_loop(), Backoff(first_s=0.2, most_s=2.0)
    deadline, patience_s = loop.time() + wait_s, _FIRST_PATIENCE_S
    while True:
        left_s = deadline - loop.time()
        if left_s <= 0:
            raise Unavailable(f"not within {wait_s:g} s")
        try:
            async with asyncio.timeout(min(patience_s, left_s)):
                await store.get(str(ResourceKey("ClusterInformation", "default")))
        except (Unavailable, TimeoutError):
            if backoff.failures == 0:
                output.note(f"Waiting up to {wait_s:g} s for etcd")
            await asyncio.sleep(min(backoff.next_s(), left_s))
            patience_s *= 2  # it may be there and slow
        else:
            return


async def _with_address(
    objects: Objects, plan: Plan, method: str, seen: Sequence[autodetect.Seen]
) -> Plan:
    """The plan with the node's address: as told, or the stored one, or found."""
    if method == "none":
        return plan
    if not method:
        stored = await objects.find(ResourceKey("Node", plan.node_name))
        if stored and (stored["spec"].get("bgp") or {}).get("ipv4Address"):
            return plan
        method = "autodetect"
    destination = autodetect.reached_through(method)
    source = _source_address(destination) if destination else None
    try:
        return replace(plan, address=autodetect.choose(method, seen, source))
    except autodetect.NoAddress as error:
        raise ObjectError(str(error)) from None
    except ValueError as error:
        raise click.UsageError(f"--ip {method!r}: {error}") from None


async def _interfaces() -> list[autodetect.Seen]:
    from cymric.kernel.netlink import Netlink

    links = Netlink()
    try:
        return [
            autodetect.Seen(link.name, link.index, await _addresses(links, link.index))
            for link in await links.all()
            if link.is_up
        ]
    finally:
        links.close()


async def _addresses(links: Any, index: int) -> tuple[Interface, ...]:
    found: tuple[Interface, ...] = await links.addresses(index)
    return found


def _source_address(destination: str) -> Address | None:
    """The address the kernel would send from; connecting a datagram socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((destination, _ANY_PORT))
        except OSError as error:
            raise ObjectError(f"no way to reach {destination}: {error}") from None
        return parse_address(probe.getsockname()[0])


def _as_number(text: str) -> int | None:
    try:
        return parse_asn(text) if text else None
    except ValueError as error:
        raise click.UsageError(f"--as-number: {error}") from None
