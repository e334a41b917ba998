"""The CNI executables and cnid, as a container runtime sees them, on a real etcd and kernel."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cymric.kernel.namespace import opened, visiting
from tests.support.cni_node import CniNode, finished, node_with_etcd, output
from tests.support.eventually import eventually_now

pytestmark = [pytest.mark.root, pytest.mark.etcd]

KUBERNETES = "IgnoreUnknown=1;K8S_POD_NAMESPACE=prod;K8S_POD_NAME=web-1"
WEB_1 = "cali91bef8fbcc9"  # from SHA-1 of prod.web-1


@pytest.fixture
def node(tmp_path: Path) -> Iterator[CniNode]:
    with node_with_etcd(tmp_path) as made:
        made.start()
        yield made


@pytest.mark.parametrize(
    ("version", "family"),
    [("0.3.1", {"version": "4"}), ("0.4.0", {"version": "4"}), ("1.0.0", {}), ("1.1.0", {})],
)
def test_add_result_of_each_version(node: CniNode, version: str, family: dict[str, str]) -> None:
    """ADD answers in the shape of the version that was asked for."""
    pod = node.pod("aaaabbbbccccdddd")
    answer = node.call("ADD", pod, cniVersion=version)
    assert answer.code == 0, answer
    mac = json.loads(pod.run("ip", "-j", "link", "show", "eth0"))[0]["address"]
    mtu = {"mtu": 1500} if version == "1.1.0" else {}
    assert answer.tree == {
        "cniVersion": version,
        "interfaces": [
            {"name": "caliaaaabbbbccc", **mtu},
            {"name": "eth0", "mac": mac, **mtu, "sandbox": str(pod.path)},
        ],
        "ips": [{**family, "address": f"{answer.address}/32", "interface": 1}],
        "routes": [{"dst": f"{answer.address}/32"}],
        "dns": {},
    }


def test_add_wires_as_calico_does(node: CniNode) -> None:
    """The pair has Calico's MAC, sysctls, routes and address, and the MTU asked for."""
    pod = node.pod("aaaabbbbccccdddd")
    answer = node.call("ADD", pod, mtu=1400)
    (ours,) = json.loads(output("ip", "-j", "link", "show", "caliaaaabbbbccc"))
    assert (ours["address"], ours["mtu"]) == ("ee:ee:ee:ee:ee:ee", 1400)
    assert "UP" in ours["flags"]
    for name, value in (
        ("ipv4/conf/{}/proxy_arp", "1"),
        ("ipv4/conf/{}/forwarding", "1"),
        ("ipv4/conf/{}/route_localnet", "1"),
        ("ipv4/neigh/{}/proxy_delay", "0"),
    ):
        path = Path("/proc/sys/net") / name.format("caliaaaabbbbccc")
        assert path.read_text().strip() == value, path
    (theirs,) = json.loads(pod.run("ip", "-j", "addr", "show", "eth0"))
    assert theirs["mtu"] == 1400
    inet = [(a["local"], a["prefixlen"]) for a in theirs["addr_info"] if a["family"] == "inet"]
    assert inet == [(answer.address, 32)]
    routes = [(r["dst"], r.get("gateway")) for r in json.loads(pod.run("ip", "-j", "route"))]
    assert routes == [("default", "169.254.1.1"), ("169.254.1.1", None)]
    assert output("ip", "route") == ""  # the node's routes are felix' business


def test_pod_reaches_its_node(node: CniNode) -> None:
    """With felix' route in place the node answers ARP for the gateway, and packets pass."""
    pod = node.pod("aaaabbbbccccdddd")
    answer = node.call("ADD", pod)
    output("ip", "route", "add", answer.address, "dev", "caliaaaabbbbccc")
    output("ip", "addr", "add", "198.19.0.2/32", "dev", "lo")
    pod.run("ping", "-c", "1", "-W", "2", "198.19.0.2")


def test_endpoint_of_a_pod(node: CniNode) -> None:
    """A Kubernetes pod's endpoint has Calico's names, labels and profiles; its address theirs."""
    pod = node.pod("aaaabbbbccccdddd")
    answer = node.call("ADD", pod, args=KUBERNETES, policy={"type": "k8s"})
    assert answer.tree["interfaces"][0]["name"] == WEB_1
    (endpoint,) = node.endpoints.items()
    key, value = endpoint
    base = "/calico/resources/v3/projectcalico.org/workloadendpoints/prod/"
    assert key == base + "node--a-k8s-web--1-eth0"
    assert value["metadata"]["labels"] == {
        "projectcalico.org/namespace": "prod",
        "projectcalico.org/orchestrator": "k8s",
    }
    spec = value["spec"]
    assert spec["ipNetworks"] == [f"{answer.address}/32"]
    assert spec["profiles"] == ["kns.prod"]
    assert (spec["containerID"], spec["pod"]) == ("aaaabbbbccccdddd", "web-1")
    assert (spec["interfaceName"], spec["mac"]) == (WEB_1, answer.tree["interfaces"][1]["mac"])
    assert list(node.handles) == ["/calico/ipam/v2/handle/pod-network.aaaabbbbccccdddd"]
    (block,) = node.keys("/calico/ipam/v2/assignment/").values()
    secondary = block["attributes"][0]["secondary"]
    assert {name: secondary[name] for name in ("namespace", "node", "pod")} == {
        "namespace": "prod",
        "node": "node-a",
        "pod": "web-1",
    }
    assert secondary["timestamp"].endswith(" +0000 UTC")


def test_generic_endpoint_is_open(node: CniNode) -> None:
    """Without Kubernetes an endpoint gets the built-in profile that allows everything."""
    node.call("ADD", node.pod("aaaabbbbccccdddd"), labels={"app": "web"})
    (value,) = node.endpoints.values()
    assert value["spec"]["profiles"] == ["projectcalico-default-allow"]
    assert value["metadata"]["labels"]["app"] == "web"
    assert value["metadata"]["namespace"] == "default"


def test_del_removes_everything_and_twice_is_fine(node: CniNode) -> None:
    """DEL leaves nothing; again, for an unknown container, without namespace: still fine."""
    pod = node.pod("aaaabbbbccccdddd")
    node.call("ADD", pod)
    for netns in (None, None, "", "/run/netns/no-such"):
        assert node.call("DEL", pod, netns=netns).code == 0
        node.assert_nothing_left()


def test_del_after_the_namespace_is_gone(node: CniNode) -> None:
    """A container that vanished with its namespace is cleaned up from what is stored."""
    pod = node.pod("aaaabbbbccccdddd")
    node.call("ADD", pod)
    node.remove(pod)
    assert node.call("DEL", pod).code == 0
    node.assert_nothing_left()


def test_add_again_gives_the_same_result(node: CniNode) -> None:
    """A repeated ADD of a sound attachment changes nothing and answers the same."""
    pod = node.pod("aaaabbbbccccdddd")
    first = node.call("ADD", pod)
    stored = node.endpoints
    assert node.call("ADD", pod) == first
    assert node.endpoints == stored
    assert node.held == 1


def test_add_again_mends_a_broken_attachment(node: CniNode) -> None:
    """A repeated ADD after the pair was lost wires anew, with the same address."""
    pod = node.pod("aaaabbbbccccdddd")
    first = node.call("ADD", pod)
    output("ip", "link", "del", "caliaaaabbbbccc")
    second = node.call("ADD", pod)
    assert (second.code, second.address) == (0, first.address)
    assert node.call("CHECK", pod, prevResult=second.tree).code == 0
    assert node.held == 1


def test_new_container_of_the_same_pod(node: CniNode) -> None:
    """A pod's new container takes the endpoint over; the old one's DEL does not touch it."""
    old, new = node.pod("aaaabbbbccccdddd"), node.pod("1111222233334444")
    node.call("ADD", old, args=KUBERNETES)
    (before,) = node.endpoints.values()
    second = node.call("ADD", new, args=KUBERNETES)
    assert second.code == 0
    (after,) = node.endpoints.values()
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["spec"]["containerID"] == new.container_id
    assert node.call("DEL", old, args=KUBERNETES).code == 0
    assert node.call("CHECK", new, args=KUBERNETES, prevResult=second.tree).code == 0
    assert node.held == 1
    assert node.call("DEL", new, args=KUBERNETES).code == 0
    node.assert_nothing_left()


def test_two_interfaces_of_one_container(node: CniNode) -> None:
    """Removing one interface of a container leaves the other's address alone."""
    pod = node.pod("aaaabbbbccccdddd")
    first = node.call("ADD", pod, args=KUBERNETES)
    taken = node.call("ADD", pod, interface="net1", args=KUBERNETES)
    assert taken.code == 1  # the host interface is named after the pod alone, as Calico's is
    assert "belongs to another endpoint" in taken.tree["msg"]
    assert node.call("CHECK", pod, args=KUBERNETES, prevResult=first.tree).code == 0
    assert node.held == 1


def test_alike_container_ids_are_kept_apart(node: CniNode) -> None:
    """Ids that share their first eleven characters never take each other's interface."""
    one, other = node.pod("container-0001"), node.pod("container-0002")
    first = node.call("ADD", one)
    refused = node.call("ADD", other)
    assert (refused.code, refused.tree["code"]) == (1, 101)
    assert "calicontainer-0" in refused.tree["msg"]
    assert node.call("DEL", other).code == 0
    assert node.call("CHECK", one, prevResult=first.tree).code == 0
    assert node.held == 1


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        ("ip netns exec {ns} ip addr flush dev eth0", "does not have address"),
        ("ip netns exec {ns} ip route del default", "no route to 0.0.0.0/0"),
        ("ip netns exec {ns} ip link set eth0 down", "is down"),
        ("ip link del caliaaaabbbbccc", "is missing"),
    ],
)
def test_check_names_what_is_wrong(node: CniNode, damage: str, text: str) -> None:
    """CHECK is quiet about a sound attachment and says what is not as ADD made it."""
    pod = node.pod("aaaabbbbccccdddd")
    made = node.call("ADD", pod).tree
    assert node.call("CHECK", pod, prevResult=made).code == 0
    output(*damage.format(ns=pod.namespace).split())
    answer = node.call("CHECK", pod, prevResult=made)
    assert (answer.code, answer.tree["code"]) == (1, 103)
    assert text in answer.tree["details"]


def test_explicit_address_and_pools(node: CniNode) -> None:
    """An address asked for by name is given, a taken one refused; an unknown pool is an error."""
    one, two = node.pod("aaaabbbbccccdddd"), node.pod("1111222233334444")
    assert node.call("ADD", one, args="IP=198.19.16.77").address == "198.19.16.77"
    refused = node.call("ADD", two, args="IP=198.19.16.77")
    assert (refused.code, refused.tree["code"]) == (1, 100)
    assert "already assigned" in refused.tree["details"]
    ipam = {"type": "cymric-cni-ipam", "ipv4_pools": ["elsewhere"]}
    assert "elsewhere does not exist" in node.call("ADD", two, ipam=ipam).tree["details"]
    assert node.held == 1
    assert node.interfaces == {"caliaaaabbbbccc"}


BAD_CALLS: list[tuple[dict[str, Any], int, str]] = [
    ({"cniVersion": "0.1.0"}, 1, "supported are"),
    ({"name": "a b"}, 7, "network name"),
    ({"name": None}, 7, "name"),
    ({"mtu": -1}, 7, "mtu"),
    ({"ipam": {"type": "no-such"}}, 100, "no such executable"),
    ({"ipam": {"type": "../sh"}}, 7, "no plugin's name"),
    ({"ipam": {}}, 7, "no plugin's name"),
    ({"ipam": {"type": "calico-ipam", "assign_ipv4": "false"}}, 7, "neither"),
    ({"runtimeConfig": {"mac": "01:00:5e:00:00:01"}}, 7, "no MAC"),
    ({"args": "IP=10.0.0.300"}, 4, "IP in CNI_ARGS"),
    ({"args": "nonsense"}, 4, "NAME=VALUE"),
    ({"interface": "much-too-long-a-name"}, 4, "CNI_IFNAME"),
    ({"netns": "/etc/hostname"}, 4, "is no network namespace"),
    ({"netns": "/proc/self/ns/net"}, 4, "node's own namespace"),
    ({"netns": "/run/netns/no-such"}, 4, "No such file"),
]


def test_bad_calls_are_refused_by_their_codes(node: CniNode) -> None:
    """What is wrong with a call is named, with the specification's code, and nothing is left."""
    pod = node.pod("aaaabbbbccccdddd")
    for options, code, text in BAD_CALLS:
        answer = node.call("ADD", pod, **options)
        said = f"{answer.tree.get('msg')} {answer.tree.get('details', '')}"
        assert (answer.code, answer.tree.get("code")) == (1, code), (options, answer)
        assert text in said, (options, said)
    node.assert_nothing_left()


def test_interface_taken_in_the_container(node: CniNode) -> None:
    """When eth0 exists already the kernel's refusal is named and everything is undone."""
    pod = node.pod("aaaabbbbccccdddd")
    pod.run("ip", "link", "add", "eth0", "type", "bridge")
    answer = node.call("ADD", pod)
    assert (answer.code, answer.tree["code"]) == (1, 101)
    assert "create veth caliaaaabbbbccc with peer eth0" in answer.tree["details"]
    assert "exists" in answer.tree["details"]
    node.assert_nothing_left()
    pod.run("ip", "link", "show", "eth0")


def test_locked_datastore(node: CniNode) -> None:
    """While the datastore is locked ADD asks to try again later; DEL still works."""
    pod = node.pod("aaaabbbbccccdddd")
    node.call("ADD", pod)
    key = "/calico/resources/v3/projectcalico.org/clusterinformations/default"
    tree = node.keys(key)[key]
    tree["spec"]["datastoreReady"] = False
    node.put(key, tree)
    said = "cnid knows of the lock"
    eventually_now(lambda: node.call_node("STATUS").tree.get("code") == 50, 15, what=said)
    answer = node.call("ADD", node.pod("1111222233334444"))
    assert (answer.code, answer.tree["code"]) == (1, 11)
    assert "locked" in answer.tree["msg"]
    assert node.call("DEL", pod).code == 0
    node.assert_nothing_left()


def test_twenty_at_once(node: CniNode) -> None:
    """Twenty calls at the same moment all succeed, with addresses of one block."""
    pods = [node.pod(f"{number:04x}{'cafe' * 3}{number:04x}") for number in range(20)]
    answers = [finished(process) for process in [node.begin("ADD", pod) for pod in pods]]
    assert [answer.code for answer in answers] == [0] * 20
    assert len({answer.address for answer in answers}) == 20
    assert len(node.keys("/calico/ipam/v2/assignment/")) == 1
    gone = [finished(process) for process in [node.begin("DEL", pod) for pod in pods]]
    assert [answer.code for answer in gone] == [0] * 20
    node.assert_nothing_left()


def test_ipam_alone_under_ptp(node: CniNode) -> None:
    """Debian's ptp gets its address from us, reaches its node through it, and gives it back."""
    pod = node.pod("aaaabbbbccccdddd")
    config = json.dumps(
        {
            "cniVersion": "1.0.0",
            "name": "ptp-network",
            "type": "ptp",
            "ipam": {"type": "cymric-cni-ipam", "socket": str(node.socket)},
        }
    )
    environment = {
        "CNI_CONTAINERID": pod.container_id,
        "CNI_IFNAME": "eth0",
        "CNI_NETNS": str(pod.path),
        "CNI_PATH": f"{node.directory / 'bin'}:/usr/lib/cni",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    }

    def ptp(command: str) -> dict[str, Any]:
        done = subprocess.run(
            ["/usr/lib/cni/ptp"],
            env={**environment, "CNI_COMMAND": command},
            input=config,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        tree: dict[str, Any] = json.loads(done.stdout or "{}")
        return tree

    made = ptp("ADD")
    assert made["ips"][0]["address"].startswith("198.19.16.")
    assert node.held == 1
    pod.run("ping", "-c", "1", "-W", "2", "169.254.1.1")
    ptp("DEL")
    assert (node.held, node.handles) == (0, {})


def test_socket_is_for_root_and_survives_garbage(node: CniNode) -> None:
    """The socket's mode is 0600; whatever is sent gets an error, and the next call is served."""
    assert node.socket.stat().st_mode & 0o777 == 0o600
    for garbage in (
        b"garbage\n",
        b"cymric-cni 1 main 0 0\n",
        b"cymric-cni 2 main x 0\n",
        b"cymric-cni 2 main 0 99999999999\n",
        b"cymric-cni 2 main 0 10\nhalf",
        b"cymric-cni 2 other 0 2\n{}",
        b"cymric-cni 2 main 4 2\n\xff\xfe\0\0{}",
        b"x" * (1 << 21) + b"\n",
        b"no newline",
    ):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(node.socket))
            try:
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                continue  # refused before all of it was read
            answer = b"".join(iter(lambda c=connection: c.recv(65536), b""))  # type: ignore[misc]
            status, _, body = answer.partition(b"\n")
            assert status == b"cymric-cni 2 1"
            assert json.loads(body)["code"] == 6
    assert node.call("ADD", node.pod("aaaabbbbccccdddd")).code == 0


def test_without_cnid(node: CniNode) -> None:
    """Without cnid VERSION works, and everything else asks to try again later."""
    node.stop()
    pod = node.pod("aaaabbbbccccdddd")
    versions = node.call("VERSION", pod)
    assert versions.tree["supportedVersions"] == ["0.3.1", "0.4.0", "1.0.0", "1.1.0"]
    for command in ("ADD", "DEL", "CHECK"):
        answer = node.call(command, pod, cniVersion="0.4.0")
        assert (answer.code, answer.tree["code"]) == (1, 11)
        assert answer.tree["cniVersion"] == "0.4.0"
        assert str(node.socket) in answer.tree["msg"]
    assert node.call("STATUS", pod, cniVersion="1.1.0").tree["code"] == 50
    assert node.call("NONSENSE", pod).tree["code"] == 4


def test_calls_stay_in_their_namespaces(node: CniNode) -> None:
    """After many visits to pods' namespaces cnid still works in its own."""
    for number in range(3):
        assert node.call("ADD", node.pod(f"{number:04x}{'cafe' * 3}{number:04x}")).code == 0
    assert node.process is not None
    with opened(f"/proc/{node.process.pid}/ns/net") as cnid, visiting(cnid):
        assert len(node.interfaces) == 3
    eventually_now(lambda: "started" in node.log)
