"""The pool manager: the fixed IP sets that rules of every node refer to.

`this-host` holds the addresses of all interfaces that are no workload's; the others come from the
datastore. Every set exists once for each family in use.
"""

from __future__ import annotations

from collections.abc import Mapping

from cymric.model.net import Address, host_network
from felix.calc.values import Desired
from felix.ipset.sets import IPSet
from felix.rules.names import ALL_HOSTS, MASQUERADE_POOLS, NETWORK_POOLS, THIS_HOST

AddressesByInterface = Mapping[str, frozenset[Address]]


def sets(desired: Desired, addresses: AddressesByInterface) -> tuple[IPSet, ...]:
    """All sets that a node needs; `addresses` are those of all its interfaces."""
    own = frozenset(
        host_network(address)
        for name, found in addresses.items()
        if not desired.config.is_workload_interface(name)
        for address in found
    )
    return tuple(
        IPSet(
            set_id,
            frozenset(member for member in members if member.version == version),
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


def ingredients(desired: Desired) -> tuple[object, ...]:
    """What the sets are made of, to see whether they must be made anew."""
    return (desired.config, desired.pools, desired.masquerade_pools, desired.hosts)
