"""Limits of bandwidth: a token bucket as the queue of a link, as bytes for rtnetlink.

What goes out of a link waits in its queue until there are tokens for it: `rate` bytes a second fill
the bucket, which holds `burst`. With a peak rate a second, small bucket caps how fast a burst
goes. The queue dies with its link, so nothing has to be taken back.
Layout: linux/pkt_sched.h of the kernel's user API (tc_tbf_qopt, TCA_TBF_…); the arithmetic is that
of tc-tbf(8) with a latency of 25 ms.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from enum import IntEnum

from cymric.kernel.links import KernelError
from cymric.kernel.netlink import Requests
from cymric.kernel.rtnetlink import Flag, attribute

LATENCY_S = 0.025
"""How long a packet may wait for tokens before the queue is full."""

_NEWQDISC = 36
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_TCMSG = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")
_RATE = struct.Struct("=BBHhHI")  # cell log, link layer, overhead, cell align, mpu, bytes a second
_LIMITS = struct.Struct("=III")  # bytes queued, and two times that TCA_TBF_BURST and PBURST replace
_LINK_LAYER_ETHERNET = 1
_ROOT = 0xFFFFFFFF
_HANDLE = 1 << 16
_KIND = b"tbf\0"
_MOST = 0xFFFFFFFF


class _Attribute(IntEnum):
    KIND = 1
    OPTIONS = 2


class _Tbf(IntEnum):
    PARMS = 1
    RATE64 = 4
    PRATE64 = 5
    BURST = 6
    PBURST = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Bytes a second, and bytes at once. `peak` 0 is none; else `peak_burst` at once at that rate.

    `peak_burst` has to hold the largest packet, which is the MTU.
    """

    rate: int
    burst: int
    peak: int = 0
    peak_burst: int = 0

    def __post_init__(self) -> None:
        if self.rate <= 0 or not 0 < self.burst <= _MOST:
            raise ValueError(f"{self} has no rate or no burst that the kernel could keep")
        if self.peak and (self.peak <= self.rate or not 0 < self.peak_burst <= _MOST):
            raise ValueError(
                f"{self} has a peak that is no higher than its rate, or no burst there"
            )

    @property
    def queued(self) -> int:
        """How many bytes may wait: what the bucket holds, and what comes within the latency."""
        at_rate = int(self.rate * LATENCY_S) + self.burst
        if self.peak:
            at_rate = min(at_rate, int(self.peak * LATENCY_S) + self.peak_burst)
        return min(at_rate, _MOST)


class NoShaping(KernelError):
    """There are no token buckets in this kernel."""


def limit(namespace: int | None, index: int, bucket: Bucket) -> None:
    """Make `bucket` the queue of a link, in place of any. Raises NoShaping, KernelError."""
    with closing(Requests(namespace)) as requests:
        what = f"limit link {index} to {bucket.rate} bytes a second"
        try:
            requests.ask(what, request(index, bucket))
        except KernelError as error:
            if error.errno in (errno.ENOENT, errno.EOPNOTSUPP):
                raise NoShaping(error.errno or 0, what, "no such queue in this kernel") from error
            raise


def request(index: int, bucket: Bucket) -> bytes:
    """The message that makes `bucket` the queue of a link."""
    parms = _rate(bucket.rate) + _rate(bucket.peak) + _LIMITS.pack(bucket.queued, 0, 0)
    options: dict[int, bytes] = {_Tbf.PARMS: parms, _Tbf.BURST: _U32.pack(bucket.burst)}
    if bucket.rate > _MOST:
        options[_Tbf.RATE64] = _U64.pack(bucket.rate)
    if bucket.peak:
        options[_Tbf.PBURST] = _U32.pack(bucket.peak_burst)
    if bucket.peak > _MOST:
        options[_Tbf.PRATE64] = _U64.pack(bucket.peak)
    payload = _TCMSG.pack(0, index, _HANDLE, _ROOT, 0) + _packed(
        {_Attribute.KIND: _KIND, _Attribute.OPTIONS: _packed(options)}
    )
    flags = Flag.REQUEST | Flag.ACK | Flag.CREATE | Flag.REPLACE
    return _HEADER.pack(_HEADER.size + len(payload), _NEWQDISC, flags, 0, 0) + payload


def _rate(bytes_a_second: int) -> bytes:
    layer = _LINK_LAYER_ETHERNET if bytes_a_second else 0
    return _RATE.pack(0, layer, 0, 0, 0, min(bytes_a_second, _MOST))


def _packed(pairs: Mapping[int, bytes]) -> bytes:
    return b"".join(attribute(kind, value) for kind, value in pairs.items())
