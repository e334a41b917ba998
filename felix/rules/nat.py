"""Address translation: natOutgoing, and floating addresses.

What leaves a pool for the world outside all pools carries the node's address. What is sent to a
floating address reaches the endpoint that has it; when an endpoint calls itself by it, the answer
must come back the same way, so the source is translated, too. A pool may name destinations that
are to see its addresses as they are (annotation `cymric.io/nat-exclude`).

Source: Calico 3.32, felix/rules/nat.go.
"""

from __future__ import annotations

from collections.abc import Iterable

from felix.calc.config import FelixConfig
from felix.calc.values import Endpoint, NatExclusion
from felix.rules.names import ALL_HOSTS, MASQUERADE_POOLS, NETWORK_POOLS, set_name
from felix.rules.rule import (
    RETURN,
    Action,
    Chain,
    DestinationNAT,
    Masquerade,
    Match,
    Rule,
    SourceNAT,
)
from felix.rules.static import FLOATING_DNAT, FLOATING_SNAT, NAT_OUTGOING


def outgoing_chain(
    config: FelixConfig,
    *,
    is_wanted: bool,
    ip_version: int = 4,
    exclusions: Iterable[NatExclusion] = (),
) -> Chain:
    """`cali-nat-outgoing`, empty unless some pool wants it; what is excluded keeps its source."""
    if not is_wanted:
        return Chain(NAT_OUTGOING)
    rules = [
        Rule(Match().source(str(one.pool)).destination(str(one.destination)), RETURN)
        for one in sorted(exclusions, key=str)
        if one.pool.version == ip_version
    ]
    if config.nat_port_range:
        for protocol in ("tcp", "udp"):
            match = _match(config, ip_version, protocol)
            action = _translate(config, config.nat_port_range, ip_version)
            rules += (Rule(match, action), Rule(match, RETURN))
    rules.append(Rule(_match(config, ip_version), _translate(config, "", ip_version)))
    return Chain(NAT_OUTGOING, tuple(rules))


def floating_chains(endpoints: Iterable[Endpoint], ip_version: int) -> tuple[Chain, Chain]:
    """`cali-fip-dnat` and `cali-fip-snat`; of two endpoints with one address the lower counts."""
    internal_by_external: dict[str, str] = {}
    external_by_internal: dict[str, str] = {}
    for one in endpoints:
        for pair in one.floating:
            if pair.external.version != ip_version:
                continue
            external, internal = str(pair.external), str(pair.internal)
            first = min(internal, internal_by_external.get(external, internal))
            internal_by_external[external] = first
    for external, internal in sorted(internal_by_external.items(), reverse=True):
        external_by_internal[internal] = external
    to_pod = (
        Rule(Match().destination(external), DestinationNAT(internal))
        for external, internal in sorted(internal_by_external.items())
    )
    to_itself = (
        Rule(Match().destination(internal).source(internal), SourceNAT(external))
        for internal, external in sorted(external_by_internal.items())
    )
    return Chain(FLOATING_DNAT, tuple(to_pod)), Chain(FLOATING_SNAT, tuple(to_itself))


def _match(config: FelixConfig, ip_version: int, protocol: str = "") -> Match:
    match = Match().source_set(set_name(MASQUERADE_POOLS, ip_version))
    match = match.not_destination_set(set_name(NETWORK_POOLS, ip_version))
    if config.nat_outgoing_exclusions == "ippoolsandhostips":
        match = match.not_destination_set(set_name(ALL_HOSTS, ip_version))
    if protocol:
        match = match.protocol(protocol)
    if config.nat_outgoing_interface_filter:
        match = match.out_interface(config.nat_outgoing_interface_filter)
    return match


def _translate(config: FelixConfig, ports: str, ip_version: int) -> Action:
    if config.nat_outgoing_address and ip_version == 4:  # the parameter is an IPv4 address
        return SourceNAT(config.nat_outgoing_address, ports, config.can("SNATFullyRandom"))
    return Masquerade(ports, config.can("MASQFullyRandom"))
