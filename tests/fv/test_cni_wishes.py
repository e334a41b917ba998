"""What a network or a container may ask for, on a real etcd and kernel: dual stack, MAC, pools."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cymric.kernel.namespace import opened, visiting
from cymric.model.keys import ResourceKey
from cymric.model.resources import IPPool, IPPoolSpec, ObjectMeta
from tests.support.cni_node import CniNode, Pod, node_with_etcd, output
from tests.support.eventually import eventually_now

pytestmark = [pytest.mark.root, pytest.mark.etcd]

ID = "aaaabbbbccccdddd"
HOST_END = "caliaaaabbbbccc"
V6_POOL = "fd00:198:19::/120"
BOTH = {"type": "cymric-cni-ipam", "assign_ipv4": "true", "assign_ipv6": "true"}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[CniNode]:
    with node_with_etcd(tmp_path) as made:
        for name, cidr in (("pods6", V6_POOL), ("special", "198.19.17.0/24")):
            spec = IPPoolSpec(cidr=cidr, block_size=122 if ":" in cidr else 26)
            pool = IPPool(metadata=ObjectMeta(name=name), spec=spec)
            made.put(ResourceKey("IPPool", name), pool)
        made.start()
        yield made


def addresses(tree: dict[str, Any]) -> list[str]:
    return [ip["address"].partition("/")[0] for ip in tree["ips"]]


def sysctl(name: str) -> str:
    return (Path("/proc/sys/net") / name).read_text().strip()


def test_dual_stack(node: CniNode) -> None:
    """A pod with both families has both addresses, gateways, routes, and reaches its node."""
    pod = node.pod(ID)
    answer = node.call("ADD", pod, ipam=BOTH)
    assert answer.code == 0, answer
    v4, v6 = addresses(answer.tree)
    assert (v4[:9], v6[:12]) == ("198.19.16", "fd00:198:19:")
    assert answer.tree["ips"][1]["address"].endswith("/128")
    (value,) = node.endpoints.values()
    assert value["spec"]["ipNetworks"] == [f"{v4}/32", f"{v6}/128"]
    routes = json.loads(pod.run("ip", "-j", "-6", "route"))
    gateways = [r.get("gateway") for r in routes if r["dst"] == "default"]
    assert gateways == ["fe80::ecee:eeff:feee:eeee"]
    told = json.loads(pod.run("ip", "-j", "addr", "show", "eth0"))[0]["addr_info"]
    ours = next(a for a in told if a["local"] == v6)
    assert "tentative" not in ours
    assert "dadfailed" not in ours
    for name in ("proxy_ndp", "forwarding"):
        assert sysctl(f"ipv6/conf/{HOST_END}/{name}") == "1"
    for name in ("accept_dad", "accept_ra", "disable_ipv6"):
        assert sysctl(f"ipv6/conf/{HOST_END}/{name}") == "0"
    output("ip", "-6", "route", "add", v6, "dev", HOST_END)
    output("ip", "-6", "addr", "add", "fd00:198:20::1/128", "dev", "lo")
    pod.run("ping", "-6", "-c", "1", "-W", "2", "fd00:198:20::1")  # at once: nothing is detected
    assert node.call("ADD", pod, ipam=BOTH) == answer
    assert node.call("CHECK", pod, ipam=BOTH, prevResult=answer.tree).code == 0
    assert node.call("DEL", pod, ipam=BOTH).code == 0
    node.assert_nothing_left()


def test_ipv6_alone(node: CniNode) -> None:
    """Without IPv4 a pod has no IPv4 address and no IPv4 route."""
    pod = node.pod(ID)
    ipam = {**BOTH, "assign_ipv4": "false"}
    answer = node.call("ADD", pod, ipam=ipam, cniVersion="0.4.0")
    assert answer.tree["ips"][0]["version"] == "6"
    assert json.loads(pod.run("ip", "-j", "-4", "route")) == []
    assert node.call("CHECK", pod, ipam=ipam, cniVersion="0.4.0", prevResult=answer.tree).code == 0
    assert node.call("DEL", pod, ipam=ipam).code == 0
    node.assert_nothing_left()


def test_one_family_short_gives_none(node: CniNode) -> None:
    """When one of two families cannot be had the call fails, and the other is not kept."""
    ipam = {**BOTH, "ipv6_pools": ["no-such-pool"]}
    answer = node.call("ADD", node.pod(ID), ipam=ipam)
    assert (answer.code, answer.tree["code"]) == (1, 100)
    node.assert_nothing_left()


@pytest.mark.parametrize("side", ["CNI_ARGS", "the runtime", "args", "args.cni"])
def test_annotations_from_every_side(node: CniNode, side: str) -> None:
    """Annotations choose pool and MAC, whichever way they come."""
    notes = {
        "cni.projectcalico.org/ipv4pools": '["special"]',
        "cni.projectcalico.org/hwAddr": "02:00:00:00:00:AA",
        "cni.projectcalico.org/allowedSourcePrefixes": '["198.19.30.0/24"]',
    }
    args, config = "", dict[str, Any]()
    match side:
        case "CNI_ARGS":
            args = ";".join(f"{name}={text}" for name, text in notes.items())
        case "the runtime":
            config["runtimeConfig"] = {"io.kubernetes.cri.pod-annotations": notes}
        case "args":
            config["conf_args"] = notes
        case _:
            lists = {"cni.projectcalico.org/ipv4pools": ["special"]}
            config["conf_args"] = {"cni": {**notes, **lists}}
    pod = node.pod(ID)
    answer = node.call("ADD", pod, args=args, **config)
    assert answer.address.startswith("198.19.17.")
    assert answer.tree["interfaces"][1]["mac"] == "02:00:00:00:00:aa"
    assert "02:00:00:00:00:aa" in pod.run("ip", "link", "show", "eth0")
    (value,) = node.endpoints.values()
    assert value["spec"]["mac"] == "02:00:00:00:00:aa"
    assert value["spec"]["allowSpoofedSourcePrefixes"] == ["198.19.30.0/24"]


def test_capabilities(node: CniNode) -> None:
    """The capabilities ips, mac and bandwidth are honoured; those of others do not disturb."""
    runtime = {
        "ips": ["198.19.16.77/24"],
        "mac": "02:00:00:00:00:bb",
        "bandwidth": {"ingressRate": 1000000, "ingressBurst": 2000, "egressRate": 3000000},
        "portMappings": [{"hostPort": 80, "containerPort": 80, "protocol": "tcp"}],
    }
    answer = node.call("ADD", node.pod(ID), runtimeConfig=runtime)
    assert (answer.address, answer.tree["interfaces"][1]["mac"]) == (
        "198.19.16.77",
        "02:00:00:00:00:bb",
    )
    (value,) = node.endpoints.values()
    assert value["spec"]["qosControls"] == {
        "ingressBandwidth": 1000000,
        "ingressBurst": 2000,
        "egressBandwidth": 3000000,
        "egressBurst": 1 << 32,
    }
    assert rates(node.pods[0]) == (125_000, 375_000)


def rates(pod: Pod) -> tuple[int, int]:
    """Bytes a second that the queues at both ends of a pod's pair let through; 0: all."""
    found = []
    for text in (
        output("tc", "-j", "qdisc", "show", "dev", HOST_END),
        pod.run("tc", "-j", "qdisc", "show", "dev", "eth0"),
    ):
        queues = json.loads(text)
        (rate,) = [q["options"]["rate"] if q["kind"] == "tbf" else 0 for q in queues]
        found.append(rate)
    return found[0], found[1]


def test_limits_by_annotations(node: CniNode) -> None:
    """Calico's annotations limit what goes in and out: on the endpoint, and on real packets."""
    notes = {
        "qos.projectcalico.org/ingressBandwidth": "400k",
        "qos.projectcalico.org/ingressBurst": "80k",
        "qos.projectcalico.org/ingressPacketRate": "100",
        "qos.projectcalico.org/egressMaxConnections": "7",
        "qos.projectcalico.org/dscp": "EF",
    }
    pod = node.pod(ID)
    config = {"runtimeConfig": {"io.kubernetes.cri.pod-annotations": notes}}
    answer = node.call("ADD", pod, **config)
    (value,) = node.endpoints.values()
    assert value["spec"]["qosControls"] == {
        "ingressBandwidth": 400_000,
        "ingressBurst": 80_000,
        "ingressPacketRate": 100,
        "ingressPacketBurst": 5,
        "egressMaxConnections": 7,
        "dscp": "EF",
    }
    assert rates(pod) == (50_000, 0)
    assert node.call("ADD", pod, **config) == answer
    assert rates(pod) == (50_000, 0)
    other = node.pod("ffffbbbbccccffff")
    unlimited = node.call("ADD", other)
    for made in (answer, unlimited):
        interface = made.tree["interfaces"][0]["name"]
        output("ip", "route", "add", made.address, "dev", interface)
    output("ip", "addr", "add", "198.19.0.2/32", "dev", "lo")
    assert 0 < arriving(pod, answer.address) < SENT / 2
    assert arriving(other, unlimited.address) == SENT
    for gone in (pod, other):
        assert node.call("DEL", gone).code == 0
    node.assert_nothing_left()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ingressBandwidth", "999"),
        ("ingressBandwidth", "fast"),
        ("ingressBurst", "1M"),
        ("egressPacketRate", "20k"),
        ("dscp", "64"),
    ],
)
def test_limits_that_cannot_be(node: CniNode, name: str, text: str) -> None:
    """A limit out of bounds, or without the one that it refines, is refused by name."""
    notes = {f"qos.projectcalico.org/{name}": text}
    answer = node.call("ADD", node.pod(ID), conf_args=notes)
    assert (answer.code, answer.tree["code"]) == (1, 7)
    node.assert_nothing_left()


def test_named_ports(node: CniNode) -> None:
    """Ports named by annotation stand on the endpoint, where policy finds them."""
    ports = [{"name": "http", "protocol": "TCP", "port": 80}]
    assert node.call("ADD", node.pod(ID), conf_args={"cymric.io/ports": ports}).code == 0
    (value,) = node.endpoints.values()
    assert value["spec"]["ports"] == [{**ports[0], "hostPort": 0, "hostIP": ""}]
    for wrong in ([{"name": "x", "protocol": "TCP"}], [{"protocol": "TCP", "port": 1}], "80"):
        answer = node.call("ADD", node.pods[0], conf_args={"cymric.io/ports": wrong})
        assert (answer.code, answer.tree["code"]) == (1, 7)


def test_queues_and_a_needed_mtu(node: CniNode) -> None:
    """Both ends of a pair have as many queues as configured; a node without MTU may be refused."""
    pod = node.pod(ID)
    assert node.call("ADD", pod, require_mtu_file=True).tree["code"] == 7
    assert node.call("ADD", pod, require_mtu_file=True, mtu=1400, num_queues=3).code == 0
    for text in (output("ip", "-j", "-d", "link", "show", HOST_END),
                 pod.run("ip", "-j", "-d", "link", "show", "eth0")):  # fmt: skip
        (link,) = json.loads(text)
        assert (link["num_tx_queues"], link["num_rx_queues"]) == (3, 3)


@pytest.mark.parametrize(
    "config",
    [
        {"datastore_type": "kubernetes"},
        {"readiness_gates": ["http://localhost:9099/readiness"]},
        {"ipam": {"type": "cymric-cni-ipam", "subnet": "198.19.16.0/24"}},
        {"num_queues": -1},
    ],
)
def test_what_nobody_acts_on_is_refused(node: CniNode, config: dict[str, Any]) -> None:
    """Fields that would change what a pod gets, and that nobody acts on, are refused at ADD."""
    answer = node.call("ADD", node.pod(ID), **config)
    assert (answer.code, answer.tree["code"]) == (1, 7)
    node.assert_nothing_left()


def test_fields_settled_elsewhere_are_named(node: CniNode) -> None:
    """What cnid's settings decide is passed over, and the log says so once for the network."""
    settled = {"etcd_endpoints": "http://x", "log_level": "debug", "datastore_type": "etcdv3"}
    pod = node.pod(ID)
    assert node.call("ADD", pod, **settled).code == 0
    assert node.call("ADD", pod, **settled).code == 0
    (line,) = [line for line in node.log.splitlines() if "fields without effect" in line]
    assert "etcd_endpoints" in line
    assert "log_level" in line
    assert "datastore_type" not in line


SENT = 400
DATAGRAM_BYTES = 1400


def arriving(pod: Pod, address: str) -> int:
    """How many datagrams of a burst of SENT come through to a pod's socket."""
    with opened(pod.path) as there, visiting(there):
        receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with receiver, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        receiver.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE: room for all
        receiver.bind((address, 5001))
        receiver.settimeout(1)
        for _ in range(SENT):
            sender.sendto(bytes(DATAGRAM_BYTES), (address, 5001))
        count = 0
        with suppress(TimeoutError):
            while receiver.recv(65536):
                count += 1
    return count


def test_addresses_past_ipam(node: CniNode) -> None:
    """IpAddrsNoIpam needs its feature, is in no book, and is announced where no pool covers it."""
    notes = {"conf_args": {"cni.projectcalico.org/ipAddrsNoIpam": '["198.19.40.5"]'}}
    pod = node.pod(ID)
    assert node.call("ADD", pod, **notes).tree["code"] == 7
    allowed = {"feature_control": {"ip_addrs_no_ipam": True}, **notes}
    answer = node.call("ADD", pod, **allowed)
    assert answer.address == "198.19.40.5"
    assert (node.held, node.handles) == (0, {})
    (value,) = node.endpoints.values()
    assert value["metadata"]["annotations"]["cymric.io/announce"] == "true"
    assert node.call("CHECK", pod, prevResult=answer.tree, **allowed).code == 0
    assert node.call("ADD", pod, **allowed) == answer
    assert node.call("DEL", pod, **allowed).code == 0
    node.assert_nothing_left()


def test_floating_addresses(node: CniNode) -> None:
    """FloatingIPs need their feature and become the endpoint's NAT entries."""
    notes = {"conf_args": {"cni.projectcalico.org/floatingIPs": '["198.19.17.9"]'}}
    pod = node.pod(ID)
    assert node.call("ADD", pod, **notes).tree["code"] == 7
    answer = node.call("ADD", pod, feature_control={"floating_ips": True}, **notes)
    (value,) = node.endpoints.values()
    assert value["spec"]["ipNATs"] == [{"internalIP": answer.address, "externalIP": "198.19.17.9"}]


def test_mtu_of_the_node(node: CniNode) -> None:
    """Without MTU in the configuration a pod has the one that the node's file names."""
    (node.directory / "state" / "mtu").write_text("1430\n")
    for config, mtu in (({}, 1430), ({"mtu": 1300}, 1300)):
        pod = node.pod(ID)
        answer = node.call("ADD", pod, cniVersion="1.1.0", **config)
        assert [one["mtu"] for one in answer.tree["interfaces"]] == [mtu, mtu]
        for command in (output, pod.run):
            name = HOST_END if command == output else "eth0"
            assert f"mtu {mtu} " in command("ip", "link", "show", name)
        assert node.call("DEL", pod).code == 0
        node.remove(pod)


@pytest.mark.parametrize("is_forwarding", [False, True])
def test_forwarding_inside(node: CniNode, is_forwarding: bool) -> None:
    """A container forwards only if the network allows it, in both families."""
    pod = node.pod(ID)
    pod.run("sysctl", "-qw", f"net.ipv4.ip_forward={int(not is_forwarding)}")
    settings = {"allow_ip_forwarding": is_forwarding}
    assert node.call("ADD", pod, ipam=BOTH, container_settings=settings).code == 0
    for name in ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"):
        assert pod.run("sysctl", "-n", name).strip() == str(int(is_forwarding)), name


def test_dual_stack_with_the_real_felix(tmp_path: Path) -> None:
    """With felix running, ADD returns when the pod can be reached over both families."""
    with node_with_etcd(tmp_path, wait_s=10.0) as node:
        spec = IPPoolSpec(cidr=V6_POOL, block_size=122)
        pool = IPPool(metadata=ObjectMeta(name="pods6"), spec=spec)
        node.put(ResourceKey("IPPool", "pods6"), pool)
        node.start()
        output("ip", "addr", "add", "198.19.0.2/32", "dev", "lo")
        output("ip", "-6", "addr", "add", "fd00:198:20::1/128", "dev", "lo")
        felix = node.run("felix")
        try:
            pod: Pod = node.pod(ID)
            answer = node.call("ADD", pod, ipam=BOTH)
            assert answer.code == 0, (answer, (node.directory / "felix.log").read_text()[-3000:])
            v4, v6 = addresses(answer.tree)
            output("ping", "-c", "1", "-W", "1", v4)
            output("ping", "-6", "-c", "1", "-W", "1", v6)
            assert node.call("DEL", pod, ipam=BOTH).code == 0
            eventually_now(lambda: not list(node.status_dir.iterdir()))
        finally:
            felix.terminate()
            felix.wait(10)
