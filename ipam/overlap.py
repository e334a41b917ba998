"""What must not exist for a block to be claimed, so that no two blocks ever overlap. Pure.

Blocks of one size cannot overlap without being equal, and equal blocks have one key. But a pool may
be made anew with another `blockSize`, pools may overlap by mistake, and two nodes may look at
different pools at the same moment. So a claim lands only if

- no block *around* it exists: Calico's blocks are /20 to /32 (/116 to /128), so that is at most
  twelve keys, compared as absent;
- no block *inside* it exists. There are too many such keys to name, and in the order of keys, which
  is textual, they are no range (`10.0.0.9` comes after `10.0.0.64`). But all of them lie under few
  text prefixes: `10.0.0.` for any block in 10.0.0.0/24. A listing says what is there at a revision,
  and the claim lands only if nothing was created under those prefixes since.

The second rule may refuse a claim because a neighbour was claimed meanwhile, which overlaps
nothing; then the listing is repeated. It never lets one pass that overlaps: of two claims that
overlap one lands second, and that one either finds the other's key around it, or created under a
prefix of its own. A stock Calico node checks nothing of the kind; what it claims after us, over a
pool of another size, no guard of ours can refuse, and `cymric ipam check` reports it.
"""

from __future__ import annotations

from ipaddress import IPv6Address

from cymric.datastore.api import ABSENT, Compare, NoneCreated
from cymric.model.keys import BlockKey, block_prefix
from cymric.model.net import Network, network_of

SHORTEST = {4: 20, 6: 116}
"""The prefix length of the largest block there can be, by family (IPPool `blockSize`)."""


def guards(network: Network, revision: int) -> tuple[list[Compare], list[NoneCreated]]:
    """What a claim of `network` must demand, if a listing at `revision` showed no overlap."""
    around = [Compare(str(BlockKey(outer)), ABSENT) for outer in enclosing(network)]
    inside = [NoneCreated(prefix, revision) for prefix in prefixes(network)]
    return around, inside


def enclosing(network: Network) -> tuple[Network, ...]:
    """Every larger block that would contain `network`."""
    lengths = range(SHORTEST[network.version], network.prefixlen)
    return tuple(network_of(network.network_address, length) for length in lengths)


def prefixes(network: Network) -> tuple[str, ...]:
    """Texts with which the key of every block inside `network` begins, and of few others."""
    place = block_prefix(network.version)
    if network.version == 4:
        first = int(network.network_address) >> 8
        count = max(1, network.num_addresses >> 8)
        return tuple(f"{place}{_dotted(first + n)}." for n in range(count))
    # All blocks of a /112 differ in the last group of their text alone. That group is missing when
    # it is zero: then it may be part of the longest run of zeros, and the text is another one.
    first = int(network.network_address) >> 16 << 16
    last_group_zero = f"{place}{IPv6Address(first)}-"
    others = f"{place}{str(IPv6Address(first + 1))[:-1]}"
    return (others,) if last_group_zero.startswith(others) else (last_group_zero, others)


def _dotted(leading: int) -> str:
    """The first three octets of an IPv4 address, given as a number."""
    return f"{leading >> 16}.{leading >> 8 & 255}.{leading & 255}"
