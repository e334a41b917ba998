"""Repairs of ExaBGP 5.0.15, applied in its process before it starts.

Each repair replaces one method of ExaBGP by a small wrapper. They are written against the exact
version below and refused on any other, since they lean on private names. The adapter's discipline
(one change in flight per prefix, reload only when quiet, every reload verified) stays in force with
them, so that either alone would do in the common case.

- `keep_latest_change`: pending changes are grouped by attribute set and a prefix may wait in two
  groups, so that the older change is sent last. Here a new change of a prefix first takes the
  prefix out of the group in which it waits.
- `reload_at_once`: a reload is dropped, though answered `done`, while any route waits for any peer
  that ExaBGP is connecting to; one unreachable peer can hold back all reloads for minutes.
- `survive_bad_reload`: a failed reload leaves the parser half-filled, makes all later ones fail and
  may forget the API process. Here the parser is cleared before and after, and what ran stays.
- `listen_as_configured`: the listening address and port are read once, at start. Here each reload
  reads them from the file, so that a changed listen port needs no restart.
- `retry_soon`: between attempts to connect ExaBGP waits longer and longer, up to 60 s. In a mesh
  one side only listens, so a node that comes back would be without routes for that long.
- `finish_messages`: while a message is half written, because the socket took no more, ExaBGP may
  write the next one: a keepalive that falls due cuts an UPDATE in two, and the peer ends the
  session. Here a connection's messages wait for each other.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bgpd import exabgp_listening, exabgp_orders, exabgp_show, exabgp_speed
from bgpd.speaker_file import read_header

SUPPORTED_VERSION = "5.0.15"
RETRY_AT_MOST_S = 5
"""As Calico's BIRD retries a connection."""


class UnsupportedSpeaker(Exception):
    """The installed ExaBGP is not the version these repairs were written for."""


def apply(report_refusal: Callable[[str], None], configuration: Path) -> None:
    """Repair the installed ExaBGP in this process; a refused reload's reason is reported."""
    version = importlib.metadata.version("exabgp")
    if version != SUPPORTED_VERSION:
        raise UnsupportedSpeaker(f"exabgp {version} is installed, {SUPPORTED_VERSION} is needed")
    from exabgp.configuration.configuration import Configuration
    from exabgp.reactor import listener
    from exabgp.reactor.api import API
    from exabgp.reactor.delay import Delay
    from exabgp.reactor.loop import Reactor
    from exabgp.reactor.network.connection import Connection
    from exabgp.reactor.peer import Peer
    from exabgp.rib.outgoing import OutgoingRIB

    keep_latest_change(OutgoingRIB)
    reload_at_once(Reactor)
    survive_bad_reload(Configuration, report_refusal)
    listen_as_configured(Reactor, configuration)
    retry_soon(Delay)
    finish_messages(Connection)
    exabgp_orders.apply(API, Peer)
    exabgp_show.apply(API)
    exabgp_speed.apply()
    exabgp_listening.apply(listener)


def keep_latest_change(rib_class: Any) -> None:
    """A prefix waits in at most one attribute group: that of its newest change."""
    queue = rib_class._update_rib

    @functools.wraps(queue)
    def update_rib(rib: Any, change: Any) -> Any:
        waiting = rib._new_nlri.get(change.index())
        if waiting is not None:
            by_family = rib._new_attr_af_nlri.get(waiting.attributes.index(), {})
            by_family.get(waiting.nlri.family().afi_safi(), {}).pop(change.index(), None)
        return queue(rib, change)

    rib_class._update_rib = update_rib


def reload_at_once(reactor_class: Any) -> None:
    """Routes that wait for a peer are no reason to drop a reload."""
    reactor_class._pending_adjribout = lambda _reactor: False


def survive_bad_reload(configuration_class: Any, report_refusal: Callable[[str], None]) -> None:
    """A file that is refused changes nothing and does not spoil the next attempt."""
    reload = configuration_class._reload

    @functools.wraps(reload)
    def reload_or_keep(configuration: Any) -> Any:
        kept = (configuration.neighbors, configuration.processes)
        configuration._cleanup()
        failure: Exception | None = None
        try:
            if reload(configuration) is True:
                return True
        except Exception as error:
            # The parser signals syntax errors with all kinds; the caller reports what we return.
            failure = error
        said = str(failure or configuration.error).strip()
        reason = said or "the file is missing or unreadable"
        configuration._cleanup()
        configuration.neighbors, configuration.processes = kept
        report_refusal(reason)
        return configuration.error.set(reason)

    configuration_class._reload = reload_or_keep


def listen_as_configured(reactor_class: Any, configuration: Path) -> None:
    """Each reload takes the listening address and port from the file's header."""
    reload = reactor_class.reload

    @functools.wraps(reload)
    def reload_and_listen(reactor: Any) -> Any:
        from exabgp.protocol.ip import IP

        listen = read_header(configuration).listen
        if listen is not None:
            reactor._ips = [IP.create(address) for address in listen.addresses]
            reactor._port = listen.port
        return reload(reactor)

    reactor_class.reload = reload_and_listen


def retry_soon(delay_class: Any) -> None:
    """The pause between attempts to connect grows to `RETRY_AT_MOST_S` and no further."""
    increase = delay_class.increase

    @functools.wraps(increase)
    def increase_a_little(delay: Any) -> None:
        increase(delay)
        delay._next = min(delay._next, RETRY_AT_MOST_S)

    delay_class.increase = increase_a_little


def finish_messages(connection_class: Any) -> None:
    """Messages leave a connection whole, in the order in which their writing began.

    ExaBGP advances every writer once a turn, and each yields False while it cannot go on.
    """
    write = connection_class.writer

    @functools.wraps(write)
    def write_in_turn(connection: Any, data: bytes) -> Iterator[bool]:
        waiting: deque[object] = connection.__dict__.setdefault("_cymric_waiting", deque())
        ticket = object()
        waiting.append(ticket)
        try:
            while waiting[0] is not ticket:
                yield False
            for is_written in write(connection, data):
                if is_written:
                    waiting.popleft()
                yield is_written
        finally:
            if ticket in waiting:  # given up half way
                waiting.remove(ticket)

    connection_class.writer = write_in_turn
