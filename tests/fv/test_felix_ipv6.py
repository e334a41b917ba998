"""Felix with both families, floating and spoofed addresses, on real kernels and both iptables."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator

import pytest

from tests.support.eventually import eventually_now
from tests.support.felix_lab import (
    NODE,
    NODE_ADDRESS6,
    POOL,
    POOL6,
    RESOURCES,
    WORLD_ADDRESS,
    WORLD_ADDRESS6,
    FelixLab,
    Pod,
    run,
    wep_name,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd]

FLOATING, SPOOFED = "198.19.15.7", "198.19.31.77"


@pytest.fixture(scope="module", params=["nft", "legacy"])
def lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FelixLab]:
    """A node with pools of both families, and floating and spoofed addresses allowed."""
    made = FelixLab(tmp_path_factory.mktemp("felix6"), request.param)
    try:
        made.open()
        tool = f"ip6tables-{request.param}"
        made.on_node(tool, "-A", "FORWARD", "-s", "fd00:bad::1/128", "-j", "DROP")
        made.put_pool("first", POOL, nat_outgoing=False)
        made.put_pool("six", POOL6, nat_outgoing=True)
        spec: dict[str, object] = {"floatingIPs": "Enabled", "workloadSourceSpoofing": "Any"}
        made.put("FelixConfiguration", "felixconfigurations", "default", spec)
        made.start_felix()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def pods(lab: FelixLab) -> tuple[Pod, Pod]:
    """Two dual-stack pods, complete."""
    first = lab.add_pod("a", "198.19.16.2", "fd00:198:16::2")
    second = lab.add_pod("b", "198.19.16.3", "fd00:198:16::3")
    for pod in (first, second):
        lab.put_endpoint(pod)
    lab.wait_up(first, second)
    return first, second


def test_dual_stack_pods_reach_each_other_and_the_world(
    lab: FelixLab, pods: tuple[Pod, Pod]
) -> None:
    """In both families; the world sees the node's address for the pool with natOutgoing."""
    first, second = pods
    for address in (second.address, second.address6, WORLD_ADDRESS, WORLD_ADDRESS6):
        assert first.pings(address), address
    assert second.pings(first.address6)
    assert run("ip", "netns", "exec", lab.world, "ping", "-c", "1", "-W", "2", first.address6)
    assert "MASQUERADE" in "".join(lab.save("nat", program="ip6tables"))


def test_ipv6_route_switches_sets_and_status(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """A /128 with Calico's attributes, switches, sets of IPv6, both families in the file."""
    pod = pods[0]
    route = lab.on_node("ip", "-6", "-d", "-N", "route", "show", f"{pod.address6}/128").split()
    assert route[: route.index("metric") + 2] == (
        f"1 {pod.address6} dev {pod.interface} proto 3 scope 0 metric 1024".split()
    )
    for path, value in (
        (f"ipv6/conf/{pod.interface}/proxy_ndp", "1"),
        (f"ipv6/conf/{pod.interface}/forwarding", "1"),
        (f"ipv6/conf/{pod.interface}/accept_ra", "0"),
        ("ipv6/conf/all/forwarding", "1"),
    ):
        assert lab.on_node("cat", f"/proc/sys/net/{path}").strip() == value, path
    sets = lab.on_node("ipset", "save")
    assert "create cali60network-ip-pools hash:net family inet6" in sets
    assert f"add cali60masq-ipam-pools {POOL6}" in sets
    status = json.loads(lab.status_file(pod).read_text())
    assert status["ipv4Nets"] == [f"{pod.address}/32"]
    assert status["ipv6Nets"] == [f"{pod.address6}/128"]


def test_pod_to_host_in_ipv6(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """Neighbour discovery of the gateway works though the host's own addresses do not answer."""
    assert not pods[0].pings(NODE_ADDRESS6)
    neighbours = pods[0].run("ip", "-6", "neigh", "show")
    assert "ee:ee:ee:ee:ee:ee" in neighbours


def test_spoofed_and_unknown_sources_are_dropped_in_ipv6(
    lab: FelixLab, pods: tuple[Pod, Pod]
) -> None:
    """The reverse path check knows IPv6; a pod without an endpoint gets nowhere."""
    first, second = pods
    spoofed = "fd00:198:16::77"
    first.run("ip", "address", "add", f"{spoofed}/128", "dev", "eth0", "nodad")
    try:
        assert not first.pings(second.address6, "-I", spoofed)
        counted = lab.on_node("sh", "-c", f"ip6tables-{lab.backend}-save -c -t raw | grep rpfilter")
        assert int(re.findall(r"\[(\d+):", counted)[0]) >= 2
    finally:
        first.run("ip", "address", "del", f"{spoofed}/128", "dev", "eth0")
    stranger = lab.add_pod("x", "198.19.16.9", "fd00:198:16::9")
    try:
        lab.on_node(
            "ip", "route", "add", f"{stranger.address6}/128", "dev", stranger.interface,
            "proto", "static",
        )  # fmt: skip
        assert not stranger.pings(second.address6)
        assert not second.pings(stranger.address6)
    finally:
        lab.remove_pod(stranger)


def test_pod_with_ipv4_only_stays_out_of_the_ipv6_tables(lab: FelixLab) -> None:
    """One transaction in IPv4, none in IPv6."""
    pod = lab.add_pod("v", "198.19.16.5")
    before = lab.metric("felix_iptables_restore_calls")
    lab.put_endpoint(pod)
    lab.wait_up(pod)
    assert lab.metric("felix_iptables_restore_calls") == before + 1
    assert pod.interface in "".join(lab.save("filter"))
    assert pod.interface not in "".join(lab.save("filter", program="ip6tables"))
    lab.delete_endpoint(pod)
    lab.wait_down(pod)
    lab.remove_pod(pod)


def test_floating_address(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """The world reaches a pod by it, and so do another pod, and the pod itself."""
    first, second = pods
    run("ip", "-n", lab.world, "route", "add", f"{FLOATING}/32", "via", "198.19.0.2")
    assert not second.pings(FLOATING)
    nat = [{"internalIP": first.address, "externalIP": FLOATING}]
    lab.put_endpoint(first, ipNATs=nat)
    eventually_now(lambda: FLOATING in "".join(lab.save("nat")))
    lab.wait_up(first)
    assert first.interface in lab.on_node("ip", "route", "show", f"{FLOATING}/32")
    assert run("ip", "netns", "exec", lab.world, "ping", "-c", "1", "-W", "2", FLOATING)
    assert second.pings(FLOATING)
    assert first.pings(FLOATING)
    lab.put_endpoint(first)
    eventually_now(lambda: FLOATING not in "".join(lab.save("nat")))
    eventually_now(lambda: not lab.on_node("ip", "route", "show", f"{FLOATING}/32"))
    lab.wait_up(first)


def test_spoofed_source_prefix_that_is_allowed(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """An endpoint may send from the prefixes it names, and nobody else may."""
    first, second = pods
    run("ip", "-n", lab.world, "route", "add", f"{SPOOFED}/32", "via", "198.19.0.2")
    lab.on_node("ip", "route", "add", f"{SPOOFED}/32", "dev", "lo")  # the answer may die here

    def counted() -> int:
        text = lab.on_node("sh", "-c", f"iptables-{lab.backend}-save -c -t raw | grep rpfilter")
        return int(re.findall(r"\[(\d+):", text)[0])

    first.run("ip", "address", "add", f"{SPOOFED}/32", "dev", "eth0")
    try:
        before = counted()
        first.pings(second.address, "-I", SPOOFED)
        assert counted() > before
        lab.put_endpoint(first, allowSpoofedSourcePrefixes=["198.19.31.0/24"])
        eventually_now(lambda: "cali-rpf-skip -s 198.19.31.0/24" in "".join(lab.save("raw")))
        lab.wait_up(first)
        before = counted()
        first.pings(second.address, "-I", SPOOFED)
        assert counted() == before
        path = f"/proc/sys/net/ipv4/conf/{first.interface}/rp_filter"
        assert lab.on_node("cat", path).strip() == "0"
    finally:
        first.run("ip", "address", "del", f"{SPOOFED}/32", "dev", "eth0")
        lab.put_endpoint(first)


def test_endpoint_told_of_directly(lab: FelixLab) -> None:
    """A pod is complete before anything is stored; what is never stored is undone."""
    pod = lab.add_pod("h", "198.19.16.8")
    spec = {
        "orchestrator": "k8s",
        "node": NODE,
        "pod": pod.name,
        "endpoint": "eth0",
        "ipNetworks": [f"{pod.address}/32"],
        "profiles": ["projectcalico-default-allow"],
        "interfaceName": pod.interface,
        "mac": pod.mac,
    }
    metadata = {"name": wep_name(pod), "namespace": "default"}
    value = {
        "kind": "WorkloadEndpoint",
        "apiVersion": "projectcalico.org/v3",
        "metadata": metadata,
        "spec": spec,
    }
    key = f"{RESOURCES}/workloadendpoints/default/{wep_name(pod)}"

    def tell(what: object) -> str:
        with socket.socket(socket.AF_UNIX) as told:
            told.connect(str(lab.directory / "felix.sock"))
            told.sendall(json.dumps({"key": key, "value": what}).encode() + b"\n")
            return told.recv(4096).decode()

    assert tell(value) == '{"ok":true}\n'
    lab.wait_up(pod)
    assert pod.pings(WORLD_ADDRESS)
    lab.wait_down(pod)  # five seconds later, and the rest follows
    eventually_now(lambda: pod.interface not in "".join(lab.save("filter")))
    tell(value)
    lab.put_endpoint(pod)
    lab.wait_up(pod)
    assert lab.metric('cymric_felix_endpoint_programmed_seconds_count{source="hint"}') == 2
    lab.delete_endpoint(pod)
    lab.wait_down(pod)
    lab.remove_pod(pod)


def test_restart_writes_nothing_in_either_family(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """Everything is recognised, and rules of others in ip6tables are untouched."""
    lab.kill_felix()
    lab.start_felix()
    assert lab.metric("felix_iptables_restore_calls") == 0
    assert lab.metric("felix_ipset_lines_executed") == 0
    assert "-A FORWARD -s fd00:bad::1/128 -j DROP" in lab.save("filter", program="ip6tables")
    assert pods[0].pings(pods[1].address6)
    lab.wait_up(*pods)
