"""`cymric felix`: what this node's felix has worked out, asked over its unix socket."""

from __future__ import annotations

import click

from cymric.cli import output
from cymric.cli.bgpd_socket import ask_felix
from cymric.cli.session import Session


@click.group("felix")
def group() -> None:
    """The policy agent of this node."""


@group.command("dump")
@click.option("-o", "--output", "form", type=click.Choice(["json", "yaml"]), default="json")
@click.option("--members", is_flag=True, help="The members of sets, not only how many.")
@click.pass_obj
def dump(session: Session, form: str, members: bool) -> None:
    """The calculated state: parameters, endpoints with their policies in order, sets, problems."""
    output.document(ask_felix(session, "dump members" if members else "dump"), form)
