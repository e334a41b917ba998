"""Links, addresses and neighbours of one network namespace, through netlink.

One `Netlink` is bound for ever to the namespace it was opened in, by visiting that for the moment
of opening a socket (`namespace.visiting`); pyroute2's own way would fork a helper for each socket.
Calls may overlap. The kernel works on a request while it is being sent, so removing a link occupies
the loop for as long as that takes (some 20 ms).

What is done for every pod goes as packed messages over a socket of our own (`link_messages.py`);
listing and watching, where the library's decoding earns its price, through pyroute2, which only
this file knows.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import nullcontext, suppress
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

from pyroute2 import AsyncIPRoute
from pyroute2.netlink.exceptions import NetlinkError

from cymric.kernel import link_messages as packed
from cymric.kernel.links import (
    Equipment,
    EventsLost,
    KernelError,
    Link,
    LinkChange,
    LinkChanges,
    LinkRoute,
    MadeVeth,
    Neighbour,
    NoSuchLink,
    VethPair,
    kernel_error,
)
from cymric.kernel.namespace import visiting
from cymric.kernel.rtnetlink import RT_TABLE_MAIN, Message, messages, parse_error
from cymric.model.net import Address, Interface

_RTMGRP_LINK = 1
_IFF_UP = 0x1
_IFF_LOWER_UP = 0x10000
_NUD_PERMANENT = 0x80
_SOL_NETLINK, _NETLINK_EXT_ACK = 270, 11
_ANSWER_TIMEOUT = struct.pack("@ll", 2, 0)
"""Seconds and microseconds to wait for the kernel."""
_MOST_BYTES = 65536
_SO_RCVBUFFORCE = 33
_EVENT_BUFFER_BYTES = 4 << 20
"""What the kernel keeps of events while this process is busy: a thousand pods' worth."""
_DOOMED = 0x63796D72
"""The group of links about to be removed: a number nobody else uses, and nothing stays in it."""


class Netlink:
    """The kernel's links; see `cymric.kernel.links.Links`. `namespace` None is our own."""

    def __init__(self, namespace: int | None = None) -> None:
        self._namespace = namespace
        self._requests = Requests(namespace)
        self._ipr: Any = None
        self._listing = asyncio.Lock()

    def close(self) -> None:
        """Let go of the sockets."""
        self._requests.close()
        if self._ipr is not None:
            self._ipr.close()

    @property
    def _library(self) -> Any:
        if self._ipr is None:
            self._ipr = _open_socket(self._namespace)
        return self._ipr

    async def all(self) -> tuple[Link, ...]:
        """Every link."""
        return tuple(map(_link, await self._list("list links", self._library.link("dump"))))

    async def _list(self, what: str, answer: Awaitable[Any]) -> list[Any]:
        """A listing. One after the other: the kernel refuses two at once on a socket (EBUSY)."""
        async with self._listing:
            return await _ask(what, answer)

    async def get(self, name: str) -> Link | None:
        """The link of that name, or None."""
        try:
            payload = self._requests.ask(f"look up link {name}", packed.get_link(name))
        except NoSuchLink:
            return None
        return packed.parse_link(payload)

    async def create_veth(self, pair: VethPair) -> MadeVeth:
        """Create the pair, both ends down. Raises AlreadyThere if either name is taken."""
        _, payload = self._requests.ask_all(
            (
                (f"create veth {pair.name} with peer {pair.peer_name}", packed.create_veth(pair)),
                (f"look up link {pair.name}", packed.get_link(pair.name)),
            )
        )
        return MadeVeth(packed.parse_link(payload), packed.parse_peer_index(payload))

    async def set_up(self, index: int) -> None:
        """Switch a link on. Raises NoSuchLink."""
        self._requests.ask(f"switch on link {index}", packed.set_up(index))

    async def delete(self, index: int) -> None:
        """Remove a link and, of a veth, its peer. Raises NoSuchLink."""
        self._requests.ask(f"remove link {index}", packed.delete_link(index))

    async def delete_all(self, indices: Sequence[int]) -> None:
        """Remove links and their peers in one step, which costs what one costs; missing is fine."""
        found = 0
        for index in indices:
            with suppress(NoSuchLink):
                self._requests.ask(f"mark link {index}", packed.set_group(index, _DOOMED))
                found += 1
        if found:
            with suppress(NoSuchLink):  # the last of them went by itself in between
                self._requests.ask(f"remove {found} links", packed.delete_group(_DOOMED))

    async def addresses(self, index: int) -> tuple[Interface, ...]:
        """The addresses of a link, both families."""
        found = await self._list(
            f"list addresses of link {index}", self._library.addr("dump", index=index)
        )
        return tuple(
            ip_interface(f"{message.get('local') or message.get('address')}/{message['prefixlen']}")
            for message in found
            if message["index"] == index
        )

    async def add_address(self, index: int, address: Interface) -> None:
        """Give a link an address. Raises AlreadyThere, NoSuchLink."""
        what = f"add address {address} to link {index}"
        self._requests.ask(what, packed.add_address(index, address))

    async def routes(self, index: int, version: int = 4) -> tuple[LinkRoute, ...]:
        """The main table's routes of one family over a link."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        found = await self._list(
            f"list routes of link {index}",
            self._library.route("dump", family=family, table=RT_TABLE_MAIN, oif=index),
        )
        return tuple(
            _route(message)
            for message in found
            if message.get("oif") == index and message.get("table") == RT_TABLE_MAIN
        )

    async def add_route(self, route: LinkRoute) -> None:
        """Add a route. Raises AlreadyThere, NoSuchLink."""
        what = f"add route {route.destination} over link {route.index}"
        self._requests.ask(what, packed.add_route(route))

    async def equip(self, index: int, equipment: Equipment) -> None:
        """Give a link all of it. Raises what the first refusal is; the rest may be done or not."""
        asked: list[tuple[str, bytes]] = []
        for neighbour in equipment.neighbours:
            what = f"set neighbour {neighbour.address} to {neighbour.mac} on link {index}"
            asked.append((what, packed.set_neighbour(index, neighbour.address, neighbour.mac)))
        for route in equipment.routes:
            what = f"add route {route.destination} over link {route.index}"
            asked.append((what, packed.add_route(route)))
        for address in equipment.addresses:
            what = f"add address {address} to link {index}"
            asked.append((what, packed.add_address(index, address)))
        self._requests.ask_all(asked)

    async def neighbours(self, index: int) -> tuple[Neighbour, ...]:
        """The neighbour entries of a link that have a MAC, learned ones too."""
        found = await self._list(
            f"list neighbours of link {index}", self._library.neigh("dump", ifindex=index)
        )
        return tuple(
            Neighbour(
                ip_address(message.get("dst")),
                message.get("lladdr"),
                bool(message["state"] & _NUD_PERMANENT),
            )
            for message in found
            if message["ifindex"] == index and message.get("dst") and message.get("lladdr")
        )

    async def set_neighbour(self, index: int, address: Address, mac: str) -> None:
        """Make `address` permanently `mac` on a link, whatever was known before."""
        what = f"set neighbour {address} to {mac} on link {index}"
        self._requests.ask(what, packed.set_neighbour(index, address, mac))

    async def remove_neighbour(self, index: int, address: Address) -> None:
        """Forget an entry; a missing one is not an error."""
        what = f"remove neighbour {address} from link {index}"
        try:
            self._requests.ask(what, packed.remove_neighbour(index, address))
        except KernelError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
                raise

    async def watch(self) -> LinkChanges:
        """Every change of links from now on; list after this returns, and nothing is missed."""
        # A socket of its own: answers to requests never wait behind a burst of events.
        with visiting(self._namespace) if self._namespace is not None else nullcontext():
            events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            events.setblocking(False)
            events.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _EVENT_BUFFER_BYTES)
            events.bind((0, _RTMGRP_LINK))
        except BaseException:
            events.close()
            raise
        return _Changes(events)


class Requests:
    """Requests over a plain socket, one call at a time.

    The kernel has answered when `send` returns, so nothing here waits: no await, no timer.
    """

    def __init__(self, namespace: int | None) -> None:
        with visiting(namespace) if namespace is not None else nullcontext():
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        # The kernel's own time limits: Python's would cost a poll before each call.
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, _ANSWER_TIMEOUT)
        self._sequence = 0

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()

    def ask(self, what: str, request: bytes) -> bytes:
        """The payload of the answer, empty for a mere acknowledgement. Raises KernelError."""
        (payload,) = self.ask_all(((what, request),))
        return payload

    def ask_all(self, asked: Sequence[tuple[str, bytes]]) -> tuple[bytes, ...]:
        """The payloads of the answers to requests sent as one; the kernel does them in order.

        Raises KernelError for the first that was refused; those after it were tried, too.
        """
        first = self._sequence + 1
        self._sequence += len(asked)
        waiting = {(first + n) & 0xFFFFFFFF: what for n, (what, _) in enumerate(asked)}
        answers = dict.fromkeys(waiting, b"")
        refused: dict[int, KernelError] = {}
        requests = (packed.numbered(r, n) for n, (_, r) in zip(answers, asked, strict=True))
        try:
            self._socket.send(b"".join(requests))
            while waiting:
                for kind, flags, sequence, payload in messages(self._socket.recv(_MOST_BYTES)):
                    what = waiting.pop(sequence, "")
                    if not what:
                        continue  # the late answer to a request given up
                    if kind != Message.ERROR:
                        answers[sequence] = payload
                    elif (error := _refusal(what, flags, payload)) is not None:
                        refused[sequence] = error
        except OSError as error:
            what = next(iter(waiting.values()), "send")
            code = error.errno or errno.EIO
            raise kernel_error(code, what, error.strerror or str(error)) from error
        for sequence in answers:
            if sequence in refused:
                raise refused[sequence]
        return tuple(answers.values())


def _refusal(what: str, flags: int, payload: bytes) -> KernelError | None:
    code, said = parse_error(flags, payload)
    if not code:
        return None
    plain = os.strerror(code)
    return kernel_error(code, what, f"{said} ({plain})" if said else plain)


class _Changes:
    """Link events of one socket. A pod is half a dozen of them, so they are decoded by hand."""

    def __init__(self, events: socket.socket) -> None:
        self._events = events

    async def __aiter__(self) -> AsyncIterator[LinkChange]:
        loop = asyncio.get_running_loop()
        try:
            while True:
                data = await loop.sock_recv(self._events, _MOST_BYTES)
                for kind, _, _, payload in messages(data):
                    if kind not in (packed.Kind.NEWLINK, packed.Kind.DELLINK):
                        continue
                    # A bridge reports its ports' own changes in the AF_BRIDGE family; those are no
                    # link changes.
                    if payload[0] != socket.AF_UNSPEC:
                        continue
                    link = packed.parse_link(payload)
                    is_gone = kind == packed.Kind.DELLINK
                    yield LinkChange(link.index, link.name, None if is_gone else link)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                raise EventsLost("the kernel dropped link events") from error
            raise

    async def aclose(self) -> None:
        self._events.close()


def _open_socket(namespace: int | None) -> Any:
    ipr = AsyncIPRoute(groups=0, ext_ack=True)
    with visiting(namespace) if namespace is not None else nullcontext():
        ipr.socket  # noqa: B018 - the property opens the socket, here and nowhere else
    return ipr


async def _ask(request: str, answer: Awaitable[Any]) -> list[Any]:
    """Wait for an answer; refusals become our own errors, which say what was asked."""
    try:
        found = await answer
        if hasattr(found, "__aiter__"):
            return [message async for message in found]
        return list(found)
    except NetlinkError as error:
        raise kernel_error(error.code, request, _reason(error)) from None
    except OSError as error:
        code = error.errno or errno.EIO
        raise kernel_error(code, request, error.strerror or str(error)) from error


def _reason(error: NetlinkError) -> str:
    said = str(error.args[1]) if len(error.args) > 1 else ""
    plain = os.strerror(error.code)
    return plain if said in ("", plain) else f"{said} ({plain})"


def _link(message: Any) -> Link:
    flags = message["flags"]
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        kind=message.get(("linkinfo", "kind")) or "",
        mac=message.get("address") or "",
        mtu=message.get("mtu") or 0,
        is_up=bool(flags & _IFF_UP),
        is_running=bool(flags & _IFF_UP and flags & _IFF_LOWER_UP),
    )


def _route(message: Any) -> LinkRoute:
    gateway = message.get("gateway")
    anywhere = "0.0.0.0" if message["family"] == socket.AF_INET else "::"
    return LinkRoute(
        destination=ip_network(f"{message.get('dst') or anywhere}/{message['dst_len']}"),
        index=message.get("oif"),
        gateway=ip_address(gateway) if gateway else None,
    )
