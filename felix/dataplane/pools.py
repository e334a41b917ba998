"""The pool manager: the fixed IP sets that rules of every node refer to.

`this-host` holds the addresses of all interfaces that are no workload's; the others come from the
datastore.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address

from felix.calc.values import Desired
from felix.ipset.sets import IPSet
from felix.rules.names import ALL_HOSTS, MASQUERADE_POOLS, NETWORK_POOLS, THIS_HOST

AddressesByInterface = Mapping[str, frozenset[IPv4Address]]


def sets(desired: Desired, addresses: AddressesByInterface) -> tuple[IPSet, ...]:
    """All sets that a node needs; `addresses` are those of all its interfaces."""
    own = frozenset(
        str(address)
        for name, found in addresses.items()
        if not desired.config.is_workload_interface(name)
        for address in found
    )
    return (
        IPSet(NETWORK_POOLS, desired.pools),
        IPSet(MASQUERADE_POOLS, desired.masquerade_pools),
        IPSet(ALL_HOSTS, desired.hosts),
        IPSet(THIS_HOST, own, type="hash:ip"),
    )
