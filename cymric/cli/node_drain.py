"""`cymric node drain` and `undrain`: a wish at the Node, and waiting until the node's bgpd met it.

    drain ─▶ Node annotation cymric.io/drain ─▶ that node's bgpd ─▶ cymric.io/drain-status ─▶ here

Works from any machine that reaches etcd: bgpd of the node writes back how far it is. The wish stays
until `undrain`, over restarts and a reboot, so a node that comes back does not attract traffic
before somebody says so. Asking again is harmless and waits again.

"Safe to reboot" is said only of what was seen: the node's bgpd has told every peer whose session is
up, and no workload endpoint of the node is left in the datastore. Moving pods away is the
orchestrator's work (`kubectl drain`); new pods on a draining node are not refused here.
"""

from __future__ import annotations

import asyncio
import time

import click

from cymric.cli import output
from cymric.cli.kinds import find
from cymric.cli.objects import Changed, ObjectError, Objects
from cymric.cli.session import Session
from cymric.datastore.api import Datastore
from cymric.model import codec
from cymric.model.codec import Malformed
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.keys import ResourceKey, resource_prefix

WISH, STATUS = "cymric.io/drain", "cymric.io/drain-status"
"""Annotations: what is wanted, and what the node's bgpd says of it. bgpd knows them as well."""

ATTEMPTS = 5
LOOK_EVERY_S = 0.5
MOST_NAMED = 5


@click.command("drain")
@click.argument("node")
@click.option("--for-reboot", is_flag=True, help="The whole node goes, not only its services.")
@click.option("--timeout", "timeout_s", default=300.0, help="Seconds to wait; 0 does not wait.")
@click.pass_obj
def drain(session: Session, node: str, for_reboot: bool, timeout_s: float) -> None:
    """Lead traffic away from NODE, and wait until it is.

    Routes of services, and new ones, are marked GRACEFUL_SHUTDOWN with the lowest preference; when
    all peers were told and had time to move, routes of services are withdrawn. Blocks of pods stay
    as long as pods live in them. With --for-reboot blocks are marked as well, and the command ends
    when no pod is left: then the node may be rebooted.
    """
    wish = "reboot" if for_reboot else "services"
    session.run(lambda store: drain_node(store, node, wish, timeout_s))


@click.command("undrain")
@click.argument("node")
@click.option("--timeout", "timeout_s", default=60.0, help="Seconds to wait; 0 does not wait.")
@click.pass_obj
def undrain(session: Session, node: str, timeout_s: float) -> None:
    """Let NODE attract traffic as ever."""
    session.run(lambda store: undrain_node(store, node, timeout_s))


async def drain_node(store: Datastore, node: str, wish: str, timeout_s: float) -> None:
    """Ask for it, and wait until it is so. `wish`: services or reboot. Raises ObjectError."""
    objects = Objects(store)
    await _annotate(objects, node, wish)
    if not timeout_s:
        click.echo(f"Node {node} is asked to drain ({wish}); cymric node status shows how far.")
        return
    deadline_s = time.monotonic() + timeout_s
    phase = ""
    while (now := (await _annotations(objects, node)).get(STATUS, "")) != f"{wish} left":
        if now != phase:
            output.note(f"node {node}: {now or 'waiting for its bgpd'}")
            phase = now
        if time.monotonic() > deadline_s:
            raise ObjectError(
                f"node {node} is not drained after {timeout_s:g} s: "
                + (f"it is at {now!r}" if now else "its bgpd does not answer; does it run?")
                + "; the wish stays, undrain takes it back"
            )
        await asyncio.sleep(LOOK_EVERY_S)
    click.echo(f"Node {node}: every peer that is connected was told and had time to move;")
    if wish == "services":
        click.echo("routes of services are withdrawn. Pods stay reachable.")
        return
    await _wait_for_pods(store, node, deadline_s, timeout_s)
    click.echo("routes of services are withdrawn; no workload endpoint is left on the node.")
    click.echo(f"Safe to reboot {node}. Afterwards: cymric node undrain {node}")


async def undrain_node(store: Datastore, node: str, timeout_s: float) -> None:
    """Take the wish back, and wait until the node knows. Raises ObjectError."""
    objects = Objects(store)
    await _annotate(objects, node, None)
    deadline_s = time.monotonic() + timeout_s
    while timeout_s and (await _annotations(objects, node)).get(STATUS):
        if time.monotonic() > deadline_s:
            raise ObjectError(
                f"the wish is taken back, but bgpd of {node} has not said that it advertises "
                f"as ever after {timeout_s:g} s; does it run?"
            )
        await asyncio.sleep(LOOK_EVERY_S)
    click.echo(f"Node {node} attracts traffic as ever.")


async def _wait_for_pods(store: Datastore, node: str, deadline_s: float, timeout_s: float) -> None:
    told = 0
    while left := await _endpoints_on(store, node):
        if time.monotonic() > deadline_s:
            named = ", ".join(left[:MOST_NAMED]) + (" …" if len(left) > MOST_NAMED else "")
            raise ObjectError(
                f"not safe to reboot {node}: {len(left)} workload endpoints are left after "
                f"{timeout_s:g} s: {named}"
            )
        if len(left) != told:
            output.note(f"node {node}: waiting for {len(left)} workload endpoints to go")
            told = len(left)
        await asyncio.sleep(LOOK_EVERY_S)


async def _endpoints_on(store: Datastore, node: str) -> list[str]:
    """Names of the node's endpoints; what cannot be read counts if its name begins like one."""
    found = []
    for item in (await store.list(resource_prefix("WorkloadEndpoint"))).items:
        name = item.key.removeprefix(resource_prefix("WorkloadEndpoint"))
        try:
            decoded = codec.decode(item.key, item.value)
        except Malformed:
            if name.partition("/")[2].startswith(node.replace("-", "--") + "-"):
                found.append(f"{name} (unreadable)")
            continue
        endpoint = None if decoded is None else decoded[1]
        if isinstance(endpoint, WorkloadEndpoint) and endpoint.spec.node == node:
            found.append(name)
    return found


async def _annotations(objects: Objects, node: str) -> dict[str, str]:
    tree = await objects.get(ResourceKey("Node", node))
    return dict(tree["metadata"].get("annotations") or {})


async def _annotate(objects: Objects, node: str, wish: str | None) -> None:
    """Write the wish, or take it away. Raises NotFound, Changed."""
    for _ in range(ATTEMPTS):
        tree = await objects.get(ResourceKey("Node", node))
        annotations = dict(tree["metadata"].get("annotations") or {})
        if annotations.get(WISH) == wish:
            return
        if wish is None:
            del annotations[WISH]
        else:
            annotations[WISH] = wish
        tree["metadata"]["annotations"] = annotations
        try:
            await objects.replace(find("Node"), tree)
        except Changed:
            continue  # kubelet's labels, bgpd's status: look again
        return
    raise Changed(ResourceKey("Node", node), f"others kept changing it, {ATTEMPTS} times")
