"""BFD for one BGP peer, as its annotation says: intervals and multiplier.

    metadata.annotations["cymric.io/bfd"] of a BGPPeer ▶ bfd_of ▶ Session.bfd ▶ bgpd, ToR files

Calico's BGPPeer has no field for BFD, so the setting is an annotation, which calicoctl keeps.
Values: `enabled`, `disabled`, `300ms x 3`, or `150ms/300ms x 3` (send / receive).

Source: RFC 5880 §6.8.1 (what the numbers mean), RFC 5882 §3 (what a client does with BFD).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the BFD process reads this module and wants to stay small
    from cymric.model.resources import Resource

BFD_ANNOTATION = "cymric.io/bfd"

LEAST_INTERVAL_MS, MOST_INTERVAL_MS = 50, 60_000
MOST_MULTIPLIER = 255

_ON = frozenset({"enabled", "enable", "true", "on", "yes"})
_OFF = frozenset({"disabled", "disable", "false", "off", "no", ""})
_VALUE = re.compile(
    r"(?P<tx>\d{1,6})\s*(?P<tx_unit>ms|s)"
    r"(?:\s*/\s*(?P<rx>\d{1,6})\s*(?P<rx_unit>ms|s))?"
    r"\s*[x*]\s*(?P<multiplier>\d{1,3})",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BfdParameters:
    """What we tell the peer: the interval at which we want to send, the least at which we can
    receive, and after how many missing packets it may take us for dead (RFC 5880 §6.8.1).
    """

    min_tx_ms: int = 300
    min_rx_ms: int = 300
    multiplier: int = 3

    def __post_init__(self) -> None:
        for interval_ms in (self.min_tx_ms, self.min_rx_ms):
            if not LEAST_INTERVAL_MS <= interval_ms <= MOST_INTERVAL_MS:
                raise ValueError(
                    f"BFD interval must be {LEAST_INTERVAL_MS} ms to"
                    f" {MOST_INTERVAL_MS // 1000} s, not {interval_ms} ms"
                )
        if not 1 <= self.multiplier <= MOST_MULTIPLIER:
            raise ValueError(
                f"BFD multiplier must be 1 to {MOST_MULTIPLIER}, not {self.multiplier}"
            )

    def __str__(self) -> str:
        """The annotation's text."""
        receive = "" if self.min_rx_ms == self.min_tx_ms else f"/{self.min_rx_ms}ms"
        return f"{self.min_tx_ms}ms{receive} x {self.multiplier}"


def parse_bfd(text: str) -> BfdParameters | None:
    """The annotation's value; None means no BFD. Raises ValueError, which names the value."""
    word = text.strip().lower()
    if word in _OFF:
        return None
    if word in _ON:
        return BfdParameters()
    found = _VALUE.fullmatch(word)
    if found is None:
        raise ValueError(
            f"{BFD_ANNOTATION} is {text!r}; it must be enabled, disabled or like '300ms x 3'"
        )
    tx_ms = _milliseconds(found["tx"], found["tx_unit"])
    rx_ms = tx_ms if found["rx"] is None else _milliseconds(found["rx"], found["rx_unit"])
    return BfdParameters(min_tx_ms=tx_ms, min_rx_ms=rx_ms, multiplier=int(found["multiplier"]))


def bfd_of(resource: Resource) -> BfdParameters | None:
    """What the annotation of a BGPPeer asks for; None: nothing. Raises ValueError."""
    return parse_bfd((resource.metadata.annotations or {}).get(BFD_ANNOTATION, ""))


def _milliseconds(digits: str, unit: str) -> int:
    return int(digits) * (1000 if unit == "s" else 1)
