"""The route driver: desired routes in, difference written.

Place in the flow: bgpd's `fib` and felix's endpoint manager work out the whole set of routes they
want; this driver compares it with what the kernel has and sends the difference as packed netlink
messages, some hundred per system call.

Invariants
- Ours is what carries our protocol number (and satisfies `owns`, for a number shared with others).
- A route not known to be ours is created with EXCL, so that it can never overwrite somebody else's
  route of equal prefix and metric; only a route read back or written by us is sent with REPLACE.
- A changed next hop or kind is one replace: no moment without a route. A changed metric is another
  route to the kernel, so the new one is added before the old one is deleted.
- The kernel answers each failed message with its sequence number and applies the rest, so one bad
  route costs only itself.

Source: rtnetlink(7), netlink(7); replace and exclusive creation tried on Linux 6.18.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from cymric.kernel import rtnetlink
from cymric.kernel.api import NextHop, Owns, Route, RouteKind, RouteRefused, RoutesApplied
from cymric.kernel.rtnetlink import Flag, Message, Seen
from cymric.model.net import Network

RTPROT_BOOT = 3
"""Felix's protocol number, as Calico has it; shared with `ip route add`, hence its `owns`."""
RTPROT_CYMRIC = 179
"""bgpd's protocol number; nobody else's."""

BATCH = 400
"""Messages per send: some 20 kB, far below the socket buffer, and about 2 ms in the kernel."""
DUMP_ATTEMPTS = 5
ANSWER_WITHIN_S = 10.0

_SOL_NETLINK = 270
_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 10, 11, 12
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER_BYTES = 8 << 20
_READ_BYTES = 256 << 10

_Identity = tuple[Network, int]  # prefix and metric: what the kernel tells routes of a table by


class NetlinkError(OSError):
    """The kernel refused a request that concerns no single route (a dump, a device look-up)."""


class DumpInterrupted(NetlinkError):
    """The table kept changing while it was read; read it again later."""


class RouteTable:
    """Our routes in one table of the network namespace in which this object was made."""

    def __init__(
        self,
        *,
        protocol: int = RTPROT_CYMRIC,
        owns: Owns | None = None,
        table: int = rtnetlink.RT_TABLE_MAIN,
    ) -> None:
        self._protocol = protocol
        self._owns = owns
        self._table = table
        self._encoder = rtnetlink.Encoder(table=table, protocol=protocol)
        self._socket = _open_socket()
        self._sequence = 0
        self._one_at_a_time = asyncio.Lock()
        self._actual: dict[_Identity, Route] | None = None

    async def __aenter__(self) -> RouteTable:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket. The routes stay."""
        self._socket.close()

    def invalidate(self) -> None:
        """Forget what was read: the next `apply` reads the kernel first."""
        self._actual = None

    async def list(self) -> Mapping[Network, Route]:
        """Our routes as the kernel has them now; of two metrics to one prefix the better."""
        async with self._one_at_a_time:
            actual = await self._read()
            self._actual = actual
        best: dict[Network, Route] = {}
        for (prefix, metric), route in actual.items():
            if prefix not in best or metric < best[prefix].metric:
                best[prefix] = route
        return best

    async def apply(self, desired: Mapping[Network, Route]) -> RoutesApplied:
        """Make our routes exactly `desired`; what the kernel refused is named in the answer."""
        async with self._one_at_a_time:
            # Until all answers are in, what the kernel has is not known (cancellation, errors).
            actual, self._actual = self._actual, None
            if actual is None:
                actual = await self._read()
            applied = await self._apply(desired, actual)
            if not any(refused.errno == errno.EEXIST for refused in applied.refused.values()):
                self._actual = actual  # a refusal changes nothing, but EEXIST we did not expect
            return applied

    async def _apply(
        self, desired: Mapping[Network, Route], actual: dict[_Identity, Route]
    ) -> RoutesApplied:
        wanted = {(prefix, route.metric): route for prefix, route in desired.items()}
        replaced, added = _difference(wanted, actual)
        refused: dict[Network, RouteRefused] = {}
        devices = {
            hop.device
            for route in (*added.values(), *replaced.values())
            for hop in route.next_hops
            if hop.device is not None
        }
        index = {name: await self._device_index(name) for name in devices}

        # Order matters: new routes first, so that a changed metric leaves no gap.
        requests = []
        for flag, changes in ((Flag.REPLACE, replaced), (Flag.EXCLUSIVE, added)):
            for key, route in changes.items():
                missing = [
                    hop.device for hop in route.next_hops if index.get(hop.device or "") == 0
                ]
                if missing:
                    reason = f"there is no device {missing[0]}"
                    refused[key[0]] = RouteRefused(errno.ENODEV, reason)
                    continue
                requests.append((key, route, Flag.CREATE | flag))
        errors = await self._send_new(requests, index)
        # A prefix whose new route was refused keeps its old one, whatever its metric.
        kept = {prefix for (prefix, _) in errors} | refused.keys()
        deleted = [key for key in actual if key not in wanted and key[0] not in kept]
        delete_errors = await self._send_delete(deleted)

        for key, route, _ in requests:
            if key not in errors:
                actual[key] = route
        for place in deleted:
            if place not in delete_errors:
                del actual[place]
        refused |= {place[0]: error for place, error in (errors | delete_errors).items()}
        return RoutesApplied(
            added=sum(key in added and key not in errors for key, _, _ in requests),
            replaced=sum(key in replaced and key not in errors for key, _, _ in requests),
            deleted=len(deleted) - len(delete_errors),
            refused=refused,
        )

    async def _send_new(
        self, requests: Sequence[tuple[_Identity, Route, int]], index: dict[str, int]
    ) -> dict[_Identity, RouteRefused]:
        errors: dict[_Identity, RouteRefused] = {}
        for start in range(0, len(requests), BATCH):
            batch, first = requests[start : start + BATCH], self._sequence + 1
            self._sequence += len(batch)
            data = b"".join(
                self._encoder.new_route(
                    prefix,
                    route,
                    flags=flags | (Flag.ACK if first + offset == self._sequence else 0),
                    sequence=first + offset,
                    index=index,
                )
                for offset, ((prefix, _), route, flags) in enumerate(batch)
            )
            for sequence, refused in (await self._exchange(data, first)).items():
                errors[batch[sequence - first][0]] = refused
        return errors

    async def _send_delete(self, keys: Sequence[_Identity]) -> dict[_Identity, RouteRefused]:
        errors: dict[_Identity, RouteRefused] = {}
        for start in range(0, len(keys), BATCH):
            batch, first = keys[start : start + BATCH], self._sequence + 1
            self._sequence += len(batch)
            data = b"".join(
                self._encoder.delete_route(
                    prefix,
                    metric=metric,
                    flags=Flag.ACK if first + offset == self._sequence else 0,
                    sequence=first + offset,
                )
                for offset, (prefix, metric) in enumerate(batch)
            )
            for sequence, refused in (await self._exchange(data, first)).items():
                if refused.errno != errno.ESRCH:  # already gone is what we wanted
                    errors[batch[sequence - first]] = refused
        return errors

    async def _exchange(self, data: bytes, first: int) -> dict[int, RouteRefused]:
        """Send a batch whose last message asks for an answer; the errors by sequence number."""
        errors: dict[int, RouteRefused] = {}
        async with asyncio.timeout(ANSWER_WITHIN_S):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)
            async for kind, flags, sequence, payload in self._answers():
                if kind != Message.ERROR or sequence < first:
                    continue  # left over from a request that was given up
                number, text = rtnetlink.parse_error(flags, payload)
                if number:
                    errors[sequence] = RouteRefused(number, text or os.strerror(number))
                if sequence == self._sequence:
                    break
        return errors

    async def _answers(self) -> AsyncIterator[tuple[int, int, int, bytes]]:
        loop = asyncio.get_running_loop()
        while True:
            for message in rtnetlink.messages(await loop.sock_recv(self._socket, _READ_BYTES)):
                yield message

    async def _read(self) -> dict[_Identity, Route]:
        seen: list[Seen] = []
        for version in (4, 6):
            seen += await self._dump(version)
        names: dict[int, str] = {}
        if any(number for route in seen for _, number, _ in route.hops):
            names = await self._device_names()
        actual: dict[_Identity, Route] = {}
        routes: dict[object, Route | None] = {}  # few next hops, many prefixes
        for one in seen:
            kind = (one.kind, one.hops, one.metric, one.source)
            if kind not in routes:
                routes[kind] = _to_route(one, names)
            route = routes[kind]
            if route is not None and (self._owns is None or self._owns(one.prefix, route)):
                actual[one.prefix, one.metric] = route
        return actual

    async def _dump(self, version: int) -> Sequence[Seen]:
        for _ in range(DUMP_ATTEMPTS):
            self._sequence += 1
            request = rtnetlink.dump_routes(
                version, table=self._table, protocol=self._protocol, sequence=self._sequence
            )
            with suppress(DumpInterrupted):
                payloads = await self._ask(request, Message.NEWROUTE)
                seen: list[Seen] = []
                for start in range(0, len(payloads), BATCH):
                    parsed = map(rtnetlink.parse_route, payloads[start : start + BATCH])
                    seen += (
                        route for route in parsed if route is not None and self._is_ours(route)
                    )
                    await asyncio.sleep(0)  # a large table must not hold up everything else
                return seen
        raise DumpInterrupted(errno.EINTR, "the route table kept changing while it was read")

    def _is_ours(self, route: Seen) -> bool:
        """Said again here, because old kernels do not filter a dump."""
        return route.protocol == self._protocol and route.table == self._table

    async def _device_names(self) -> dict[int, str]:
        self._sequence += 1
        request = rtnetlink.get_links(name=None, sequence=self._sequence)
        payloads = await self._ask(request, Message.NEWLINK)
        return dict(rtnetlink.parse_link(payload) for payload in payloads)

    async def _device_index(self, name: str) -> int:
        """The number of a device; 0 if there is none of that name."""
        self._sequence += 1
        request = rtnetlink.get_links(name=name, sequence=self._sequence)
        try:
            payloads = await self._ask(request, Message.NEWLINK, is_dump=False)
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return 0
            raise
        return rtnetlink.parse_link(payloads[0])[0]

    async def _ask(
        self, request: bytes, wanted: Message, *, is_dump: bool = True
    ) -> Sequence[bytes]:
        """The payloads that answer a question; raises NetlinkError if it is refused."""
        payloads: list[bytes] = []
        is_interrupted = False
        async with asyncio.timeout(ANSWER_WITHIN_S):
            await asyncio.get_running_loop().sock_sendall(self._socket, request)
            async for kind, flags, sequence, payload in self._answers():
                if sequence != self._sequence:
                    continue
                is_interrupted = is_interrupted or bool(flags & Flag.DUMP_INTERRUPTED)
                if kind == Message.ERROR:
                    number, text = rtnetlink.parse_error(flags, payload)
                    if number == errno.ENOENT and wanted is Message.NEWROUTE:
                        return []  # the kernel makes a table when its first route comes
                    raise NetlinkError(number, text or os.strerror(number))
                if kind == wanted:
                    payloads.append(payload)
                if kind == Message.DONE or not is_dump:
                    break
        if is_interrupted:
            raise DumpInterrupted(errno.EINTR, "the table changed while it was read")
        return payloads


def _difference(
    wanted: Mapping[_Identity, Route], actual: Mapping[_Identity, Route]
) -> tuple[dict[_Identity, Route], dict[_Identity, Route]]:
    """What must be replaced, and what added."""
    replaced, added = {}, {}
    for key, route in wanted.items():
        have = actual.get(key)
        if have is None:
            added[key] = route
        elif have is not route and not route.is_met_by(have):
            replaced[key] = route
    return replaced, added


def _to_route(seen: Seen, names: Mapping[int, str]) -> Route | None:
    """The value of a dumped route; None if this driver could not have written it."""
    hops = []
    for gateway, number, weight in seen.hops:
        device = names.get(number)
        if gateway is None and device is None:
            return None
        hops.append(NextHop(gateway=gateway, device=device, weight=weight))
    if seen.metric == 0 or (seen.kind is RouteKind.UNICAST and not hops):
        return None
    return Route(kind=seen.kind, next_hops=tuple(hops), metric=seen.metric, source=seen.source)


def _open_socket() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
    opened.setblocking(False)
    for option, forced in (
        (socket.SO_SNDBUF, _SO_SNDBUFFORCE),
        (socket.SO_RCVBUF, _SO_RCVBUFFORCE),
    ):
        try:
            opened.setsockopt(socket.SOL_SOCKET, forced, _BUFFER_BYTES)
        except PermissionError:
            opened.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
        with suppress(OSError):  # kernels before 4.20 lack the last: then the filter is ours alone
            opened.setsockopt(_SOL_NETLINK, option, 1)
    opened.bind((0, 0))
    return opened
