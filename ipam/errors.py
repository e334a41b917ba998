"""What can go wrong in IPAM, sorted by what the caller does about it.

Retry: `Contended`, and everything of `cymric.datastore.api` that says so. Report to whoever asked:
`NoAddress` and its kinds, `AddressRefused` and its kinds. Skip until the next sync: `StaleRelease`.
"""

from __future__ import annotations


class IPAMError(Exception):
    """Any refusal of IPAM. The text is meant for the person who asked for the address."""


class Contended(IPAMError):
    """Others kept changing the same keys for as many tries as we allow; try again."""


class NoAddress(IPAMError):
    """No address could be given."""


class NoPool(NoAddress):
    """No pool may serve this request: an operator has to change a pool or the request."""


class NoFreeAddresses(NoAddress):
    """The pools that may serve this request have nothing left."""


class BlockLimitReached(NoAddress):
    """The node owns as many blocks as it may, and they are full."""


class AddressRefused(IPAMError):
    """The address that was asked for by name cannot be given."""


class AddressTaken(AddressRefused):
    """Somebody holds it."""


class AddressOutsidePools(AddressRefused):
    """No enabled pool contains it."""


class NotOurBlock(AddressRefused):
    """Its block belongs to another node, and strict affinity forbids borrowing."""


class AddressRouted(AddressRefused):
    """The kernel routes it to another workload of this node, whatever the datastore says."""


class StaleRelease(IPAMError):
    """The address changed hands since the caller looked: nothing was released."""
