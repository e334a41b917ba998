"""cymric-cni together with other plugins: after it, before it, and as its source of addresses."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.cni_chain import Chain, Refused
from tests.support.cni_node import CniNode, Pod, node_with_etcd, output
from tests.support.eventually import eventually_now

pytestmark = [pytest.mark.root, pytest.mark.etcd]

CYMRIC = {"type": "cymric-cni"}
ID = "aaaabbbbccccdddd"
SERVER = """
import socket
listener = socket.create_server(("", 8000))
while True:
    connection, _ = listener.accept()
    connection.sendall(b"hello")
    connection.close()
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[CniNode]:
    with node_with_etcd(tmp_path) as made:
        made.start()
        yield made


def host_local(node: CniNode, **more: Any) -> dict[str, Any]:
    data = str(node.directory / "host-local")
    return {"type": "host-local", "subnet": "198.19.24.0/28", "dataDir": data, **more}


def leases(node: CniNode) -> set[str]:
    directory = node.directory / "host-local" / "pod-network"
    return {path.name for path in directory.glob("198.*")} if directory.exists() else set()


@contextmanager
def serving(pod: Pod) -> Iterator[None]:
    """The pod answers on its port 8000."""
    command = ["ip", "netns", "exec", pod.namespace, "python3", "-c", SERVER]
    process = subprocess.Popen(command)
    try:
        eventually_now(lambda: "8000" in pod.run("ss", "-Hltn"), what="the pod listens")
        yield
    finally:
        process.kill()
        process.wait()


def test_portmap_bandwidth_and_tuning_after_us(node: CniNode) -> None:
    """Debian's plugins work on what we made: a host port, a limit, sysctls; and all of it goes."""
    ports = [{"hostPort": 8080, "containerPort": 8000, "protocol": "tcp"}]
    rates = {"ingressRate": 8000000, "ingressBurst": 800000}
    chain = Chain(
        node,
        [
            {**CYMRIC, "runtimeConfig": {"portMappings": ports}},
            {"type": "portmap", "snat": True, "runtimeConfig": {"portMappings": ports}},
            {"type": "bandwidth", "runtimeConfig": {"bandwidth": rates}},
            {"type": "tuning", "sysctl": {"net.ipv4.conf.eth0.arp_filter": "1"}, "mtu": 1400},
        ],
    )
    pod = node.pod(ID)
    made = chain.add(pod)
    address = made["ips"][0]["address"].partition("/")[0]
    output("ip", "route", "add", address, "dev", "caliaaaabbbbccc")
    output("ip", "addr", "add", "198.19.0.2/32", "dev", "lo")
    with serving(pod):
        script = "import socket; print(socket.create_connection(('198.19.0.2', 8080), 5).recv(9))"
        assert "hello" in output("python3", "-c", script)
    assert "tbf" in output("tc", "qdisc", "show", "dev", "caliaaaabbbbccc")
    assert pod.run("sysctl", "-n", "net.ipv4.conf.eth0.arp_filter").strip() == "1"
    # Debian's portmap looks for an IPv6 chain that it does not make for a pod without IPv6.
    chain.check(pod, made, but="portmap")
    chain.delete(pod, made)
    assert node.interfaces == set()
    assert "8080" not in output("iptables-save", "-t", "nat")
    node.assert_nothing_left()


def test_after_a_plugin_that_made_the_interface(node: CniNode) -> None:
    """Behind ptp, which made eth0, cymric-cni refuses by name and leaves nothing of its own."""
    chain = Chain(node, [{"type": "ptp", "ipam": host_local(node)}, CYMRIC])
    pod = node.pod(ID)
    with pytest.raises(Refused) as caught:
        chain.add(pod)
    assert (caught.value.plugin, caught.value.tree["code"]) == ("cymric-cni", 7)
    assert "eth0" in caught.value.tree["msg"]
    assert node.endpoints == {}
    assert node.held == 0
    chain.delete(pod, None)


def test_results_before_ours_are_kept(node: CniNode) -> None:
    """What a plugin before us made stays in the result, ours comes after it, with right indices."""
    before = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "other0"}, {"name": "net9", "sandbox": "/run/netns/elsewhere"}],
        "ips": [{"address": "198.19.25.1/24", "interface": 1}],
        "routes": [{"dst": "198.19.26.0/24"}],
        "dns": {"nameservers": ["198.19.25.53"]},
    }
    pod = node.pod(ID)
    made = node.call("ADD", pod, prevResult=before).tree
    assert made["interfaces"][:2] == before["interfaces"]
    assert [one["name"] for one in made["interfaces"][2:]] == ["caliaaaabbbbccc", "eth0"]
    assert made["ips"][0] == before["ips"][0]  # type: ignore[index]
    assert made["ips"][1]["interface"] == 3
    assert made["dns"] == before["dns"]
    assert {"dst": "198.19.26.0/24"} in made["routes"]
    assert node.call("CHECK", pod, prevResult=made).code == 0


def test_addresses_from_host_local(node: CniNode) -> None:
    """host-local gives the address; endpoint, pod and result have it as /32, and DEL returns it."""
    chain = Chain(node, [{**CYMRIC, "ipam": host_local(node)}])
    pod = node.pod(ID)
    made = chain.add(pod)
    assert made["ips"][0]["address"].startswith("198.19.24.")
    assert made["ips"][0]["address"].endswith("/32")
    address = made["ips"][0]["address"].partition("/")[0]
    (value,) = node.endpoints.values()
    assert value["spec"]["ipNetworks"] == [f"{address}/32"]
    assert value["metadata"]["annotations"]["cymric.io/announce"] == "true"
    assert leases(node) == {address}
    assert node.handles == {}
    assert f"inet {address}/32" in pod.run("ip", "addr", "show", "eth0")
    assert chain.add(pod) == made
    chain.check(pod, made)
    chain.delete(pod, made)
    chain.delete(pod, made)
    assert leases(node) == set()
    node.assert_nothing_left()


def test_routes_of_host_local(node: CniNode) -> None:
    """Routes configured for host-local replace the pod's default route, or stand beside it."""
    ipam = host_local(node, routes=[{"dst": "198.19.32.0/20"}])
    for more, expected in (
        ({}, ["169.254.1.1", "198.19.32.0/20"]),
        ({"include_default_routes": True}, ["169.254.1.1", "198.19.32.0/20", "default"]),
    ):
        chain = Chain(node, [{**CYMRIC, "ipam": ipam, **more}])
        pod = node.pod(ID)
        made = chain.add(pod)
        assert sorted(r["dst"] for r in json.loads(pod.run("ip", "-j", "route"))) == expected
        chain.check(pod, made)
        chain.delete(pod, made)
        node.remove(pod)


def test_exhausted_host_local_says_so(node: CniNode) -> None:
    """A delegated plugin's refusal reaches the runtime by name, and nothing is left."""
    ipam = host_local(node, rangeStart="198.19.24.2", rangeEnd="198.19.24.2")
    chain = Chain(node, [{**CYMRIC, "ipam": ipam}])
    chain.add(node.pod("1111222233334444"))
    pod = node.pod(ID)
    with pytest.raises(Refused) as caught:
        chain.add(pod)
    assert "ipam plugin host-local" in caught.value.tree["msg"]
    assert node.interfaces == {"cali11112222333"}
    assert len(node.endpoints) == 1
    assert list(node.journal.iterdir()) == []


def test_host_local_and_a_killed_cnid(tmp_path: Path) -> None:
    """An address from host-local that a killed cnid had taken is given back by the next one."""
    with node_with_etcd(tmp_path, wait_s=30.0) as node:
        node.start()
        process = node.begin("ADD", node.pod(ID), ipam=host_local(node), path="/usr/lib/cni")
        eventually_now(lambda: node.endpoints)
        assert len(leases(node)) == 1
        node.stop(kill=True)
        process.communicate(timeout=30)
        node.start()
        eventually_now(lambda: not leases(node), 20)
        eventually_now(lambda: not list(node.journal.iterdir()))
        node.assert_nothing_left()
