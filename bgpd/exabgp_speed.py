"""What makes ExaBGP 5.0.15 fast enough, changed in its process before it starts.

Measured with 10,000 routes on two busy cores, and what each change is for:

- `pass_updates_whole`: of 450 us that a received UPDATE with own attributes cost, decoding to
  objects and printing them as JSON was most. A plain UPDATE (`update_wire.is_plain`) is passed to
  bgpd as it is, in one line; all others go the stock way. The same for UPDATEs that are written:
  stock code decodes what it has just encoded, only to tell the API.
- `several_turns`: the main loop gives each peer one message per turn, and a turn costs more than
  the message. Here a peer that has more to do goes on for `TURN_S`; others wait that long at most.
- `work_without_pause`: commands are worked off fifty steps at a time, in an event loop made anew
  each time, with a pause of a hundredth of the reactor's speed in between. Here they go on for
  `TURN_S`, and there is no pause while something waits. So the reactor sleeps long when idle.
- `many_prefixes_a_command`: `announce attributes` (and `withdraw attributes`) parse the attributes
  once and the prefixes without a parser, and do not describe each route to a log that is off. What
  was parsed is remembered, for the same command to the next peer; a peer named by its address alone
  is found without asking a regular expression of each.

The loop itself, with many peers: exabgp_loop.py.

Lines added to ExaBGP's: `!r <peer> <hex>` for an UPDATE received, `!s <peer> <hex>` for one that is
about to be written; the BGP header is left out.
"""

from __future__ import annotations

import functools
import inspect
import socket
import time
from collections.abc import Iterator
from typing import Any

from bgpd import exabgp_loop
from bgpd.update_wire import is_plain

TURN_S = 0.005
PREFIXES_A_STEP = 20
REMEMBERED_COMMANDS = 4096


def apply() -> None:
    """Change the installed ExaBGP in this process; `exabgp_patches` has checked its version."""
    from exabgp.bgp.message import Message
    from exabgp.reactor.api import API
    from exabgp.reactor.api.processes import Processes
    from exabgp.reactor.asynchronous import ASYNC
    from exabgp.reactor.loop import Reactor
    from exabgp.reactor.peer import Peer
    from exabgp.reactor.protocol import Protocol

    pass_updates_whole(Message, Processes, Protocol)
    several_turns(Peer)
    work_without_pause(ASYNC, Reactor)
    many_prefixes_a_command(API)
    exabgp_loop.apply()


# --- UPDATEs --------------------------------------------------------------------------------------


def pass_updates_whole(message_class: Any, processes_class: Any, protocol_class: Any) -> None:
    """Plain UPDATEs reach bgpd as they were on the wire."""
    from exabgp.bgp.message import Update
    from exabgp.bgp.message.direction import Direction

    class WholeUpdate(Update):  # type: ignore[misc]
        """An UPDATE that ExaBGP need not understand: it keeps no routes received."""

        def __init__(self, body: bytes) -> None:
            super().__init__([], {})
            self.body = body

    update_id = Update.ID
    unpack = message_class.unpack.__func__
    tell = processes_class.message
    send = protocol_class.send

    def unpack_or_pass(cls: Any, kind: int, data: bytes, direction: Any, negotiated: Any) -> Any:
        if kind == update_id and direction == Direction.IN and _is_simple(negotiated):
            body = bytes(data)
            if is_plain(body):
                return WholeUpdate(body)
        return unpack(cls, kind, data, direction, negotiated)

    @functools.wraps(tell)
    def tell_whole(
        processes: Any, kind: int, neighbor: Any, direction: str, message: Any, *rest: Any
    ) -> Any:
        if isinstance(message, WholeUpdate):
            return _tell(processes, neighbor, direction, message.body)
        return tell(processes, kind, neighbor, direction, message, *rest)

    @functools.wraps(send)
    def send_and_tell(protocol: Any, raw: bytes) -> Any:
        body = bytes(raw[19:])
        told = protocol.neighbor.api.get("send-update", False)
        if not (told and raw[18] == update_id and _is_simple(protocol.negotiated)) or not is_plain(
            body
        ):
            yield from send(protocol, raw)
            return
        protocol.peer.stats["send-update"] += 1
        _tell(protocol.peer.reactor.processes, protocol.neighbor, "send", body)
        yield from protocol.connection.writer(raw)

    message_class.unpack = classmethod(unpack_or_pass)
    processes_class.message = tell_whole
    protocol_class.send = send_and_tell


def _is_simple(negotiated: Any) -> bool:
    """Whether the session's messages need no more knowledge than `update_wire` has."""
    if not negotiated.asn4:
        return False
    return not any(
        negotiated.addpath.receive(*family) or negotiated.addpath.send(*family)
        for family in negotiated.families
    )


def _tell(processes: Any, neighbor: Any, direction: str, body: bytes) -> None:
    if processes.silence:
        return
    line = f"!{direction[0]} {neighbor['peer-address']} {body.hex()}"
    for process in processes._notify(neighbor, f"{direction}-update"):
        processes.write(process, line, neighbor)


# --- the main loop --------------------------------------------------------------------------------


def several_turns(peer_class: Any) -> None:
    """A peer that has more to do at once goes on for a moment."""
    from exabgp.reactor.peer import ACTION

    run = peer_class.run

    @functools.wraps(run)
    def run_on(peer: Any) -> Any:
        action = run(peer)
        if action != ACTION.NOW:
            return action
        until_s = time.monotonic() + TURN_S
        while action == ACTION.NOW and time.monotonic() < until_s:
            action = run(peer)
        return action

    peer_class.run = run_on


def work_without_pause(async_class: Any, reactor_class: Any) -> None:
    """Commands that wait are worked off without sleeping in between."""
    from exabgp.logger import log

    run = async_class.run
    wait_for_io = reactor_class._wait_for_io

    @functools.wraps(run)
    def run_a_while(waiting: Any) -> bool:
        queue = waiting._async
        until_s = time.monotonic() + TURN_S
        while queue:
            uid, work = queue[0]
            if not inspect.isgenerator(work):
                return bool(run(waiting))
            try:
                while time.monotonic() < until_s:
                    next(work)
                return True
            except StopIteration:
                queue.popleft()
            except Exception as error:
                # As stock code: one command that fails must not end the loop of all sessions.
                message = f"a command failed: {error!r}"
                log.error(lambda message=message: message, "reactor")
                queue.popleft()
                waiting._notify_error(uid)
        return False

    @functools.wraps(wait_for_io)
    def wait_if_idle(reactor: Any, sleep_ms: int) -> Any:
        is_busy = not reactor.asynchronous.ready()
        return wait_for_io(reactor, 0 if is_busy else sleep_ms)

    async_class.run, reactor_class._wait_for_io = run_a_while, wait_if_idle


# --- commands -------------------------------------------------------------------------------------


def many_prefixes_a_command(api_class: Any) -> None:
    """`announce attributes … nlri …` and its withdrawal, with the attributes parsed once."""
    for name, is_announced in (("announce attributes", True), ("withdraw attributes", False)):
        stock = api_class.callback["text"][name]
        api_class.callback["text"][name] = _quick(stock, is_announced=is_announced)


def _quick(stock: Any, *, is_announced: bool) -> Any:
    @functools.wraps(stock)
    def command(api: Any, reactor: Any, service: str, line: str, use_json: bool) -> bool:
        head, _, tail = line.partition(" nlri ")
        prefixes = tail.split()
        if not prefixes or "next-hop self" in head:
            return bool(stock(api, reactor, service, line, use_json))
        work = _inject(api, reactor, service, head, prefixes, is_announced=is_announced)
        reactor.asynchronous.schedule(service, line, work)
        return True

    return command


def _inject(
    api: Any, reactor: Any, service: str, head: str, prefixes: list[str], *, is_announced: bool
) -> Iterator[None]:
    """The first prefix goes through ExaBGP's parser and its checks, the others share its result."""
    from exabgp.reactor.api.command.limit import extract_neighbors
    from exabgp.rib.change import Change

    try:
        descriptions, command = extract_neighbors(head)
        names = _named(reactor, service, descriptions)
        if not names:
            raise ValueError(head)
        model, attributes = _parsed(api, command, prefixes[0], is_announced=is_announced)
        changes = [Change(_like(model, prefix), attributes) for prefix in prefixes]
    except (ValueError, IndexError, OSError):
        reactor.processes.answer_error(service)
        return
    family = model.family().afi_safi()
    known = reactor.configuration.neighbors
    neighbors = [known[name] for name in names if name in known]
    for at, change in enumerate(changes):
        for neighbor in neighbors:
            if family in neighbor.families():
                neighbor.rib.outgoing.add_to_rib(change)
        if at % PREFIXES_A_STEP == 0:
            yield
    reactor.processes.answer_done(service)


def _named(reactor: Any, service: str, descriptions: list[list[str]]) -> list[str]:
    """The peers that a command names."""
    from exabgp.reactor.api.command.limit import match_neighbors

    peers: list[str] = reactor.peers(service)
    if len(descriptions) == 1 and len(descriptions[0]) == 1 and descriptions[0] != ["neighbor *"]:
        start = f"{descriptions[0][0]} "
        return [name for name in peers if name.startswith(start)]
    return list(match_neighbors(peers, descriptions))


_parsed_before: dict[tuple[str, bool], tuple[Any, Any]] = {}


def _parsed(api: Any, command: str, prefix: str, *, is_announced: bool) -> tuple[Any, Any]:
    """A model NLRI and the attributes of a command, parsed once. Raises ValueError."""
    from exabgp.bgp.message import Action
    from exabgp.configuration.static import ParseStaticRoute

    key = command, ":" in prefix
    found = _parsed_before.get(key)
    if found is None:
        (change,) = api.api_attributes(f"{command} nlri {prefix}", []) or (None,)
        if change is None or (is_announced and not ParseStaticRoute.check(change)):
            raise ValueError(command)
        change.nlri.action = Action.ANNOUNCE if is_announced else Action.WITHDRAW
        if len(_parsed_before) >= REMEMBERED_COMMANDS:
            _parsed_before.clear()
        found = _parsed_before[key] = change.nlri, change.attributes
    return found


def _like(model: Any, prefix: str) -> Any:
    """The same NLRI for another prefix. Raises ValueError or OSError if the text is none."""
    from exabgp.bgp.message.update.nlri.cidr import CIDR

    text, _, length_text = prefix.partition("/")
    is_ipv6, length = ":" in text, int(length_text)
    if is_ipv6 != (len(model.cidr.ton()) == 16):
        raise ValueError(f"{prefix} is of another family")
    packed = socket.inet_pton(socket.AF_INET6 if is_ipv6 else socket.AF_INET, text)
    bits = len(packed) * 8
    if not 0 <= length <= bits or int.from_bytes(packed) & ((1 << bits - length) - 1):
        raise ValueError(f"{prefix} is no prefix")
    made = type(model)(model.afi, model.safi, model.action)
    made.cidr, made.nexthop, made.path_info = CIDR(packed, length), model.nexthop, model.path_info
    return made
