"""All IP sets of a node: the fixed ones that rules of every node name, and those of policies.

`this-host` holds the addresses of all interfaces that are no workload's; the others come from the
datastore. Every set exists once for each family in use. A policy's set whose members are as before
is the same object as before, so large sets cost nothing when they do not change.
"""

from __future__ import annotations

from collections.abc import Mapping

from cymric.model.net import Address, Network, host_network
from felix.calc.values import Desired
from felix.calc.values import IPSet as CalculatedSet
from felix.ipset.sets import IPSet, texts
from felix.rules.names import ALL_HOSTS, DSCP_SOURCES, MASQUERADE_POOLS, NETWORK_POOLS, THIS_HOST

AddressesByInterface = Mapping[str, frozenset[Address]]


def sets(desired: Desired, addresses: AddressesByInterface) -> tuple[IPSet, ...]:
    """All sets that a node needs; `addresses` are those of all its interfaces."""
    return Sets().sets(desired, addresses)


class _PolicySets:
    """The sets of policies by family; those of which nothing changed stay the same objects."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, int], tuple[CalculatedSet, IPSet]] = {}

    def sets(self, desired: Desired) -> list[IPSet]:
        """All of them, of all families in use."""
        before, self._made = self._made, {}
        found = []
        for version in desired.config.ip_versions:
            for set_id, one in desired.ip_sets.items():
                made = before.get((set_id, version))
                if made is None or made[0] is not one:
                    kind, members = str(one.kind), one.members(version)
                    made = (one, IPSet(set_id, members, kind, version, is_policy=True))
                self._made[set_id, version] = made
                found.append(made[1])
        return found


class Sets:
    """All sets of one node, again and again; see `sets`."""

    def __init__(self) -> None:
        self._policy = _PolicySets()

    def sets(self, desired: Desired, addresses: AddressesByInterface) -> tuple[IPSet, ...]:
        """All sets that a node needs; `addresses` are those of all its interfaces."""
        return (*_fixed(desired, addresses), *self._policy.sets(desired))


def _fixed(desired: Desired, addresses: AddressesByInterface) -> tuple[IPSet, ...]:
    """Those that rules of every node name, and those of endpoints with special wishes."""
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
    return (*fixed, *special)


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
