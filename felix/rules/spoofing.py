"""`cali-rpf-skip`: sources that an endpoint may use beside its own addresses.

The reverse path check would drop them, for no route leads back. Only filled where the operator
allows it (workloadSourceSpoofing), so the chain is empty nearly everywhere. Source: Calico 3.32,
felix/dataplane/linux/endpoint_mgr.go; the order, which is by chance there, is sorted here.
"""

from __future__ import annotations

from collections.abc import Iterable

from felix.calc.values import Endpoint
from felix.rules.rule import ACCEPT, Chain, Match, Rule
from felix.rules.static import RPF_SKIP


def skip_chain(endpoints: Iterable[Endpoint], ip_version: int) -> Chain:
    """One rule for each interface and prefix."""
    rules = (
        Rule(Match().in_interface(one.interface).source(str(prefix)), ACCEPT)
        for one in endpoints
        for prefix in sorted(one.spoofable, key=str)
        if prefix.version == ip_version
    )
    return Chain(RPF_SKIP, tuple(rules))
