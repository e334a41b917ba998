"""`cymric policy`: changes on trial, and what policy does on this node.

Trials work on the datastore from anywhere; counters and explanations are asked of felix on this
machine, over its unix socket.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click
import msgspec

from cymric.cli import output, policy_trial, resource
from cymric.cli.bgpd_socket import ask_felix
from cymric.cli.session import Session

_file = click.option("-f", "--filename", help="A file of objects, or - for standard input.")
_namespace = click.option("-n", "--namespace", default="", help="Namespace of the objects.")
_form = click.option("-o", "--output", "form", type=click.Choice(["ps", "json"]), default="ps")


@click.group("policy")
def group() -> None:
    """Policy: changes on trial, hit counters, and why a packet passes or not."""


@group.command("apply")
@_file
@_namespace
@click.option("--confirm", "within", metavar="60s", help="Undo it unless confirmed in that time.")
@click.pass_obj
def apply(session: Session, filename: str | None, namespace: str, within: str | None) -> None:
    """Apply the objects of a file; with --confirm on trial: nodes undo them by themselves."""
    if not filename:
        raise click.UsageError("give the file with -f")
    if within is None:
        raise click.UsageError("without --confirm use: cymric apply -f FILE")
    within_s = policy_trial.seconds(within)
    policy_trial.apply(session, resource.targets_of(None, (), filename, namespace), within_s)


@group.command("confirm")
@_file
@_namespace
@click.pass_obj
def confirm(session: Session, filename: str | None, namespace: str) -> None:
    """Make what is on trial stay: the objects of a file, or all."""
    policy_trial.confirm(session, _chosen(filename, namespace))


@group.command("rollback")
@_file
@_namespace
@click.pass_obj
def rollback(session: Session, filename: str | None, namespace: str) -> None:
    """Write what was before a trial, whether or not it is over."""
    policy_trial.rollback(session, _chosen(filename, namespace))


@group.command("trials")
@click.pass_obj
def trials(session: Session) -> None:
    """What is on trial, and what was and was undone."""
    policy_trial.show(session)


def _chosen(filename: str | None, namespace: str) -> Sequence[resource.Target]:
    return resource.targets_of(None, (), filename, namespace) if filename else ()


@group.command("counters")
@click.argument("name", required=False)
@_form
@click.pass_obj
def counters(session: Session, name: str | None, form: str) -> None:
    """Packets and bytes that each rule of each policy matched on this node.

    NAME is a policy, `prod/allow-web` or `deny-all`; without it all are shown.
    """
    rows: Sequence[Mapping[str, Any]] = ask_felix(session, "counters")["counters"]
    if name:
        rows = [row for row in rows if name in (row["policy"], row["policy"].partition(" ")[2])]
    if form == "json":
        output.document(rows, form)
        return
    output.table(
        ("POLICY", "TIER", "DIRECTION", "RULE", "ACTION", "PACKETS", "BYTES"),
        [
            (
                *(row["policy"], row["tier"], row["direction"], str(row["rule"] or "-")),
                *(row["action"], str(row["packets"]), str(row["bytes"])),
            )
            for row in rows
        ],
    )
    if not rows:
        output.note(f"no policy {name} acts on this node" if name else "no policy acts here")


@group.command("explain")
@click.option("--from", "source", required=True, help="A pod, `namespace/name`, or an address.")
@click.option("--to", "destination", required=True, help="The same.")
@click.option("--port", type=click.IntRange(0, 65535), default=0)
@click.option("--protocol", default="tcp", help="tcp, udp, sctp, icmp, icmpv6 or a number.")
@_form
@click.pass_obj
def explain(
    session: Session, source: str, destination: str, port: int, protocol: str, form: str
) -> None:
    """What policy says of a new connection, and which rule decides, at both ends."""
    asked = {"from": source, "to": destination, "port": port, "protocol": protocol}
    answer = ask_felix(session, f"explain {msgspec.json.encode(asked).decode()}")
    if form == "json":
        output.document(answer, form)
        return
    rows = [
        (
            *(one["source"], one["destination"], one["endpoint"], one["direction"]),
            *(one["action"], one["by"], str(one["rule"] or "-")),
        )
        for one in answer["decisions"]
    ]
    output.table(("FROM", "TO", "AT", "DIRECTION", "SAYS", "BY", "RULE"), rows)
    output.note(f"the connection is {answer['verdict']}")
