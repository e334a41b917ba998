"""What felix' calculation costs: a large cluster read, one label changed, ten thousand a second.

10,000 endpoints in 50 namespaces, 100 of them on this node, 1,000 policies with 1,000 different
selectors in their rules. No kernel, no datastore: bytes as etcd holds them go in, the picture comes
out. Times of changes are processor time of decoding, calculation and the new picture together.
There is nobody to compare with in the same run.

    python -m bench.felix_calc [endpoints [local [policies]]]
"""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench.row import Row, median
from cymric.datastore.api import WatchEvent
from cymric.datastore.syncer import decode
from felix.calc.state import Calculation

ENDPOINTS, LOCAL, POLICIES = 10_000, 100, 1_000
NAMESPACES, APPS = 50, 200
SINGLE_CHANGES = 300
RATE, SECONDS, BATCH = 10_000, 10, 500
PREFIX = "/calico/resources/v3/projectcalico.org/"
NODE = "node0"

Stored = tuple[str, bytes]


def resource(kind: str, plural: str, name: str, spec: object, **metadata: object) -> Stored:
    """One object as it is stored."""
    namespace = metadata.get("namespace")
    place = f"{namespace}/{name}" if namespace else name
    tree = {
        "kind": kind,
        "apiVersion": "projectcalico.org/v3",
        "metadata": {"name": name, **metadata},
        "spec": spec,
    }
    return f"{PREFIX}{plural}/{place}", json.dumps(tree, separators=(",", ":")).encode()


def endpoint(number: int, count: int, local: int, version: str) -> Stored:
    """One endpoint; the first `local` are on this node."""
    others = max(1, count // 100)
    node = NODE if number < local else f"node{1 + number % others}"
    namespace = f"ns{number % NAMESPACES}"
    address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}/32"
    return resource(
        "WorkloadEndpoint",
        "workloadendpoints",
        f"{node}-k8s-pod{number}-eth0",
        {
            "orchestrator": "k8s",
            "node": node,
            "pod": f"pod{number}",
            "endpoint": "eth0",
            "serviceAccountName": f"sa{number % 10}",
            "ipNetworks": [address],
            "profiles": [f"kns.{namespace}", f"ksa.{namespace}.sa{number % 10}"],
            "interfaceName": f"cali{number:07x}",
            "mac": "ee:ee:ee:ee:ee:ee",
            "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        },
        namespace=namespace,
        labels={
            "app": f"app{number % APPS}",
            "version": version,
            "pod-template-hash": f"{number % 997:x}",
            "projectcalico.org/namespace": namespace,
            "projectcalico.org/orchestrator": "k8s",
        },
    )


def policy(number: int) -> Stored:
    """One policy; its rule's selector is its own."""
    namespace = f"ns{number % NAMESPACES}"
    peer = f"app == 'app{number % APPS}' && version != 'v{number}'"
    rule = {
        "action": "Allow",
        "protocol": "TCP",
        "source": {"selector": peer},
        "destination": {"ports": [8080, "http"]},
    }
    spec = {
        "order": number,
        "selector": f"app in {{'app{number % LOCAL}', 'app{(number + 7) % LOCAL}'}}",
        "types": ["Ingress"],
        "ingress": [rule],
    }
    # Those of a namespace are about all in it, so that most of the policies are active here.
    if number >= POLICIES:
        # More than a node is ever subject to: the others are about somebody else's pods.
        spec["selector"] = f"tenant == 'tenant{number}'"
    elif number % 10:
        spec["selector"] = "version starts with 'v'"
    if number % 10:
        name = f"policy{number}"
        return resource("NetworkPolicy", "networkpolicies", name, spec, namespace=namespace)
    return resource("GlobalNetworkPolicy", "globalnetworkpolicies", f"policy{number}", spec)


def cluster(count: int, local: int, policies: int) -> Iterator[Stored]:
    """Everything that is stored."""
    yield resource("Tier", "tiers", "default", {"order": 1000000, "defaultAction": "Deny"})
    allow = [{"action": "Allow"}]
    for number in range(NAMESPACES):
        spec = {
            "ingress": allow,
            "egress": allow,
            "labelsToApply": {f"pcns.team{number % 5}": "yes", "pcns.env": f"env{number % 3}"},
        }
        yield resource("Profile", "profiles", f"kns.ns{number}", spec)
    for number in range(count):
        yield endpoint(number, count, local, "v1")
    for number in range(policies):
        yield policy(number)


def feed(calculation: Calculation, stored: list[Stored]) -> None:
    """As the syncer does."""
    for update in decode(WatchEvent(key, value, 1) for key, value in stored):
        calculation.on_update(update.key, update.value)


def rss_mib() -> float:
    """What this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1024 / 1024


def measure(count: int = ENDPOINTS, local: int = LOCAL, policies: int = POLICIES) -> list[Row]:
    """All rows."""
    size = f"{count:,} endpoints, {local} local, {policies:,} policies"
    stored = list(cluster(count, local, policies))
    gc.collect()
    memory_before = rss_mib()
    calculation = Calculation(NODE, {})
    began, began_cpu = time.perf_counter(), time.process_time()
    feed(calculation, stored)
    desired = calculation.desired()
    took, took_cpu = time.perf_counter() - began, time.process_time() - began_cpu
    gc.collect()
    memory = rss_mib() - memory_before
    assert len(desired.endpoints) == local, "the cluster is not the one described"
    chance = random.Random(1)
    singles = []
    for number in chance.choices(range(count), k=SINGLE_CHANGES):
        change = [endpoint(number, count, local, f"v{chance.randrange(policies)}")]
        started = time.process_time()
        feed(calculation, change)
        calculation.desired()
        singles.append(time.process_time() - started)
    busy, grown = storm(calculation, count, local, chance)
    return [
        Row(what=f"felix, in sync, {size}", unit="s", cymric=took),
        Row(what="felix, the same, processor time", unit="s", cymric=took_cpu),
        Row(what="felix, memory for it", unit="MiB", cymric=memory),
        Row(what="felix, sets and active policies", unit="sets", cymric=len(desired.ip_sets)),
        Row(what="felix, one label change, median", unit="ms", cymric=median(singles) * 1000),
        Row(what="felix, one label change, slowest", unit="ms", cymric=max(singles) * 1000),
        Row(
            what=f"felix, {RATE:,} label changes in batches of {BATCH}",
            unit="s of processor time",
            cymric=busy / SECONDS,
        ),
        Row(what=f"felix, memory grown after {SECONDS} x that", unit="MiB", cymric=grown),
    ]


def storm(
    calculation: Calculation, count: int, local: int, chance: random.Random
) -> tuple[float, float]:
    """Processor time of all changes (their making left out), and what memory grew by."""
    versions = [f"v{number}" for number in range(64)]
    busy = 0.0
    gc.collect()
    before = rss_mib()
    for _ in range(RATE * SECONDS // BATCH):
        batch = [
            endpoint(number, count, local, chance.choice(versions))
            for number in chance.choices(range(count), k=BATCH)
        ]
        started = time.process_time()
        feed(calculation, batch)
        calculation.desired()
        busy += time.process_time() - started
    gc.collect()
    return busy, rss_mib() - before


if __name__ == "__main__":
    for row in measure(*map(int, sys.argv[1:])):
        print(row)
