"""The two chains of a workload endpoint: to it (`cali-tw-`) and from it (`cali-fw-`).

What is established passes, what conntrack calls invalid does not; tunnels may not start in a pod;
then the profiles in order, the first verdict counts; no verdict is a drop. Tiers of policy come
between. Source: Calico 3.32, felix/rules/endpoints.go.
"""

from __future__ import annotations

from collections.abc import Sequence

from felix.calc.config import FelixConfig
from felix.calc.values import Endpoint
from felix.rules.marks import Marks
from felix.rules.names import (
    FROM_WORKLOAD,
    PROFILE_INBOUND,
    PROFILE_OUTBOUND,
    TO_WORKLOAD,
    limited,
)
from felix.rules.rule import ACCEPT, DROP, RETURN, Chain, ClearMark, Jump, Match, Rule

_UDP, _IPIP = "17", "4"


def chains(endpoint: Endpoint, config: FelixConfig, marks: Marks) -> tuple[Chain, Chain]:
    """To and from the endpoint."""
    start = _start(config, marks)
    to_name = limited(TO_WORKLOAD, endpoint.interface)
    from_name = limited(FROM_WORKLOAD, endpoint.interface)
    inbound = _profiles(endpoint.profiles, PROFILE_INBOUND, marks)
    outbound = _profiles(endpoint.profiles, PROFILE_OUTBOUND, marks)
    return (
        Chain(to_name, (*start, *inbound)),
        Chain(from_name, (*start, *_no_tunnels(config), *outbound)),
    )


def _start(config: FelixConfig, marks: Marks) -> tuple[Rule, ...]:
    established = Rule(Match().conntrack_state("RELATED,ESTABLISHED"), ACCEPT)
    invalid = Rule(Match().conntrack_state("INVALID"), DROP)
    clear = Rule(action=ClearMark(marks.accept | marks.passed))
    if config.disable_conntrack_invalid_check:
        return (established, clear)
    return (established, invalid, clear)


def _no_tunnels(config: FelixConfig) -> tuple[Rule, ...]:
    rules = []
    if not config.allow_vxlan_from_workloads:
        rules.append(
            Rule(
                Match().protocol(_UDP).destination_ports(str(config.vxlan_port)),
                DROP,
                ("Drop VXLAN encapped packets originating in workloads",),
            )
        )
    if not config.allow_ipip_from_workloads:
        rules.append(
            Rule(
                Match().protocol(_IPIP),
                DROP,
                ("Drop IPinIP encapped packets originating in workloads",),
            )
        )
    return tuple(rules)


def _profiles(names: Sequence[str], prefix: str, marks: Marks) -> tuple[Rule, ...]:
    accepted = Rule(Match().mark_set(marks.accept), RETURN, ("Return if profile accepted",))
    steps = [
        rule for name in names for rule in (Rule(action=Jump(limited(prefix, name))), accepted)
    ]
    return (*steps, Rule(action=DROP, comments=("Drop if no profiles matched",)))
