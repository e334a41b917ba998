"""What felix tells people, on `<run_dir>/felix-status.sock`: one question line, one JSON document.

    dump [members]    what was worked out: parameters, endpoints, policies in order, sets, problems
    counters          what each rule of each policy matched on this node, read from the kernel
    explain {…}       what policy says of a connection between two pods or addresses

A dump is what is wanted; whether the kernel has it is the data plane's business and told by
readiness. Explanations are worked out from what is stored, by the meaning of policy and not by the
rendered rules (felix/calc/verdict.py), so they answer for every node's pods.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from cymric.datastore.api import Datastore, DatastoreError, WatchEvent
from cymric.datastore.syncer import decode
from cymric.kernel.command import CommandFailed, Commands
from cymric.model.endpoints import WorkloadEndpoint
from cymric.model.keys import ResourceKey, resource_prefix
from cymric.model.net import Address, parse_address
from cymric.model.rules import protocol_number
from cymric.model.strictest import Damaged
from felix import trials
from felix.calc import graph, verdict
from felix.calc.values import Desired, TierPolicies
from felix.iptables.backend import Backend
from felix.iptables.counters import Count, Place, of_ends, of_policies, parse_counted
from felix.rules.actions import deny
from felix.rules.marks import allocate
from felix.rules.names import FROM_HOST, FROM_WORKLOAD, TO_HOST, TO_WORKLOAD
from felix.rules.policy import RuleChains

_DIRECTIONS = {
    TO_WORKLOAD: "ingress",
    FROM_WORKLOAD: "egress",
    FROM_HOST: "ingress",
    TO_HOST: "egress",
}
_TABLES = ("raw", "mangle", "filter")


class Asked(msgspec.Struct, frozen=True, rename={"source": "from", "destination": "to"}):
    """A connection: pods as `namespace/name`, or addresses."""

    source: str
    destination: str
    port: int = 0
    protocol: str = "tcp"


class Questions:
    """See the chapter. `desired` gives the latest picture, without working anything out."""

    def __init__(
        self,
        desired: Callable[[], Desired],
        store: Datastore,
        commands: Commands,
        clock: Callable[[], float] = time.time,
        is_in_sync: Callable[[], bool] = lambda: True,
    ) -> None:
        self._is_in_sync = is_in_sync
        self._desired = desired
        self._store = store
        self._commands = commands
        self._clock = clock
        self.backend: Backend | None = None
        """Which iptables is in use, once that is known."""

    async def answer(self, question: str) -> Mapping[str, Any]:
        """Raises ValueError for what is no question, or cannot be answered."""
        word, _, rest = question.partition(" ")
        match word:
            case "" | "dump":
                picture = dump(self._desired(), with_members=rest == "members")
                return {"inSync": self._is_in_sync(), **picture}
            case "counters":
                return {"counters": await self._counters()}
            case "explain":
                return await self._explain(msgspec.json.decode(rest, type=Asked))
        raise ValueError(f"unknown question {word!r}")

    async def _counters(self) -> list[dict[str, Any]]:
        if self.backend is None:
            raise ValueError("no rules were written yet")
        desired = self._desired()
        found: dict[Place, Count] = {}
        for version in desired.config.ip_versions:
            backend = self.backend.of(version)
            for table in _TABLES:
                for place, count in (await self._counted(desired, backend, table)).items():
                    found[place] = found.get(place, Count()) + count
        return [
            {**dataclasses.asdict(place), **dataclasses.asdict(count)}
            for place, count in sorted(found.items(), key=lambda item: item[0])
        ]

    async def _counted(
        self, desired: Desired, backend: Backend, table: str
    ) -> Mapping[Place, Count]:
        config = desired.config
        try:
            done = (await self._commands.run((*backend.save(table), "-c"))).checked()
        except CommandFailed as error:
            raise ValueError(str(error)) from None
        counted = parse_counted(done.stdout)
        marks = allocate(config.iptables_mark_mask)
        chains = RuleChains(config, marks, backend.ip_version, deny(config, table))
        chains.update(desired.policies, desired.profiles)
        found = of_policies(chains.counted(), counted)
        return {**found, **of_ends(counted, _DIRECTIONS)}

    async def _explain(self, asked: Asked) -> Mapping[str, Any]:
        try:
            protocol = protocol_number(asked.protocol)
            stored = await self._stored()
        except DatastoreError as error:
            raise ValueError(f"the datastore does not answer: {error}") from None
        return explain(stored, asked, protocol)

    async def _stored(self) -> dict[ResourceKey, object]:
        """Everything that policy depends on, as it is in force now."""
        found: dict[ResourceKey, object] = {}
        for kind in sorted(graph.KINDS):
            listed = await self._store.list(resource_prefix(kind))
            events = [WatchEvent(one.key, one.value, one.revision) for one in listed.items]
            for update in decode(events):
                value = update.value
                if isinstance(update.key, ResourceKey):
                    value = trials.in_force(update.key, value, self._clock())
                if isinstance(value, Damaged):
                    value = value.stand_in
                if isinstance(update.key, ResourceKey) and value is not None:
                    found[update.key] = value
        return found


def explain(stored: Mapping[ResourceKey, object], asked: Asked, protocol: int) -> Mapping[str, Any]:
    """What both ends say, for each family that both have. Raises ValueError."""
    source, destination = _end(stored, asked.source), _end(stored, asked.destination)
    decisions = []
    for version in (4, 6):
        addresses = [
            next((one for one in end[1] if one.version == version), None)
            for end in (source, destination)
        ]
        if addresses[0] is None or addresses[1] is None:
            continue
        packet = verdict.Packet(
            source=addresses[0],
            destination=addresses[1],
            protocol=protocol,
            destination_port=asked.port,
            icmp_type=8 if version == 4 else 128,
        )
        for key, direction in ((source[0], "egress"), (destination[0], "ingress")):
            if key is not None:
                said = verdict.decide(stored, key, direction, packet)
                decisions.append(
                    {
                        "source": str(packet.source),
                        "destination": str(packet.destination),
                        "endpoint": f"{key.namespace}/{key.name}",
                        "direction": direction,
                        "action": said.action,
                        "by": said.by,
                        "rule": said.rule,
                    }
                )
    if not decisions:
        raise ValueError("neither end is a workload, or they have no family in common")
    is_allowed = all(one["action"] == "allow" for one in decisions)
    return {"decisions": decisions, "verdict": "allowed" if is_allowed else "denied"}


def _end(
    stored: Mapping[ResourceKey, object], name: str
) -> tuple[ResourceKey | None, tuple[Address, ...]]:
    """Whose policy counts at one end, and its addresses. Raises ValueError."""
    workloads = [(key, one) for key, one in stored.items() if isinstance(one, WorkloadEndpoint)]
    if "/" in name:
        for key, one in workloads:
            if one.workload_id == name:
                return key, one.spec.addresses
        raise ValueError(f"there is no workload {name}")
    address = parse_address(name)
    for key, one in workloads:
        if address in one.spec.addresses:
            return key, (address,)
    return None, (address,)


def dump(desired: Desired, *, with_members: bool = False) -> dict[str, Any]:
    """The picture as JSON."""
    policies = {
        str(id_): {
            "tier": one.tier,
            "ingress": [_plain(rule) for rule in one.inbound],
            "egress": [_plain(rule) for rule in one.outbound],
        }
        for id_, one in sorted(desired.policies.items())
    }
    sets = {
        id_: {
            "type": str(one.kind),
            "ipv4": sorted(one.members_v4) if with_members else len(one.members_v4),
            "ipv6": sorted(one.members_v6) if with_members else len(one.members_v6),
        }
        for id_, one in sorted(desired.ip_sets.items())
    }
    return {
        "ready": desired.is_ready,
        "config": _plain(desired.config),
        "endpoints": [
            {
                "endpoint": str(one.id),
                "interface": one.interface,
                "addresses": [str(address) for address in one.addresses],
                "tiers": _tiers(one.tiers),
                "profiles": list(one.profiles),
                "dscp": one.dscp,
            }
            for one in desired.endpoints
        ],
        "hostEndpoints": [
            {
                "endpoint": one.id,
                "interface": one.interface,
                "tiers": _tiers(one.tiers),
                "forwardTiers": _tiers(one.forward_tiers),
                "untrackedTiers": _tiers(one.untracked_tiers),
                "preDNATTiers": _tiers(one.pre_dnat_tiers),
                "profiles": list(one.profiles),
            }
            for one in desired.host_endpoints
        ],
        "policies": policies,
        "profiles": {name: _plain(one) for name, one in sorted(desired.profiles.items())},
        "sets": sets,
        "pools": sorted(map(str, desired.pools)),
        "masqueradePools": sorted(map(str, desired.masquerade_pools)),
        "natExclusions": sorted(map(str, desired.nat_exclusions)),
        "hosts": sorted(map(str, desired.hosts)),
        "serviceCIDRs": sorted(map(str, desired.service_cidrs)),
        "problems": [_plain(one) for one in desired.problems],
        "notes": [_plain(one) for one in desired.notes],
        "cluster": dict(Counter(desired.count_by_kind)),
    }


def _tiers(tiers: tuple[TierPolicies, ...]) -> list[dict[str, Any]]:
    return [
        {
            "tier": one.name,
            "end": str(one.default_action),
            "ingress": [str(id_) for id_ in one.inbound],
            "egress": [str(id_) for id_ in one.outbound],
        }
        for one in tiers
    ]


def _plain(value: object) -> Any:
    """A value of ours as JSON has it; what says nothing is left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        return {name: _plain(found) for name, found in fields.items() if found not in (None, ())}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float)) or value is None else str(value)
