"""GC and STATUS, and what cnid's socket withstands."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cymric.cli import cni_files
from cymric.cli.cni_files import Wanted
from tests.support.cni_node import Answer, CniNode, Pod, finished, node_with_etcd, output
from tests.support.eventually import eventually_now

pytestmark = [pytest.mark.root, pytest.mark.etcd]

DEBIAN = "/usr/lib/cni"
RUNTIME_KNOWS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")


@pytest.fixture
def node(tmp_path: Path) -> Iterator[CniNode]:
    with node_with_etcd(tmp_path) as made:
        made.start()
        yield made


def gc(node: CniNode, keep: list[Pod], **config: Any) -> Answer:
    """GC of the network, as a runtime that has only `keep`."""
    valid = [{"containerID": pod.container_id, "ifname": "eth0"} for pod in keep]
    return node.call_node("GC", **{"cni.dev/valid-attachments": valid, **config})


def pods(node: CniNode, count: int) -> list[Pod]:
    return [node.pod(f"{number:04x}beefbeef{number:04x}") for number in range(count)]


def test_gc_removes_what_is_not_listed(node: CniNode) -> None:
    """Attachments of the network that the runtime does not list go with link and address."""
    kept, *unused, other = pods(node, 5)
    for pod in (kept, *unused):
        assert node.call("ADD", pod).code == 0
    assert node.call("ADD", other, name="another").code == 0
    node.remove(unused[0])
    assert gc(node, [kept]).code == 0
    assert {e["spec"]["containerID"] for e in node.endpoints.values()} == {
        kept.container_id,
        other.container_id,
    }
    assert (node.held, len(node.handles), len(node.interfaces)) == (2, 2, 2)
    assert gc(node, [kept]).code == 0
    assert gc(node, [], name="another").code == 0
    assert gc(node, []).code == 0
    node.assert_nothing_left()


def test_gc_and_status_by_the_installed_list(node: CniNode) -> None:
    """A runtime that follows the installed list, at the highest version both know, reaches us."""
    tree = json.loads(cni_files.conflist(Wanted(name="cymric", socket=node.socket)))
    version = max(v for v in tree["cniVersions"] if v in RUNTIME_KNOWS)
    assert version == "1.1.0"
    config: dict[str, Any] = {**tree["plugins"][0], "name": tree["name"], "cniVersion": version}
    assert config.pop("socket") == str(node.socket)  # `call` adds it
    kept, unused = pods(node, 2)
    for pod in (kept, unused):
        assert node.call("ADD", pod, **config).code == 0
    assert gc(node, [kept], **config).code == 0
    assert [e["spec"]["containerID"] for e in node.endpoints.values()] == [kept.container_id]
    assert node.call_node("STATUS", **config).code in (0, 51)  # 51: there is no felix here
    assert gc(node, [], **config).code == 0
    node.assert_nothing_left()


def test_gc_leaves_other_nodes_alone(node: CniNode) -> None:
    """Endpoints and addresses of another node of the same network stay."""
    (pod,) = pods(node, 1)
    assert node.call("ADD", pod).code == 0
    moved = {}
    for key, tree in node.endpoints.items():
        tree["spec"]["node"] = "node-b"
        tree["metadata"]["name"] = tree["metadata"]["name"].replace("node--a", "node--b")
        moved[key.replace("node--a", "node--b")] = tree
        node.etcd.etcdctl("del", key)
    for key, tree in moved.items():
        node.put(key, tree)
    for key, block in node.keys("/calico/ipam/v2/assignment/").items():
        block["attributes"][0]["secondary"]["node"] = "node-b"
        node.put(key, block)
    assert gc(node, []).code == 0
    assert (len(node.endpoints), node.held) == (1, 1)


def test_gc_of_addresses_alone(node: CniNode) -> None:
    """Under another main plugin GC frees the addresses of containers that are not listed."""
    one, two = pods(node, 2)
    for pod in (one, two):
        answer = node.call("ADD", pod, plugin="cymric-cni-ipam", type="ptp")
        assert answer.code == 0
    valid = [{"containerID": one.container_id, "ifname": "eth0"}]
    config = {"cni.dev/valid-attachments": valid, "type": "ptp"}
    assert node.call_node("GC", plugin="cymric-cni-ipam", **config).code == 0
    assert list(node.handles) == [f"/calico/ipam/v2/handle/pod-network.{one.container_id}"]


def test_gc_gives_back_to_host_local(node: CniNode) -> None:
    """An unused attachment whose address another plugin gave is returned to that plugin."""
    data = node.directory / "host-local"
    ipam = {"type": "host-local", "subnet": "198.19.24.0/28", "dataDir": str(data)}
    one, two = pods(node, 2)
    for pod in (one, two):
        process = node.begin("ADD", pod, ipam=ipam, path=DEBIAN, cniVersion="1.0.0")
        assert finished(process).code == 0
    answer = gc(node, [one], ipam=ipam, path=DEBIAN)
    assert answer.code == 0, answer  # although Debian's host-local is older than GC
    assert [e["spec"]["containerID"] for e in node.endpoints.values()] == [one.container_id]
    assert len(list((data / "pod-network").glob("198.*"))) == 1
    assert list(node.journal.iterdir()) == []


def test_gc_without_a_list_is_refused(node: CniNode) -> None:
    """A runtime that does not say what is valid removes nothing."""
    (pod,) = pods(node, 1)
    node.call("ADD", pod)
    answer = node.call_node("GC")
    assert (answer.code, answer.tree["code"]) == (1, 7)
    assert len(node.endpoints) == 1
    assert node.call_node("GC", cniVersion="1.0.0").tree["code"] == 1


def test_status(tmp_path: Path) -> None:
    """STATUS is quiet when pods can be added, and says who is missing when they cannot."""
    with node_with_etcd(tmp_path, wait_s=5.0) as node:
        node.start()
        eventually_now(lambda: node.call_node("STATUS").tree.get("code") == 51)
        assert "felix" in node.call_node("STATUS").tree["msg"]
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(node.socket.with_name("felix.sock")))
        listener.listen()
        assert node.call_node("STATUS") == Answer(0, {})
        key = "/calico/resources/v3/projectcalico.org/clusterinformations/default"
        tree = node.keys(key)[key]
        tree["spec"]["datastoreReady"] = False
        node.put(key, tree)
        eventually_now(lambda: node.call_node("STATUS").tree.get("code") == 50)
        assert "locked" in node.call_node("STATUS").tree["msg"]
        node.etcd.kill()
        answer = node.call_node("STATUS")
        assert answer.tree["code"] == 50
        assert "datastore" in answer.tree["msg"]
        node.stop()
        assert node.call_node("STATUS").tree["code"] == 50
        listener.close()


def test_a_thousand_connections(node: CniNode) -> None:
    """A thousand clients that say nothing, or half of it, keep nobody from being served."""
    silent = []
    try:
        for number in range(1000):
            client = socket.socket(socket.AF_UNIX)
            client.settimeout(20)
            client.connect(str(node.socket))
            if number % 2:
                client.sendall(b"cymric-cni 2 main 20 20\nCNI_")
            silent.append(client)
        (pod,) = pods(node, 1)
        assert node.call("ADD", pod).code == 0
        answer = silent[1].recv(65536)  # they are told after a bounded time
        assert b"no request within" in answer
    finally:
        for client in silent:
            client.close()
    assert node.call("DEL", pod).code == 0
    node.assert_nothing_left()


def test_others_than_root_are_refused(node: CniNode) -> None:
    """Another user cannot connect; and with the mode changed, is refused by its credentials."""
    script = (
        "import os, socket; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
        f"s.connect({str(node.socket)!r});"
        "print(s.recv(9999).decode())"
    )
    for directory in node.socket.parents:
        if str(directory).startswith("/tmp/"):
            directory.chmod(0o755)
    refused = subprocess.run(["python3", "-c", script], capture_output=True, text=True, check=False)
    assert "PermissionError" in refused.stderr
    node.socket.chmod(0o666)
    assert "may not use this socket" in output("python3", "-c", script)


def test_clients_that_leave(node: CniNode) -> None:
    """An executable that is killed while it waits leaves nothing behind that DEL does not find."""
    several = pods(node, 8)
    processes = [node.begin("ADD", pod) for pod in several]
    for process in processes[::2]:
        process.kill()
    for process in processes:
        process.wait(30)
    for pod in several:
        assert node.call("DEL", pod).code == 0
    node.assert_nothing_left()
