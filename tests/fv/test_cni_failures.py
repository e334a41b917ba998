"""What happens when something around a CNI call fails: nothing is left, and the error says why."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.cni_node import CniNode, Pod, finished, node_with_etcd, output
from tests.support.eventually import eventually_now

pytestmark = [pytest.mark.root, pytest.mark.etcd]

ID = "aaaabbbbccccdddd"
STATUS_FILE = f"cni default%2F{ID} eth0"
StartNode = Callable[[float], CniNode]


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[StartNode]:
    """Start a node whose cnid waits so many seconds for felix."""
    with ExitStack() as stack:

        def start(wait_s: float) -> CniNode:
            node = stack.enter_context(node_with_etcd(tmp_path, wait_s=wait_s))
            node.start()
            return node

        yield start


def seconds_of(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def tell(node: CniNode, pod: Pod, **wrong: object) -> None:
    """Write the status file as felix would for what the pod has now."""
    (theirs,) = json.loads(pod.run("ip", "-j", "addr", "show", "eth0"))
    address = next(a["local"] for a in theirs["addr_info"] if a["family"] == "inet")
    content = {"ifaceName": "cali", "mac": theirs["address"], "ipv4Nets": [f"{address}/32"]}
    beside = node.status_dir / ".new"
    beside.write_text(json.dumps({**content, **wrong}))
    beside.rename(node.status_dir / STATUS_FILE)


def test_add_while_etcd_is_down(start_node: StartNode) -> None:
    """Without etcd ADD ends soon with "try again later", leaves nothing, and works afterwards."""
    node = start_node(0)
    pod = node.pod(ID)
    node.etcd.kill()
    began = time.monotonic()
    answer = node.call("ADD", pod)
    assert time.monotonic() - began < 20
    assert (answer.code, answer.tree["code"]) == (1, 11)
    assert "datastore" in answer.tree["msg"]
    assert node.interfaces == set()
    node.etcd.start()
    assert node.call("ADD", pod).code == 0
    assert node.call("DEL", pod).code == 0
    node.assert_nothing_left()


def test_del_while_etcd_is_down(start_node: StartNode) -> None:
    """Without etcd DEL takes the link, promises the rest on disk, and cnid keeps the promise."""
    node = start_node(0)
    gone, pod, also = (node.pod(f"{n}1112222333344{n}4") for n in range(3))
    for one in (gone, pod, also):
        assert node.call("ADD", one).code == 0
    node.etcd.kill()
    assert node.call("DEL", pod).code == 0
    assert node.call("DEL", pod).code == 0
    node.remove(gone)
    assert node.call("DEL", gone).code == 0
    assert node.interfaces == {"cali21112222333"}
    node.stop(kill=True)  # the promise is not in memory
    assert len(list(node.journal.iterdir())) == 2
    node.start()
    assert node.call("DEL", also).code == 0  # by a process that has never seen etcd
    node.etcd.start()
    eventually_now(lambda: not list(node.journal.iterdir()), 20)
    node.assert_nothing_left()


def test_add_first_keeps_the_promise_of_a_del(start_node: StartNode) -> None:
    """An ADD for a container whose DEL is owed carries that out before anything else."""
    node = start_node(0)
    pod = node.pod(ID)
    first = node.call("ADD", pod)
    node.etcd.kill()
    assert node.call("DEL", pod).code == 0
    node.stop(kill=True)
    node.etcd.start()
    node.start()
    second = node.call("ADD", pod)
    assert (first.code, second.code) == (0, 0)
    assert (node.held, len(node.endpoints), len(node.interfaces)) == (1, 1, 1)
    assert node.call("CHECK", pod, prevResult=second.tree).code == 0
    assert list(node.journal.iterdir()) == []


def test_add_waits_for_felix(start_node: StartNode) -> None:
    """ADD answers as soon as felix says that the endpoint is programmed, and not before."""
    node = start_node(30)
    pod = node.pod(ID)
    process = node.begin("ADD", pod)
    eventually_now(lambda: node.endpoints)
    assert process.poll() is None
    tell(node, pod)
    assert seconds_of(lambda: finished(process)) < 2
    assert process.returncode == 0


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"mac": "02:00:00:00:00:01"}, id="of another pair"),
        pytest.param({"ipv4Nets": ["198.19.31.1/32"]}, id="of another address"),
        pytest.param({"mac": "", "ipv4Nets": []}, id="that says nothing"),
    ],
)
def test_left_over_status_does_not_count(start_node: StartNode, wrong: dict[str, object]) -> None:
    """A status file of a former instance does not make ADD return early."""
    node = start_node(30)
    other, pod = node.pod("1111222233334444"), node.pod(ID)
    process = node.begin("ADD", other)
    eventually_now(lambda: node.endpoints)
    tell(node, other, **wrong)  # the file has the name of the other container
    process.kill()
    process.wait()
    process = node.begin("ADD", pod)
    eventually_now(lambda: len(node.endpoints) == 2)
    assert process.poll() is None
    tell(node, pod)
    assert finished(process).code == 0


def test_silent_felix(start_node: StartNode) -> None:
    """When felix says nothing ADD fails in time, names felix, and leaves nothing."""
    node = start_node(0.5)
    answer = node.call("ADD", node.pod(ID))
    assert (answer.code, answer.tree["code"]) == (1, 11)
    assert answer.tree["msg"] == "felix did not program the endpoint within 0.5 s"
    assert STATUS_FILE in answer.tree["details"]
    node.assert_nothing_left()


def test_killed_in_the_middle(start_node: StartNode) -> None:
    """What a killed cnid left half made is undone by the next one, and by nobody else's ADD."""
    node = start_node(30)
    whole, half = node.pod("1111222233334444"), node.pod(ID)
    process = node.begin("ADD", whole)
    eventually_now(lambda: node.endpoints)
    (node.status_dir / "cni default%2F1111222233334444 eth0").write_text("new")
    assert finished(process).code == 0
    process = node.begin("ADD", half)
    eventually_now(lambda: len(node.endpoints) == 2)
    node.stop(kill=True)
    assert finished(process).tree["code"] == 11
    assert (node.held, len(node.interfaces)) == (2, 2)
    node.start()
    eventually_now(lambda: node.held == 1 and len(node.endpoints) == 1)
    eventually_now(lambda: not list(node.journal.iterdir()))
    assert node.interfaces == {"cali11112222333"}
    assert node.call("DEL", whole).code == 0
    node.assert_nothing_left()


def test_etcd_lost_in_the_middle(start_node: StartNode) -> None:
    """An ADD that fails while etcd is away takes its link back at once, the rest when it can."""
    node = start_node(1.5)
    process = node.begin("ADD", node.pod(ID))
    eventually_now(lambda: node.endpoints)
    node.etcd.kill()
    answer = finished(process)
    assert (answer.code, answer.tree["code"]) == (1, 11)
    assert node.interfaces == set()
    assert len(list(node.journal.iterdir())) == 1
    node.etcd.start()
    eventually_now(lambda: not list(node.journal.iterdir()), 20)
    node.assert_nothing_left()


def test_etcd_restarted_between_calls(start_node: StartNode) -> None:
    """A restarted etcd costs nothing but time."""
    node = start_node(0)
    node.etcd.kill()
    node.etcd.start()
    assert node.call("ADD", node.pod(ID)).code == 0


def test_with_the_real_felix(start_node: StartNode) -> None:
    """With felix running, ADD returns when the pod is reachable, and the first packet passes."""
    node = start_node(5)
    output("ip", "addr", "add", "198.19.0.2/32", "dev", "lo")
    felix = node.run("felix")
    try:
        pods = [node.pod(str(number) * 16) for number in (1, 2)]
        addresses = []
        for pod in pods:
            answer = node.call("ADD", pod)
            assert answer.code == 0, (answer, (node.directory / "felix.log").read_text()[-3000:])
            assert answer.address in output("ip", "route")
            output("ping", "-c", "1", "-W", "1", answer.address)
            addresses.append(answer.address)
        pods[0].run("ping", "-c", "1", "-W", "1", addresses[1])
        for pod in pods:
            assert node.call("DEL", pod).code == 0
        node.assert_nothing_left()
        eventually_now(lambda: not list(node.status_dir.iterdir()), what="felix removed its files")
    finally:
        felix.terminate()
        felix.wait(10)
