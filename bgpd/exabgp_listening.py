"""Repairs of how ExaBGP 5.0.15 takes connections, applied by `exabgp_patches.apply`.

- `check_distance`: TTL security (RFC 5082) was checked on connections that ExaBGP opens, not on
  those it accepts, unless the peer had a listening socket of its own. Here a connection whose first
  packet (kept by the kernel, TCP_SAVE_SYN) came from too far away is closed, and each accepted one
  drops what comes from too far away later.
- `answer_from_close_by`: the answer to a peer's SYN left with the system's TTL of 64, which a peer
  with TTL security drops. Here listening sockets send with 255, as BIRD's do; so do connections
  accepted from them, which harms nobody.
- `accept_without_own_address`: a connection that arrives for a peer without fixed local address,
  before one was opened to it, ended ExaBGP. Here such a peer has a placeholder until then.
"""

from __future__ import annotations

import functools
import socket
from typing import Any

FARTHEST_TTL = 255
TCP_SAVE_SYN, TCP_SAVED_SYN = 27, 28
"""From linux/tcp.h; Python's socket module has no names for them."""


def apply(listener_module: Any) -> None:
    """Repair ExaBGP's module `exabgp.reactor.listener`."""
    check_distance(listener_module)
    answer_from_close_by(listener_module.Listener)
    accept_without_own_address(listener_module.Listener)


def check_distance(listener_module: Any) -> None:
    """An accepted connection is held to its neighbour's `incoming-ttl`."""
    set_sending = listener_module.set_accepted_ttl

    @functools.wraps(set_sending)
    def set_both(connection: Any, neighbor: Any) -> None:
        set_sending(connection, neighbor)
        least = neighbor["incoming-ttl"]
        if not least or connection.io is None:
            return
        peer = neighbor["peer-address"]
        try:
            listener_module.set_minimum_ttl(connection.io, connection.afi, connection.peer, least)
            is_near = first_ttl(connection.io) >= least
        except (OSError, listener_module.NetworkError) as error:
            reason = str(error)
            listener_module.log.critical(lambda: f"cannot check the TTL of {peer}: {reason}", "tcp")
            is_near = False
        if not is_near:
            listener_module.log.critical(
                lambda: f"connection of {peer} came from too far away, it is closed", "tcp"
            )
            connection.io.shutdown(socket.SHUT_RDWR)

    listener_module.set_accepted_ttl = set_both


def first_ttl(connection: socket.socket) -> int:
    """The TTL or hop limit of the SYN that opened a connection; 0 if the kernel kept none."""
    syn = connection.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, 256)
    if len(syn) < 20:
        return 0
    return syn[8] if syn[0] >> 4 == 4 else syn[7]


def answer_from_close_by(listener_class: Any) -> None:
    """Listening sockets send with the greatest TTL, and keep the first packets they get."""
    create = listener_class._new_socket

    @functools.wraps(create)
    def new_socket(listener: Any, ip: Any) -> Any:
        made = create(listener, ip)
        made.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)
        if made.family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, FARTHEST_TTL)
        else:
            made.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, FARTHEST_TTL)
        return made

    listener_class._new_socket = new_socket


def accept_without_own_address(listener_class: Any) -> None:
    """A peer without fixed local address can be the first to connect."""
    take = listener_class.new_connections

    @functools.wraps(take)
    def new_connections(listener: Any) -> Any:
        from exabgp.protocol.ip import IP

        for key in listener._reactor.peers():
            neighbor = listener._reactor.neighbor(key)
            if neighbor["local-address"] is None:
                is_ipv4 = neighbor["peer-address"].ipv4()
                neighbor["local-address"] = IP.create("0.0.0.0" if is_ipv4 else "::")
        return take(listener)

    listener_class.new_connections = new_connections
