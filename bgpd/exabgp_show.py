"""A question that ExaBGP 5.0.15 lacks: what would you send this peer, attributes included?

    show cymric-held <peer>   ▶   <peer> update <hex> …   ▶   done

Stock `show adj-rib out` names prefixes, one a line, or describes attributes for people. Here routes
with equal attributes are packed into UPDATEs, as if they were sent, and told as hexadecimal digits
of the messages without their header: hundreds of prefixes a line, and nothing is left out. What is
no plain UPDATE (`update_wire.is_plain`) is told as stock does, by prefix: `<peer> <afi> <safi> …`.

Place in the flow: added in ExaBGP's process before it starts; asked by bgpd/exabgp_proof.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from bgpd.update_wire import is_plain

QUESTION = "show cymric-held"
ROUTES_A_STEP = 200


def held(peer: str) -> str:
    """The question about one peer. Refused while its session is not up."""
    return f"{QUESTION} {peer}"


def apply(api_class: Any) -> None:
    """Teach the question to ExaBGP's class that takes commands."""
    response = api_class.response

    @functools.wraps(response)
    def respond(api: Any, reactor: Any, service: str, command: str, use_json: bool) -> Any:
        question, _, name = command.rpartition(" ")
        if question != QUESTION:
            return response(api, reactor, service, command, use_json)
        reactor.asynchronous.schedule(service, command, _answer(reactor, service, name))
        return True

    api_class.response = respond


def _answer(reactor: Any, service: str, name: str) -> Iterator[None]:
    peers = [peer for peer in reactor._peers.values() if str(peer.neighbor["peer-address"]) == name]
    negotiated = peers[0].proto.negotiated if peers and peers[0].proto else None
    if negotiated is None or not negotiated.families:
        reactor.processes.answer_error(service)
        return
    for nlris, attributes in (yield from _grouped(peers[0].neighbor.rib.outgoing)):
        for line in _lines(nlris, attributes, negotiated):
            reactor.processes.write(service, f"{name} {line}")
        yield
    reactor.processes.answer_done(service)


def _grouped(outgoing: Any) -> Any:
    """Routes that share family and attributes, in groups of a bounded size."""
    groups: dict[Any, list[tuple[list[Any], Any]]] = {}
    for number, change in enumerate(list(outgoing.cached_changes())):
        if number % ROUTES_A_STEP == 0:
            yield
        key = change.nlri.family().afi_safi(), change.attributes.index()
        of_kind = groups.setdefault(key, [])
        if not of_kind or len(of_kind[-1][0]) == ROUTES_A_STEP:
            of_kind.append(([], change.attributes))
        of_kind[-1][0].append(change.nlri)
    return [group for of_kind in groups.values() for group in of_kind]


def _lines(nlris: list[Any], attributes: Any, negotiated: Any) -> Iterator[str]:
    from exabgp.bgp.message import Update

    bodies = [bytes(one[19:]) for one in Update(nlris, attributes).messages(negotiated, False)]
    if bodies and negotiated.asn4 and all(map(is_plain, bodies)):
        yield from (f"update {body.hex()}" for body in bodies)
        return
    for nlri in nlris:
        afi, safi = nlri.family().afi_safi()
        yield f"{afi} {safi} {nlri}"
