"""What happens to one packet on its whole way through a node, from the stored objects alone.

`verdict` says what one endpoint's policy says; this puts the verdicts in the order in which a
packet meets them. A way is the interface a packet comes in by and the one it leaves by; the empty
name is the host itself. Like `verdict` it is written from the description of policy alone, and what
the rendered tables and the kernel do is compared with it.

    in by an interface of the host   untracked, then pre-DNAT policy; what either allows has no
                                     more to fear from the host's policy for what comes in
    ends at the host                 the host's own policy, or the workload's egress policy and then
                                     defaultEndpointToHostAction
    passes through                   forward policy of the way in; egress policy of the workload it
                                     comes from; ingress policy of the one it goes to; forward
                                     policy of the way out
    begins at the host               to a workload: nothing; else untracked, then the host's policy

Ports of the failsafe lists are open to the host's own traffic before any policy of the host.
Covered is the first packet of a connection, not translated, from an address that is the sender's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from cymric.model.endpoints import HostEndpoint, WorkloadEndpoint
from cymric.model.keys import ResourceKey
from cymric.model.net import Address
from cymric.model.rules import protocol_number
from felix.calc.config import FelixConfig, ProtocolPort
from felix.calc.verdict import (
    Decision,
    Objects,
    Packet,
    Trail,
    decide,
    decide_early,
    decide_forwarded,
)

ALLOWED = Decision("allow", "no policy")
_NEIGHBOUR_DISCOVERY = (130, 131, 132, 133, 135, 136)
_UDP, _IPIP, _ICMPV6 = 17, 4, 58
_ANY = "*"


@dataclass(frozen=True, slots=True)
class Way:
    """By which interfaces of the node; the empty name is the host itself."""

    comes_in: str
    goes_out: str


@dataclass(frozen=True)
class Node:
    """What a node knows: the stored objects, its parameters, its interfaces with addresses."""

    name: str
    objects: Objects
    config: FelixConfig = field(default_factory=FelixConfig)
    interfaces: Mapping[str, frozenset[Address]] = field(default_factory=dict)


def judge(node: Node, way: Way, packet: Packet, trail: Trail | None = None) -> tuple[Decision, ...]:
    """Every decision on the way, in order; the last one is what happens to the packet.

    Decisions of `none` are those of policy that left the packet to what comes later. The rules that
    matched are added to `trail`.
    """
    found: list[Decision] = []
    for decision in _Judge(node, way, packet, trail).decisions():
        found.append(decision)
        if decision.action == "deny":
            break
    if not found or found[-1].action == "none":
        found.append(ALLOWED)
    return tuple(found)


class _Judge:
    def __init__(self, node: Node, way: Way, packet: Packet, trail: Trail | None) -> None:
        self._trail = trail
        self._node = node
        self._objects = node.objects
        self._config = node.config
        self._way = way
        self._packet = packet

    def decisions(self) -> Iterator[Decision]:
        if not self._way.comes_in:
            yield from self._from_host()
            return
        is_accepted = False
        for decision in self._early():
            yield decision
            is_accepted = decision.action == "allow"
        if not self._way.goes_out:
            yield from self._to_host(is_accepted=is_accepted)
        else:
            yield from self._through(is_accepted=is_accepted)

    # --- the stages -------------------------------------------------------------------------------

    def _early(self) -> Iterator[Decision]:
        """Untracked policy, then policy before address translation unless that allowed it."""
        packet, name = self._packet, self._way.comes_in
        owner = self._owner(name)
        if owner is None:
            return
        config = self._config
        untracked = Decision("none", "no untracked policy")
        if self._is_named(owner):  # one for all interfaces has none
            opened, answered = config.failsafe_inbound, config.failsafe_outbound
            far = packet.source
            if not self._is_failsafe(opened, far) and not self._is_answer(answered, far):
                untracked = self._decide_early(owner, "ingress", "untracked")
            yield untracked
        if untracked.action == "none" and not self._is_failsafe(
            config.failsafe_inbound, packet.source
        ):
            yield self._decide_early(owner, "ingress", "pre-DNAT")

    def _to_host(self, *, is_accepted: bool) -> Iterator[Decision]:
        packet, name = self._packet, self._way.comes_in
        if self._config.is_workload_interface(name):
            if packet.protocol == _ICMPV6 and packet.icmp_type in _NEIGHBOUR_DISCOVERY:
                yield Decision("allow", "neighbour discovery")
                return
            yield self._from_workload(name)
            if self._config.default_endpoint_to_host_action in ("drop", "reject"):
                yield Decision("deny", "defaultEndpointToHostAction")
            return
        owner = self._owner(name)
        if owner is None or is_accepted:
            return
        if self._is_failsafe(self._config.failsafe_inbound, packet.source):
            yield Decision("allow", "failsafe port")
        else:
            yield decide(self._objects, _key(owner), "ingress", packet, self._trail)

    def _through(self, *, is_accepted: bool) -> Iterator[Decision]:
        packet, way, objects = self._packet, self._way, self._objects
        if not is_accepted and (owner := self._owner(way.comes_in)):
            yield decide_forwarded(objects, _key(owner), "ingress", packet, self._trail)
        if self._config.is_workload_interface(way.comes_in):
            yield self._from_workload(way.comes_in)
        if self._config.is_workload_interface(way.goes_out):
            yield self._of_workload(way.goes_out, "ingress")
        if owner := self._owner(way.goes_out):
            yield decide_forwarded(objects, _key(owner), "egress", packet, self._trail)

    def _from_host(self) -> Iterator[Decision]:
        packet, name, config = self._packet, self._way.goes_out, self._config
        owner = self._owner(name)
        if owner is None or config.is_workload_interface(name):
            return
        far = packet.destination
        is_failsafe = self._is_failsafe(config.failsafe_outbound, far)
        if (
            self._is_named(owner)
            and not is_failsafe
            and not self._is_answer(config.failsafe_inbound, far)
        ):
            early = self._decide_early(owner, "egress", "untracked")
            yield early
            if early.action == "allow":
                return
        if is_failsafe:
            yield Decision("allow", "failsafe port")
        else:
            yield decide(self._objects, _key(owner), "egress", packet, self._trail)

    def _decide_early(self, owner: HostEndpoint, direction: str, kind: str) -> Decision:
        key = _key(owner)
        return decide_early(self._objects, key, direction, self._packet, kind, self._trail)

    # --- endpoints --------------------------------------------------------------------------------

    def _from_workload(self, interface: str) -> Decision:
        packet, config = self._packet, self._config
        is_vxlan = packet.protocol == _UDP and packet.destination_port == config.vxlan_port
        is_tunnel = (is_vxlan and not config.allow_vxlan_from_workloads) or (
            packet.protocol == _IPIP and not config.allow_ipip_from_workloads
        )
        # An interface that nobody knows is dropped as well; both before any policy.
        if is_tunnel and self._workload(interface) is not None:
            return Decision("deny", "tunnels from workloads")
        return self._of_workload(interface, "egress")

    def _of_workload(self, interface: str, direction: str) -> Decision:
        key = self._workload(interface)
        if key is None:
            return Decision("deny", "unknown interface")
        return decide(self._objects, key, direction, self._packet, self._trail)

    def _workload(self, interface: str) -> ResourceKey | None:
        """Whose an interface is: the first by name of those on it with an address of the family."""
        found = [
            (f"{stored.spec.orchestrator}/{stored.workload_id}/{stored.spec.endpoint}", key, stored)
            for key, stored in self._objects.items()
            if isinstance(stored, WorkloadEndpoint)
            and stored.spec.node == self._node.name
            and stored.spec.interface_name == interface
            and stored.spec.ip_networks
        ]
        if not found:
            return None
        _, key, first = min(found, key=lambda one: one[0])
        versions = {address.version for address in first.spec.addresses}
        return key if self._packet.ip_version in versions else None

    def _owner(self, interface: str) -> HostEndpoint | None:
        """The host endpoint of an interface: by name, else by address, else the one for all."""
        here = [one for one in self._host_endpoints() if one.spec.node == self._node.name]
        addresses = self._node.interfaces.get(interface, frozenset())
        is_workload = self._config.is_workload_interface(interface)
        named = [one for one in here if one.spec.interface_name == interface]
        expecting = [
            one
            for one in here
            if not one.spec.interface_name and addresses & set(one.spec.addresses)
        ]
        for_all = [one for one in here if one.spec.interface_name == _ANY]
        for group in (for_all,) if is_workload else (named, expecting, for_all):
            if group:
                return min(group, key=lambda one: one.metadata.name)
        return None

    def _host_endpoints(self) -> Iterator[HostEndpoint]:
        return (one for one in self._objects.values() if isinstance(one, HostEndpoint))

    def _is_named(self, owner: HostEndpoint) -> bool:
        return owner.spec.interface_name != _ANY

    # --- failsafe ports ---------------------------------------------------------------------------

    def _is_failsafe(self, ports: Iterable[ProtocolPort], far: Address) -> bool:
        return self._is_one_of(ports, far, self._packet.destination_port)

    def _is_answer(self, ports: Iterable[ProtocolPort], far: Address) -> bool:
        """Whether it could be the answer to a packet to a failsafe port of the other direction."""
        return self._is_one_of(ports, far, self._packet.source_port)

    def _is_one_of(self, ports: Iterable[ProtocolPort], far: Address, port: int) -> bool:
        return any(
            protocol_number(one.protocol) == self._packet.protocol
            and one.port == port
            and (one.net is None or far in one.net)
            for one in ports
        )


def _key(owner: HostEndpoint) -> ResourceKey:
    return ResourceKey("HostEndpoint", owner.metadata.name)
