"""Nodes and pods that come, go and come back; blocks that follow them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address

import pytest

from labs import checks, observe
from labs.lab import Lab
from labs.network import destroy, make_pod_namespace, run
from labs.pods import TRY_AGAIN_LATER, CniError
from labs.probe import fetch_all
from labs.topology import EXTERNAL_POOL, POD_RANGE, Pod, container_id
from tests.fv.test_lab_restart import sessions
from tests.support.lab_tools import Capture, pod, wait_equal, wait_for

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.peers, pytest.mark.slow]


def _owned(lab: Lab, node: str) -> set[str]:
    return {str(block.cidr) for block in observe.blocks(lab) if block.owner == node}


def test_a_node_that_was_destroyed_comes_back_with_its_blocks(lab: Lab) -> None:
    """A node's namespace destroyed and made again: same blocks, and its new pods live in them."""
    owned, names = _owned(lab, "node2"), {pod.name for pod in lab.records.pods_on("node2")}
    assert owned
    before = sessions(lab)
    address = lab.records.node("node2").address
    lab.reboot_node("node2")
    checks.wait_settled(lab, patience_s=60)
    assert _owned(lab, "node2") == owned
    back = lab.records.pods_on("node2")
    assert {pod.name for pod in back} == names
    for one in back:
        assert any(IPv4Address(one.address) in b.cidr for b in observe.blocks(lab))
    after = sessions(lab)
    for node in ("control", "node1"):
        assert {p: ports for p, ports in before[node].items() if p != address} == {
            p: ports for p, ports in after[node].items() if p != address
        }


def test_a_node_is_added_and_removed(lab: Lab) -> None:
    """A fourth node joins the mesh, takes a block and serves pods; removed, nothing of it stays.

    The sessions among the others never break, although each ExaBGP's configuration changes twice.
    """
    before = sessions(lab)
    rules = observe.kernel_state(lab, "node1")
    lab.add_node("node3")
    try:
        lab.add_pod("node3", "newcomer")
        checks.wait_settled(lab, patience_s=60)
        assert len(_owned(lab, "node3")) == 1
        assert len(sessions(lab)["node3"]) == 4
    finally:
        lab.remove_node("node3")
    checks.wait_settled(lab, patience_s=60)
    assert sessions(lab) == before
    assert not [key for key in observe.stored_keys(lab) if "node3" in key]
    assert not [key for key in observe.stored_keys(lab) if "newcomer" in key]
    wait_equal(lambda: observe.kernel_state(lab, "node1"), rules)


def test_a_released_block_leaves_every_kernel(lab: Lab) -> None:
    """A block released by a collector elsewhere is withdrawn: no kernel keeps a route for it.

    Its node's blackhole goes and host1's BIRD forgets the prefix; the node can claim it again.
    """
    with pod(lab, "control", "short-lived", pools=(str(EXTERNAL_POOL),)) as made:
        checks.wait_settled(lab)
        block = next(b for b in observe.blocks(lab) if IPv4Address(made.address) in b.cidr)
        assert block.owner == "control"
        assert block.cidr in lab.router.announced()
    name = str(block.cidr).replace("/", "-")
    lab.etcdctl("del", f"{observe.BLOCKS}{name}")
    lab.etcdctl("del", f"/calico/ipam/v2/host/control/ipv4/block/{name}")
    for machine in ("control", "node1", "node2", "host1"):
        wait_for(
            lambda machine=machine: all(  # type: ignore[misc]
                route.prefix != block.cidr for route in observe.routes(lab, machine)
            ),
            what=f"{block.cidr} gone from {machine}",
        )
    wait_for(lambda: block.cidr not in lab.router.announced(), what="withdrawn from host1")
    with pod(lab, "control", "next", pools=(str(EXTERNAL_POOL),)):  # its cnid has noticed, too
        checks.wait_settled(lab)


def test_pods_made_at_once_on_all_nodes_have_addresses_of_their_own(lab: Lab) -> None:
    """Twelve ADDs at the same time on three nodes that must claim blocks of one pool for them.

    No address is given twice, no block has two owners, each address is in a block of its node.
    """
    wanted = [
        Pod(
            f"at-once-{node.name}-{n}",
            node.name,
            (str(EXTERNAL_POOL),),
            container_id(node.name, f"{n}"),
        )
        for node in lab.records.nodes
        for n in range(4)
    ]
    sandboxes = [lab.layout.pod_namespace(one.name) for one in wanted]

    def add(one: Pod) -> str:
        return lab.cni.add(lab.records.node(one.node), one)

    def delete(one: Pod) -> None:
        lab.cni.delete(lab.records.node(one.node), one)

    for sandbox in sandboxes:
        make_pod_namespace(sandbox)
    try:
        with ThreadPoolExecutor(len(wanted)) as runtimes:
            addresses = list(runtimes.map(add, wanted))
        assert len({*addresses, *(one.address for one in lab.records.pods)}) == len(
            addresses
        ) + len(lab.records.pods)
        for one, address in zip(wanted, addresses, strict=True):
            (block,) = [b for b in observe.blocks(lab) if IPv4Address(address) in b.cidr]
            assert block.owner == one.node
            assert block.cidr.subnet_of(EXTERNAL_POOL)
    finally:
        with ThreadPoolExecutor(len(wanted)) as runtimes:
            list(runtimes.map(delete, wanted))
        destroy(sandboxes)
    assert not [key for key in observe.stored_keys(lab) if "at-once" in key]


def test_a_pod_made_while_etcd_is_down_fails_cleanly(lab: Lab) -> None:
    """ADD without etcd says code 11 (try again later) and leaves nothing; traffic goes on."""
    node = lab.records.node("node1")
    namespace = lab.layout.namespace("node1")
    links = _links(namespace)
    before = sessions(lab)
    lab.supervisor.stop("datastore", "etcd")
    try:
        with pytest.raises(CniError) as refused:
            lab.add_pod("node1", "unlucky", patience_s=0)
        assert refused.value.code == TRY_AGAIN_LATER
        assert refused.value.message
        assert _links(namespace) == links
        assert "unlucky" not in {one.name for one in lab.records.pods}
        assert all(answer.ok for answer in observe.matrix(lab).values())
    finally:
        lab.supervisor.start("datastore", "etcd")
        lab.wait_for_etcd()
    assert not [key for key in observe.stored_keys(lab) if "unlucky" in key]
    checks.wait_settled(lab)
    assert sessions(lab) == before
    with pod(lab, node.name, "unlucky"):
        checks.wait_settled(lab)


def _links(namespace: str) -> set[str]:
    shown = run("ip", "-netns", namespace, "-o", "link", "show").splitlines()
    return {line.split(":")[1].strip() for line in shown}


def test_a_deleted_pod_leaves_nothing(lab: Lab) -> None:
    """After DEL nothing of the pod is left in etcd, in kernels or in files."""
    keys, kernel = set(observe.stored_keys(lab)), observe.kernel_state(lab, "node1")
    links = _links(lab.layout.namespace("node1"))
    status = lab.layout.node_dir("node1") / "endpoint-status"
    files = {path.name for path in status.iterdir()}
    with pod(lab, "node1", "brief") as made:
        assert set(observe.stored_keys(lab)) - keys
        assert IPv4Address(made.address) in POD_RANGE
        assert any("brief" in path.name for path in status.iterdir())
    wait_equal(lambda: set(observe.stored_keys(lab)), keys)
    wait_equal(lambda: observe.kernel_state(lab, "node1"), kernel)
    assert _links(lab.layout.namespace("node1")) == links
    wait_equal(lambda: {path.name for path in status.iterdir()}, files)


def test_no_packet_reaches_a_deleted_pods_address_elsewhere(lab: Lab) -> None:
    """An address that was given back is answered by nobody: the blackhole of its node takes it."""
    with pod(lab, "node2", "leaving") as made:
        checks.wait_settled(lab)
    with Capture(lab) as capture:
        asked = (lab.layout.pod_namespace("customer"), made.address)
        assert not fetch_all([asked])[asked].ok
        arrived = {packet.target for packet in capture.packets()}
    assert IPv4Address(made.address) in arrived, "it went to node2, which owns the block"
