"""Address translation: natOutgoing, and floating addresses.

What leaves a pool for the world outside all pools carries the node's address. What is sent to a
floating address reaches the endpoint that has it; when an endpoint calls itself by it, the answer
must come back the same way, so the source is translated, too.

Source: Calico 3.32, felix/rules/nat.go.
"""

from __future__ import annotations

from collections.abc import Iterable

from felix.calc.config import FelixConfig
from felix.calc.values import Endpoint
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
    config: FelixConfig, *, is_wanted: bool, ip_version: int = 4, random_fully: bool = True
) -> Chain:
    """`cali-nat-outgoing`, empty unless some pool wants it."""
    if not is_wanted:
        return Chain(NAT_OUTGOING)
    if not config.nat_port_range:
        rule = Rule(_match(config, ip_version), _translate(config, "", ip_version, random_fully))
        return Chain(NAT_OUTGOING, (rule,))
    rules: list[Rule] = []
    for protocol in ("tcp", "udp"):
        match = _match(config, ip_version, protocol)
        action = _translate(config, config.nat_port_range, ip_version, random_fully)
        rules += (Rule(match, action), Rule(match, RETURN))
    action = _translate(config, "", ip_version, random_fully)
    rules.append(Rule(_match(config, ip_version), action))
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


def _translate(config: FelixConfig, ports: str, ip_version: int, random_fully: bool) -> Action:
    if config.nat_outgoing_address and ip_version == 4:  # the parameter is an IPv4 address
        return SourceNAT(config.nat_outgoing_address, ports, random_fully)
    return Masquerade(ports, random_fully)
