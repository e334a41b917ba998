"""The standing invariant of IPAM, computed from one snapshot. Pure.

    one owner a block · block and affinity agree both ways · no overlap, of whatever size
    handles = allocations = addresses in use · what a node owns = what it advertises

What breaks the invariant is a problem. What looks odd and is known to be harmless is a note, with
its name: a claim half made, counts of a handle that a crash of a Calico node left too high, blocks
of former pools, an allocation so young that its workload may still be starting.
Source: Calico's IPAM data model and what `calicoctl ipam check` looks at; the comparisons of blocks
with affinities, with each other and with announcements are ours.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from cymric.model.ipam import (
    HOST_AFFINITY,
    LOAD_BALANCER_AFFINITY,
    WINDOWS_RESERVED_HANDLE,
    AffinityState,
    AllocationBlock,
)
from cymric.model.keys import AffinityKey
from cymric.model.net import Address, Network, contains, host_network
from ipam import block as blocks
from ipam.snapshot import Snapshot, Use, affinity_text, has_handle_key

SETTLING_S = 90.0
"""How long an ADD may take (Calico's limit): until then an address may wait for its workload."""

_GO_TIME = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.\d+)? ([+-]\d{4})")


class Kind(StrEnum):
    """What was found, by the name it has in reports."""

    UNREADABLE = "unreadable"
    TWO_OWNERS = "two-owners"
    STALE_AFFINITY = "stale-affinity"
    AFFINITY_WITHOUT_BLOCK = "affinity-without-block"
    BLOCK_WITHOUT_AFFINITY = "block-without-affinity"
    OVERLAP = "overlap"
    ALLOCATED_TWICE = "allocated-twice"
    LEAKED_ADDRESS = "leaked-address"
    NOT_ALLOCATED = "not-allocated"
    SHARED_ADDRESS = "shared-address"
    WRONG_NODE = "wrong-node"
    MISSING_HANDLE = "missing-handle"
    HANDLE_TOO_LOW = "handle-too-low"
    NOT_ADVERTISED = "not-advertised"
    ADVERTISED_IN_VAIN = "advertised-in-vain"
    UNSETTLED_CLAIM = "unsettled-claim"
    NO_OWNER = "no-owner"
    DEAD_NODE = "dead-node"
    OUTSIDE_POOLS = "block-outside-pools"
    OTHER_SIZE = "block-of-other-size"
    UNTIDY_BLOCK = "untidy-block"
    FOREIGN_ADDRESS = "address-outside-pools"
    STARTING = "starting"
    LOAD_BALANCER = "load-balancer"
    HANDLE_TOO_HIGH = "handle-too-high"
    LEAKED_HANDLE = "leaked-handle"


NOTES = frozenset(
    {
        Kind.UNSETTLED_CLAIM,
        Kind.NO_OWNER,
        Kind.DEAD_NODE,
        Kind.OUTSIDE_POOLS,
        Kind.OTHER_SIZE,
        Kind.UNTIDY_BLOCK,
        Kind.FOREIGN_ADDRESS,
        Kind.STARTING,
        Kind.LOAD_BALANCER,
        Kind.HANDLE_TOO_HIGH,
        Kind.LEAKED_HANDLE,
    }
)
"""The kinds that are no problem."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found; `subject` is the block, address, handle or key it is about."""

    kind: Kind
    subject: str
    text: str

    @property
    def is_problem(self) -> bool:
        """Whether it breaks the invariant."""
        return self.kind not in NOTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One address that a block says is given. `owner` is the block's node, `users` who uses it."""

    address: Address
    block: Network
    handle: str | None
    attributes: Mapping[str, str]
    sequence_number: int
    owner: str
    users: tuple[str, ...]

    @property
    def node(self) -> str:
        """The node it was given to; the block's, when the holder did not say."""
        return self.attributes.get("node", "") or self.owner

    @property
    def is_borrowed(self) -> bool:
        """Whether another node than the block's uses it."""
        return self.node != self.owner


@dataclass(frozen=True, slots=True)
class Advertised:
    """What one node's speaker says it advertises."""

    node: str
    prefixes: frozenset[Network]


@dataclass(frozen=True, slots=True)
class Audit:
    """What is allocated, and everything found, in the order of kinds."""

    allocations: tuple[Allocation, ...]
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What breaks the invariant."""
        return tuple(finding for finding in self.findings if finding.is_problem)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What is odd and harmless."""
        return tuple(finding for finding in self.findings if not finding.is_problem)

    def subjects(self, kind: Kind) -> tuple[str, ...]:
        """What the findings of one kind are about, each once."""
        return tuple(dict.fromkeys(f.subject for f in self.findings if f.kind is kind))


def audit(snapshot: Snapshot, *, now_s: float, advertised: Advertised | None = None) -> Audit:
    """Everything that is wrong or odd. `now_s` is Unix time; it tells old allocations from new."""
    users = _users(snapshot.uses)
    allocations = tuple(allocations_of(snapshot, users))
    found = [
        *(Finding(Kind.UNREADABLE, key, why) for key, why in snapshot.unreadable.items()),
        *_ownership(snapshot),
        *_overlaps(snapshot.blocks),
        *_places(snapshot),
        *_addresses(snapshot, allocations, users, now_s),
        *_handles(snapshot, allocations),
        *(_advertising(snapshot, advertised) if advertised is not None else ()),
    ]
    order = {kind: place for place, kind in enumerate(Kind)}
    return Audit(allocations, tuple(sorted(found, key=lambda finding: order[finding.kind])))


def confirmed(earlier: Audit, later: Audit) -> Audit:
    """The later audit without the problems that the earlier does not show.

    A workload that goes or comes is two writes or more: between them its address looks leaked. Such
    a moment is over when one looks again.
    """
    known = {(finding.kind, finding.subject) for finding in earlier.problems}
    stayed = (f for f in later.findings if not f.is_problem or (f.kind, f.subject) in known)
    return Audit(later.allocations, tuple(stayed))


def allocations_of(
    snapshot: Snapshot, users: Mapping[Address, Sequence[Use]] | None = None
) -> Iterator[Allocation]:
    """Every address that is given, in the order of blocks."""
    users = _users(snapshot.uses) if users is None else users
    for network, block in snapshot.blocks.items():
        sequences = block.sequence_number_for_allocation or {}
        for ordinal, holder in block.held():
            address = block.address(ordinal)
            is_reserved = holder.handle == WINDOWS_RESERVED_HANDLE
            yield Allocation(
                address=address,
                block=network,
                handle=None if is_reserved else holder.handle,
                attributes=holder.attributes,
                sequence_number=sequences.get(str(ordinal), 0),
                owner=block.owner_host or "",
                users=("Reserved for Windows",)
                if is_reserved
                else tuple(use.user for use in users.get(address, ())),
            )


# --- blocks ---------------------------------------------------------------------------------------


def _ownership(snapshot: Snapshot) -> Iterator[Finding]:
    claims: dict[Network, list[str]] = defaultdict(list)
    for key, affinity in snapshot.affinities.items():
        block, claimant = snapshot.blocks.get(key.cidr), affinity_text(key)
        if affinity.is_confirmed:
            claims[key.cidr].append(claimant)
        else:
            whose = "nobody yet" if block is None else (block.affinity or "nobody")
            text = f"the claim of {claimant} is {affinity.state}; the block is of {whose}"
            yield Finding(Kind.UNSETTLED_CLAIM, str(key.cidr), text)
            continue
        if block is None:
            text = f"{claimant} claims it, but there is no such block"
            yield Finding(Kind.AFFINITY_WITHOUT_BLOCK, str(key.cidr), text)
        elif block.affinity != claimant:
            text = f"{claimant} claims it, but the block is of {block.affinity or 'nobody'}"
            yield Finding(Kind.STALE_AFFINITY, str(key.cidr), text)
    for network, claimants in claims.items():
        if len(claimants) > 1:
            yield Finding(Kind.TWO_OWNERS, str(network), f"claimed by {' and '.join(claimants)}")
    known = {(affinity_text(key), key.cidr) for key in snapshot.affinities}
    for network, block in snapshot.blocks.items():
        if block.affinity is None:
            text = "empty, and nobody's" if block.is_empty else "nobody's; its addresses stay"
            yield Finding(Kind.NO_OWNER, str(network), text)
        elif (block.affinity, network) not in known:
            text = f"of {block.affinity}, which has no claim on it"
            yield Finding(Kind.BLOCK_WITHOUT_AFFINITY, str(network), text)
    for node, owned in _owned_by_the_dead(snapshot):
        text = f"node {node} does not exist and owns {', '.join(owned)}: see `cymric ipam gc`"
        yield Finding(Kind.DEAD_NODE, node, text)


def _owned_by_the_dead(snapshot: Snapshot) -> Iterator[tuple[str, list[str]]]:
    owned: dict[str, set[Network]] = defaultdict(set)
    for network, block in snapshot.blocks.items():
        if block.owner_host:
            owned[block.owner_host].add(network)
    for key in snapshot.affinities:
        if key.owner_type == "host":
            owned[key.owner].add(key.cidr)
    for node in sorted(owned.keys() - snapshot.nodes):
        yield node, [str(network) for network in sorted(owned[node], key=_order)]


def _overlaps(found: Mapping[Network, AllocationBlock]) -> Iterator[Finding]:
    """Blocks that share addresses: of two, one contains the other."""
    around: list[Network] = []
    for network in sorted(found, key=_order):
        while around and not contains(around[-1], network):
            around.pop()
        for outer in around:
            yield Finding(Kind.OVERLAP, str(network), f"lies inside block {outer}")
        around.append(network)


def _places(snapshot: Snapshot) -> Iterator[Finding]:
    for network, block in snapshot.blocks.items():
        pool = snapshot.pool_of(network)
        if pool is None:
            yield Finding(Kind.OUTSIDE_POOLS, str(network), "lies in no IPPool")
        elif pool.spec.block_prefix_length != network.prefixlen:
            text = f"pool {pool.metadata.name} has blocks of /{pool.spec.block_prefix_length}"
            yield Finding(Kind.OTHER_SIZE, str(network), text)
        for text in blocks.problems(block):
            yield Finding(Kind.UNTIDY_BLOCK, str(network), text)


# --- addresses ------------------------------------------------------------------------------------


def _addresses(
    snapshot: Snapshot,
    allocations: Sequence[Allocation],
    users: Mapping[Address, Sequence[Use]],
    now_s: float,
) -> Iterator[Finding]:
    by_address: dict[Address, list[Allocation]] = defaultdict(list)
    for allocation in allocations:
        by_address[allocation.address].append(allocation)
        if not allocation.users:
            yield _unused(snapshot, allocation, now_s)
    for address, several in by_address.items():
        if len(several) > 1:
            where = " and ".join(str(allocation.block) for allocation in several)
            yield Finding(Kind.ALLOCATED_TWICE, str(address), f"allocated in {where}")
    pools = [pool.spec.network for pool in snapshot.pools.values() if not pool.spec.disabled]
    for address, uses in users.items():
        names = " and ".join(use.user for use in uses)
        if len(uses) > 1:
            yield Finding(Kind.SHARED_ADDRESS, str(address), f"has multiple owners: {names}")
        held = by_address.get(address)
        if held is None:
            network = host_network(address)
            if any(contains(pool, network) for pool in pools):
                text = f"in use by {names} and in active IPAM pool but has no IPAM allocation"
                yield Finding(Kind.NOT_ALLOCATED, str(address), text)
            else:
                text = f"in use by {names} is not in any active IP pool"
                yield Finding(Kind.FOREIGN_ADDRESS, str(address), text)
            continue
        for use in uses:
            nodes = {allocation.attributes.get("node", use.node) for allocation in held}
            if use.node not in nodes:
                text = f"{use.user} is on {use.node}, it was given to {' and '.join(nodes)}"
                yield Finding(Kind.WRONG_NODE, str(address), text)


def _unused(snapshot: Snapshot, allocation: Allocation, now_s: float) -> Finding:
    address, text = str(allocation.address), describe(allocation)
    owner = snapshot.blocks[allocation.block].affinity
    if owner == LOAD_BALANCER_AFFINITY or (allocation.handle or "").startswith("lb-"):
        return Finding(
            Kind.LOAD_BALANCER, address, f"of a service, which only Kubernetes has; {text}"
        )
    age_s = _age_s(allocation.attributes.get("timestamp", ""), now_s)
    if age_s is not None and abs(age_s) < SETTLING_S:
        return Finding(Kind.STARTING, address, f"given {age_s:.0f} s ago, not in use yet; {text}")
    return Finding(Kind.LEAKED_ADDRESS, address, f"leaked; {text}")


def describe(allocation: Allocation) -> str:
    """Handle and attributes of an allocation, in one line as calicoctl prints them."""
    extra = ",".join(f"{name}={value}" for name, value in sorted(allocation.attributes.items()))
    return f"attrs Main:{allocation.handle or '<none>'} Extra:{extra}"


def _age_s(text: str, now_s: float) -> float | None:
    """Seconds since a moment in Go's spelling; None if it is not readable."""
    match = _GO_TIME.match(text)
    if match is None:
        return None
    try:
        moment = datetime.strptime(f"{match[1]} {match[2]}", "%Y-%m-%d %H:%M:%S %z")
    except ValueError:
        return None
    return now_s - moment.timestamp()


# --- handles and announcements --------------------------------------------------------------------


def _handles(snapshot: Snapshot, allocations: Iterable[Allocation]) -> Iterator[Finding]:
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for allocation in allocations:
        if allocation.handle is not None and has_handle_key(allocation.handle):
            counted[allocation.handle][str(allocation.block)] += 1
    for handle in sorted(counted.keys() - snapshot.handles.keys()):
        text = "is in use in a block but doesn't exist"
        yield Finding(Kind.MISSING_HANDLE, handle, text)
    for handle, stored in snapshot.handles.items():
        if handle not in counted:
            yield Finding(Kind.LEAKED_HANDLE, handle, "doesn't have any active IPs")
            continue
        for cidr in sorted(stored.block.keys() | counted[handle].keys()):
            said, real = stored.block.get(cidr, 0), counted[handle][cidr]
            if said != real:
                kind = Kind.HANDLE_TOO_HIGH if said > real else Kind.HANDLE_TOO_LOW
                yield Finding(kind, handle, f"counts {said} in block {cidr}, which holds {real}")


def _advertising(snapshot: Snapshot, advertised: Advertised) -> Iterator[Finding]:
    """The same rule as the speaker's: confirmed blocks of more than one address in open pools."""
    node = advertised.node
    closed = [pool.spec.network for pool in snapshot.pools.values() if pool.spec.disable_bgp_export]
    wanted = {
        network
        for network, block in snapshot.blocks.items()
        if block.affinity == HOST_AFFINITY + node
        and (affinity := snapshot.affinities.get(AffinityKey(node, network))) is not None
        and affinity.state in (AffinityState.CONFIRMED, AffinityState.EMPTY)
        and network.prefixlen < network.max_prefixlen
        and not any(contains(outer, network) for outer in closed)
    }
    workloads = {host_network(use.address) for use in snapshot.uses if use.node == node}
    for network in sorted(wanted - advertised.prefixes, key=_order):
        yield Finding(Kind.NOT_ADVERTISED, str(network), f"of {node}, which does not advertise it")
    for network in sorted(advertised.prefixes - wanted - workloads, key=_order):
        text = f"advertised by {node}, which neither owns it nor runs it"
        yield Finding(Kind.ADVERTISED_IN_VAIN, str(network), text)


def _users(uses: Iterable[Use]) -> dict[Address, list[Use]]:
    found: dict[Address, list[Use]] = defaultdict(list)
    for use in uses:
        found[use.address].append(use)
    return dict(found)


def _order(network: Network) -> tuple[int, int, int]:
    return network.version, int(network.network_address), network.prefixlen
