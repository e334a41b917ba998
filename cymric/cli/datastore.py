"""`cymric datastore`: the lock that keeps workloads and addresses from changing.

The lock is ClusterInformation's `datastoreReady`: while it is false no workload is added or removed
anywhere, and addresses stay as they are. Objects can be written all the same.
"""

from __future__ import annotations

import click

from cymric.cli.objects import Objects
from cymric.cli.session import Session
from cymric.cli.startup import set_ready


@click.group("datastore")
def group() -> None:
    """The datastore as a whole."""


@group.command("lock")
@click.pass_obj
def lock(session: Session) -> None:
    """Let no workload come or go, for changes that must have addresses stand still."""
    session.run(lambda store: set_ready(Objects(store), is_ready=False))
    click.echo("Datastore locked.")


@group.command("unlock")
@click.pass_obj
def unlock(session: Session) -> None:
    """Let workloads come and go again."""
    session.run(lambda store: set_ready(Objects(store), is_ready=True))
    click.echo("Datastore unlocked.")


@group.group("migrate", hidden=True)
def migrate() -> None:
    """Where calicoctl has the lock."""


migrate.add_command(lock)
migrate.add_command(unlock)
