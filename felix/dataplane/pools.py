"""The pool manager: the fixed IP sets that rules of every node refer to.

`this-host` holds the addresses of all interfaces that are no workload's; the others come from the
datastore.
"""

from __future__ import annotations

from ipaddress import IPv4Interface

from cymric.kernel.links import Links, NoSuchLink
from felix.calc.values import Desired
from felix.dataplane.interfaces import Interfaces
from felix.ipset.sets import IPSet
from felix.rules.names import ALL_HOSTS, MASQUERADE_POOLS, NETWORK_POOLS, THIS_HOST


def sets(desired: Desired, host_addresses: frozenset[str]) -> tuple[IPSet, ...]:
    """All sets that a node needs."""
    return (
        IPSet(NETWORK_POOLS, desired.pools),
        IPSet(MASQUERADE_POOLS, desired.masquerade_pools),
        IPSet(ALL_HOSTS, desired.hosts),
        IPSet(THIS_HOST, host_addresses, type="hash:ip"),
    )


async def host_addresses(links: Links, interfaces: Interfaces, desired: Desired) -> frozenset[str]:
    """The IPv4 addresses of the host itself. Raises KernelError."""
    found: set[str] = set()
    for link in interfaces.all():
        if desired.config.is_workload_interface(link.name):
            continue
        try:
            addresses = await links.addresses(link.index)
        except NoSuchLink:
            continue
        found |= {str(one.ip) for one in addresses if isinstance(one, IPv4Interface)}
    return frozenset(found)
