"""What endpoints want written into their packets (DSCP), once those leave the cluster.

A packet to another pod or to this host keeps what it has. The sources that want something are a
set, so that all others pay for one look-up. Source: Calico 3.32, felix/rules/static.go.
"""

from __future__ import annotations

from collections.abc import Sequence

from felix.calc.values import Endpoint
from felix.rules.names import DSCP_SOURCES, NETWORK_POOLS, THIS_HOST, set_name
from felix.rules.rule import Chain, Jump, Match, Rule, SetDSCP

EGRESS_DSCP = "cali-egress-dscp"


def wishes(endpoints: Sequence[Endpoint], ip_version: int) -> tuple[tuple[str, int], ...]:
    """Address and value of every endpoint that has a wish, sorted."""
    found = (
        (str(address), one.dscp)
        for one in endpoints
        if one.dscp is not None
        for address in one.addresses
        if address.version == ip_version
    )
    return tuple(sorted(found))


def way(ip_version: int) -> Rule:
    """From POSTROUTING to the chain, for those who want something and leave."""
    match = Match().source_set(set_name(DSCP_SOURCES, ip_version))
    match = match.not_destination_set(set_name(NETWORK_POOLS, ip_version))
    match = match.not_destination_set(set_name(THIS_HOST, ip_version))
    return Rule(match, Jump(EGRESS_DSCP))


def chain(wanted: Sequence[tuple[str, int]]) -> Chain:
    """What each of them wants."""
    rules = (Rule(Match().source(address), SetDSCP(value)) for address, value in wanted)
    return Chain(EGRESS_DSCP, tuple(rules))
