"""`cymric bgp`: what this node's bgpd does, peer by peer and prefix by prefix.

Everything is asked of bgpd over its unix socket and nothing of etcd, because these commands are
wanted most when something is broken. A peer may be named by its address, by the session's name, or
by the node behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import ip_network
from typing import Any

import click

from cymric.cli import output
from cymric.cli.bgpd_socket import ask
from cymric.cli.durations import ago, span
from cymric.cli.node_status import note_outgoing
from cymric.cli.objects import ObjectError
from cymric.cli.session import Session

_form = click.option(
    "-o", "--output", "form", type=click.Choice(["ps", "wide", "yaml", "json"]), default="ps"
)

_NUMBERS = ("local_pref", "med")

Row = Mapping[str, Any]


@click.group("bgp")
def group() -> None:
    """BGP on this node: peers, what they sent, what they were told, and why."""


@group.command("peers")
@_form
@click.pass_obj
def peers(session: Session, form: str) -> None:
    """Every session: state, for how long, prefixes in and out, and why it last ended."""
    answer = ask(session, "status")
    if form in ("yaml", "json"):
        output.document(answer["peers"], form)
        return
    rows = [_peer_row(one, is_wide=form == "wide") for one in answer["peers"]]
    more = ("NAME", "FAMILY", "FLAPS", "UPDATES") if form == "wide" else ()
    heading = ("PEER", "ASN", "STATE", "FOR", "IN", "LIMIT", "OUT", "BFD", *more, "LAST ERROR")
    output.table(heading, rows)
    for one in answer["peers"]:
        if one["over_limit"]:
            output.note(f"{one['address']}: {one['over_limit']} prefixes above its limit not kept")
        if one["hint"]:
            output.note(f"{one['address']}: {one['hint']}")
    note_outgoing(answer.get("outgoing", {}))


@group.command("routes")
@_form
@click.pass_obj
def routes(session: Session, form: str) -> None:
    """The routes that bgpd chose among those received."""
    answer = ask(session, "routes")
    found = _sorted(answer["routes"])
    if form in ("yaml", "json"):
        output.document({**answer, "routes": found}, form)
        return
    rows = [(r["prefix"], r["next_hop"], r["peer"], r["settled_by"]) for r in found]
    output.table(("PREFIX", "NEXT HOP", "PEER", "SETTLED BY"), rows)


@group.command("received")
@click.argument("peer")
@click.option("--rejected", "only_rejected", is_flag=True, help="Only what is not used.")
@_form
@click.pass_obj
def received(session: Session, peer: str, only_rejected: bool, form: str) -> None:
    """What PEER sent, and why what is not used is not."""
    answer = ask(session, f"received {_address_of(session, peer)}")
    found = [r for r in _sorted(answer["routes"]) if r["rejected"] or not only_rejected]
    if form in ("yaml", "json"):
        output.document({**answer, "routes": found}, form)
        return
    rows = [
        (*_attributes(r, form), ("stale; " if r["stale"] else "") + (r["rejected"] or "accepted"))
        for r in found
    ]
    output.table((*_headings(form), "POLICY"), rows)
    _note_down(answer)


@group.command("advertised")
@click.argument("peer")
@_form
@click.pass_obj
def advertised(session: Session, peer: str, form: str) -> None:
    """What PEER is told, and why."""
    answer = ask(session, f"advertised {_address_of(session, peer)}")
    found = _sorted(answer["routes"])
    if form in ("yaml", "json"):
        output.document({**answer, "routes": found}, form)
        return
    output.table((*_headings(form), "WHY"), [(*_attributes(r, form), r["why"]) for r in found])
    _note_down(answer)
    if answer["waits_for"]:
        output.note(f"nothing is announced yet: waiting for {answer['waits_for']}")
    if answer["drain"]:
        output.note(f"this node is being drained: {answer['drain']}")


@group.command("why")
@click.argument("prefix")
@_form
@click.pass_obj
def why(session: Session, prefix: str, form: str) -> None:
    """Every path to PREFIX, and at which step of the decision each was lost."""
    answer = ask(session, f"why {prefix}")
    if form in ("yaml", "json"):
        output.document(answer, form)
        return
    rows = [
        (
            "*" if path["used"] else "",
            path["peer"],
            _way(path),
            path.get("unreachable") or path["rejected"] or path["lost_at"] or answer["settled_by"],
        )
        for path in answer["paths"]
    ]
    output.table(("USED", "PEER", "NEXT HOP", "WHY"), rows)
    if not rows:
        output.note(f"no peer sent {prefix}")


def _way(path: Mapping[str, Any]) -> str:
    """The next hop, and the gateways on the way to it if it is not on-link."""
    gateways = ", ".join(path.get("reached_through", ()))
    return f"{path['next_hop']} via {gateways}" if gateways else str(path["next_hop"])


@group.command("diff")
@_form
@click.pass_obj
def diff(session: Session, form: str) -> None:
    """What each peer should have, what ExaBGP was given, and what was written to the peer.

    Exit code 1 if something is missing that nobody is about to send.
    """
    answer = ask(session, "diff")
    if form in ("yaml", "json"):
        output.document(answer, form)
    else:
        rows = [
            (
                one["peer"],
                "up" if one["is_up"] else "down",
                *(
                    str(one[word])
                    for word in ("wanted", "configured", "confirmed", "pending", "missing")
                ),
                str(one["repaired"]),
            )
            for one in answer["peers"]
        ]
        output.table(
            (
                *("PEER", "SESSION", "DESIRED", "CONFIGURED", "CONFIRMED", "PENDING", "MISSING"),
                "REPAIRED",
            ),
            rows,
        )
        for one in answer["peers"]:
            for words, named, count in (
                ("not told as wanted", one.get("unconfirmed"), one["pending"] + one["missing"]),
                ("repaired last", one.get("repaired_last"), 0),
            ):
                if named:
                    more = f" and {count - len(named)} more" if count > len(named) else ""
                    output.note(f"{one['peer']}, {words}: {', '.join(named)}{more}")
        output.note(f"sessions in ExaBGP: {answer['configuration']}")
        if answer["waits_for"]:
            output.note(f"nothing is announced yet: waiting for {answer['waits_for']}")
    if any(one["is_up"] and one["missing"] for one in answer["peers"]):
        raise ObjectError("a peer lacks prefixes, and nothing is on its way to it")


def _peer_row(one: Row, *, is_wide: bool) -> tuple[str, ...]:
    more = (
        (one["name"], ",".join(one["families"]), str(one["flaps"]), str(one["updates"]))
        if is_wide
        else ()
    )
    is_up = one["state"] == "up"
    error = one["last_error"]
    if error and is_up:
        error = f"{ago(one['last_error_at'])}: {error}"
    inside = str(one["received"])
    if one["received"] != one["accepted"]:
        inside = f"{one['accepted']} of {one['received']}"
    told = one["advertised"]
    out = str(told["confirmed"])
    if told["confirmed"] != told["wanted"]:
        out = f"{told['confirmed']} of {told['wanted']}"
    since = one["changed"] or one["since"]
    return (
        *(one["address"], str(one["asn"]), one["state"]),
        span(one["uptime_s"]) if is_up else ago(since),
        *(inside, str(one["limit"]), out, one["bfd"] or "-"),
        *more,
        error or ("" if is_up else one["info"]),
    )


def _address_of(session: Session, peer: str) -> str:
    """The address of a peer named in any way. Raises ObjectError, naming those there are."""
    known = ask(session, "status")["peers"]
    for one in known:
        if peer in (one["address"], one["name"], one["node"]) and peer:
            return str(one["address"])
    names = ", ".join(f"{one['address']} ({one['node'] or one['name']})" for one in known)
    raise ObjectError(f"this node has no peer {peer}; there are: {names or 'none'}")


def _headings(form: str) -> tuple[str, ...]:
    more = ("LOCAL PREF", "MED", "COMMUNITIES") if form == "wide" else ()
    return ("PREFIX", "NEXT HOP", "AS PATH", *more)


def _attributes(row: Row, form: str) -> tuple[str, ...]:
    more: tuple[str, ...] = ()
    if form == "wide":
        local_pref, med = ("-" if row[word] is None else str(row[word]) for word in _NUMBERS)
        more = (local_pref, med, " ".join(row["communities"]))
    path = " ".join(map(str, row["as_path"])) or "-"
    return (row["prefix"], row["next_hop"], path, *more)


def _sorted(rows: Sequence[Row]) -> list[Row]:
    def order(row: Row) -> tuple[int, int, int]:
        network = ip_network(row["prefix"])
        return network.version, int(network.network_address), network.prefixlen

    return sorted(rows, key=order)


def _note_down(answer: Row) -> None:
    if not answer["is_up"]:
        output.note(f"the session with {answer['peer']} is down")
