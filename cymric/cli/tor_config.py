"""`cymric tor-config`: the configuration of the router behind a BGPPeer, from the same objects.

What is printed is for a person to read and load; nothing is sent anywhere. Passwords are not read:
`PASSWORD-OF-<secret>/<key>` stands where one belongs.
"""

from __future__ import annotations

from typing import TypeVar

import click

from cymric.cli.objects import ObjectError
from cymric.cli.session import Session
from cymric.datastore.api import Datastore
from cymric.model import codec
from cymric.model.keys import resource_prefix
from cymric.model.net import parse_network
from cymric.model.peering import PeeringInputs
from cymric.model.resources import BGPConfiguration, BGPPeer, IPPool, Node, Resource

R = TypeVar("R", bound=Resource)


@click.command("tor-config")
@click.option("--peer", required=True, help="The BGPPeer whose router is to be configured.")
@click.option(
    "--for",
    "dialect",
    required=True,
    type=click.Choice(["frr", "bird", "eos", "junos", "nxos", "ios-xr"]),
    help="What runs on the router.",
)
@click.option("--node", default="", help="Only this node's session; all nodes' if not given.")
@click.option(
    "--announce",
    "announced",
    multiple=True,
    metavar="CIDR",
    help="What the router announces to the nodes beside our pools; may be repeated.",
)
@click.option("--max-prefixes", type=click.IntRange(1), help="What one node may announce.")
@click.pass_obj
def command(
    session: Session,
    peer: str,
    dialect: str,
    node: str,
    announced: tuple[str, ...],
    max_prefixes: int | None,
) -> None:
    """Print what the router behind a BGPPeer must be told."""
    from cymric.model.tor import MAX_PREFIXES, render, tor_config

    inputs, pools = session.run(_read)
    try:
        config = tor_config(
            peer,
            inputs,
            pools.values(),
            node=node,
            max_prefixes=max_prefixes or MAX_PREFIXES,
            announced=[parse_network(cidr) for cidr in announced],
        )
    except ValueError as error:
        raise ObjectError(str(error)) from None
    click.echo(render(config, dialect), nl=False)


async def _read(store: Datastore) -> tuple[PeeringInputs, dict[str, IPPool]]:
    inputs = PeeringInputs(
        nodes=await _all(store, Node),
        peers=await _all(store, BGPPeer),
        configurations=await _all(store, BGPConfiguration),
    )
    return inputs, await _all(store, IPPool)


async def _all(store: Datastore, kind: type[R]) -> dict[str, R]:
    """Every object of a kind. An object that does not parse stops us: Malformed names it."""
    listing = await store.list(resource_prefix(kind.__name__))
    found: dict[str, R] = {}
    for item in listing.items:
        decoded = codec.decode(item.key, item.value)
        if decoded is not None and isinstance(decoded[1], kind):
            found[decoded[1].metadata.name] = decoded[1]
    return found
