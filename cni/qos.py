"""Limits of one endpoint, from the words of annotations to token buckets. Pure.

    qos.projectcalico.org/…  (annotations)  ─┐
    bandwidth                (capability)   ─┴▶ QoSControls ─▶ stored on the endpoint
                                                    └────────▶ buckets ─▶ the queues of the pair

Names, bounds and defaults are Calico's. An annotation wins over the capability in its direction;
`kubernetes.io/ingress-bandwidth` and its like reach us as the capability, which runtimes make of
them. What is out of bounds is refused, as whoever wrote it would not get what is written. Packet
rates, numbers of connections and DSCP are stored for felix' rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

from cni.netconf import Bandwidth, bad_config
from cymric.kernel.shaping import Bucket
from cymric.model.endpoints import QoSControls

PREFIX = "qos.projectcalico.org/"
DIRECTIONS = ("ingress", "egress")
BOUNDS: Mapping[str, tuple[int, int]] = {
    "Bandwidth": (1_000, 10**15),  # bits a second
    "Burst": (1_000, 0xFFFFFFFF * 8),  # bits
    "Peakrate": (1_010, 1_010 * 10**12),  # bits a second
    "Minburst": (1_000, 100_000_000),  # bytes
    "PacketRate": (1, 10_000),  # packets a second
    "PacketBurst": (1, 10_000),  # packets
    "MaxConnections": (1, 0xFFFFFFFF),
}
"""The least and the most of each limit, in both directions."""
NAMES = (*(f"{way}{name}" for way in DIRECTIONS for name in BOUNDS), "dscp")
DEFAULT_BURST_BITS = 1 << 32
DEFAULT_PACKET_BURST = 5
DSCP_WORDS = frozenset(
    {"DF", "EF", *(f"CS{n}" for n in range(8))}
    | {f"AF{group}{drop}" for group in range(1, 5) for drop in range(1, 4)}
)
MAX_DSCP = 63
HEADER_BYTES = 14
"""What an Ethernet header adds to the MTU: less than one packet in the bucket lets none through."""

_QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)([kMGTPE]|[KMGTPE]i|[eE][+-]?\d+|[num])?")
_FACTORS = {
    **{letter: Decimal(1000) ** n for n, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": Decimal(1024) ** n for n, letter in enumerate("KMGTPE", 1)},
    **{letter: Decimal(1000) ** -n for n, letter in enumerate("mun", 1)},
}


def controls(notes: Mapping[str, str], bandwidth: Bandwidth | None) -> QoSControls | None:
    """The limits that annotations (without their prefix) and capability ask for; None if none.

    Raises CniError.
    """
    found: dict[str, int] = {}
    if bandwidth is not None:
        for way, rate, burst in (
            ("ingress", bandwidth.ingress_rate, bandwidth.ingress_burst),
            ("egress", bandwidth.egress_rate, bandwidth.egress_burst),
        ):
            if rate and f"{way}Bandwidth" not in notes:
                found[f"{way}Bandwidth"] = _bounded("bandwidth", "Bandwidth", rate)
                found[f"{way}Burst"] = _bounded("bandwidth", "Burst", burst) if burst else 0
    for way in DIRECTIONS:
        for name in BOUNDS:
            if (text := notes.get(way + name)) is not None:
                found[way + name] = _bounded(PREFIX + way + name, name, quantity(text))
        _complete(found, way)
    made = QoSControls(
        **{_snake(name): number for name, number in found.items()}, dscp=_dscp(notes.get("dscp"))
    )
    return None if made == QoSControls() else made


def quantity(text: str) -> int:
    """A number as Kubernetes writes quantities (`10M`, `1.5Gi`, `2e6`), rounded up.

    Raises CniError.
    """
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise bad_config(f"{text!r} is no quantity")
    number, suffix = Decimal(match[1]), match[2] or ""
    if suffix in _FACTORS:
        number *= _FACTORS[suffix]
    elif suffix:
        number = number.scaleb(max(-99, min(99, int(suffix[1:]))))
    return int(number.to_integral_value(rounding="ROUND_CEILING"))


def buckets(qos: QoSControls, mtu: int) -> tuple[Bucket | None, Bucket | None]:
    """What goes into the pod, and what comes out of it, as limits for links of that MTU."""
    least = mtu + HEADER_BYTES
    return (
        _bucket(
            qos.ingress_bandwidth,
            qos.ingress_burst,
            qos.ingress_peakrate,
            qos.ingress_minburst,
            least,
        ),
        _bucket(
            qos.egress_bandwidth, qos.egress_burst, qos.egress_peakrate, qos.egress_minburst, least
        ),
    )


def _bucket(bits: int, burst_bits: int, peak_bits: int, minburst: int, least: int) -> Bucket | None:
    if not bits:
        return None
    burst = min((burst_bits or DEFAULT_BURST_BITS) // 8, 0xFFFFFFFF)
    peak_burst = max(minburst, least) if peak_bits else 0
    return Bucket(
        rate=bits // 8, burst=max(burst, least), peak=peak_bits // 8, peak_burst=peak_burst
    )


def _complete(found: dict[str, int], way: str) -> None:
    """Refuse limits without the one they refine; fill in what Calico fills in."""
    bandwidth, peak = found.get(f"{way}Bandwidth", 0), found.get(f"{way}Peakrate", 0)
    for name, needed in (("Burst", "Bandwidth"), ("Minburst", "Peakrate"),
                         ("PacketBurst", "PacketRate")):  # fmt: skip
        if found.get(way + name) and not found.get(way + needed):
            raise bad_config(f"{PREFIX}{way}{name} needs {way}{needed}")
    if peak and (not bandwidth or peak // 8 <= bandwidth // 8):
        raise bad_config(f"{PREFIX}{way}Peakrate has to be higher than {way}Bandwidth")
    if bandwidth:
        found[f"{way}Burst"] = found.get(f"{way}Burst") or DEFAULT_BURST_BITS
    if found.get(f"{way}PacketRate"):
        found.setdefault(f"{way}PacketBurst", DEFAULT_PACKET_BURST)


def _bounded(where: str, name: str, number: int) -> int:
    least, most = BOUNDS[name]
    if not least <= number <= most:
        raise bad_config(f"{where}: {number} is not between {least} and {most}")
    return number


def _dscp(text: str | None) -> int | str | None:
    if text is None:
        return None
    if text.isascii() and text.isdecimal() and int(text) <= MAX_DSCP:
        return int(text)
    if text.upper() in DSCP_WORDS:
        return text.upper()
    raise bad_config(f"{PREFIX}dscp {text!r} is neither 0 to {MAX_DSCP} nor a name of DiffServ")


def _snake(name: str) -> str:
    return re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", name)
