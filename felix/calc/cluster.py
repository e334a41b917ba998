"""What the cluster's own objects mean here: parameters, pools, hosts, service ranges, the lock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from cymric.model.net import Network, host_network, parse_interface, parse_network
from cymric.model.resources import (
    BGPConfiguration,
    ClusterInformation,
    FelixConfiguration,
    IPPool,
    Node,
)
from cymric.model.selector import SelectorError
from cymric.model.selector import parse as parse_selector
from felix.calc.config import FelixConfig
from felix.calc.sources import Source, from_object, settle, without_effect
from felix.calc.values import NatExclusion, Problem

ANNOTATION_NAT_EXCLUDE = "cymric.io/nat-exclude"
"""On a pool with natOutgoing: prefixes that see its addresses untranslated, with commas."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of this node, what could not be read, and what is set without any effect."""

    config: FelixConfig
    problems: tuple[Problem, ...]
    notes: tuple[Problem, ...]


def parameters(
    node_name: str,
    node_labels: Mapping[str, str],
    environment: Source,
    stored: Iterable[FelixConfiguration],
    *,
    has_ipv6: bool,
) -> Parameters:
    """The parameters of a node that has these labels."""
    by_name = {item.metadata.name: item for item in stored}
    own, default = by_name.pop(f"node.{node_name}", None), by_name.pop("default", None)
    scoped, problems = _scoped(node_labels, by_name)
    found = [item for item in (own, *scoped, default) if item is not None]
    sources = [
        environment,
        *(from_object(item.metadata.name, item.spec, item.annotations) for item in found),
    ]
    config, rejected = settle(sources)
    problems += [Problem(subject, reason) for subject, reason in rejected]
    if not has_ipv6:
        config = replace(config, ipv6_support=False)
    notes = tuple(Problem(subject, reason) for subject, reason in without_effect(sources))
    return Parameters(config, tuple(problems), notes)


def _scoped(
    labels: Mapping[str, str], by_name: Mapping[str, FelixConfiguration]
) -> tuple[list[FelixConfiguration], list[Problem]]:
    """The objects whose selector matches the node; of several the first by name is strongest."""
    found: list[FelixConfiguration] = []
    problems: list[Problem] = []
    for name, item in sorted(by_name.items()):
        if name.startswith("node."):
            continue
        subject = f"FelixConfiguration {name}"
        text = item.spec.get("nodeSelector")
        if not isinstance(text, str) or not text.strip():
            problems.append(Problem(subject, "is for no node: it has no nodeSelector"))
            continue
        try:
            is_ours = parse_selector(text).matches(labels)
        except SelectorError as error:
            problems.append(Problem(subject, f"nodeSelector: {error}"))
            continue
        if is_ours:
            found.append(item)
    return found, problems


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


def nat_exclusions(
    stored: Iterable[IPPool],
) -> tuple[tuple[NatExclusion, ...], tuple[Problem, ...]]:
    """What the pools' annotations leave untranslated, and what of them cannot be read."""
    found: list[NatExclusion] = []
    problems: list[Problem] = []
    for pool in stored:
        text = pool.annotations.get(ANNOTATION_NAT_EXCLUDE, "")
        for word in filter(None, (part.strip() for part in text.split(","))):
            subject = f"IPPool {pool.metadata.name}"
            try:
                destination = parse_interface(word).network
            except ValueError as error:
                problems.append(Problem(subject, f"{ANNOTATION_NAT_EXCLUDE}: {error}"))
                continue
            if destination.version != pool.spec.network.version:
                reason = f"{ANNOTATION_NAT_EXCLUDE}: {word} is of the other family"
                problems.append(Problem(subject, reason))
            else:
                found.append(NatExclusion(pool.spec.network, destination))
    return tuple(found), tuple(problems)


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
