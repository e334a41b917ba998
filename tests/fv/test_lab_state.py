"""What a lab leaves in etcd, in kernels and in a pod: Calico's keys, names and shapes."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from ipaddress import IPv4Address

import pytest

from cymric.model import codec
from labs import observe
from labs.lab import Lab
from labs.network import entering, run
from labs.topology import DEFAULT_POOL, EXTERNAL_POOL, HOST_ADDRESS
from tests.support.lab_tools import pod, pool_key, wait_for

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.peers]

RESOURCES = "/calico/resources/v3/projectcalico.org/"
BGPD_PROTOCOL = "179"


def test_etcd_holds_what_calico_would(lab: Lab) -> None:
    """Every kind of key is there under Calico's name, and every value is one we can read."""
    keys = observe.stored_keys(lab, "/calico/")
    nodes = [node.name for node in lab.records.nodes]
    expected = [
        *(f"{RESOURCES}nodes/{node}" for node in nodes),
        f"{RESOURCES}ippools/default-ipv4-ippool",
        f"{RESOURCES}ippools/external-pool",
        f"{RESOURCES}bgppeers/host1",
        f"{RESOURCES}bgpconfigurations/default",
        f"{RESOURCES}felixconfigurations/default",
        f"{RESOURCES}clusterinformations/default",
        f"{RESOURCES}workloadendpoints/default/node1-k8s-customer-eth0",
    ]
    assert set(expected) <= set(keys)
    for key, value in observe.stored(lab, "/calico/").items():
        codec.decode(key, json.dumps(value).encode())  # raises if it is not as it should be


def test_blocks_affinities_and_handles_agree(lab: Lab) -> None:
    """Each block has its owner's confirmed affinity; each address a handle that counts it."""
    stored = observe.stored(lab, "/calico/ipam/v2/")
    blocks = {key: value for key, value in stored.items() if "/assignment/" in key}
    affinities = {key: value for key, value in stored.items() if "/host/" in key}
    assert {(v["cidr"], v["affinity"].removeprefix("host:")) for v in blocks.values()} == {
        (_cidr(key), key.split("/")[5]) for key in affinities
    }
    assert {value["state"] for value in affinities.values()} == {"confirmed"}
    counted: dict[str, int] = {}
    for value in blocks.values():
        for index in value["allocations"]:
            if index is not None:
                handle = value["attributes"][index]["handle_id"]
                counted[handle] = counted.get(handle, 0) + 1
    handles = {
        key.rpartition("/")[2]: sum(value["block"].values())
        for key, value in stored.items()
        if "/handle/" in key
    }
    assert counted == handles
    assert sum(counted.values()) == len(lab.records.pods)


def _cidr(affinity_key: str) -> str:
    address, _, length = affinity_key.rpartition("/")[2].rpartition("-")
    return f"{address}/{length}"


def test_an_unreadable_value_is_reported_by_key_and_does_no_harm(lab: Lab) -> None:
    """A pool that does not parse is as absent, is named in the log, and stops nothing."""
    key = pool_key("broken-pool")
    lab.etcdctl("put", key, '{"kind":"IPPool","spec":{"cidr":')
    try:
        log = lab.layout.logs / "node1-felix.log"
        wait_for(lambda: "broken-pool" in log.read_text(), what="felix names the key")
        assert all(answer.ok for answer in observe.matrix(lab).values())
        with pod(lab, "node1", "regardless"):
            pass
    finally:
        lab.etcdctl("del", key)


def test_a_pods_interface_is_as_calico_makes_it(lab: Lab) -> None:
    """A /32 on eth0, default via 169.254.1.1; outside `cali` and 11 digits, ee:ee:ee:ee:ee:ee."""
    customer = lab.records.pod("customer")
    inside = lab.layout.pod_namespace("customer")
    (eth0,) = json.loads(run("ip", "-netns", inside, "-j", "address", "show", "dev", "eth0"))
    addresses = [a for a in eth0["addr_info"] if a["family"] == "inet"]
    assert [(a["local"], a["prefixlen"]) for a in addresses] == [(customer.address, 32)]
    routes = json.loads(run("ip", "-netns", inside, "-j", "route", "show"))
    assert [(r["dst"], r.get("gateway"), r.get("scope")) for r in routes] == [
        ("default", "169.254.1.1", None),
        ("169.254.1.1", None, "link"),
    ]
    name = "cali" + hashlib.sha1(b"default.customer").hexdigest()[:11]  # noqa: S324
    outside = lab.layout.namespace("node1")
    (cali,) = json.loads(run("ip", "-netns", outside, "-j", "link", "show", "dev", name))
    assert cali["address"] == "ee:ee:ee:ee:ee:ee"
    assert cali["operstate"] == "UP"
    (route,) = json.loads(run("ip", "-netns", outside, "-j", "route", "show", customer.address))
    assert (route["dev"], route["scope"]) == (name, "link")
    default = "/proc/sys/net/ipv4/conf/default/rp_filter"
    wanted = {
        "proxy_arp": "1",
        "forwarding": "1",
        "route_localnet": "1",
        "rp_filter": run(*entering(outside), "cat", default).strip(),
    }
    for setting, value in wanted.items():
        path = f"/proc/sys/net/ipv4/conf/{name}/{setting}"
        assert run(*entering(outside), "cat", path).strip() == value, setting


@pytest.mark.parametrize("version", ["0.3.1", "0.4.0", "1.0.0"])
def test_cni_check_passes_in_every_version(lab: Lab, version: str) -> None:
    """CHECK of a healthy pod succeeds silently where the version has it; VERSION tells all."""
    customer = lab.records.pod("customer")
    node = lab.records.node(customer.node)
    config = {**lab.cni.netconf(node), "cniVersion": version}
    answer = lab.cni.call("VERSION", node, customer, config=config)
    assert version in answer["supportedVersions"]
    if version != "0.3.1":
        added = {"cniVersion": version, "ips": [{"address": f"{customer.address}/32"}]}
        assert lab.cni.call("CHECK", node, customer, config={**config, "prevResult": added}) == {}


def test_cni_del_is_idempotent(lab: Lab) -> None:
    """DEL of a pod that is gone, and of one that never was, succeeds and harms nobody."""
    with pod(lab, "node1", "twice") as made:
        node = lab.records.node("node1")
        lab.delete_pod("twice")
        lab.cni.delete(node, made)
        lab.cni.delete(node, made)


def test_bgpd_routes_are_marked(lab: Lab) -> None:
    """Routes to others' blocks and the blackholes of own ones carry protocol 179, metric 1024."""
    for node in lab.records.nodes:
        owned = {block.cidr for block in observe.blocks(lab) if block.owner == node.name}
        routes = observe.routes(lab, node.name)
        marked = {route.prefix for route in routes if route.protocol == BGPD_PROTOCOL}
        assert marked == {block.cidr for block in observe.blocks(lab)}
        assert {route.prefix for route in routes if route.kind == "blackhole"} == owned
    shown = run(
        "ip", "-netns", lab.layout.namespace("node1"), "-N", "route", "show", "proto", "179"
    )
    assert all("metric 1024" in line for line in shown.splitlines())


def test_chains_and_sets_have_calicos_names(lab: Lab) -> None:
    """filter, nat, raw and mangle have Calico's skeleton; the pool sets have Calico's names."""
    inside = entering(lab.layout.namespace("node1"))
    for table, chains in {
        "filter": ("cali-FORWARD", "cali-INPUT", "cali-OUTPUT", "cali-from-wl-dispatch",
                   "cali-to-wl-dispatch", "cali-wl-to-host"),
        "nat": ("cali-PREROUTING", "cali-POSTROUTING", "cali-OUTPUT", "cali-nat-outgoing"),
        "raw": ("cali-PREROUTING", "cali-OUTPUT"),
        "mangle": ("cali-PREROUTING", "cali-POSTROUTING"),
    }.items():  # fmt: skip
        saved = run(*inside, "iptables-save", "-t", table)
        for chain in chains:
            assert f"\n:{chain} " in saved, (table, chain)
    sets = run(*inside, "ipset", "save")
    assert f"add cali40network-ip-pools {DEFAULT_POOL}" in sets
    assert f"add cali40network-ip-pools {EXTERNAL_POOL}" in sets
    assert f"add cali40masq-ipam-pools {DEFAULT_POOL}" in sets
    assert f"add cali40masq-ipam-pools {EXTERNAL_POOL}" not in sets


def test_foreign_rules_survive(lab: Lab) -> None:
    """A rule written by hand stays where it is when felix restarts and writes, in any table."""
    inside = entering(lab.layout.namespace("node1"))
    foreign = [
        ("filter", "FORWARD", ["-s", "192.0.2.1", "-j", "ACCEPT"]),
        ("mangle", "POSTROUTING", ["-p", "tcp", "--tcp-flags", "SYN,RST", "SYN",
                                   "-j", "TCPMSS", "--set-mss", "1300"]),
        ("nat", "POSTROUTING", ["-s", "192.0.2.2", "-j", "ACCEPT"]),
    ]  # fmt: skip
    run(*inside, "iptables", "-w", "-t", "filter", "-N", "by-hand")
    try:
        for table, chain, words in foreign:
            run(*inside, "iptables", "-w", "-t", table, "-A", chain, *words)
        before = _foreign(lab)
        assert len(before) >= 4
        old = lab.supervisor.kill("node1", "felix")
        with pod(lab, "node1", "makes-felix-write"):
            assert lab.supervisor.process("node1", "felix").pid != old
            assert _foreign(lab) == before
        assert _foreign(lab) == before
    finally:
        for table, chain, words in foreign:
            run(*inside, "iptables", "-w", "-t", table, "-D", chain, *words)
        run(*inside, "iptables", "-w", "-t", "filter", "-X", "by-hand")


def _foreign(lab: Lab) -> list[str]:
    """The rules and chains that are not ours, in their order."""
    rules = observe.kernel_state(lab, "node1").rules
    return [
        rule
        for rule in rules
        if re.match(r"-A |:by-hand", rule) and "cali:" not in rule and "-A cali" not in rule
    ]


def test_node_status_shows_the_sessions(lab: Lab) -> None:
    """`cymric node status` on a node names every peer, its type and that it is established."""
    text = lab.cymric("node1", "node", "status")
    for address, kind in {
        "198.19.0.1": "node-to-node mesh",
        "198.19.0.3": "node-to-node mesh",
        str(HOST_ADDRESS): "global",
    }.items():
        (line,) = [line for line in text.splitlines() if f" {address} " in line]
        assert kind in line
        assert "Established" in line


def test_ipam_show_counts_the_pods(lab: Lab) -> None:
    """`cymric ipam show --show-blocks` lists each pool and each block that etcd holds."""
    text = lab.cymric("control", "ipam", "show", "--show-blocks")
    for block in observe.blocks(lab):
        (line,) = [line for line in text.splitlines() if f" {block.cidr} " in line]
        assert re.search(rf"\b{block.used}\b", line)
    for pool in (DEFAULT_POOL, EXTERNAL_POOL):
        assert f" {pool} " in text


def test_ends_on_a_stopped_lab_with_a_word() -> None:
    """A command for a lab that is not up says so in a line, without a traceback."""
    done = subprocess.run(
        ["labs/lab", "--name", "nosuchlab", "status"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "the lab is not up" in done.stderr
    assert "Traceback" not in done.stderr


def test_addresses_are_in_blocks_of_their_node(lab: Lab) -> None:
    """Every pod's address lies in a block that its own node owns, in the pool it asked for."""
    for one in lab.records.pods:
        block = next(b for b in observe.blocks(lab) if IPv4Address(one.address) in b.cidr)
        assert block.owner == one.node
        assert block.cidr.prefixlen == (29 if one.pools else 26)
