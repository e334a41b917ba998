"""Names in the kernel: chains, IP sets, and how long ones are cut.

The names are Calico's, so that a node changes hands between the two without a rule being moved.
Source: Calico 3.32, felix/rules and felix/ipsets.
"""

from __future__ import annotations

import base64
import hashlib

CHAIN_PREFIX = "cali-"
MAX_CHAIN_NAME = 28
MAX_SET_NAME = 31
SET_PREFIX_BY_VERSION = {4: "cali40", 6: "cali60"}

TO_WORKLOAD = "cali-tw-"
FROM_WORKLOAD = "cali-fw-"
TO_HOST = "cali-th-"
FROM_HOST = "cali-fh-"
TO_HOST_FORWARDED = "cali-thfw-"
FROM_HOST_FORWARDED = "cali-fhfw-"
POLICY_INBOUND = "cali-pi-"
POLICY_OUTBOUND = "cali-po-"
PROFILE_INBOUND = "cali-pri-"
PROFILE_OUTBOUND = "cali-pro-"

NETWORK_POOLS = "network-ip-pools"
MASQUERADE_POOLS = "masq-ipam-pools"
ALL_HOSTS = "all-hosts-net"
THIS_HOST = "this-host"
DSCP_SOURCES = "dscp-src-net"


def limited(prefix: str, suffix: str, limit: int = MAX_CHAIN_NAME) -> str:
    """`prefix` + `suffix`, the suffix replaced by a hash of itself if that is too long.

    A suffix that fits exactly but starts with `_` is hashed too: it could be a hash itself.
    """
    suffix = suffix or "_"
    name = prefix + suffix
    if len(name) < limit or (len(name) == limit and not suffix.startswith("_")):
        return name
    digest = base64.urlsafe_b64encode(hashlib.sha256(suffix.encode()).digest()).decode()
    return f"{prefix}_{digest}"[:limit]


def set_name(set_id: str, ip_version: int = 4) -> str:
    """The kernel's name of a set of IPv4 or IPv6 members."""
    return (SET_PREFIX_BY_VERSION[ip_version] + set_id)[:MAX_SET_NAME]
