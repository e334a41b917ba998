"""What the cluster's own objects mean here: parameters, pools, hosts, service ranges, the lock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from cymric.model.net import Network, host_network, parse_interface, parse_network
from cymric.model.resources import (
    BGPConfiguration,
    ClusterInformation,
    FelixConfiguration,
    IPPool,
    Node,
)
from felix.calc.config import FelixConfig, Source, from_object, settle
from felix.calc.values import Problem


def parameters(
    node_name: str,
    environment: Source,
    stored: Iterable[FelixConfiguration],
    *,
    has_ipv6: bool,
) -> tuple[FelixConfig, tuple[Problem, ...]]:
    """The parameters of this node, and what could not be read."""
    sources = [environment]
    problems = []
    found = {item.metadata.name: item for item in stored}
    for name in (f"node.{node_name}", "default"):
        if item := found.pop(name, None):
            sources.append(from_object(name, item.spec, item.annotations))
    for name in found:
        if not name.startswith("node."):
            reason = "scoped by selector: ignored"
            problems.append(Problem(f"FelixConfiguration {name}", reason))
    config, rejected = settle(sources)
    problems.extend(Problem(subject, reason) for subject, reason in rejected)
    if not has_ipv6:
        config = replace(config, ipv6_support=False)
    return config, tuple(problems)


def is_ready(stored: Iterable[ClusterInformation]) -> bool:
    """Whether the datastore may be acted upon."""
    return all(info.spec.datastoreReady is not False for info in stored)


def pools(stored: Iterable[IPPool]) -> tuple[frozenset[Network], frozenset[Network]]:
    """The pools' prefixes, and those of them that are masqueraded."""
    found = tuple(stored)
    return (
        frozenset(
            pool.spec.network
            for pool in found
            if tuple(pool.spec.allowed_uses) != ("LoadBalancer",)
        ),
        frozenset(pool.spec.network for pool in found if pool.spec.nat_outgoing),
    )


def hosts(stored: Iterable[Node], config: FelixConfig) -> Iterator[Network]:
    """Every node's addresses."""
    yield from map(parse_network, config.external_nodes)
    for node in stored:
        if bgp := node.spec.bgp:
            for text in (bgp.ipv4_address, bgp.ipv6_address):
                if text:
                    yield host_network(parse_interface(text).ip)


def service_cidrs(stored: BGPConfiguration | None) -> tuple[Network, ...]:
    """The service ranges of BGPConfiguration default, sorted by text."""
    if stored is None:
        return ()
    spec = stored.spec
    groups = (spec.service_cluster_ips, spec.service_external_ips, spec.service_load_balancer_ips)
    texts = sorted({item.cidr for group in groups for item in group})
    return tuple(map(parse_network, texts))
