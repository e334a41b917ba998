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
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class _Actual:
    """Our routes as the kernel has them: the best by prefix, and those of worse metric beside it.

    The latter come from earlier processes, or from a change that was refused half way.
    """

    best: dict[Network, Route] = field(default_factory=dict)
    worse: dict[Network, dict[int, Route]] = field(default_factory=dict)

    def add(self, prefix: Network, route: Route) -> None:
        """A route that is there, in the place of one of equal metric."""
        have = self.best.get(prefix)
        if have is None or have.metric == route.metric:
            self.best[prefix] = route
        elif route.metric < have.metric:
            self.best[prefix] = route
            self.worse.setdefault(prefix, {})[have.metric] = have
        else:
            self.worse.setdefault(prefix, {})[route.metric] = route

    def add_all(self, routes: Mapping[Network, Route]) -> None:
        """Routes that are there."""
        if not self.worse and len(set(routes).difference(self.best)) == len(routes):
            self.best.update(routes)
            return
        for prefix, route in routes.items():
            self.add(prefix, route)

    def remove(self, prefix: Network, metric: int) -> None:
        """A route that is gone; of those that are left the best takes its place."""
        left = [route for route in self.all_of(prefix) if route.metric != metric]
        self.best.pop(prefix, None)
        self.worse.pop(prefix, None)
        for route in left:
            self.add(prefix, route)

    def all_of(self, prefix: Network) -> tuple[Route, ...]:
        """All our routes to the prefix."""
        have = self.best.get(prefix)
        if have is None:
            return ()
        return (have, *self.worse.get(prefix, {}).values()) if self.worse else (have,)


@dataclass(slots=True)
class _Plan:
    """What to write: in this order, so that a changed metric leaves no gap."""

    added: dict[Network, Route] = field(default_factory=dict)
    replaced: dict[Network, Route] = field(default_factory=dict)
    deleted: list[_Identity] = field(default_factory=list)

    def want(self, prefix: Network, route: Route | None, have: tuple[Route, ...]) -> None:
        """Plan what makes `have` into `route`."""
        if route is not None:
            same = next((one for one in have if one.metric == route.metric), None)
            if same is None:
                self.added[prefix] = route
            elif same is not route and not route.is_met_by(same):
                self.replaced[prefix] = route
        for one in have:
            if route is None or one.metric != route.metric:
                self.deleted.append((prefix, one.metric))


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
        self._actual: _Actual | None = None

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
            actual = self._actual = await self._read()
        return dict(actual.best)

    async def apply(self, desired: Mapping[Network, Route]) -> RoutesApplied:
        """Make our routes exactly `desired`; what the kernel refused is named in the answer."""
        async with self._one_at_a_time:
            actual = await self._take_actual()
            plan = _Plan()
            best, worse = actual.best, actual.worse
            for prefix, route in desired.items():
                have = best.get(prefix)
                if have is None:
                    plan.added[prefix] = route
                elif have is not route or prefix in worse:
                    plan.want(prefix, route, actual.all_of(prefix))
            for prefix in set(best).difference(desired):
                plan.want(prefix, None, actual.all_of(prefix))
            return await self._write(plan, actual)

    async def change(self, changes: Mapping[Network, Route | None]) -> RoutesApplied:
        """Make our routes to these prefixes so, and leave all others as they are."""
        async with self._one_at_a_time:
            actual = await self._take_actual()
            plan = _Plan()
            # From dictionary to set to dictionary, kept hashes go along: no call per prefix.
            new = set(changes).difference(actual.best)
            if len(new) == len(changes):
                plan.added = {p: route for p, route in changes.items() if route is not None}
            else:
                for prefix, route in changes.items():
                    plan.want(prefix, route, actual.all_of(prefix))
            return await self._write(plan, actual)

    async def _take_actual(self) -> _Actual:
        """What the kernel has. Until all answers are in, that is not known: `_write` says it."""
        actual, self._actual = self._actual, None
        return await self._read() if actual is None else actual

    async def _write(self, plan: _Plan, actual: _Actual) -> RoutesApplied:
        refused: dict[Network, RouteRefused] = {}
        index = await self._indices(plan)
        added = await self._send_new(plan.added, Flag.EXCLUSIVE, index, refused)
        replaced = await self._send_new(plan.replaced, Flag.REPLACE, index, refused)
        # A prefix whose new route was refused keeps its old one, whatever its metric.
        doomed = [place for place in plan.deleted if place[0] not in refused]
        deleted = await self._send_delete(doomed, refused)
        actual.add_all(added)
        actual.add_all(replaced)
        for prefix, metric in deleted:
            actual.remove(prefix, metric)
        if not any(one.errno == errno.EEXIST for one in refused.values()):
            self._actual = actual  # a refusal changes nothing, but EEXIST we did not expect
        return RoutesApplied(
            added=len(added), replaced=len(replaced), deleted=len(deleted), refused=refused
        )

    async def _indices(self, plan: _Plan) -> dict[str, int]:
        """The numbers of all devices that routes name; 0 for one that is not there."""
        routes = {id(one): one for one in (*plan.added.values(), *plan.replaced.values())}
        names = {
            hop.device
            for route in routes.values()
            for hop in route.next_hops
            if hop.device is not None
        }
        return {name: await self._device_index(name) for name in names}

    async def _send_new(
        self,
        routes: Mapping[Network, Route],
        flag: Flag,
        index: Mapping[str, int],
        refused: dict[Network, RouteRefused],
    ) -> Mapping[Network, Route]:
        """Send routes; those that the kernel took. The others are noted in `refused`."""
        missing = {name for name, number in index.items() if number == 0}
        if missing:
            routes = {
                prefix: route
                for prefix, route in routes.items()
                if not _names_missing(prefix, route, missing, refused)
            }
        untaken: list[Network] = []
        items = list(routes.items())
        for start in range(0, len(items), BATCH):
            batch, first = items[start : start + BATCH], self._sequence + 1
            self._sequence += len(batch)
            data = self._encoder.new_routes(
                batch, flags=Flag.CREATE | flag, first=first, index=index
            )
            for sequence, error in (await self._exchange(data, first)).items():
                prefix = batch[sequence - first][0]
                refused[prefix] = error
                untaken.append(prefix)
        if not untaken:
            return routes
        without = set(untaken)
        return {prefix: route for prefix, route in items if prefix not in without}

    async def _send_delete(
        self, places: Sequence[_Identity], refused: dict[Network, RouteRefused]
    ) -> Sequence[_Identity]:
        """Delete routes; those that are gone. The others are noted in `refused`."""
        gone: list[_Identity] = []
        for start in range(0, len(places), BATCH):
            batch, first = places[start : start + BATCH], self._sequence + 1
            self._sequence += len(batch)
            data = b"".join(
                self._encoder.delete_route(
                    prefix,
                    metric=metric,
                    flags=Flag.ACK if sequence == self._sequence else 0,
                    sequence=sequence,
                )
                for sequence, (prefix, metric) in enumerate(batch, first)
            )
            errors = await self._exchange(data, first)
            for sequence, error in errors.items():
                if error.errno != errno.ESRCH:  # already gone is what we wanted
                    refused[batch[sequence - first][0]] = error
            gone += (one for one in batch if not errors or one[0] not in refused)
        return gone

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

    async def _read(self) -> _Actual:
        seen: list[Seen] = []
        for version in (4, 6):
            seen += await self._dump(version)
        names: dict[int, str] = {}
        if any(number for route in seen for _, number, _ in route.hops):
            names = await self._device_names()
        actual = _Actual()
        routes: dict[object, Route | None] = {}  # few next hops, many prefixes
        for one in seen:
            kind = (one.kind, one.hops, one.metric, one.source)
            if kind not in routes:
                routes[kind] = _to_route(one, names)
            route = routes[kind]
            if route is not None and (self._owns is None or self._owns(one.prefix, route)):
                actual.add(one.prefix, route)
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


def _names_missing(
    prefix: Network, route: Route, missing: set[str], refused: dict[Network, RouteRefused]
) -> bool:
    """Whether the route goes through a device that is not there; then it is noted as refused."""
    for hop in route.next_hops:
        if hop.device in missing:
            refused[prefix] = RouteRefused(errno.ENODEV, f"there is no device {hop.device}")
            return True
    return False


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
