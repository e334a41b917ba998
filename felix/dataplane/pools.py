"""All IP sets of a node: the fixed ones that rules of every node name, and those of policies.

`this-host` holds the addresses of all interfaces that are no workload's; the others come from the
datastore. Every set exists once for each family in use. A policy's set whose members are as before
is the same object as before, so large sets cost nothing when they do not change.
"""

from __future__ import annotations

from collections.abc import Mapping

from cymric.model.net import Address, Network, host_network
from felix.calc.values import Desired
from felix.ipset.sets import IPSet, texts
from felix.rules.names import ALL_HOSTS, DSCP_SOURCES, MASQUERADE_POOLS, NETWORK_POOLS, THIS_HOST

AddressesByInterface = Mapping[str, frozenset[Address]]


def sets(desired: Desired, addresses: AddressesByInterface) -> tuple[IPSet, ...]:
    """All sets that a node needs; `addresses` are those of all its interfaces."""
    own = frozenset(
        host_network(address)
        for name, found in addresses.items()
        if not desired.config.is_workload_interface(name)
        and not desired.config.is_excluded_interface(name)
        for address in found
    )
    fixed = (
        IPSet(
            set_id,
            texts(member for member in members if member.version == version),
            type=kind,
            ip_version=version,
        )
        for version in desired.config.ip_versions
        for set_id, members, kind in (
            (NETWORK_POOLS, desired.pools, "hash:net"),
            (MASQUERADE_POOLS, desired.masquerade_pools, "hash:net"),
            (ALL_HOSTS, desired.hosts, "hash:net"),
            (THIS_HOST, own, "hash:ip"),
        )
    )
    marked = _dscp_sources(desired)
    special = (
        IPSet(
            DSCP_SOURCES,
            texts(member for member in marked if member.version == version),
            type="hash:net",
            ip_version=version,
        )
        for version in desired.config.ip_versions
        if any(member.version == version for member in marked)
    )
    policy = (
        IPSet(one.id, one.members(version), str(one.kind), version, is_policy=True)
        for version in desired.config.ip_versions
        for one in desired.ip_sets.values()
    )
    return (*fixed, *special, *policy)


def _dscp_sources(desired: Desired) -> tuple[Network, ...]:
    """Whose packets are marked when they leave the cluster."""
    marked = (one for one in desired.endpoints if one.dscp is not None)
    return tuple(host_network(address) for one in marked for address in one.addresses)


def ingredients(desired: Desired) -> tuple[object, ...]:
    """What the sets are made of, to see whether they must be made anew."""
    return (
        desired.config,
        desired.pools,
        desired.masquerade_pools,
        desired.hosts,
        desired.ip_sets,
        _dscp_sources(desired),
    )
