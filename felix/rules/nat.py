"""natOutgoing: what leaves a pool for the world outside all pools carries the node's address.

Source: Calico 3.32, felix/rules/nat.go.
"""

from __future__ import annotations

from felix.calc.config import FelixConfig
from felix.rules.names import ALL_HOSTS, MASQUERADE_POOLS, NETWORK_POOLS, set_name
from felix.rules.rule import RETURN, Action, Chain, Masquerade, Match, Rule, SourceNAT
from felix.rules.static import NAT_OUTGOING


def outgoing_chain(config: FelixConfig, *, is_wanted: bool, random_fully: bool = True) -> Chain:
    """`cali-nat-outgoing`, empty unless some pool wants it."""
    if not is_wanted:
        return Chain(NAT_OUTGOING)
    if not config.nat_port_range:
        return Chain(NAT_OUTGOING, (Rule(_match(config), _translate(config, "", random_fully)),))
    rules: list[Rule] = []
    for protocol in ("tcp", "udp"):
        match = _match(config, protocol)
        rules.append(Rule(match, _translate(config, config.nat_port_range, random_fully)))
        rules.append(Rule(match, RETURN))
    rules.append(Rule(_match(config), _translate(config, "", random_fully)))
    return Chain(NAT_OUTGOING, tuple(rules))


def _match(config: FelixConfig, protocol: str = "") -> Match:
    match = Match().source_set(set_name(MASQUERADE_POOLS))
    match = match.not_destination_set(set_name(NETWORK_POOLS))
    if config.nat_outgoing_exclusions == "ippoolsandhostips":
        match = match.not_destination_set(set_name(ALL_HOSTS))
    if protocol:
        match = match.protocol(protocol)
    if config.nat_outgoing_interface_filter:
        match = match.out_interface(config.nat_outgoing_interface_filter)
    return match


def _translate(config: FelixConfig, ports: str, random_fully: bool) -> Action:
    if config.nat_outgoing_address:
        return SourceNAT(config.nat_outgoing_address, ports, random_fully)
    return Masquerade(ports, random_fully)
