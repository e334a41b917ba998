"""`cymric node status`: this node's sessions from its bgpd; all nodes, or another, from etcd.

What a session does is known only to the two nodes that have it. So for other nodes the datastore
tells which sessions they should have and how far a drain is, and this node's bgpd, if one runs,
how the session with each of them looks from here.

Confd's word is shown as well: a configuration that ExaBGP would refuse is never installed, and
here is where one learns that, and why.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import click

from cymric.cli import output
from cymric.cli.bgpd_socket import NotRunning, ask
from cymric.cli.durations import ago
from cymric.cli.node_drain import STATUS, WISH
from cymric.cli.objects import ObjectError
from cymric.cli.session import Session
from cymric.datastore.api import Datastore
from cymric.model import codec
from cymric.model.codec import Malformed
from cymric.model.keys import resource_prefix
from cymric.model.peering import PeeringInputs, peering_of
from cymric.model.resources import BGPConfiguration, BGPPeer, Node

_KINDS = ("Node", "BGPPeer", "BGPConfiguration")
_HEADING = ("PEER ADDRESS", "PEER TYPE", "STATE", "SINCE", "INFO")


@click.command("status")
@click.argument("node", required=False)
@click.option("-a", "--all", "is_all", is_flag=True, help="All nodes, from the datastore.")
@click.option("-o", "--output", "form", type=click.Choice(["ps", "yaml", "json"]), default="ps")
@click.pass_obj
def status(session: Session, node: str | None, is_all: bool, form: str) -> None:
    """The BGP sessions of this node, as bgpd sees them; of NODE, or of all, from the datastore."""
    if not is_all and node in (None, session.settings().node_name):
        _here(session, form)
        return
    inputs, complaints = session.run(read)
    seen = _seen_from_here(session)
    told = {name: describe(name, inputs, seen) for name in sorted(inputs.nodes)}
    if node is not None and node not in told:
        raise ObjectError(f"resource does not exist: Node({node})")
    for complaint in complaints:
        output.note(complaint)
    if form != "ps":
        output.document(told if node is None else told[node], form)
    elif node is None:
        _table(told)
    else:
        _one(node, told[node])


def _here(session: Session, form: str) -> None:
    answer = ask(session, "status")
    confd = confd_status(session)
    if form != "ps":
        output.document({**answer, **({"confd": confd} if confd else {})}, form)
        return
    click.echo("Cymric process is running.")
    peers = answer["peers"]
    for version, mark in ((4, "."), (6, ":")):
        rows = [
            (p["address"], p["type"], p["state"], clock_time(p["since"]), p["info"])
            for p in peers
            if mark in p["address"]
        ]
        if rows or version == 4:
            click.echo(f"\nIPv{version} BGP status")
        if rows:
            output.boxed(_HEADING, rows)
        elif version == 4:
            click.echo("No IPv4 peers found.")
    for peer in peers:
        if peer.get("hint"):
            output.note(f"{peer['address']}: {peer['hint']}")
    for name, why in answer.get("unsupported_peers", {}).items():
        output.note(f"BGPPeer {name} is not served: {why}")
    for name, why in answer.get("problems", {}).items():
        output.note(f"{name}: {why}")
    if not answer["in_sync"]:
        output.note("bgpd is not in sync with etcd yet")
    if not answer["speaker"]["connected"]:
        output.note("bgpd has no connection to the speaker (ExaBGP)")
    note_outgoing(answer.get("outgoing", {}))
    if confd.get("state") == "refused":
        output.note(
            f"confd refused the newest configuration {ago(confd.get('at', 0))}, the one before "
            f"it is in use: {confd.get('reason', 'no reason given')}"
        )
    for name, why in (confd.get("unsupported") or {}).items():
        if name not in answer.get("unsupported_peers", {}):
            output.note(f"BGPPeer {name} is not configured: {why}")


def note_outgoing(outgoing: Mapping[str, Any]) -> None:
    """What stands between this node's routes and its peers, as remarks."""
    if outgoing.get("waits_for"):
        output.note(f"nothing is announced yet: waiting for {outgoing['waits_for']}")
    if outgoing.get("phase"):
        output.note(f"this node is being drained ({outgoing['wish']}): {outgoing['phase']}")
    if outgoing.get("complaint"):
        output.note(f"the annotation {WISH} is not understood: {outgoing['complaint']}")


def confd_status(session: Session) -> dict[str, Any]:
    """What confd of this node last said of the speaker's file; empty if it said nothing."""
    try:
        told = json.loads(session.settings().confd_status.read_text())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) else {}


async def read(store: Datastore) -> tuple[PeeringInputs, list[str]]:
    """What the datastore says about peering, and a line for each value that cannot be read."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
    complaints = []
    for kind in _KINDS:
        for item in (await store.list(resource_prefix(kind))).items:
            try:
                decoded = codec.decode(item.key, item.value)
            except Malformed as error:
                complaints.append(str(error))
                continue
            value = None if decoded is None else decoded[1]
            if isinstance(value, Node | BGPPeer | BGPConfiguration):
                found[kind][value.metadata.name] = value
    inputs = PeeringInputs(
        nodes=found["Node"], peers=found["BGPPeer"], configurations=found["BGPConfiguration"]
    )
    return inputs, complaints


def describe(
    name: str, inputs: PeeringInputs, seen: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """One node: what it should have, and how the session with it looks from here."""
    node, peering = inputs.nodes[name], peering_of(name, inputs)
    bgp = node.spec.bgp
    return {
        "addresses": [
            text.partition("/")[0]
            for text in (() if bgp is None else (bgp.ipv4_address, bgp.ipv6_address))
            if text
        ],
        "asn": inputs.asn(name),
        "cluster_id": "" if bgp is None else bgp.route_reflector_cluster_id,
        "sessions": [
            {
                "peer": str(one.peer_address),
                "name": one.name,
                "type": one.peer_type.value,
                "asn": one.peer_asn,
                "node": one.peer_node,
            }
            for one in peering.sessions
        ],
        "unsupported_peers": dict(peering.unsupported),
        "problems": dict(peering.problems),
        "drain": node.annotations.get(WISH, ""),
        "drain_status": node.annotations.get(STATUS, ""),
        "seen_from_here": dict(seen.get(name, {})),
    }


def clock_time(since_s: float) -> str:
    """As BIRD prints it: the time of day within a day, else the date."""
    if not since_s:
        return ""
    moment, now = datetime.fromtimestamp(since_s), datetime.now()
    return moment.strftime("%H:%M:%S" if (now - moment).days < 1 else "%Y-%m-%d")


def _seen_from_here(session: Session) -> dict[str, dict[str, Any]]:
    """How the sessions with other nodes look from this machine, if it is one that has some."""
    try:
        answer = ask(session, "status")
    except NotRunning:
        return {}
    seen = {
        one["node"]: {word: one[word] for word in ("state", "info", "since")}
        for one in answer["peers"]
        if one["node"]
    }
    seen[answer["node"]] = {"state": "here", "info": "", "since": 0}
    return seen


def _table(told: Mapping[str, Mapping[str, Any]]) -> None:
    rows = [
        (
            name,
            ",".join(one["addresses"]) or "-",
            str(one["asn"]),
            one["cluster_id"] or "-",
            str(len(one["sessions"])),
            one["seen_from_here"].get("state", "-"),
            one["drain_status"] or (f"{one['drain']} wanted" if one["drain"] else "-"),
        )
        for name, one in told.items()
    ]
    output.table(("NODE", "ADDRESS", "ASN", "REFLECTOR", "SESSIONS", "FROM HERE", "DRAIN"), rows)


def _one(name: str, told: Mapping[str, Any]) -> None:
    click.echo(f"Node {name}, AS {told['asn']}: the sessions it should have")
    rows = [
        (one["peer"], one["type"], str(one["asn"]), one["node"] or "-") for one in told["sessions"]
    ]
    output.table(("PEER ADDRESS", "PEER TYPE", "ASN", "NODE"), rows)
    if seen := told["seen_from_here"]:
        output.note(f"from here: {seen['state']} {seen['info']}".rstrip())
    for peer, why in told["unsupported_peers"].items():
        output.note(f"BGPPeer {peer} is not served: {why}")
    for name, why in told["problems"].items():
        output.note(f"{name}: {why}")
    if told["drain"] or told["drain_status"]:
        output.note(f"drain: {told['drain_status'] or told['drain'] + ' wanted'}")
