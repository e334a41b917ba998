"""`cymric ipam configure`: the settings of IPAM for the whole cluster.

They lie in one key that a Calico node reads as well. Fields of other versions are kept; the write
lands only on the value that was read.
"""

from __future__ import annotations

import click

from cymric.cli.objects import APPLY_ATTEMPTS, ObjectError
from cymric.cli.schema import Tree, conform, fields
from cymric.cli.session import Session
from cymric.datastore import api
from cymric.datastore.api import Datastore
from cymric.model import codec
from cymric.model.ipam import DEFAULT_IPAM_CONFIG, IPAMConfig
from cymric.model.keys import IPAM_CONFIG

_FIELDS = fields(
    "strict_affinity:bool auto_allocate_blocks:bool maxBlocksPerHost:int "
    "kubeVirtVMAddressPersistence:string?"
)
_NAMES = {
    "strict_affinity": "StrictAffinity",
    "maxBlocksPerHost": "MaxBlocksPerHost",
    "kubeVirtVMAddressPersistence": "KubeVirtVMAddressPersistence",
}


@click.command("configure")
@click.option(
    "--strictaffinity",
    type=click.BOOL,
    help="When true, nodes do not borrow addresses from each other's blocks.",
)
@click.option(
    "--max-blocks-per-host",
    type=click.IntRange(0),
    help="How many blocks a node may own; 0: no limit set. Needs strict affinity.",
)
@click.option(
    "--kubevirt-ip-persistence",
    type=click.Choice(["Enabled", "Disabled"]),
    help="Stored for Calico nodes that run virtual machines.",
)
@click.pass_obj
def configure(
    session: Session,
    strictaffinity: bool | None,
    max_blocks_per_host: int | None,
    kubevirt_ip_persistence: str | None,
) -> None:
    """Change the settings of IPAM for the whole cluster."""
    wanted = {
        "strict_affinity": strictaffinity,
        "maxBlocksPerHost": max_blocks_per_host,
        "kubeVirtVMAddressPersistence": kubevirt_ip_persistence,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    if not given:
        raise click.UsageError("at least one configuration option must be specified")
    session.run(lambda store: _change(store, given))
    for name, value in given.items():
        said = str(value).lower() if isinstance(value, bool) else value
        click.echo(f"Successfully set {_NAMES[name]} to: {said}")


async def _change(store: Datastore, given: Tree) -> None:
    for _ in range(APPLY_ATTEMPTS):
        read = await store.get(IPAM_CONFIG)
        value = codec.encode(DEFAULT_IPAM_CONFIG) if read is None else read.value
        try:
            tree = codec.decode_as(Tree, value)
            changed = conform({**tree, **given}, _FIELDS).tree
            problem = codec.decode_as(IPAMConfig, codec.encode_tree(changed)).problem()
        except ValueError as error:
            raise codec.Malformed(IPAM_CONFIG, str(error)) from None
        if problem is not None:
            raise ObjectError(f"not a configuration that IPAM could follow: {problem}")
        revision = api.ABSENT if read is None else read.revision
        try:
            await api.update(store, IPAM_CONFIG, codec.encode_tree(changed), if_revision=revision)
        except api.Conflict:
            continue  # another changed it meanwhile: keep what they set
        return
    raise ObjectError(f"others kept changing the configuration of IPAM, {APPLY_ATTEMPTS} times")
