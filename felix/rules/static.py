"""The chains that every node has, whatever runs on it, and their hooks in the kernel's chains.

Order and text are Calico's (3.32, felix/rules/static.go, without tunnels and IPVS), so that rule
hashes agree. The chains they jump to are written in dispatch.py, host.py, nat.py and spoofing.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from cymric.model.net import Network
from felix.calc.config import FelixConfig
from felix.rules.actions import allow
from felix.rules.marks import Marks
from felix.rules.rule import (
    ACCEPT,
    DROP,
    REJECT,
    RETURN,
    Chain,
    ClearMark,
    Goto,
    Jump,
    Match,
    Rule,
    SetMark,
    Target,
)

FROM_WORKLOAD_DISPATCH = "cali-from-wl-dispatch"
TO_WORKLOAD_DISPATCH = "cali-to-wl-dispatch"
FROM_HOST_ENDPOINT = "cali-from-host-endpoint"
TO_HOST_ENDPOINT = "cali-to-host-endpoint"
FROM_HOST_FORWARD = "cali-from-hep-forward"
TO_HOST_FORWARD = "cali-to-hep-forward"
WORKLOAD_TO_HOST = "cali-wl-to-host"
CIDR_BLOCK = "cali-cidr-block"
RPF_SKIP = "cali-rpf-skip"
NAT_OUTGOING = "cali-nat-outgoing"
FLOATING_DNAT = "cali-fip-dnat"
FLOATING_SNAT = "cali-fip-snat"

_ICMPV6 = "58"
_NEIGHBOUR_DISCOVERY = (130, 131, 132, 133, 135, 136)
"""Multicast listeners, router solicitation, neighbour solicitation and advertisement: without them
no pod finds its gateway, so they never depend on policy (RFC 4861, RFC 2710)."""

_HOST_ACTIONS: dict[str, Target] = {
    "drop": DROP,
    "reject": REJECT,
    "accept": ACCEPT,
    "return": RETURN,
}


def hook(chain: str) -> Rule:
    """The jump from a kernel chain to ours."""
    return Rule(action=Jump(f"cali-{chain}"))


def filter_chains(
    config: FelixConfig, marks: Marks, service_cidrs: Sequence[Network], ip_version: int
) -> tuple[Chain, ...]:
    """INPUT, FORWARD and OUTPUT of the filter table, and what they jump to."""
    return (
        _input(config, marks),
        _workload_to_host(config, ip_version),
        _forward(config, marks),
        _output(config, marks),
        _cidr_block(config, service_cidrs, ip_version),
    )


def forward_appends(config: FelixConfig, marks: Marks) -> tuple[Rule, ...]:
    """The end of FORWARD: accept what policy accepted; mark the rest for mangle POSTROUTING."""
    accept = allow(config, "filter")
    return (
        Rule(Match().mark_set(marks.accept), accept, ("Policy explicitly accepted packet.",)),
        Rule(action=SetMark(marks.accept)),
    )


def _accepted_by_host_endpoint(marks: Marks, accept: Target) -> Rule:
    return Rule(Match().mark_set(marks.accept), accept, ("Host endpoint policy accepted packet.",))


def _input(config: FelixConfig, marks: Marks) -> Chain:
    accept = allow(config, "filter")
    return Chain(
        "cali-INPUT",
        (
            *(
                Rule(Match().in_interface(f"{prefix}+"), Goto(WORKLOAD_TO_HOST))
                for prefix in config.interface_prefixes
            ),
            Rule(Match().mark_set(marks.accept), accept),
            Rule(action=ClearMark(marks.all)),
            Rule(action=Jump(FROM_HOST_ENDPOINT)),
            _accepted_by_host_endpoint(marks, accept),
        ),
    )


def _workload_to_host(config: FelixConfig, ip_version: int) -> Chain:
    action = _HOST_ACTIONS[config.default_endpoint_to_host_action]
    accept = allow(config, "filter")
    types = _NEIGHBOUR_DISCOVERY if ip_version == 6 else ()
    return Chain(
        WORKLOAD_TO_HOST,
        (
            *(Rule(Match().protocol(_ICMPV6).icmpv6_type(number), accept) for number in types),
            Rule(action=Jump(FROM_WORKLOAD_DISPATCH)),
            Rule(action=action, comments=("Configured DefaultEndpointToHostAction",)),
        ),
    )


def _forward(config: FelixConfig, marks: Marks) -> Chain:
    by_prefix = [
        rule
        for prefix in config.interface_prefixes
        for rule in (
            Rule(Match().in_interface(f"{prefix}+"), Jump(FROM_WORKLOAD_DISPATCH)),
            Rule(Match().out_interface(f"{prefix}+"), Jump(TO_WORKLOAD_DISPATCH)),
        )
    ]
    return Chain(
        "cali-FORWARD",
        (
            Rule(action=ClearMark(marks.all_but_accept)),
            Rule(Match().mark_clear(marks.accept), Jump(FROM_HOST_FORWARD)),
            *by_prefix,
            Rule(action=Jump(TO_HOST_FORWARD)),
            Rule(action=Jump(CIDR_BLOCK)),
        ),
    )


def _output(config: FelixConfig, marks: Marks) -> Chain:
    accept = allow(config, "filter")
    return Chain(
        "cali-OUTPUT",
        (
            Rule(Match().mark_set(marks.accept), accept),
            *(
                Rule(Match().out_interface(f"{prefix}+"), RETURN)
                for prefix in config.interface_prefixes
            ),
            Rule(action=ClearMark(marks.all)),
            Rule(Match().not_conntrack_state("DNAT"), Jump(TO_HOST_ENDPOINT)),
            _accepted_by_host_endpoint(marks, accept),
        ),
    )


def _cidr_block(config: FelixConfig, service_cidrs: Sequence[Network], ip_version: int) -> Chain:
    """What is left for a service range loops between node and router: it ends here."""
    if config.service_loop_prevention == "disabled":
        return Chain(CIDR_BLOCK)
    action = REJECT if config.service_loop_prevention == "reject" else DROP
    cidrs = sorted(str(cidr) for cidr in service_cidrs if cidr.version == ip_version)
    return Chain(CIDR_BLOCK, tuple(Rule(Match().destination(cidr), action) for cidr in cidrs))


def raw_chains(config: FelixConfig, marks: Marks) -> tuple[Chain, ...]:
    """PREROUTING and OUTPUT of the raw table: the strict reverse path check of workloads.

    Who may use other sources skips it (`cali-rpf-skip`, felix/rules/spoofing.py).
    """
    prerouting = Chain(
        "cali-PREROUTING",
        (
            Rule(action=ClearMark(marks.all)),
            *(
                Rule(Match().in_interface(f"{prefix}+"), SetMark(marks.scratch0))
                for prefix in config.interface_prefixes
            ),
            Rule(Match().mark_set(marks.scratch0), Jump(RPF_SKIP)),
            Rule(Match().mark_set(marks.scratch0).reverse_path_failed(), DROP),
            Rule(Match().mark_clear(marks.scratch0), Jump(FROM_HOST_ENDPOINT)),
            Rule(Match().mark_set(marks.accept), ACCEPT),
        ),
    )
    output = Chain(
        "cali-OUTPUT",
        (
            Rule(action=ClearMark(marks.all)),
            Rule(action=Jump(TO_HOST_ENDPOINT)),
            Rule(Match().mark_set(marks.accept), ACCEPT),
        ),
    )
    return (prerouting, output)


def mangle_chains(
    config: FelixConfig, marks: Marks, first: tuple[Rule, ...] = ()
) -> tuple[Chain, ...]:
    """PREROUTING and POSTROUTING of the mangle table: host endpoints before and after DNAT.

    `first` is what happens to every packet that leaves, ahead of policy.
    """
    accept = allow(config, "mangle")
    prerouting = Chain(
        "cali-PREROUTING",
        (
            Rule(Match().conntrack_state("RELATED,ESTABLISHED"), accept),
            Rule(Match().mark_set(marks.accept), accept),
            Rule(action=Jump(FROM_HOST_ENDPOINT)),
            _accepted_by_host_endpoint(marks, accept),
        ),
    )
    postrouting = Chain(
        "cali-POSTROUTING",
        (
            *first,
            Rule(Match().mark_set(marks.accept), RETURN),
            Rule(action=ClearMark(marks.all)),
            Rule(Match().conntrack_state("DNAT"), Jump(TO_HOST_ENDPOINT)),
            _accepted_by_host_endpoint(marks, RETURN),
        ),
    )
    return (prerouting, postrouting)


def nat_chains() -> tuple[Chain, ...]:
    """PREROUTING, OUTPUT and POSTROUTING of the nat table."""
    dnat = (Rule(action=Jump(FLOATING_DNAT)),)
    snat = (Rule(action=Jump(FLOATING_SNAT)), Rule(action=Jump(NAT_OUTGOING)))
    return (
        Chain("cali-PREROUTING", dnat),
        Chain("cali-OUTPUT", dnat),
        Chain("cali-POSTROUTING", snat),
    )
