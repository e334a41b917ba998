"""Values survive our hands byte for byte, and what is broken is named by its key."""

from __future__ import annotations

import pytest

from cymric.model import codec
from cymric.model.ipam import DEFAULT_IPAM_CONFIG, AffinityState, AllocationBlock, BlockAffinity
from cymric.model.keys import BlockKey, HandleKey, IPAMConfigKey, ResourceKey
from cymric.model.net import parse_network
from cymric.model.policy import Profile
from cymric.model.resources import BGPPeer, IPPool, Node, ObjectMeta

RESOURCES = "/calico/resources/v3/projectcalico.org"
META = '"uid":"8d1f6a3a-0a52-4f0e-9c53-0b7c2d1f6b10","creationTimestamp":"2026-01-02T03:04:05Z"'

STORED = {
    f"{RESOURCES}/ippools/default-ipv4-ippool": (
        '{"kind":"IPPool","apiVersion":"projectcalico.org/v3","metadata":'
        f'{{"name":"default-ipv4-ippool",{META}}},"spec":{{"cidr":"192.168.0.0/16",'
        '"vxlanMode":"Never","ipipMode":"Never","natOutgoing":true,"blockSize":26,'
        '"nodeSelector":"all()","allowedUses":["Workload","Tunnel"],"assignmentMode":"Automatic"}}'
    ),
    f"{RESOURCES}/nodes/node-a": (
        '{"kind":"Node","apiVersion":"projectcalico.org/v3","metadata":'
        f'{{"name":"node-a",{META},"labels":{{"rack":"1"}}}},'
        '"spec":{"bgp":{"ipv4Address":"10.0.0.11/24"},'
        '"interfaces":[{"name":"eth0","addresses":["10.0.0.11"]}]},"status":{}}'
    ),
    f"{RESOURCES}/workloadendpoints/prod/node--a-k8s-web--1-eth0": (
        '{"kind":"WorkloadEndpoint","apiVersion":"projectcalico.org/v3","metadata":'
        f'{{"name":"node--a-k8s-web--1-eth0","namespace":"prod",{META},"labels":{{"app":"web",'
        '"projectcalico.org/namespace":"prod","projectcalico.org/orchestrator":"k8s"}},'
        '"spec":{"orchestrator":"k8s","node":"node-a","containerID":"0d9c5e1c2f","pod":"web-1",'
        '"endpoint":"eth0","ipNetworks":["192.168.10.1/32"],"profiles":["kns.prod"],'
        '"interfaceName":"cali2b4f0b7d9aa","mac":"5e:1c:9a:03:7f:22"}}'
    ),
    f"{RESOURCES}/workloadendpoints/prod/n-cni-c0-eth0": (
        '{"kind":"WorkloadEndpoint","apiVersion":"projectcalico.org/v3","metadata":'
        f'{{"name":"n-cni-c0-eth0","namespace":"prod",{META}}},"spec":{{"orchestrator":"cni",'
        '"node":"n","containerID":"c0","endpoint":"eth0","serviceAccountName":"web",'
        '"ipNetworks":["192.168.10.2/32","fd00:10::2/128"],'
        '"ipNATs":[{"internalIP":"192.168.10.2","externalIP":"192.0.2.7"}],'
        '"ipv4Gateway":"169.254.1.1","profiles":["kns.prod"],"interfaceName":"calic0",'
        '"mac":"5e:1c:9a:03:7f:23","ports":[{"name":"http","protocol":"TCP","port":80,'
        '"hostPort":8080,"hostIP":"10.0.0.1/32"},{"name":"","protocol":17,"port":53,'
        '"hostPort":0,"hostIP":""}],"allowSpoofedSourcePrefixes":["10.9.0.0/16","fd00:9::/64"],'
        '"qosControls":{"ingressBandwidth":1000000,"ingressMinburst":1500,'
        '"egressBandwidth":2000000,"egressPacketRate":100,"ingressMaxConnections":5,"dscp":"EF"}}}'
    ),
    f"{RESOURCES}/clusterinformations/default": (
        '{"kind":"ClusterInformation","apiVersion":"projectcalico.org/v3","metadata":'
        f'{{"name":"default",{META}}},"spec":{{"clusterGUID":"9f1c3f9c1f7b4f8fb9a0c1d2e3f4a5b6",'
        '"clusterType":"bgp","calicoVersion":"v3.32.1","datastoreReady":true}}'
    ),
    f"{RESOURCES}/bgppeers/tor-rack1": (
        '{"kind":"BGPPeer","apiVersion":"projectcalico.org/v3","metadata":'
        f'{{"name":"tor-rack1",{META}}},"spec":{{"nodeSelector":"rack == \\"1\\"",'
        '"peerIP":"10.1.0.1","asNumber":64601,"maxRestartTime":"2m0s"}}'
    ),
    f"{RESOURCES}/profiles/kns.prod": (
        '{"kind":"Profile","apiVersion":"projectcalico.org/v3","metadata":'
        f'{{"name":"kns.prod",{META}}},"spec":{{"ingress":[{{"action":"Allow"}}],'
        '"egress":[{"action":"Allow"}],"labelsToApply":{"pcns.env":"prod"}}}'
    ),
    "/calico/ipam/v2/assignment/ipv4/block/192.168.10.0-30": (
        '{"cidr":"192.168.10.0/30","affinity":"host:node-a",'
        '"affinity_claim_time":"2026-01-02T03:04:05Z","allocations":[0,1,null,null],'
        '"unallocated":[2,3],"attributes":[{"handle_id":"ipip-tunnel-addr-node-a",'
        '"secondary":{"node":"node-a","type":"ipipTunnelAddress"}},'
        '{"handle_id":"k8s-pod-network.0d9c5e1c2f","secondary":{"namespace":"prod",'
        '"node":"node-a","pod":"web-1"}}],"sequenceNumber":1767323045123456791,'
        '"sequenceNumberForAllocation":{"0":1767323045123456789,"1":1767323045123456790},'
        '"deleted":false}'
    ),
    "/calico/ipam/v2/host/node-a/ipv4/block/192.168.10.0-30": (
        '{"state":"confirmed","deleted":false}'
    ),
    "/calico/ipam/v2/handle/k8s-pod-network.0d9c5e1c2f": (
        '{"block":{"192.168.10.0/26":1,"fd00:10:244::40/122":1},"deleted":false}'
    ),
    "/calico/ipam/v2/config": (
        '{"auto_allocate_blocks":true,"kubeVirtVMAddressPersistence":"Enabled"}'
    ),
}


@pytest.mark.parametrize("key", STORED)
def test_round_trip(key: str) -> None:
    """What Calico stored comes out as the same bytes, under the same key."""
    decoded = codec.decode(key, STORED[key].encode())
    assert decoded is not None
    typed_key, value = decoded
    assert str(typed_key) == key
    assert codec.encode(value).decode() == STORED[key]


def test_go_escapes() -> None:
    """The characters that Go's encoder escapes in strings are written its way and read either."""
    value = {"selector": "a == 'x' && b < \u2028>"}
    encoded = codec.encode(value)
    assert encoded == b'{"selector":"a == \'x\' \\u0026\\u0026 b \\u003c \\u2028\\u003e"}'
    assert codec.decode_as(dict[str, str], encoded) == value


def test_older_block_without_claim_time_and_with_null_handle() -> None:
    """A block of an older release is read: null records, no claim time, deprecated host field."""
    block = codec.decode_as(
        AllocationBlock,
        b'{"cidr":"10.0.0.0/31","affinity":null,"allocations":[0,null],"unallocated":[1],'
        b'"attributes":[{"handle_id":null,"secondary":null}],"sequenceNumber":1,'
        b'"sequenceNumberForAllocation":null,"deleted":false,"hostAffinity":"x","new":1}',
    )
    assert block.owner_host is None
    assert [(ordinal, held.handle, held.attributes) for ordinal, held in block.held()] == [
        (0, None, {})
    ]


def test_empty_affinity_value_is_confirmed() -> None:
    """An affinity with an empty value is the legacy form of a confirmed one."""
    decoded = codec.decode("/calico/ipam/v2/host/n/ipv4/block/10.0.0.0-26", b"")
    assert decoded is not None
    assert decoded[1] == BlockAffinity(state=AffinityState.EMPTY)
    assert isinstance(decoded[1], BlockAffinity)
    assert decoded[1].is_confirmed


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        pytest.param(f"{RESOURCES}/ippools/p", "{", "truncated", id="broken JSON"),
        pytest.param(f"{RESOURCES}/ippools/p", "\udcff", "", id="not UTF-8"),
        pytest.param(f"{RESOURCES}/ippools/p/q", "{}", "not the key of a IPPool", id="long key"),
        pytest.param(
            f"{RESOURCES}/ippools/p",
            '{"kind":"IPPool","metadata":{"name":"p"},"spec":{"cidr":"10.0.0.1/8"}}',
            "host bits",
            id="host bits in the pool",
        ),
        pytest.param(
            f"{RESOURCES}/ippools/p",
            '{"kind":"IPPool","metadata":{"name":"p"},"spec":{"cidr":"10.0.0.0/28"}}',
            "larger than pool",
            id="blocks larger than the pool",
        ),
        pytest.param(
            f"{RESOURCES}/ippools/p",
            '{"kind":"IPPool","metadata":{"name":"other"},"spec":{"cidr":"10.0.0.0/16"}}',
            "named other",
            id="name differs from key",
        ),
        pytest.param(
            f"{RESOURCES}/ippools/p",
            '{"kind":"Node","metadata":{"name":"p"},"spec":{"cidr":"10.0.0.0/16"}}',
            "is a Node",
            id="kind differs from key",
        ),
        pytest.param(
            f"{RESOURCES}/nodes/n",
            '{"kind":"Node","metadata":{"name":"n"},"spec":{"bgp":{"ipv4Address":"fd00::1/64"}}}',
            "not IPv4",
            id="address of the wrong family",
        ),
        pytest.param(
            f"{RESOURCES}/bgppeers/b",
            '{"kind":"BGPPeer","metadata":{"name":"b"},"spec":{"peerIP":"10.0.0.1:x"}}',
            "invalid literal",
            id="port that is no number",
        ),
        pytest.param(
            f"{RESOURCES}/bgppeers/b",
            '{"kind":"BGPPeer","metadata":{"name":"b"},"spec":{"nodeSelector":"a =="}}',
            "",
            id="selector that does not parse",
        ),
        pytest.param(
            f"{RESOURCES}/workloadendpoints/ns/wrong",
            '{"kind":"WorkloadEndpoint","metadata":{"name":"wrong","namespace":"ns"},'
            '"spec":{"orchestrator":"cni","node":"n","containerID":"c","endpoint":"eth0"}}',
            "make its name n-cni-c-eth0",
            id="endpoint under a wrong name",
        ),
        pytest.param(
            f"{RESOURCES}/workloadendpoints/ns/n-cni-c-eth0",
            '{"kind":"WorkloadEndpoint","metadata":{"name":"n-cni-c-eth0","namespace":"ns"},'
            '"spec":{"orchestrator":"cni","node":"n","containerID":"c","endpoint":"eth0",'
            '"ipNATs":[{"internalIP":"10.0.0.1","externalIP":"fd00::1"}]}}',
            "other family",
            id="floating address of the other family",
        ),
        pytest.param(
            f"{RESOURCES}/workloadendpoints/ns/n-cni-c-eth0",
            '{"kind":"WorkloadEndpoint","metadata":{"name":"n-cni-c-eth0","namespace":"ns"},'
            '"spec":{"orchestrator":"cni","node":"n","containerID":"c","endpoint":"eth0",'
            '"allowSpoofedSourcePrefixes":["10.0.0.1/8","all"]}}',
            "'all'",
            id="spoofed prefix that is none",
        ),
        pytest.param(
            "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-31",
            '{"cidr":"10.0.0.2/31","allocations":[null,null],"unallocated":[0,1]}',
            "block 10.0.0.2/31",
            id="block under another block's key",
        ),
        pytest.param(
            "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-31",
            '{"cidr":"10.0.0.0/31","allocations":[null,0],"unallocated":[0]}',
            "without attribute record",
            id="dangling attribute index",
        ),
        pytest.param(
            "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-31",
            '{"cidr":"10.0.0.0/31","allocations":[null,null],"unallocated":[0,0]}',
            "twice",
            id="ordinal free twice",
        ),
        pytest.param(
            "/calico/ipam/v2/assignment/ipv4/block/10.0.0.0-31",
            '{"cidr":"10.0.0.0/31","allocations":[null,null],"unallocated":[0]}',
            "neither",
            id="ordinal lost",
        ),
        pytest.param("/calico/ipam/v2/assignment/ipv4/block/10.0.0.1-31", "{}", "", id="unmasked"),
        pytest.param("/calico/ipam/v2/assignment/ipv6/block/10.0.0.0-31", "{}", "", id="family"),
        pytest.param("/calico/ipam/v2/handle/a/b", "{}", "not the key", id="slash in a handle"),
    ],
)
def test_malformed_is_named(key: str, value: str, reason: str) -> None:
    """A value that cannot be right raises an error that starts with its key."""
    with pytest.raises(codec.Malformed) as caught:
        codec.decode(key, value.encode(errors="surrogateescape"))
    assert str(caught.value).startswith(f"{key}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "key",
    ["/registry/pods/x", "compact_rev_key", "/calico/ipam/v2/host/node-a", RESOURCES + "/x/y"],
)
def test_foreign_keys(key: str) -> None:
    """Keys that are none of the data model's are no error and no value."""
    assert codec.decode(key, b"anything") is None


def test_kinds_nobody_reads_yet_keep_their_tree() -> None:
    """A kind without typed form decodes to its JSON tree."""
    decoded = codec.decode(
        f"{RESOURCES}/livemigrations/x", b'{"kind":"LiveMigration","spec":{"order":5}}'
    )
    assert decoded == (
        ResourceKey("LiveMigration", "x"),
        codec.Unmodelled({"kind": "LiveMigration", "spec": {"order": 5}}),
    )


def test_defaults_are_what_calico_creates() -> None:
    """The IPAM configuration created when there is none reads as Calico writes it."""
    assert codec.encode(DEFAULT_IPAM_CONFIG).decode() == STORED["/calico/ipam/v2/config"]
    assert str(IPAMConfigKey()) == "/calico/ipam/v2/config"


def test_keys_of_both_families() -> None:
    """IPv6 blocks keep their colons; only the slash becomes a dash."""
    key = BlockKey(parse_network("fd00:10:244::40/122"))
    assert str(key) == "/calico/ipam/v2/assignment/ipv6/block/fd00:10:244::40-122"
    with pytest.raises(ValueError, match="slash"):
        HandleKey("a/b")


def test_objects_we_make_have_calicos_shape() -> None:
    """Objects built here carry kind and version, and drop what is default."""
    pool = IPPool(
        metadata=ObjectMeta(name="p"),
        spec=codec.decode_as(
            IPPool, STORED[f"{RESOURCES}/ippools/default-ipv4-ippool"].encode()
        ).spec,
    )
    assert codec.encode(pool).startswith(b'{"kind":"IPPool","apiVersion":"projectcalico.org/v3"')
    assert codec.encode(Node(metadata=ObjectMeta(name="n"))).endswith(b'"spec":{},"status":{}}')
    assert BGPPeer(metadata=ObjectMeta(name="b")).labels == {}
    assert Profile(metadata=ObjectMeta(name="b")).annotations == {}
