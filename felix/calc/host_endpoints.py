"""Which host endpoint is whose interface's.

An interface belongs to the host endpoints of this node that name it, else to those that name none
and expect an address that it has; of several, to the one whose name comes first. `*` stands for
every interface that has none. An endpoint that names its interface counts whether or not the
interface is there (Calico waits for it): when it appears, its policy is there already.
Source: Calico 3.32 felix/dataplane/linux/endpoint_mgr.go, in our own words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from cymric.model.endpoints import HostEndpoint
from cymric.model.keys import ResourceKey
from cymric.model.net import Address
from felix.calc.policies import WILDCARD_INTERFACE
from felix.calc.values import Problem

AddressesByInterface = Mapping[str, frozenset[Address]]

_INTERFACE = re.compile(r"[A-Za-z0-9_.:@-]{1,15}")

Owners = dict[str, HostEndpoint]
"""Whose an interface is, by its name; `*` among them."""


def assign(
    stored: Iterable[HostEndpoint],
    interfaces: AddressesByInterface,
    is_workload_interface: Callable[[str], bool],
) -> tuple[Owners, tuple[Problem, ...]]:
    """Each interface's host endpoint, and what is left out and why."""
    owners: Owners = {}
    problems: list[Problem] = []
    unnamed: list[HostEndpoint] = []
    for one in sorted(stored, key=lambda one: one.metadata.name):
        subject, name = f"HostEndpoint {one.metadata.name}", one.spec.interface_name
        if not name:
            unnamed.append(one)
        elif name != WILDCARD_INTERFACE and not _INTERFACE.fullmatch(name):
            problems.append(Problem(subject, f"has no usable interface name ({name!r}): ignored"))
        elif is_workload_interface(name):
            problems.append(Problem(subject, f"{name} is a workload's interface: ignored"))
        elif name in owners:
            first = owners[name].metadata.name
            problems.append(Problem(subject, f"{name} already belongs to {first}"))
        else:
            owners[name] = one
    named = set(owners)
    for one in unnamed:
        expected = set(one.spec.addresses)
        found = [
            name
            for name, addresses in sorted(interfaces.items())
            if not is_workload_interface(name) and expected & addresses
        ]
        subject = f"HostEndpoint {one.metadata.name}"
        if not found:
            problems.append(Problem(subject, "no interface has an address that it expects"))
        for name in found:
            if name in named:
                continue
            if name in owners:
                first = owners[name].metadata.name
                problems.append(Problem(subject, f"{name} already belongs to {first}"))
            else:
                owners[name] = one
    return owners, tuple(problems)


def key_of(stored: HostEndpoint) -> ResourceKey:
    """Its key."""
    return ResourceKey("HostEndpoint", stored.metadata.name)
