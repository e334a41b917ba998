"""A node on fakes: the whole data plane of felix, a kernel in memory, a clock turned by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path

from cymric.kernel.command import FakeCommands, Finished
from cymric.kernel.fake_links import FakeLinks, FakeNetwork
from cymric.kernel.fake_routes import FakeRoutes, FakeRoutingTable
from cymric.kernel.links import Link
from cymric.kernel.netfilter_events import SilentEvents, TableEvents
from cymric.model.net import parse_network
from cymric.runtime.pacing import Kick
from felix.calc.config import FelixConfig
from felix.calc.values import (
    Desired,
    Endpoint,
    EndpointId,
    PolicyRule,
    ProfileRules,
    Verdict,
)
from felix.dataplane.conntrack import Conntrack
from felix.dataplane.endpoints import EndpointManager, RouteOwnership
from felix.dataplane.interfaces import Interfaces
from felix.dataplane.loop import Dataplane, Drivers
from felix.dataplane.pools import AddressesByInterface
from felix.dataplane.status import StatusFiles
from felix.dataplane.sysctls import Sysctls
from felix.ipset.sets import IPSets
from felix.iptables.backend import Backend
from felix.iptables.table import CheckIntervals, Table
from felix.rules.tables import TABLES
from tests.support.eventually import eventually
from tests.support.fake_iptables import FakeIpset, FakeIptables

POOL = parse_network("198.19.16.0/21")
ALLOW = ProfileRules("p", (PolicyRule(Verdict.ALLOW),), (PolicyRule(Verdict.ALLOW),))


def pod(name: str, address: str = "198.19.16.2") -> Endpoint:
    """An endpoint on interface `cali<name>`."""
    mac = f"02:00:00:00:00:{ord(name):02x}"
    endpoint_id = EndpointId("k8s", f"default/{name}", "eth0")
    return Endpoint(endpoint_id, f"cali{name}", mac, (IPv4Address(address),), ("p",))


def wanting(*pods: Endpoint, **changes: object) -> Desired:
    """A picture with these pods."""
    desired = Desired(
        config=FelixConfig(ipv6_support=False),
        endpoints=tuple(sorted(pods, key=lambda one: one.interface)),
        profiles={"p": ALLOW} if pods else {},
        pools=frozenset([POOL]),
        masquerade_pools=frozenset([POOL]),
    )
    return replace(desired, **changes)  # type: ignore[arg-type]


@dataclass
class Node:
    """A data plane whose kernel is in memory and whose clock is turned by hand."""

    directory: Path
    now_s: float = 1000.0
    desired: Desired = field(default_factory=wanting)
    applied: int = 0
    table_events: TableEvents = field(default_factory=SilentEvents)
    host_interfaces: AddressesByInterface = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.iptables, self.ip6tables, self.ipset = FakeIptables(), FakeIptables(), FakeIpset()
        self.conntrack_calls: list[str] = []
        self.commands = FakeCommands(
            {
                "iptables-nft-save": self.iptables.save,
                "iptables-nft-restore": self.iptables.restore,
                "ip6tables-nft-save": self.ip6tables.save,
                "ip6tables-nft-restore": self.ip6tables.restore,
                "ipset": self.ipset.run,
                "conntrack": self._conntrack,
            }
        )
        self.links: FakeLinks = FakeNetwork().add(1)
        self.routes = FakeRoutingTable()
        self.kick = Kick()
        self.proc = self.directory / "proc"
        self._make_proc("default")
        for path in (
            "ipv4/ip_forward",
            "ipv6/conf/all/forwarding",
            "netfilter/nf_conntrack_acct",
        ):
            self._make_file(path)

    def start(self) -> Dataplane:
        """A fresh data plane, as a restarted process has it."""
        config = self.desired.config
        interfaces = Interfaces(self.links, clock=self.clock)
        ownership = RouteOwnership(interfaces, config)
        sysctls = Sysctls(self.proc)
        tables = {
            version: {
                name: Table(
                    name,
                    Backend("nft", version),
                    self.commands,
                    clock=self.clock,
                    intervals=CheckIntervals(),
                )
                for name in TABLES
            }
            for version in config.ip_versions
        }
        drivers = Drivers(
            config=config,
            table_events=self.table_events,
            addresses=lambda: {"up0": frozenset([IPv4Address("198.19.0.2")])},
            interfaces=interfaces,
            ipsets=IPSets(self.commands, clock=self.clock, release_s=0.0),
            tables=tables,
            endpoints=EndpointManager(
                config=config,
                links=self.links,
                interfaces=interfaces,
                routes=FakeRoutes(self.routes, protocol=3, owns=ownership),
                ownership=ownership,
                sysctls=sysctls,
                status=StatusFiles(self.directory / "status"),
            ),
            conntrack=Conntrack(self.commands),
            sysctls=sysctls,
        )
        return Dataplane(
            drivers,
            lambda: self.desired,
            self.kick,
            clock=self.clock,
            on_applied=self._count,
            on_host_interfaces=self._note_host,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run it until the end of the block."""
        task = asyncio.ensure_future(self.start().run())
        before = self.applied
        try:
            await eventually(lambda: self.applied > before or task.done())
            if task.done():
                task.result()
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def add_link(self, name: str) -> Link:
        """A pod's link appears and comes up."""
        self._make_proc(name)
        self.routes.networks_by_device[name] = ()
        link = self.links.add(name)
        await self.links.set_up(link.index)
        return link

    async def remove_link(self, link: Link) -> None:
        """It goes, and its routes with it."""
        self.routes.remove_device(link.name)
        await self.links.delete(link.index)

    def want(self, desired: Desired) -> None:
        """The datastore changed."""
        self.desired = desired
        self.kick()

    def clock(self) -> float:
        """Monotonic seconds."""
        return self.now_s

    def pass_time(self, seconds: float) -> None:
        """Turn the clock and let the loop look at it."""
        self.now_s += seconds
        self.kick()

    @property
    def up(self) -> set[str]:
        """The names of status files."""
        return {path.name for path in (self.directory / "status").glob("*")}

    @property
    def route_devices(self) -> dict[str, str | None]:
        """Device by prefix."""
        found = self.routes.entries.items()
        return {str(prefix): route.next_hops[0].device for (prefix, _), (_, route) in found}

    def switch(self, path: str) -> str:
        """A sysctl."""
        return (self.proc / path).read_text()

    def _note_host(self, addresses: AddressesByInterface) -> None:
        self.host_interfaces = addresses

    def _count(self) -> None:
        self.applied += 1

    def _conntrack(self, argv: Sequence[str], _: str) -> Finished:
        self.conntrack_calls.append(argv[-1])
        return Finished(tuple(argv), 1, "", "conntrack v1.4.7: 0 flow entries have been deleted.")

    def _make_proc(self, name: str) -> None:
        for switch in ("proxy_ndp", "forwarding", "accept_ra"):
            self._make_file(f"ipv6/conf/{name}/{switch}")
        for switch in ("route_localnet", "proxy_arp", "forwarding", "rp_filter"):
            self._make_file(f"ipv4/conf/{name}/{switch}")
        self._make_file(f"ipv4/neigh/{name}/proxy_delay")

    def _make_file(self, path: str) -> None:
        (self.proc / path).parent.mkdir(parents=True, exist_ok=True)
        (self.proc / path).write_text("0\n")
