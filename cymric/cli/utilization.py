"""How full pools and blocks are, counted as Calico counts. Pure.

A block belongs to the pool that contains it; blocks in no pool are grouped as orphans. What is in
use is what a block's table says is given; the rest of the pool, cut into blocks or not, is free.
Source: Calico 3.32 GetUtilization and `calicoctl ipam show`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cymric.model.ipam import AllocationBlock
from cymric.model.net import Network, contains

Row = tuple[str, str, str, str, str]
HEADINGS = ("GROUPING", "CIDR", "IPS TOTAL", "IPS IN USE", "IPS FREE")
BORROWED_HEADINGS = ("IP", "BORROWING-NODE", "BLOCK", "BLOCK OWNER", "TYPE", "ALLOCATED-TO")


@dataclass(frozen=True, slots=True)
class Usage:
    """One pool (None: the orphans) with its blocks."""

    pool: Network | None
    blocks: tuple[AllocationBlock, ...]

    @property
    def in_use(self) -> int:
        """How many addresses of the pool are given."""
        return sum(map(addresses_in_use, self.blocks))


def addresses_in_use(block: AllocationBlock) -> int:
    """How many addresses of a block are given."""
    return len(block.allocations) - len(block.unallocated)


def utilization(
    pools: Mapping[str, Network], blocks: Sequence[AllocationBlock]
) -> tuple[Usage, ...]:
    """Every pool in the order of names, then the orphans if there are any."""
    left = list(blocks)
    usages = []
    for _, pool in sorted(pools.items()):
        inside: list[AllocationBlock] = []
        others: list[AllocationBlock] = []
        for block in left:
            (inside if contains(pool, block.network) else others).append(block)
        usages.append(Usage(pool, tuple(inside)))
        left = others
    return (*usages, Usage(None, tuple(left))) if left else tuple(usages)


def rows(usages: Sequence[Usage], *, with_blocks: bool) -> list[Row]:
    """The lines of the table. Orphaned blocks always show: nobody would see them otherwise."""
    lines: list[Row] = []
    for usage in usages:
        if usage.pool is not None:
            pool = usage.pool
            lines.append(_row("IP Pool", pool, pool.num_addresses, usage.in_use))
        if with_blocks or usage.pool is None:
            lines += [
                _row("Block", block.network, len(block.allocations), addresses_in_use(block))
                for block in usage.blocks
            ]
    return lines


def borrowed_rows(blocks: Sequence[AllocationBlock]) -> list[tuple[str, ...]]:
    """Every address held by another node than the one that owns its block."""
    lines: list[tuple[str, ...]] = []
    for block in blocks:
        owner = block.owner_host
        for ordinal, holder in block.held():
            attributes = holder.attributes
            node = attributes.get("node", "")
            if not node or node == owner:
                continue
            kind = attributes.get("type", "")
            pod = attributes.get("pod", "")
            whom = f"{attributes.get('namespace', '')}/{pod}" if pod else kind
            address = str(block.address(ordinal))
            row = (address, node, block.cidr, owner or "", "pod" if pod else kind, whom)
            lines.append(row)
    return lines


def without_node(blocks: Sequence[AllocationBlock]) -> int:
    """How many addresses say nothing of the node that holds them (very old ones)."""
    return sum(
        1 for block in blocks for _, holder in block.held() if not holder.attributes.get("node")
    )


def _row(grouping: str, network: Network, total: int, in_use: int) -> Row:
    free = total - in_use
    return (
        grouping,
        str(network),
        f"{total:.5g}",
        f"{in_use:.5g} ({100 * in_use / total:.0f}%)",
        f"{free:.5g} ({100 * free / total:.0f}%)",
    )
