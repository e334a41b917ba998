"""Translation of what leaves the pools, on a real kernel: every option, seen by the receiver."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.eventually import eventually_now
from tests.support.felix_lab import NODE, NODE_ADDRESS, POOL, WORLD_ADDRESS, FelixLab, Pod, run

pytestmark = [pytest.mark.root, pytest.mark.etcd]

POD_ADDRESS = "198.19.16.2"
SECOND_NODE_ADDRESS = "198.19.0.9"
EXCLUDED = "198.19.60.1"
SERVICES, SERVICE = "198.19.48.0/24", "198.19.48.9"
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FelixLab]:
    """A node whose default route leads to the world, which has more than one address."""
    made = FelixLab(tmp_path_factory.mktemp("felix-nat"), "nft")
    try:
        made.open()
        run("ip", "-n", made.world, "address", "add", f"{EXCLUDED}/32", "dev", "eth0")
        run("ip", "-n", made.world, "route", "add", SERVICES, "via", NODE_ADDRESS)
        run("ip", "-n", made.node, "address", "add", f"{SECOND_NODE_ADDRESS}/20", "dev", "up0")
        run("ip", "-n", made.node, "route", "add", "default", "via", WORLD_ADDRESS)
        made.put_pool("first", POOL, nat_outgoing=True)
        made.start_felix()
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def pod(lab: FelixLab) -> Pod:
    """A pod that is complete."""
    made = lab.add_pod("a", POD_ADDRESS)
    lab.put_endpoint(made)
    lab.wait_up(made)
    return made


def seen(lab: FelixLab, pod: Pod, words: str, receiving: str, *, patience_s: int = 10) -> list[str]:
    """The first packet of `words` that arrives in the world, as tcpdump tells; empty for none."""
    capture = subprocess.Popen(
        ["ip", "netns", "exec", lab.world, "timeout", str(patience_s), "tcpdump",
         "-nvlU", "-c", "1", "-i", "eth0", "--direction=in", receiving],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert capture.stderr is not None
        while "listening" not in capture.stderr.readline():
            pass
        pod.run("sh", "-c", words, check=False)
        out, _ = capture.communicate(timeout=20)
    finally:
        capture.kill()
        capture.wait()
    return [line for line in out.splitlines() if line.strip()]


def source_of(lab: FelixLab, pod: Pod, address: str = WORLD_ADDRESS) -> str:
    """The source that the world sees of an echo request to one of its addresses."""
    words = f"ping -c 1 -W 1 {address}"
    found = re.findall(
        r"(\S+) > ", "\n".join(seen(lab, pod, words, f"icmp[icmptype] == 8 and dst {address}"))
    )
    return found[0] if found else ""


def configure(lab: FelixLab, **spec: object) -> None:
    """The parameters of all nodes."""
    lab.put("FelixConfiguration", "felixconfigurations", "default", spec)


def becomes(lab: FelixLab, pod: Pod, source: str, address: str = WORLD_ADDRESS) -> None:
    """Wait until the world sees that source."""
    eventually_now(
        lambda: source_of(lab, pod, address) == source, PATIENCE_S, what=f"{address} sees {source}"
    )


def test_source_address_by_selector_and_by_node(lab: FelixLab, pod: Pod) -> None:
    """SNAT to the address given; the node's own object wins over one that selects it by label."""
    becomes(lab, pod, NODE_ADDRESS)
    lab.put("Node", "nodes", NODE, {}, labels={"rack": "a"})
    scoped = {"nodeSelector": "rack == 'a'", "natOutgoingAddress": SECOND_NODE_ADDRESS}
    lab.put("FelixConfiguration", "felixconfigurations", "rack-a", scoped)
    try:
        becomes(lab, pod, SECOND_NODE_ADDRESS)
        own = {"natOutgoingAddress": NODE_ADDRESS}
        lab.put("FelixConfiguration", "felixconfigurations", f"node.{NODE}", own)
        becomes(lab, pod, NODE_ADDRESS)
    finally:
        lab.delete("felixconfigurations", f"node.{NODE}")
        lab.delete("felixconfigurations", "rack-a")


def test_interface_filter(lab: FelixLab, pod: Pod) -> None:
    """Only what leaves by the interface is translated."""
    try:
        configure(lab, iptablesNATOutgoingInterfaceFilter="other+")
        becomes(lab, pod, POD_ADDRESS)
        configure(lab, iptablesNATOutgoingInterfaceFilter="up+")
        becomes(lab, pod, NODE_ADDRESS)
    finally:
        configure(lab)


def test_host_exclusion(lab: FelixLab, pod: Pod) -> None:
    """What goes to another node keeps its source, where that is asked for."""
    lab.put("Node", "nodes", "node2", {"bgp": {"ipv4Address": f"{WORLD_ADDRESS}/20"}})
    try:
        becomes(lab, pod, NODE_ADDRESS)
        configure(lab, natOutgoingExclusions="IPPoolsAndHostIPs")
        becomes(lab, pod, POD_ADDRESS)
        assert source_of(lab, pod, EXCLUDED) == NODE_ADDRESS
    finally:
        configure(lab)
        lab.delete("nodes", "node2")


def test_exclusion_by_annotation(lab: FelixLab, pod: Pod) -> None:
    """What the pool's annotation names sees the pod's address, everybody else the node's."""
    spec = {"cidr": POOL, "natOutgoing": True, "blockSize": 26}
    wish = {"cymric.io/nat-exclude": "198.19.60.0/24"}
    try:
        lab.put("IPPool", "ippools", "first", spec, annotations=wish)
        becomes(lab, pod, POD_ADDRESS, EXCLUDED)
        assert source_of(lab, pod) == NODE_ADDRESS
    finally:
        lab.put_pool("first", POOL, nat_outgoing=True)
    becomes(lab, pod, NODE_ADDRESS, EXCLUDED)


def test_port_range(lab: FelixLab, pod: Pod) -> None:
    """Source ports of translated connections are inside the range."""
    python = (
        'python3 -IS -c "import socket; s = socket.socket(type=socket.SOCK_DGRAM);'
        f" s.sendto(b'x', ('{WORLD_ADDRESS}', 7))\""
    )
    try:
        configure(lab, natPortRange="61000:61003")

        def is_inside() -> bool:
            lines = seen(lab, pod, python, f"udp and dst {WORLD_ADDRESS}")
            found = re.findall(r"(\d+\.\d+\.\d+\.\d+)\.(\d+) > ", "\n".join(lines))
            return (
                bool(found) and found[0][0] == NODE_ADDRESS and 61000 <= int(found[0][1]) <= 61003
            )

        eventually_now(is_inside, PATIENCE_S, what="ports are in the range")
    finally:
        configure(lab)


def test_packets_are_marked_where_they_leave(lab: FelixLab, pod: Pod) -> None:
    """DSCP of the endpoint, seen by the world; nothing else of the packet's TOS is touched."""
    words = f"ping -c 1 -W 1 {WORLD_ADDRESS}"

    def tos() -> str:
        text = "\n".join(seen(lab, pod, words, f"icmp[icmptype] == 8 and dst {WORLD_ADDRESS}"))
        found = re.search(r"tos (0x[0-9a-f]+)", text)
        return found[1] if found else ""

    assert tos() == "0x0"
    try:
        lab.put_endpoint(pod, qosControls={"dscp": "EF"})
        eventually_now(lambda: tos() == "0xb8", PATIENCE_S, what="packets carry EF")
    finally:
        lab.put_endpoint(pod)
    eventually_now(lambda: tos() == "0x0", PATIENCE_S, what="they carry nothing again")
    eventually_now(lambda: "dscp" not in lab.on_node("ipset", "list", "-n"), PATIENCE_S)


def test_no_loop_of_services_that_are_not_there(lab: FelixLab, pod: Pod) -> None:
    """What nobody takes ends here: dropped or rejected, and sent to the router only if told so."""
    lab.put(
        "BGPConfiguration",
        "bgpconfigurations",
        "default",
        {"serviceClusterIPs": [{"cidr": SERVICES}]},
    )

    def fate() -> str:
        arrived = seen(lab, pod, f"ping -c 1 -W 1 {SERVICE}", f"dst {SERVICE}", patience_s=2)
        if arrived:
            return "sent on"
        answer = pod.run("ping", "-c", "1", "-W", "1", SERVICE, check=False)
        return "rejected" if "Port Unreachable" in answer else "dropped"

    for action, expected in (("Disabled", "sent on"), ("Reject", "rejected"), ("Drop", "dropped")):
        configure(lab, serviceLoopPrevention=action)
        eventually_now(lambda e=expected: fate() == e, PATIENCE_S, what=expected)  # type: ignore[misc]
    lab.delete("bgpconfigurations", "default")
    configure(lab)
    eventually_now(lambda: fate() == "sent on", PATIENCE_S, what="it is no service any more")
