"""Felix on real kernels: both iptables, namespaces as pods, etcd as the datastore."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.support.eventually import eventually_now
from tests.support.felix_lab import (
    NODE_ADDRESS,
    POOL,
    WORLD_ADDRESS,
    FelixLab,
    Pod,
    run,
)

pytestmark = [pytest.mark.root, pytest.mark.etcd]

OTHER_POOL = "198.19.24.0/21"
FOREIGN = (
    ("filter", "FORWARD", "-s 192.0.2.1/32 -j DROP"),
    ("filter", "INPUT", '-p tcp -m tcp --dport 7 -m comment --comment "of others" -j ACCEPT'),
    ("nat", "POSTROUTING", "-s 192.0.2.2/32 -j ACCEPT"),
    ("mangle", "POSTROUTING", "-p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --set-mss 1300"),
)


@pytest.fixture(scope="module", params=["nft", "legacy"])
def lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[FelixLab]:
    """A node with two pods, a pool with natOutgoing, and rules of somebody else."""
    made = FelixLab(tmp_path_factory.mktemp("felix"), request.param)
    try:
        made.open()
        for table, chain, rule in FOREIGN:
            made.on_node("sh", "-c", f"iptables-{request.param} -t {table} -A {chain} {rule}")
        made.on_node(f"iptables-{request.param}", "-N", "OTHERS")
        made.put_pool("first", POOL, nat_outgoing=True)
        made.put_pool("second", OTHER_POOL, nat_outgoing=False)
        made.start_felix()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def pods(lab: FelixLab) -> tuple[Pod, Pod]:
    """A pod in each pool, complete."""
    first, second = lab.add_pod("a", "198.19.16.2"), lab.add_pod("b", "198.19.24.3")
    for pod in (first, second):
        lab.put_endpoint(pod)
    lab.wait_up(first, second)
    return first, second


def sources_seen_by(namespace: str, device: str, pod: Pod, address: str) -> set[str]:
    """The source addresses of echo requests that arrive when `pod` pings `address`."""
    capture = subprocess.Popen(
        ["ip", "netns", "exec", namespace, "tcpdump", "-nlU", "-c", "2", "-i", device,
         f"icmp[icmptype] == icmp-echo and dst {address}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert capture.stderr is not None
        while "listening" not in capture.stderr.readline():
            pass
        pod.pings(address)
        out, _ = capture.communicate(timeout=10)
    finally:
        capture.kill()
        capture.wait()
    return set(re.findall(r"IP (\S+) > ", out))


def test_pods_with_an_allowing_profile_reach_each_other(
    lab: FelixLab, pods: tuple[Pod, Pod]
) -> None:
    """Two pods on one node talk, in both directions, and to the world outside."""
    first, second = pods
    assert first.pings(second.address)
    assert second.pings(first.address)
    assert first.pings(WORLD_ADDRESS)
    assert run("ip", "netns", "exec", lab.world, "ping", "-c", "1", "-W", "1", first.address)


def test_routes_and_switches(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """A pod has a /32 route with Calico's attributes, a neighbour entry, and its switches set."""
    pod = pods[0]
    route = lab.on_node("ip", "-d", "-N", "route", "show", f"{pod.address}/32")
    assert route.split() == (
        f"1 {pod.address} dev {pod.interface} proto 3 scope 253 metric 1024".split()
    )
    neighbour = lab.on_node("ip", "neigh", "show", pod.address)
    assert f"lladdr {pod.mac} PERMANENT" in neighbour
    for path, value in (
        (f"ipv4/conf/{pod.interface}/proxy_arp", "1"),
        (f"ipv4/conf/{pod.interface}/route_localnet", "1"),
        (f"ipv4/conf/{pod.interface}/forwarding", "1"),
        (f"ipv4/neigh/{pod.interface}/proxy_delay", "0"),
        ("ipv4/ip_forward", "1"),
    ):
        assert lab.on_node("cat", f"/proc/sys/net/{path}").strip() == value, path


def test_spoofed_source_is_dropped(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """A packet whose source is not the pod's own dies in the raw table's reverse path check."""
    first, second = pods
    first.run("ip", "address", "add", "198.19.16.77/32", "dev", "eth0")
    try:
        assert not first.pings(second.address, "-I", "198.19.16.77")
        assert not first.pings(WORLD_ADDRESS, "-I", "198.19.16.77")
        drops = lab.on_node("sh", "-c", f"iptables-{lab.backend}-save -c -t raw | grep rpfilter")
        assert int(re.findall(r"\[(\d+):", drops)[0]) >= 2
        assert first.pings(second.address)
    finally:
        first.run("ip", "address", "del", "198.19.16.77/32", "dev", "eth0")


def test_nat_outgoing(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """The world sees the node's address for a pool with natOutgoing, else the pod's; pods never."""
    first, second = pods
    assert sources_seen_by(lab.world, "eth0", first, WORLD_ADDRESS) == {NODE_ADDRESS}
    assert sources_seen_by(lab.world, "eth0", second, WORLD_ADDRESS) == {second.address}
    assert sources_seen_by(second.namespace, "eth0", first, second.address) == {first.address}


def test_unknown_workload_interface_is_dropped(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """A pod without an endpoint gets no route and cannot talk, even with a route made for it."""
    stranger = lab.add_pod("x", "198.19.16.9")
    try:
        lab.on_node(
            "ip", "route", "add", "198.19.16.9/32", "dev", stranger.interface, "proto", "static"
        )
        assert not stranger.pings(pods[0].address)
        assert not pods[0].pings(stranger.address)
        assert not stranger.pings(NODE_ADDRESS)
        assert not lab.status_file(stranger).exists()
    finally:
        lab.remove_pod(stranger)


def test_pod_to_host_follows_the_configured_action(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """Pods may not talk to the node by default; FelixConfiguration of the node changes it live."""
    assert not pods[0].pings(NODE_ADDRESS)
    spec: dict[str, object] = {"defaultEndpointToHostAction": "Return"}
    lab.put("FelixConfiguration", "felixconfigurations", "node.node1", spec)
    eventually_now(lambda: pods[0].pings(NODE_ADDRESS))
    lab.delete("felixconfigurations", "node.node1")
    eventually_now(lambda: not pods[0].pings(NODE_ADDRESS))


def test_profile_rules_and_their_absence(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """A missing profile drops, one that allows passes, and its rules may match."""
    first, second = pods
    allow: dict[str, object] = {"ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}]}
    try:
        lab.put_endpoint(second, "kns.late")
        eventually_now(lambda: not first.pings(second.address))
        lab.put("Profile", "profiles", "kns.late", allow)
        eventually_now(lambda: first.pings(second.address))
        matching = {"action": "Deny", "source": {"nets": [f"{first.address}/32"]}}
        rules = [matching, {"action": "Allow"}]
        lab.put("Profile", "profiles", "kns.late", {**allow, "ingress": rules})
        eventually_now(lambda: not first.pings(second.address))
    finally:
        lab.put_endpoint(second)
        lab.delete("profiles", "kns.late")
        eventually_now(lambda: first.pings(second.address))


def test_foreign_rules_stay_and_our_jumps_keep_their_place(
    lab: FelixLab, pods: tuple[Pod, Pod]
) -> None:
    """Rules of others survive; a jump pushed down is back on top at the next check."""
    for table, chain, rule in FOREIGN:
        assert f"-A {chain} {rule}" in lab.save(table)
    assert "OTHERS" in lab.on_node(f"iptables-{lab.backend}-save", "-t", "filter")
    tool = f"iptables-{lab.backend}"
    lab.on_node(tool, "-I", "FORWARD", "-s", "192.0.2.9/32", "-j", "DROP")
    lab.on_node(tool, "-A", "FORWARD", "-s", "192.0.2.8/32", "-j", "DROP")

    # Any write is followed by a check.
    third = lab.add_pod("c", "198.19.16.4")
    lab.put_endpoint(third)

    def in_place() -> bool:
        rules = [line for line in lab.save("filter") if line.startswith("-A FORWARD")]
        return (
            "cali:wUHhoiAYhphO9Mso" in rules[0]
            and "192.0.2.9" in rules[1]
            and "192.0.2.8" in rules[-3]
            and "cali:S93hcgKJrXEqnTfs" in rules[-2]
            and "cali:mp77cMpurHhyjLrM" in rules[-1]
        )

    eventually_now(in_place, 15.0)
    assert pods[0].pings(pods[1].address)
    lab.delete_endpoint(third)
    lab.wait_down(third)
    lab.remove_pod(third)
    for address in ("192.0.2.9/32", "192.0.2.8/32"):
        lab.on_node(tool, "-D", "FORWARD", "-s", address, "-j", "DROP")


def test_flushed_chains_are_repaired(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """When somebody empties our chains, the check after the last write puts them back."""
    third = lab.add_pod("d", "198.19.16.5")
    lab.put_endpoint(third)
    lab.wait_up(third)
    lab.on_node(f"iptables-{lab.backend}", "-F", f"cali-tw-{third.interface}")
    eventually_now(lambda: any(f"-A cali-tw-{third.interface}" in x for x in lab.save("filter")))
    lab.delete_endpoint(third)
    lab.wait_down(third)  # which is said first: the rest follows
    eventually_now(lambda: third.interface not in "".join(lab.save("filter")))
    eventually_now(lambda: not lab.on_node("ip", "route", "show", "198.19.16.5/32"))
    lab.remove_pod(third)


def test_status_follows_the_link(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """A pod whose link goes down is reported as not complete, and again when it returns."""
    pod = pods[0]
    text = lab.status_file(pod).read_text()
    assert f'"ifaceName": "{pod.interface}"' in text
    lab.on_node("ip", "link", "set", pod.interface, "down")
    lab.wait_down(pod)
    lab.on_node("ip", "link", "set", pod.interface, "up")
    lab.wait_up(pod)
    assert pods[1].pings(pod.address)
    assert f"lladdr {pod.mac} PERMANENT" in lab.on_node("ip", "neigh", "show", pod.address)


def test_endpoint_before_its_link(lab: FelixLab) -> None:
    """An endpoint stored before its interface exists is complete soon after the link appears."""
    early = Pod("e", "", f"cali{lab.tag}e", "198.19.16.6", "02:00:c6:13:10:06")
    lab.put_endpoint(early)
    eventually_now(lambda: f"cali-tw-{early.interface}" in "".join(lab.save("filter")))
    assert not lab.status_file(early).exists()
    pod = lab.add_pod("e", "198.19.16.6")
    lab.wait_up(pod)
    lab.delete_endpoint(pod)
    lab.wait_down(pod)
    lab.remove_pod(pod)


def test_kill_and_restart_write_nothing_and_lose_nothing(
    lab: FelixLab, pods: tuple[Pod, Pod]
) -> None:
    """Felix killed and started again under a ping: no restore, counters go on, no packet lost."""
    first, second = pods

    def established() -> int:
        text = lab.on_node(f"iptables-{lab.backend}-save", "-c", "-t", "filter")
        line = next(
            line
            for line in text.splitlines()
            if f"-A cali-fw-{second.interface} " in line and "RELATED,ESTABLISHED" in line
        )
        return int(re.findall(r"\[(\d+):", line)[0])

    ping = subprocess.Popen(
        ["ip", "netns", "exec", first.namespace, "ping", "-i", "0.01", "-W", "1", second.address],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        eventually_now(lambda: established() > 20)
        lab.kill_felix()
        before = established()
        time_before = lab.status_file(second).stat().st_mtime_ns
        lab.start_felix()
        assert lab.metric("felix_iptables_restore_calls") == 0
        assert lab.metric("felix_ipset_lines_executed") == 0
        eventually_now(lambda: established() > before + 20)
        assert lab.status_file(second).stat().st_mtime_ns == time_before
    finally:
        ping.send_signal(2)
        out, _ = ping.communicate(timeout=10)
    sent, received = map(int, re.findall(r"(\d+) packets transmitted, (\d+) received", out)[0])
    assert sent - received <= 1, out  # the last request may be cut off by the end of ping
    assert " 0% packet loss" in out or sent - received == 1


def test_changes_made_while_felix_was_away(lab: FelixLab, pods: tuple[Pod, Pod]) -> None:
    """What went while felix was down is removed at its start, and nothing else."""
    gone, leftover = lab.add_pod("g", "198.19.16.8"), "cali-fw-cali00000000000"
    lab.put_endpoint(gone)
    lab.wait_up(gone)
    lab.kill_felix()
    lab.delete_endpoint(gone)
    tool = f"iptables-{lab.backend}"
    lab.on_node(tool, "-N", leftover)
    lab.on_node(tool, "-A", "FORWARD", "-j", leftover)
    lab.on_node("ipset", "create", "cali40stale", "hash:net")
    lab.on_node("ipset", "create", "theirs", "hash:net")
    lab.start_felix()
    filter_text = "".join(lab.save("filter"))
    assert gone.interface not in filter_text
    assert leftover not in filter_text
    assert not lab.status_file(gone).exists()
    started = time.monotonic()
    eventually_now(lambda: "cali40stale" not in lab.on_node("ipset", "list", "-n").split(), 10.0)
    assert "theirs" in lab.on_node("ipset", "list", "-n").split()
    eventually_now(lambda: not lab.on_node("ip", "route", "show", "198.19.16.8/32"), 20.0)
    assert time.monotonic() - started > 5, "a route nobody wants has ten seconds of grace"
    assert pods[0].pings(pods[1].address)
    lab.remove_pod(gone)


def test_sigterm_ends_cleanly_and_leaves_the_data_plane(
    lab: FelixLab, pods: tuple[Pod, Pod]
) -> None:
    """SIGTERM is exit code 0; pods go on talking."""
    assert lab.kill_felix(15) == 0  # type: ignore[arg-type]
    assert pods[0].pings(pods[1].address)
    lab.start_felix()
