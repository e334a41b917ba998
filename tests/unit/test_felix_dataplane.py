"""The data plane on fakes: order, faults, status, and what is left alone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from cymric.kernel.api import on_link
from cymric.kernel.netfilter_events import TableChange
from cymric.model.net import parse_address, parse_network
from cymric.runtime.pacing import Kick
from felix.calc.config import FelixConfig
from felix.calc.values import (
    Endpoint,
    EndpointId,
    FloatingAddress,
)
from felix.dataplane.claims import Claims
from felix.dataplane.interfaces import Interfaces
from felix.dataplane.loop import ConfigChanged, DataplaneFailed
from felix.dataplane.status import StatusFiles, content, file_name
from felix.iptables.table import TableFailed
from felix.rules.tables import TABLES
from tests.support.eventually import eventually
from tests.support.felix_node import Node, pod, wanting


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A node with nothing on it."""
    return Node(tmp_path)


async def test_endpoint_becomes_complete(node: Node) -> None:
    """Switches, neighbour, route, chains and status of a pod whose link is up."""
    link = await node.add_link("calia")
    node.desired = wanting(pod("a"))
    async with node.running():
        assert node.up == {"k8s default%2Fa eth0"}
    assert node.route_devices == {"198.19.16.2/32": "calia"}
    (neighbour,) = await node.links.neighbours(link.index)
    assert (str(neighbour.address), neighbour.mac) == ("198.19.16.2", "02:00:00:00:00:61")
    assert node.switch("ipv4/conf/calia/proxy_arp") == "1"
    assert node.switch("ipv4/ip_forward") == "1"
    assert "cali-tw-calia" in node.iptables.tables["filter"]
    assert node.ipset.sets["cali40masq-ipam-pools"][2] == {"198.19.16.0/21"}


async def test_link_that_comes_later_completes_the_endpoint(node: Node) -> None:
    """The route is written when the link appears, without any update."""
    node.desired = wanting(pod("a"))
    async with node.running():
        assert node.up == set()
        assert "cali-tw-calia" in node.iptables.tables["filter"]
        await node.add_link("calia")
        await eventually(lambda: node.up == {"k8s default%2Fa eth0"})
        assert node.route_devices == {"198.19.16.2/32": "calia"}


async def test_link_replaced_under_the_same_name(node: Node) -> None:
    """The kernel dropped the old link's route; the new one gets its own, and its neighbour."""
    link = await node.add_link("calia")
    node.desired = wanting(pod("a"))
    async with node.running():
        await node.remove_link(link)
        await eventually(lambda: not node.up)
        fresh = await node.add_link("calia")
        await eventually(lambda: node.up)
        assert node.route_devices == {"198.19.16.2/32": "calia"}
        assert len(await node.links.neighbours(fresh.index)) == 1


async def test_endpoint_that_goes_is_undone(node: Node) -> None:
    """Status first, then chains and route; its connections are forgotten."""
    await node.add_link("calia")
    node.desired = wanting(pod("a"))
    async with node.running():
        node.want(wanting())
        await eventually(lambda: not node.up)
        await eventually(lambda: "cali-tw-calia" not in node.iptables.tables["filter"])
        node.pass_time(11)  # the interface is new: its routes have some grace
        await eventually(lambda: not node.route_devices)
        await eventually(lambda: "198.19.16.2" in node.conntrack_calls)


async def test_restart_writes_nothing(node: Node) -> None:
    """A fresh process finds all as wanted: no restore, no set line, no route, same status file."""
    await node.add_link("calia")
    node.desired = wanting(pod("a"))
    async with node.running():
        pass
    before = (len(node.iptables.restores), len(node.ipset.lines), node.routes.writes)
    assert before[0] == 4
    async with node.running():
        assert node.up
    assert (len(node.iptables.restores), len(node.ipset.lines), node.routes.writes) == before


async def test_one_more_pod_is_one_restore(node: Node) -> None:
    """An ADD writes the filter table once, reads nothing back, and leaves sets alone."""
    await node.add_link("calia")
    await node.add_link("calib")
    node.desired = wanting(pod("a"))
    async with node.running():
        restores, saves = len(node.iptables.restores), node.iptables.saves
        ipset_calls = [call for call in node.commands.calls if call.argv[0] == "ipset"]
        node.want(wanting(pod("a"), pod("b", "198.19.16.3")))
        await eventually(lambda: len(node.up) == 2)
        assert len(node.iptables.restores) == restores + 1
        assert node.iptables.saves == saves
        assert ipset_calls == [call for call in node.commands.calls if call.argv[0] == "ipset"]


async def test_locked_datastore_changes_nothing(node: Node) -> None:
    """While datastoreReady is false the kernel stays; afterwards the latest picture counts."""
    await node.add_link("calia")
    node.desired = wanting(pod("a"))
    async with node.running():
        node.want(wanting(is_ready=False))
        await asyncio.sleep(0)
        await node.add_link("calib")
        assert node.up == {"k8s default%2Fa eth0"}
        node.want(wanting(pod("b")))
        await eventually(lambda: node.up == {"k8s default%2Fb eth0"})


async def test_one_address_on_two_interfaces(node: Node) -> None:
    """The first interface by name has the route; both are never half there."""
    await node.add_link("calia")
    await node.add_link("calib")
    node.desired = wanting(pod("a"), pod("b"))
    async with node.running():
        assert node.route_devices == {"198.19.16.2/32": "calia"}


async def test_route_of_another_interface_is_refused_and_the_endpoint_waits(node: Node) -> None:
    """A route that somebody else holds keeps an endpoint from being complete, until it goes."""
    await node.add_link("calia")
    node.routes.networks_by_device["eth0"] = ()
    key = (parse_network("198.19.16.2/32"), 1024)
    node.routes.entries[key] = (4, on_link("eth0"))
    node.desired = wanting(pod("a"))
    async with node.running():
        assert node.up == set()
        del node.routes.entries[key]
        node.pass_time(10)
        await eventually(lambda: node.up)


async def test_refused_route_never_ends_the_process(node: Node) -> None:
    """However long a route is refused, the others are served."""
    await node.add_link("calia")
    await node.add_link("calib")
    node.routes.networks_by_device["eth0"] = ()
    key = (parse_network("198.19.16.2/32"), 1024)
    node.routes.entries[key] = (4, on_link("eth0"))
    node.desired = wanting(pod("a"))

    def failures() -> float:
        return REGISTRY.get_sample_value("felix_int_dataplane_failures") or 0.0

    async with node.running():
        for _ in range(15):
            node.pass_time(20)
            await eventually(partial(lambda seen: failures() > seen, failures()))
        node.want(wanting(pod("a"), pod("b", "198.19.16.3")))
        await eventually(lambda: node.up == {"k8s default%2Fb eth0"})


async def test_missing_ipset_ends_the_process_after_some_tries(node: Node) -> None:
    """Without sets no rule can be written: a supervisor must know."""
    del node.commands._programs["ipset"]
    node.kick = Kick()
    task = asyncio.ensure_future(node.start().run())

    def ended() -> bool:
        node.pass_time(10)
        return task.done()

    await eventually(ended)
    with pytest.raises(ExceptionGroup) as caught:
        task.result()
    assert caught.group_contains(DataplaneFailed)
    assert not node.iptables.restores


async def test_routes_nobody_wants_have_grace(node: Node) -> None:
    """A route on a workload interface is removed, but not while the interface is new."""
    await node.add_link("calix")
    stray = (parse_network("198.19.16.9/32"), 1024)
    foreign = (parse_network("198.19.0.0/20"), 1024)
    node.routes.networks_by_device["eth0"] = ()
    node.routes.entries[stray] = (3, on_link("calix"))
    node.routes.entries[foreign] = (3, on_link("eth0"))
    async with node.running():
        assert stray in node.routes.entries
        node.pass_time(11)
        await eventually(lambda: stray not in node.routes.entries)
        assert foreign in node.routes.entries


async def test_periodic_check_repairs_table_and_sets(node: Node) -> None:
    """What others removed is back after the refresh interval."""
    async with node.running():
        node.iptables.tables["filter"]["cali-INPUT"].clear()
        node.ipset.sets["cali40network-ip-pools"][2].clear()
        node.pass_time(200)
        await eventually(lambda: node.iptables.tables["filter"]["cali-INPUT"])
        await eventually(lambda: node.ipset.sets["cali40network-ip-pools"][2])


async def test_failing_restore_is_repeated(node: Node) -> None:
    """A few refusals are overcome."""
    node.iptables.fail_next = 3
    async with node.running():
        assert "cali-INPUT" in node.iptables.tables["filter"]


async def test_table_that_cannot_be_written_ends_the_process(node: Node) -> None:
    """A supervisor starts a fresh one; endpoints are not reported as complete."""
    await node.add_link("calia")
    node.desired = wanting(pod("a"))
    node.iptables.fail_next = 1000
    with pytest.raises(ExceptionGroup) as caught:
        async with node.running():
            pass
    assert caught.group_contains(TableFailed)
    assert node.up == set()


async def test_parameter_that_needs_a_restart_ends_the_process(node: Node) -> None:
    """Drivers are built once for their parameters."""
    task = asyncio.ensure_future(node.start().run())
    await eventually(lambda: node.applied)
    node.want(wanting(config=FelixConfig(ipv6_support=False, device_route_protocol=80)))
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(task, 5)
    assert caught.group_contains(ConfigChanged)


async def test_changed_endpoint_replaces_its_neighbour(node: Node) -> None:
    """A pod that was made anew under the same name has a new MAC and address."""
    link = await node.add_link("calia")
    node.desired = wanting(pod("a"))
    async with node.running():
        changed = replace(
            pod("a"), mac="02:00:00:00:00:ff", addresses=(IPv4Address("198.19.16.7"),)
        )
        node.want(wanting(changed))
        await eventually(lambda: "198.19.16.7/32" in node.route_devices)
        (neighbour,) = await node.links.neighbours(link.index)
        assert (str(neighbour.address), neighbour.mac) == ("198.19.16.7", "02:00:00:00:00:ff")
        text = (node.directory / "status" / "k8s default%2Fa eth0").read_text()
        assert json.loads(text)["mac"] == "02:00:00:00:00:ff"


def test_status_file_name_and_content() -> None:
    """As Calico writes them: parts escaped, joined by blanks; JSON without empty fields."""
    assert file_name(EndpointId("k8s", "ns/a b", "eth0")) == "k8s ns%2Fa%20b eth0"
    assert json.loads(content(replace(pod("a"), mac=""))) == {
        "ifaceName": "calia",
        "ipv4Nets": ["198.19.16.2/32"],
    }


def test_status_of_an_earlier_process(tmp_path: Path) -> None:
    """A file that still holds is untouched; one that does not is removed."""
    for name, text in ((file_name(pod("a").id), content(pod("a"))), ("k8s x%2Fy eth0", "{}")):
        (tmp_path / name).write_text(text)
    status = StatusFiles(tmp_path)
    status.keep_only({pod("a").id: pod("a")})
    assert [path.name for path in tmp_path.iterdir()] == [file_name(pod("a").id)]
    assert status.set_up(pod("a")) is False
    assert status.set_down(pod("a").id) is True
    assert status.set_down(pod("a").id) is False


async def test_interfaces_are_known_by_their_present_name(node: Node) -> None:
    """A link that is renamed is gone under its old name."""
    interfaces = Interfaces(node.links, clock=node.clock)
    seen: list[tuple[str, bool]] = []
    interfaces.tell(lambda name, before, link: seen.append((name, link is not None)))
    link = node.links.add("tmp0")
    await interfaces.read()
    node.links._change(link.index, replace(link, name="calia"))
    await interfaces.read()
    assert interfaces.get("tmp0") is None
    assert interfaces.get("calia") is not None
    assert seen[-2:] == [("tmp0", False), ("calia", True)]


def dual_stack(name: str, *addresses: str) -> Endpoint:
    """A pod with these addresses."""
    return replace(pod(name), addresses=tuple(map(parse_address, addresses)))


BOTH = FelixConfig(ipv6_support=True)


async def test_dual_stack_endpoint(node: Node) -> None:
    """Routes of both families, switches of both, chains in both, and both in the status file."""
    link = await node.add_link("calia")
    node.desired = wanting(dual_stack("a", "198.19.16.2", "fd00:19::2"), config=BOTH)
    async with node.running():
        assert node.up == {"k8s default%2Fa eth0"}
    assert node.route_devices == {"198.19.16.2/32": "calia", "fd00:19::2/128": "calia"}
    (neighbour,) = await node.links.neighbours(link.index)
    assert str(neighbour.address) == "198.19.16.2", "IPv6 pods are found by neighbour discovery"
    for path in ("ipv6/conf/calia/proxy_ndp", "ipv6/conf/calia/forwarding"):
        assert node.switch(path) == "1"
    assert node.switch("ipv6/conf/calia/accept_ra").strip() == "0"
    assert node.switch("ipv6/conf/all/forwarding") == "1"
    assert "cali-tw-calia" in node.ip6tables.tables["filter"]
    assert "cali60network-ip-pools" in node.ipset.sets
    text = (node.directory / "status" / "k8s default%2Fa eth0").read_text()
    assert json.loads(text)["ipv4Nets"] == ["198.19.16.2/32"]
    assert json.loads(text)["ipv6Nets"] == ["fd00:19::2/128"]


async def test_pods_with_ipv4_only_cost_nothing_in_ipv6(node: Node) -> None:
    """The tables of IPv6 are written once; forwarding of IPv6 stays as the operator left it."""
    await node.add_link("calia")
    node.desired = wanting(config=BOTH)
    async with node.running():
        before = len(node.ip6tables.restores)
        assert before == len(TABLES)
        node.want(wanting(pod("a"), config=BOTH))
        await eventually(lambda: node.up)
        assert len(node.ip6tables.restores) == before
    assert node.switch("ipv6/conf/all/forwarding").strip() == "0"


async def test_restart_of_a_dual_stack_node_writes_nothing(node: Node) -> None:
    """What is there is recognised in both families."""
    await node.add_link("calia")
    node.desired = wanting(dual_stack("a", "198.19.16.2", "fd00:19::2"), config=BOTH)
    async with node.running():
        pass
    before = (len(node.ip6tables.restores), len(node.ipset.lines), node.routes.writes)
    async with node.running():
        assert node.up
    assert (len(node.ip6tables.restores), len(node.ipset.lines), node.routes.writes) == before


async def test_conntrack_knows_the_family(node: Node) -> None:
    """Connections of an IPv6 address are forgotten as those of IPv6."""
    await node.add_link("calia")
    node.desired = wanting(dual_stack("a", "fd00:19::2"), config=BOTH)
    async with node.running():
        node.want(wanting(config=BOTH))
        await eventually(lambda: "fd00:19::2" in node.conntrack_calls)
    (argv, *_) = [call.argv for call in node.commands.calls if call.argv[0] == "conntrack"]
    assert argv[:3] == ("conntrack", "--family", "ipv6")


async def test_spoofing_and_floating_endpoint(node: Node) -> None:
    """The reverse path filter of its interface is off, and its floating address is routed."""
    await node.add_link("calia")
    (node.proc / "ipv4/conf/default/rp_filter").write_text("1\n")
    floating = FloatingAddress(parse_address("192.0.2.7"), parse_address("198.19.16.2"))
    special = replace(pod("a"), spoofable=(parse_network("198.19.64.0/24"),), floating=(floating,))
    node.desired = wanting(special)
    async with node.running():
        assert node.up
        assert node.route_devices == {"198.19.16.2/32": "calia", "192.0.2.7/32": "calia"}
        assert node.switch("ipv4/conf/calia/rp_filter").strip() == "0"
        assert len(node.iptables.tables["raw"]["cali-rpf-skip"]) == 1
        node.want(wanting(pod("a")))
        await eventually(lambda: node.switch("ipv4/conf/calia/rp_filter") == "1")
        assert "192.0.2.7/32" not in node.route_devices


async def test_a_periodic_look_does_not_call_endpoints_incomplete(node: Node) -> None:
    """The status file of a pod that is well is never touched."""
    await node.add_link("calia")
    node.desired = wanting(pod("a"))
    async with node.running():
        file = node.directory / "status" / "k8s default%2Fa eth0"
        before = file.stat().st_ino
        for _ in range(3):
            (node.proc / "ipv4/conf/calia/proxy_arp").write_text("0")
            node.pass_time(100)
            await eventually(lambda: node.switch("ipv4/conf/calia/proxy_arp") == "1")
        assert file.stat().st_ino == before


names = st.sampled_from(["a", "b", "c"])
values = st.lists(st.integers(0, 4), unique=True, max_size=3).map(tuple)


@given(st.lists(st.tuples(names, values), max_size=20), st.sets(st.integers(0, 19)))
def test_claims_are_those_of_now(steps: list[tuple[str, tuple[int, ...]]], asked: set[int]) -> None:
    """Whatever was claimed before, the first by name has a value, and changes add up."""
    claims: Claims[int] = Claims()
    claimed: dict[str, tuple[int, ...]] = {}
    followed: dict[int, str] = {}

    def follow() -> None:
        for value, (before, after) in claims.take_changes().items():
            assert followed.pop(value, None) == before
            if after is not None:
                followed[value] = after

    for number, (name, wanted) in enumerate(steps):
        claims.set(name, wanted)
        claimed[name] = wanted
        if number in asked:
            follow()
    expected = {
        value: min(name for name, held in claimed.items() if value in held)
        for value in {value for held in claimed.values() for value in held}
    }
    assert dict(claims.owner_by_value) == expected
    follow()
    assert followed == expected


class Told:
    """Events that a test tells of."""

    def __init__(self) -> None:
        self._told: asyncio.Queue[TableChange] = asyncio.Queue()

    def tell(self, change: TableChange) -> None:
        """Somebody changed a table."""
        self._told.put_nowait(change)

    async def watch(self, is_own: Callable[[int], bool]) -> AsyncIterator[TableChange]:
        """See TableEvents.watch."""
        while True:
            change = await self._told.get()
            if not is_own(change.port):
                yield change


async def test_table_that_others_change_is_repaired_at_once(node: Node) -> None:
    """Their event makes the table be read and repaired; other tables and chains are left alone."""
    node.table_events = told = Told()
    node.desired = wanting(pod("a"))
    async with node.running():
        saves = node.iptables.saves
        told.tell(TableChange(4, "filter", "KUBE-FORWARD", 77))
        node.iptables.tables["filter"]["cali-FORWARD"].clear()
        node.iptables.tables["filter"]["FORWARD"].clear()
        told.tell(TableChange(4, "filter", "cali-FORWARD", 77))
        await eventually(lambda: node.iptables.tables["filter"]["cali-FORWARD"])
        assert len(node.iptables.tables["filter"]["FORWARD"]) == 3
        assert node.iptables.saves == saves + 1


async def test_host_interfaces_are_told_of_when_they_change(node: Node) -> None:
    """Names and addresses of interfaces that are no workload's, also without an address."""
    await node.links.set_up((node.links.add("up0")).index)
    async with node.running():
        await eventually(lambda: "up0" in node.host_interfaces)
        assert node.host_interfaces["up0"] == {IPv4Address("198.19.0.2")}
        node.links.add("eth7")
        await node.add_link("calia")
        await eventually(lambda: node.host_interfaces.get("eth7") == frozenset())
        assert "calia" not in node.host_interfaces
