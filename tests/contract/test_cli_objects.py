"""The command line against a datastore: the same commands in memory and on a real etcd.

What is stored is read back raw, past everything that is tested here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from cymric.cli.main import cli
from cymric.cli.session import Session
from cymric.datastore import api
from cymric.datastore.memory import MemoryDatastore
from tests.conftest import StartEtcd
from tests.support.cymric_cli import RESOURCES, Cymric, InEtcd, InMemory, pool, resource
from tests.support.etcd import make_certificates

POOL = f"{RESOURCES}/ippools/main"
BLOCK = "/calico/ipam/v2/assignment/ipv4/block/10.244.0.0-26"
AFFINITY = "/calico/ipam/v2/host/node1/ipv4/block/10.244.0.0-26"


def without_identity(value: str) -> str:
    """A stored value without its uid and time of creation."""
    return re.sub(r',"(uid|creationTimestamp)":"[^"]*"', "", value)


# --- values byte for byte -------------------------------------------------------------------------

# ruff: noqa: E501 - stored values are one line

EXAMPLES = [
    '{"kind":"IPPool","apiVersion":"projectcalico.org/v3","metadata":{"name":"default-ipv4-ippool"},"spec":{"cidr":"192.168.0.0/16","vxlanMode":"Never","ipipMode":"Never","natOutgoing":true,"blockSize":26,"nodeSelector":"all()","allowedUses":["Workload","Tunnel"],"assignmentMode":"Automatic"}}',
    '{"kind":"BGPConfiguration","apiVersion":"projectcalico.org/v3","metadata":{"name":"default"},"spec":{"logSeverityScreen":"Info","nodeToNodeMeshEnabled":false,"asNumber":64512,"serviceClusterIPs":[{"cidr":"10.96.0.0/12"}],"communities":[{"name":"blue","value":"64512:100"}],"prefixAdvertisements":[{"cidr":"192.168.0.0/16","communities":["blue"]}],"listenPort":179}}',
    '{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":{"name":"node-a","labels":{"rack":"1"}},"spec":{"bgp":{"ipv4Address":"10.0.0.11/24"},"interfaces":[{"name":"eth0","addresses":["10.0.0.11"]}]},"status":{}}',
    '{"kind":"WorkloadEndpoint","apiVersion":"projectcalico.org/v3","metadata":{"name":"node--a-k8s-web--1-eth0","namespace":"prod","labels":{"app":"web","projectcalico.org/namespace":"prod","projectcalico.org/orchestrator":"k8s"}},"spec":{"orchestrator":"k8s","node":"node-a","containerID":"0d9c5e1c2f","pod":"web-1","endpoint":"eth0","ipNetworks":["192.168.10.1/32"],"profiles":["kns.prod","ksa.prod.default"],"interfaceName":"cali2b4f0b7d9aa","mac":"5e:1c:9a:03:7f:22"}}',
    '{"kind":"Profile","apiVersion":"projectcalico.org/v3","metadata":{"name":"kns.prod"},"spec":{"ingress":[{"action":"Allow"}],"egress":[{"action":"Allow"}],"labelsToApply":{"pcns.env":"prod","pcns.projectcalico.org/name":"prod"}}}',
    '{"kind":"IPReservation","apiVersion":"projectcalico.org/v3","metadata":{"name":"gateways"},"spec":{"reservedCIDRs":["192.168.10.0/30"]}}',
    '{"kind":"FelixConfiguration","apiVersion":"projectcalico.org/v3","metadata":{"name":"default"},"spec":{"logSeverityScreen":"Info","reportingInterval":"0s","floatingIPs":"Disabled","prometheusMetricsEnabled":true}}',
    '{"kind":"FelixConfiguration","apiVersion":"projectcalico.org/v3","metadata":{"name":"node.node-a"},"spec":{"defaultEndpointToHostAction":"Return"}}',
]  # fmt: skip
PLURALS = {
    "IPPool": "ippools",
    "BGPConfiguration": "bgpconfigurations",
    "Node": "nodes",
    "WorkloadEndpoint": "workloadendpoints/prod",
    "Profile": "profiles",
    "IPReservation": "ipreservations",
    "FelixConfiguration": "felixconfigurations",
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: json.loads(text)["kind"])
def test_stored_bytes_are_calicos(cymric: Cymric, example: str) -> None:
    """What apply stores is Calico's value, byte for byte, however the file orders its fields."""
    tree = json.loads(example)
    shuffled = {name: tree[name] for name in sorted(tree, reverse=True)}
    shuffled["spec"] = {name: tree["spec"][name] for name in sorted(tree["spec"], reverse=True)}
    cymric.ok("apply", "-f", "-", stdin=yaml.safe_dump(shuffled, sort_keys=False))
    value = cymric.raw.get(f"{RESOURCES}/{PLURALS[tree['kind']]}/{tree['metadata']['name']}")
    assert value is not None
    assert without_identity(value) == example
    metadata = json.loads(value)["metadata"]
    assert metadata.keys() == tree["metadata"].keys() | {"uid", "creationTimestamp"}


def test_peer_is_stored_as_calico_spells_it(cymric: Cymric) -> None:
    """Durations, AS numbers and Go's escapes come out in Calico's spelling."""
    spec = {
        "maxRestartTime": "120s",
        "asNumber": "1.10",
        "peerIP": "10.1.0.1",
        "nodeSelector": "a == 'x' && has(b)",
        "keepOriginalNextHop": False,
    }
    cymric.ok("apply", "-f", "-", stdin=resource("BGPPeer", "tor", spec))
    value = cymric.raw.get(f"{RESOURCES}/bgppeers/tor")
    assert value is not None
    assert value.endswith(
        '"spec":{"nodeSelector":"a == \'x\' \\u0026\\u0026 has(b)","peerIP":"10.1.0.1",'
        '"asNumber":65546,"maxRestartTime":"2m0s"}}'
    )


# --- the life of an object ------------------------------------------------------------------------


def test_create_refuses_what_exists(cymric: Cymric) -> None:
    """Create writes a new object once; the second time it is told, or passed over on request."""
    said = cymric.ok("create", "-f", "-", stdin=pool())
    assert said == "Successfully created 1 'IPPool' resource(s)\n"
    before = cymric.raw.get(POOL)
    said = cymric.refused("create", "-f", "-", stdin=pool())
    assert "resource already exists: IPPool(main)" in said
    assert "created 0" in cymric.ok("create", "--skip-exists", "-f", "-", stdin=pool())
    assert cymric.raw.get(POOL) == before


def test_replace_needs_the_object(cymric: Cymric) -> None:
    """Replace refuses an object that does not exist, and keeps identity when it does."""
    assert "does not exist: IPPool(main)" in cymric.refused("replace", "-f", "-", stdin=pool())
    cymric.ok("create", "-f", "-", stdin=pool())
    before = cymric.stored(POOL)
    cymric.ok("replace", "-f", "-", stdin=pool(natOutgoing=True))
    after = cymric.stored(POOL)
    assert after["spec"]["natOutgoing"] is True
    assert after["metadata"] == before["metadata"]


def test_get_and_apply_change_nothing(cymric: Cymric) -> None:
    """What get prints can be applied as it is, and the stored value stays the same."""
    cymric.ok("apply", "-f", "-", stdin=pool())
    before = cymric.raw.get(POOL)
    for form in ("yaml", "json"):
        cymric.ok("apply", "-f", "-", stdin=cymric.ok("get", "ippool", "main", "-o", form))
        cymric.ok("apply", "-f", "-", stdin=cymric.ok("get", "ippools", "-o", form))
        assert cymric.raw.get(POOL) == before


def test_unknown_fields_survive(cymric: Cymric) -> None:
    """Fields of another version, at any depth, survive a change made through the command line."""
    foreign = pool(vxlanMode="Never", ipipMode="Never", blockSize=26, nodeSelector="all()")
    foreign["metadata"] |= {"uid": "u", "creationTimestamp": "2026-01-02T03:04:05Z"}
    foreign["spec"]["future"] = {"deep": [1, {"x": None}]}
    foreign["status"] = {"conditions": [{"type": "Allocatable", "status": "True"}]}
    cymric.raw.put(POOL, json.dumps(foreign))
    tree = yaml.safe_load(cymric.ok("get", "ippool", "main", "-o", "yaml"))
    tree["spec"]["natOutgoing"] = True
    cymric.ok("apply", "-f", "-", stdin=tree)
    after = cymric.stored(POOL)
    assert after["spec"]["future"] == {"deep": [1, {"x": None}]}
    assert after["status"] == foreign["status"]
    assert after["spec"]["natOutgoing"] is True
    assert after["metadata"]["uid"] == "u"


def test_misspelt_fields_are_refused(cymric: Cymric) -> None:
    """A field that neither this version nor the stored object knows is a mistake, with a hint."""
    said = cymric.refused("apply", "-f", "-", stdin=pool(natOutgoin=True))
    assert "spec.natOutgoin: IPPool has no such field; did you mean natOutgoing?" in said
    assert cymric.raw.get(POOL) is None


def test_a_stale_resource_version_is_refused(cymric: Cymric) -> None:
    """A file that says which revision it was made from does not overwrite a later one."""
    cymric.ok("apply", "-f", "-", stdin=pool())
    seen = json.loads(cymric.ok("get", "ippool", "main", "-o", "json"))
    cymric.ok("apply", "-f", "-", stdin=pool(natOutgoing=True))
    assert "update conflict: IPPool(main)" in cymric.refused("apply", "-f", "-", stdin=seen)
    assert "update conflict: IPPool(main)" in cymric.refused("delete", "-f", "-", stdin=seen)
    assert cymric.stored(POOL)["spec"]["natOutgoing"] is True


def test_resource_version_is_the_revision(cymric: Cymric) -> None:
    """The resourceVersion shown changes with each write, and is never in the stored value."""
    versions = []
    for nat in (False, True):
        cymric.ok("apply", "-f", "-", stdin=pool(natOutgoing=nat))
        tree = json.loads(cymric.ok("get", "ippool", "main", "-o", "json"))
        versions.append(int(tree["metadata"]["resourceVersion"]))
    assert versions[0] < versions[1]
    assert "resourceVersion" not in cymric.stored(POOL)["metadata"]


def test_delete(cymric: Cymric) -> None:
    """Delete removes by name or by file; a missing object is told, or passed over on request."""
    cymric.ok("apply", "-f", "-", stdin=resource("Node", "n1", {}))
    assert "Successfully deleted 1 'Node'" in cymric.ok("delete", "node", "n1")
    assert "does not exist: Node(n1)" in cymric.refused("delete", "node", "n1")
    cymric.ok("delete", "--skip-not-exists", "-f", "-", stdin=resource("Node", "n1", {}))
    assert cymric.raw.get(f"{RESOURCES}/nodes/n1") is None


def test_files_of_many_objects(cymric: Cymric) -> None:
    """Documents, lists and bare arrays may be mixed; the first refusal stops, and tells how far."""
    text = "\n---\n".join(
        yaml.safe_dump(document)
        for document in (
            {"kind": "NodeList", "items": [resource("Node", "n1", {}), resource("Node", "n2", {})]},
            [resource("IPReservation", "r", {"reservedCIDRs": ["10.0.0.1"]})],
        )
    )
    assert "Successfully applied 3 resource(s)" in cymric.ok("apply", "-f", "-", stdin=text)
    assert cymric.ok("get", "nodes", "-o", "name").split() == ["node/n1", "node/n2"]
    bad = [resource("Node", "n3", {}), resource("Node", "Bad_Name", {}), resource("Node", "n4", {})]
    said = cymric.refused("apply", "-f", "-", stdin=bad)
    assert "partial success: applied the first 1 of 3 'Node'" in said
    assert "metadata.name" in said
    assert cymric.ok("get", "nodes", "-o", "name").split() == ["node/n1", "node/n2", "node/n3"]


# --- rules that look at the rest of the cluster ---------------------------------------------------


def test_pools_do_not_overlap(cymric: Cymric) -> None:
    """A new pool may not overlap another; an existing one may be applied again."""
    cymric.ok("apply", "-f", "-", stdin=pool())
    said = cymric.refused("apply", "-f", "-", stdin=pool("10.244.8.0/24", name="inner"))
    assert "10.244.8.0/24 overlaps IPPool main (10.244.0.0/16)" in said
    cymric.ok("apply", "-f", "-", stdin=pool("10.245.0.0/16", name="beside"))
    cymric.ok("apply", "-f", "-", stdin=pool(disabled=True))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cidr": "10.245.0.0/16"}, "spec.cidr: cannot be changed (it is 10.244.0.0/16)"),
        ({"blockSize": 28}, "spec.blockSize: cannot be changed (it is 26)"),
        ({"allowedUses": ["LoadBalancer"]}, "cannot change to or from LoadBalancer"),
    ],
)
def test_pools_keep_what_blocks_rest_on(
    cymric: Cymric, change: Mapping[str, object], said: str
) -> None:
    """A pool's prefix, block size and kind of use are fixed when it is created."""
    cymric.ok("apply", "-f", "-", stdin=pool())
    changed = pool()
    changed["spec"] |= change
    assert said in cymric.refused("apply", "-f", "-", stdin=changed)


def block(owner: str | None, *, used: bool) -> str:
    """A stored block with one address given, or none."""
    held = [{"handle_id": "h", "secondary": {"node": "node1"}}] if used else None
    return json.dumps(
        {
            "cidr": "10.244.0.0/26",
            "affinity": f"host:{owner}" if owner else None,
            "allocations": [0 if used else None, *[None] * 63],
            "unallocated": list(range(1 if used else 0, 64)),
            "attributes": held,
            "sequenceNumber": 7,
            "sequenceNumberForAllocation": {"0": 6} if used else {},
            "deleted": False,
        }
    )


def test_a_new_pool_fits_existing_blocks(cymric: Cymric) -> None:
    """A pool cannot be created with another block size than the blocks that lie in it have."""
    cymric.raw.put(BLOCK, block("node1", used=False))
    said = cymric.refused("apply", "-f", "-", stdin=pool(blockSize=27))
    assert "block 10.244.0.0/26 exists in 10.244.0.0/16 with another size" in said
    cymric.ok("apply", "-f", "-", stdin=pool())


@pytest.mark.parametrize("used", [False, True], ids=["empty", "used"])
def test_deleting_a_pool_gives_back_its_blocks(cymric: Cymric, used: bool) -> None:
    """An empty block goes with its pool; one in use stays, with its addresses and no owner."""
    cymric.ok("apply", "-f", "-", stdin=pool())
    cymric.raw.put(BLOCK, block("node1", used=used))
    cymric.raw.put(AFFINITY, '{"state":"confirmed","deleted":false}')
    cymric.ok("delete", "ippool", "main")
    assert cymric.raw.get(POOL) is None
    assert cymric.raw.get(AFFINITY) is None
    if used:
        assert cymric.stored(BLOCK)["affinity"] is None
        assert cymric.stored(BLOCK)["allocations"][0] == 0
    else:
        assert cymric.raw.get(BLOCK) is None


def test_deleting_a_node_takes_along_what_is_its(cymric: Cymric) -> None:
    """A node's endpoints, their addresses, its blocks and the objects that name it go with it."""
    endpoint = {"orchestrator": "cni", "node": "node1", "containerID": "abc", "endpoint": "eth0",
                "ipNetworks": ["10.244.0.0/32"], "interfaceName": "caliabc"}  # fmt: skip
    peer = {"peerIP": "10.0.0.1", "asNumber": 64512}
    cymric.ok(
        "apply",
        "-f",
        "-",
        stdin=[
            pool(),
            resource("Node", "node1", {}),
            resource("Node", "node2", {}),
            resource("BGPPeer", "own", {**peer, "node": "node1"}),
            resource("BGPPeer", "other", {**peer, "node": "node2"}),
            resource("FelixConfiguration", "node.node1", {}),
            resource("WorkloadEndpoint", "", endpoint, namespace="prod"),
        ],
    )
    cymric.raw.put(BLOCK, block("node1", used=True))
    cymric.raw.put(AFFINITY, '{"state":"confirmed","deleted":false}')
    cymric.raw.put("/calico/ipam/v2/handle/h", '{"block":{"10.244.0.0/26":1},"deleted":false}')
    cymric.ok("delete", "node", "node1")
    assert cymric.ok("get", "wep", "-a", "-o", "name") == ""
    assert cymric.ok("get", "bgppeer", "-o", "name") == "bgppeer/other\n"
    assert cymric.ok("get", "felixconfig", "-o", "name") == ""
    assert cymric.ok("get", "node", "-o", "name") == "node/node2\n"
    for key in (BLOCK, AFFINITY, "/calico/ipam/v2/handle/h"):
        assert cymric.raw.get(key) is None, key


def test_a_malformed_claim_is_no_obstacle(cymric: Cymric) -> None:
    """A claim that cannot be read goes with its pool; a block that cannot be read is told by key."""
    cymric.ok("apply", "-f", "-", stdin=pool())
    cymric.raw.put(BLOCK, block("node1", used=False))
    cymric.raw.put(AFFINITY, '{"state":"bogus"}')
    other = BLOCK.replace("10.244.0.0", "10.244.0.64")
    cymric.raw.put(other, "{}")
    result = cymric("delete", "ippool", "main")
    assert result.exit_code == 0, result.output
    assert other in result.stderr
    assert [cymric.raw.get(key) for key in (POOL, BLOCK, AFFINITY)] == [None] * 3


def test_a_resource_version_is_a_revision(cymric: Cymric) -> None:
    """A resourceVersion that is no number is refused in words."""
    tree = resource("Node", "n1", {}, resourceVersion="latest")
    assert "'latest' is no revision" in cymric.refused("delete", "-f", "-", stdin=tree)


@pytest.mark.etcd
def test_certificates_in_calicoctls_file(start_etcd: StartEtcd, tmp_path: Path) -> None:
    """The configuration file of calicoctl leads to an etcd that wants certificates."""
    files = make_certificates(tmp_path / "tls")
    server = start_etcd(tls=files)
    spec = {
        "etcdEndpoints": server.endpoint,
        "etcdCACertFile": str(files.ca_cert),
        "etcdCertFile": str(files.client_cert),
        "etcdKeyFile": str(files.client_key),
    }
    path = tmp_path / "calicoctl.cfg"
    path.write_text(yaml.safe_dump({"kind": "CalicoAPIConfig", "spec": spec}))
    cymric = Cymric(InEtcd(server), Session(environ={}))
    cymric.ok("--config", str(path), "apply", "-f", "-", stdin=resource("Node", "n1", {}))
    assert cymric.ok("-c", str(path), "get", "node", "-o", "name") == "node/n1\n"
    assert cymric.stored(f"{RESOURCES}/nodes/n1")["kind"] == "Node"


def test_peers_name_existing_filters(cymric: Cymric) -> None:
    """A BGPPeer may only name filters that exist."""
    peer = resource("BGPPeer", "p", {"peerIP": "10.0.0.1", "asNumber": 1, "filters": ["f"]})
    assert "there is no BGPFilter 'f'" in cymric.refused("apply", "-f", "-", stdin=peer)
    cymric.raw.put(f"{RESOURCES}/bgpfilters/f", "{}")
    cymric.ok("apply", "-f", "-", stdin=peer)


# --- looking --------------------------------------------------------------------------------------


def test_tables(cymric: Cymric) -> None:
    """Tables have calicoctl's columns, three blanks apart."""
    cymric.ok(
        "apply",
        "-f",
        "-",
        stdin=[
            pool(natOutgoing=True),
            resource("Node", "node1", {"bgp": {"ipv4Address": "10.0.0.1/24"}}),
            resource("Node", "node2", {"bgp": {"ipv4Address": "10.0.0.2/24", "asNumber": 7}}),
            resource("BGPConfiguration", "default", {"asNumber": 65001}),
            resource("BGPPeer", "everywhere", {"peerIP": "10.0.0.9", "asNumber": 64999}),
        ],
    )
    assert cymric.ok("get", "ippools").splitlines() == [
        "NAME   CIDR            SELECTOR",
        "main   10.244.0.0/16   all()",
    ]
    assert cymric.ok("get", "ippool", "main", "-o", "wide").splitlines()[0].split() == [
        "NAME", "CIDR", "NAT", "IPIPMODE", "VXLANMODE", "DISABLED", "DISABLEBGPEXPORT",
        "SELECTOR", "ASSIGNMENTMODE",
    ]  # fmt: skip
    assert cymric.ok("get", "no", "-o", "wide").splitlines() == [
        "NAME    ASN       IPV4          IPV6",
        "node1   (65001)   10.0.0.1/24",
        "node2   7         10.0.0.2/24",
    ]
    assert cymric.ok("get", "bgppeer").splitlines()[1].split() == [
        "everywhere", "10.0.0.9", "(global)", "64999",
    ]  # fmt: skip
    assert cymric.ok("get", "bgpconfig").splitlines()[1].split() == ["default", "-", "-", "65001"]
    assert cymric.ok("get", "clusterinfo").split() == [
        "NAME", "CLUSTERGUID", "CLUSTERTYPE", "CALICOVERSION", "DATASTOREREADY",
    ]  # fmt: skip


def test_namespaces(cymric: Cymric) -> None:
    """Endpoints are shown of one namespace, `default` unless named, or of all with a column."""
    for number, namespace in enumerate(("default", "prod")):
        spec = {"orchestrator": "k8s", "node": "n", "pod": f"p{number}", "endpoint": "eth0"}
        tree = resource("WorkloadEndpoint", f"n-k8s-p{number}-eth0", spec)
        cymric.ok("apply", "-n", namespace, "-f", "-", stdin=tree)
    assert cymric.ok("get", "wep").splitlines()[1].split() == ["p0", "n"]
    assert cymric.ok("get", "wep", "-n", "prod").splitlines()[1].split() == ["p1", "n"]
    everywhere = [line.split() for line in cymric.ok("get", "wep", "-a").splitlines()]
    assert everywhere[0][:2] == ["NAMESPACE", "WORKLOAD"]
    assert [line[:2] for line in everywhere[1:]] == [["default", "p0"], ["prod", "p1"]]


def test_malformed_values_are_told_by_key(cymric: Cymric) -> None:
    """A stored value that no daemon would take is told by its key; the others are shown."""
    cymric.ok("apply", "-f", "-", stdin=pool())
    cymric.raw.put(f"{RESOURCES}/ippools/broken", "{not json")
    wrong = json.dumps(pool("10.244.0.1/16", name="wrong"))
    cymric.raw.put(f"{RESOURCES}/ippools/wrong", wrong)
    result = cymric("get", "ippool")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["NAME", "main", "wrong"]
    assert f"{RESOURCES}/ippools/broken" in result.stderr
    assert f"{RESOURCES}/ippools/wrong" in result.stderr
    assert f"{RESOURCES}/ippools/broken" in cymric.refused("get", "ippool", "broken")
    cymric.ok("delete", "ippool", "wrong")


def test_export_can_go_to_another_cluster(cymric: Cymric) -> None:
    """`--export` leaves out what belongs to this cluster: identity, time and revision."""
    cymric.ok("apply", "-f", "-", stdin=pool())
    tree = yaml.safe_load(cymric.ok("get", "ippool", "main", "-o", "yaml", "--export"))
    assert tree["metadata"] == {"name": "main"}


def test_the_built_in_profile(cymric: Cymric) -> None:
    """The profile that allows everything is shown, never stored, and cannot be touched."""
    assert cymric.ok("get", "profile", "-o", "name") == "profile/projectcalico-default-allow\n"
    tree = yaml.safe_load(cymric.ok("get", "profile", "projectcalico-default-allow", "-o", "yaml"))
    assert tree["spec"] == {"ingress": [{"action": "Allow"}], "egress": [{"action": "Allow"}]}
    assert "built in" in cymric.refused("apply", "-f", "-", stdin=tree)
    assert "built in" in cymric.refused("delete", "profile", "projectcalico-default-allow")


def test_cluster_information_is_read_only(cymric: Cymric) -> None:
    """A user can look at ClusterInformation, and not write it."""
    tree = resource("ClusterInformation", "default", {"datastoreReady": False})
    for verb in ("apply", "create", "replace", "delete"):
        assert "kept by the cluster" in cymric.refused(verb, "-f", "-", stdin=tree)


def test_ipam_show(cymric: Cymric) -> None:
    """The table counts what blocks have given; orphans of deleted pools show without a pool."""
    cymric.ok("apply", "-f", "-", stdin=[pool(), pool("10.0.0.0/8", name="x") | {
        "spec": {"cidr": "172.16.0.0/12"}}])  # fmt: skip
    cymric.raw.put(BLOCK, block("node1", used=True))
    orphan = block(None, used=True).replace("10.244.0.0/26", "192.168.0.0/26")
    cymric.raw.put("/calico/ipam/v2/assignment/ipv4/block/192.168.0.0-26", orphan)
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in cymric.ok("ipam", "show", "--show-blocks").splitlines()
        if line.startswith("|")
    ]
    assert lines == [
        ["GROUPING", "CIDR", "IPS TOTAL", "IPS IN USE", "IPS FREE"],
        ["IP Pool", "10.244.0.0/16", "65536", "1 (0%)", "65535 (100%)"],
        ["Block", "10.244.0.0/26", "64", "1 (2%)", "63 (98%)"],
        ["IP Pool", "172.16.0.0/12", "1.0486e+06", "0 (0%)", "1.0486e+06 (100%)"],
        ["Block", "192.168.0.0/26", "64", "1 (2%)", "63 (98%)"],
    ]
    assert "Handle ID: h" in cymric.ok("ipam", "show", "--ip", "10.244.0.0")
    assert "10.244.0.1 is not assigned" in cymric.ok("ipam", "show", "--ip", "10.244.0.1")
    assert "AutoAllocateBlocks" in cymric.ok("ipam", "show", "--show-configuration")


# --- concurrency and outages (where only one of the two can show it) -------------------------------


def test_apply_tries_again_when_others_write() -> None:
    """Apply lands although another writes the object between its read and its write."""
    store = _Meddled(times=3)
    cymric = Cymric(InMemory(store), Session(store=store, environ={}))
    cymric.ok("apply", "-f", "-", stdin=resource("Node", "n", {}, labels={"from": "us"}))
    stored = cymric.stored(f"{RESOURCES}/nodes/n")
    assert stored["metadata"]["labels"] == {"from": "us"}
    assert stored["metadata"]["uid"] == "theirs"


def test_apply_gives_up_after_five_tries() -> None:
    """Apply does not try for ever: it says that others keep changing the object."""
    store = _Meddled(times=5)
    cymric = Cymric(InMemory(store), Session(store=store, environ={}))
    said = cymric.refused("apply", "-f", "-", stdin=resource("Node", "n", {}))
    assert "others kept changing it, 5 times" in said


def test_a_lost_answer_is_looked_up() -> None:
    """A write whose answer is lost counts as done when the datastore shows it."""
    store = MemoryDatastore()
    cymric = Cymric(InMemory(store), Session(store=store, environ={}))
    store.lose_answers()
    cymric.ok("create", "-f", "-", stdin=resource("Node", "n", {}))


def test_an_absent_datastore_has_its_own_exit_code() -> None:
    """When etcd does not answer, the message says where it was sought; the exit code is 3."""
    environ = {"ETCD_ENDPOINTS": "http://127.0.0.1:1"}
    result = CliRunner().invoke(cli, ["get", "node"], obj=Session(environ=environ))
    assert result.exit_code == 3
    assert "etcd does not answer at http://127.0.0.1:1" in result.stderr


class _Meddled(MemoryDatastore):
    """Another writer is quicker, the first `times` times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self._times = times

    async def commit(self, transaction: api.Transaction) -> int:
        if self._times and transaction.compares:
            self._times -= 1
            theirs = resource("Node", "n", {}, uid="theirs")
            (key,) = (compare.key for compare in transaction.compares)
            write = api.Put(key, json.dumps(theirs).encode())
            await super().commit(api.Transaction((), (write,)))
        return await super().commit(transaction)
