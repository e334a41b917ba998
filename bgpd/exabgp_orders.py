"""Commands that ExaBGP 5.0.15 lacks, added in its process: hold a session down, cut it, start anew.

    cymric hold <peer> <seconds> <subcode>   Cease with that subcode, then stay down so long
    cymric cut <peer> <subcode>              the same, but the session may come back at once
    cymric restart                           end with an exit code that asks for a new process

Stock `teardown` says nothing to a peer with graceful restart, which would then keep our routes, and
ExaBGP connects again within a second. The first two wait for nothing: the NOTIFICATION goes out
as far as the socket takes it (the link may be dead), and the connection is closed.

None is answered: the effect is the `down` event, or the end. Answers are matched in order, and
these must be able to pass commands that still wait.

Source: RFC 4486 (Cease subcodes), RFC 9384 (subcode 10, BFD Down).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import time
from typing import Any

MAXIMUM_PREFIXES = 1
CONNECTION_REJECTED = 5
BFD_DOWN = 10

EXIT_RESTART = 75
"""EX_TEMPFAIL: not 0, so that a supervisor that restarts only what failed does so too."""

_IS_RESTARTING = "_cymric_is_restarting"
_HELD_UNTIL = "_cymric_held_until_s"
_DRAIN_BYTES = 4 * 1024 * 1024


def hold(peer: str, seconds: float, subcode: int = MAXIMUM_PREFIXES) -> str:
    """The command that keeps a session down for `seconds`; 0 lets it come up again."""
    return f"cymric hold {peer} {seconds:.3f} {subcode}"


def cut(peer: str, subcode: int = BFD_DOWN) -> str:
    """The command that ends a session at once."""
    return f"cymric cut {peer} {subcode}"


def restart() -> str:
    """The command that ends this ExaBGP, as SIGTERM does, in favour of a new one."""
    return "cymric restart"


def exit_code(reactor: Any, ended_with: int) -> int:
    """How the process should end: `EXIT_RESTART` if it was told to start anew."""
    return EXIT_RESTART if getattr(reactor, _IS_RESTARTING, False) else ended_with


def apply(api_class: Any, peer_class: Any) -> None:
    """Teach both commands to the classes of ExaBGP that take commands and keep sessions."""
    _obey(api_class)
    _stay_down(peer_class)


def _obey(api_class: Any) -> None:
    response = api_class.response

    @functools.wraps(response)
    def respond(api: Any, reactor: Any, service: str, command: str, use_json: bool) -> Any:
        if not command.startswith("cymric "):
            return response(api, reactor, service, command, use_json)
        with contextlib.suppress(ValueError):  # from another version of bgpd; it sees no effect
            _order(reactor, command.split())
        return True

    api_class.response = respond


def _order(reactor: Any, words: list[str]) -> None:
    match words:
        case ["cymric", "hold", name, seconds, subcode]:
            for peer in _named(reactor, name):
                setattr(peer, _HELD_UNTIL, time.monotonic() + float(seconds))
                peer._delay.reset()
                if float(seconds) > 0:
                    _end(peer, int(subcode))
        case ["cymric", "cut", name, subcode]:
            for peer in _named(reactor, name):
                _end(peer, int(subcode))
        case ["cymric", "restart"]:
            setattr(reactor, _IS_RESTARTING, True)
            reactor._termination("bgpd asked for a new process", reactor.Exit.normal)


def _named(reactor: Any, name: str) -> list[Any]:
    return [peer for peer in reactor._peers.values() if str(peer.neighbor["peer-address"]) == name]


def _end(peer: Any, subcode: int) -> None:
    """Close the connection, if there is one, and tell ExaBGP as if the network had."""
    from exabgp.reactor.network.error import NetworkError

    if peer.proto is not None and peer.proto.connection is not None:
        _say_cease(peer.proto.connection, subcode)
    error = NetworkError("ended by bgpd")
    if peer.generator and inspect.getgeneratorstate(peer.generator) == inspect.GEN_SUSPENDED:
        with contextlib.suppress(StopIteration):
            peer.generator.throw(error)
    elif peer.proto is not None:
        peer._reset("ended by bgpd", error)


def _say_cease(connection: Any, subcode: int) -> None:
    from exabgp.bgp.message import Notify

    if connection.io is None:
        return
    with contextlib.suppress(OSError):
        connection.io.send(Notify(6, subcode, "").message())
    # Closed with unread data, TCP sends a reset, and the peer may never see the NOTIFICATION.
    left = _DRAIN_BYTES
    with contextlib.suppress(OSError):
        while left > 0 and (data := connection.io.recv(65536)):
            left -= len(data)


def _is_held(peer: Any) -> bool:
    return bool(getattr(peer, _HELD_UNTIL, 0.0) > time.monotonic())


def _stay_down(peer_class: Any) -> None:
    from exabgp.reactor.peer import ACTION

    run, handle_connection = peer_class.run, peer_class.handle_connection

    @functools.wraps(run)
    def run_unless_held(peer: Any) -> Any:
        if _is_held(peer) and peer.proto is None and not peer.stopping():
            peer.generator = None
            return ACTION.LATER
        return run(peer)

    @functools.wraps(handle_connection)
    def refuse_if_held(peer: Any, connection: Any) -> Any:
        if _is_held(peer):
            _say_cease(connection, CONNECTION_REJECTED)
            connection.close()
            return True  # refused; stock code would return a NOTIFICATION that nobody sends
        return handle_connection(peer, connection)

    peer_class.run, peer_class.handle_connection = run_unless_held, refuse_if_held
