"""Bandwidth of one pod, in the queues at both ends of its pair.

    into the pod     the queue of the node's end
    out of the pod   the queue of the pod's own end

Both die with the pair, so there is nothing to take back, to find after a crash or to collect. The
price: a pod with CAP_NET_ADMIN can take the limit off what it sends, as the queue is in its
namespace. They are set before the pod has an address, so one that has is limited. Where the kernel
has no such queues, the limits stay on the endpoint and are not held.
"""

from __future__ import annotations

from dataclasses import dataclass

import structlog

from cni.qos import buckets
from cymric.kernel import shaping
from cymric.kernel.shaping import Bucket, NoShaping
from cymric.model.endpoints import QoSControls

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Ends:
    """A pair by its links' indices, in our namespace and in `there`."""

    host_index: int
    pod_index: int
    there: int
    mtu: int

    def wanted(self, limits: QoSControls) -> tuple[tuple[str, int | None, int, Bucket], ...]:
        """Direction, namespace, link and bucket of each limit."""
        into, out_of = buckets(limits, self.mtu)
        both = (
            ("into", None, self.host_index, into),
            ("out of", self.there, self.pod_index, out_of),
        )
        return tuple((way, where, index, b) for way, where, index, b in both if b is not None)


def limit(ends: Ends, limits: QoSControls) -> None:
    """Set the queues. Raises OSError."""
    try:
        for _, where, index, bucket in ends.wanted(limits):
            shaping.limit(where, index, bucket)
    except NoShaping as error:
        log.warning("bandwidth is not limited", why=str(error))
