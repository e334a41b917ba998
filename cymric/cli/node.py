"""`cymric node`: how this node's BGP sessions are; `init` is in `node_init.py`.

`status`, `routes` and `why` ask bgpd over its unix socket (one question line in, one JSON document
out) and read nothing from etcd: they work while it is down, which is when they are wanted.
"""

from __future__ import annotations

from datetime import datetime

import click

from cymric.cli import output
from cymric.cli.bgpd_socket import ask
from cymric.cli.node_init import init
from cymric.cli.session import Session

_form = click.option(
    "-o", "--output", "form", type=click.Choice(["ps", "yaml", "json"]), default="ps"
)


@click.group("node")
def group() -> None:
    """The node that runs on this machine."""


group.add_command(init)


@group.command("status")
@_form
@click.pass_obj
def status(session: Session, form: str) -> None:
    """The BGP sessions of this node, as bgpd sees them."""
    answer = ask(session, "status")
    if form != "ps":
        output.document(answer, form)
        return
    click.echo("Cymric process is running.\n\nIPv4 BGP status")
    peers = answer["peers"]
    if not peers:
        click.echo("No IPv4 peers found.")
    else:
        rows = [
            (p["address"], p["type"], p["state"], _clock_time(p["since"]), p["info"]) for p in peers
        ]
        output.boxed(("PEER ADDRESS", "PEER TYPE", "STATE", "SINCE", "INFO"), rows)
    for name, why in answer.get("unsupported_peers", {}).items():
        output.note(f"BGPPeer {name} is not served: {why}")
    if not answer["in_sync"]:
        output.note("bgpd is not in sync with etcd yet")
    if not answer["speaker"]["connected"]:
        output.note("bgpd has no connection to the speaker (ExaBGP)")


@group.command("routes")
@_form
@click.pass_obj
def routes(session: Session, form: str) -> None:
    """The routes that bgpd chose among those learnt."""
    answer = ask(session, "routes")
    if form != "ps":
        output.document(answer, form)
        return
    rows = [(r["prefix"], r["next_hop"], r["peer"], r["settled_by"]) for r in answer["routes"]]
    output.table(("PREFIX", "NEXT HOP", "PEER", "SETTLED BY"), rows)


@group.command("why")
@click.argument("prefix")
@_form
@click.pass_obj
def why(session: Session, prefix: str, form: str) -> None:
    """Every path to PREFIX, and at which step of the decision each was lost."""
    answer = ask(session, f"why {prefix}")
    if form != "ps":
        output.document(answer, form)
        return
    rows = [
        (
            "*" if path["used"] else "",
            path["peer"],
            path["next_hop"],
            path["rejected"] or path["lost_at"] or answer["settled_by"],
        )
        for path in answer["paths"]
    ]
    output.table(("USED", "PEER", "NEXT HOP", "WHY"), rows)


def _clock_time(since_s: float) -> str:
    """As BIRD prints it: the time of day within a day, else the date."""
    if not since_s:
        return ""
    moment, now = datetime.fromtimestamp(since_s), datetime.now()
    return moment.strftime("%H:%M:%S" if (now - moment).days < 1 else "%Y-%m-%d")
