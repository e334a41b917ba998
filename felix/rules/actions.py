"""What accepting and denying a packet means, by table: the operator may choose.

Accepting ends a packet's way through the table, or returns it to the rules of others. Denying drops
it; the filter table may tell the sender instead. Source: Calico 3.32, felix/rules.
"""

from __future__ import annotations

from felix.calc.config import FelixConfig
from felix.rules.rule import ACCEPT, DROP, REJECT, RETURN, Target


def allow(config: FelixConfig, table: str) -> Target:
    """What an accepted packet meets in `table`. Raw knows nothing to return to."""
    wanted = {"filter": config.filter_allow_action, "mangle": config.mangle_allow_action}
    return RETURN if wanted.get(table) == "return" else ACCEPT


def deny(config: FelixConfig, table: str) -> Target:
    """What a denied packet meets in `table`; the kernel rejects in the filter table only."""
    is_rejected = table == "filter" and config.filter_deny_action == "reject"
    return REJECT if is_rejected else DROP
