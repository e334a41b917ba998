"""From the words of annotations and capability to an endpoint's limits, and to token buckets."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.errors import CniError
from cni.netconf import Bandwidth
from cni.qos import BOUNDS, buckets, controls, quantity
from cymric.kernel.shaping import Bucket, request
from cymric.model.endpoints import QoSControls


@pytest.mark.parametrize(
    ("text", "number"),
    [("1", 1), ("10k", 10_000), ("1.5M", 1_500_000), ("2Gi", 2 << 30), ("3e3", 3000),
     ("12E-1", 2), ("100m", 1), (".5k", 500), (" 7 ", 7), ("1E", 10**18)],
)  # fmt: skip
def test_quantities(text: str, number: int) -> None:
    """Quantities are Kubernetes': decimal and binary suffixes, exponents, rounded up."""
    assert quantity(text) == number


@pytest.mark.parametrize("text", ["", "k", "-1", "1 M", "0x10", "1kk", "1K", "½", "1e", "nan"])
def test_no_quantities(text: str) -> None:
    """Anything else is refused by its text."""
    with pytest.raises(CniError, match="is no quantity"):
        quantity(text)


@given(st.text(max_size=12))
def test_a_quantity_is_read_or_refused(text: str) -> None:
    """No text does anything else than be read or be refused."""
    with suppress(CniError):
        assert quantity(text) >= 0


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        pytest.param({}, None, id="nothing"),
        pytest.param(
            {"ingressBandwidth": "1M"},
            QoSControls(ingress_bandwidth=10**6, ingress_burst=1 << 32),
            id="default burst",
        ),
        pytest.param(
            {"egressBandwidth": "1M", "egressBurst": "2M", "egressPeakrate": "3M",
             "egressMinburst": "2k"},
            QoSControls(egress_bandwidth=10**6, egress_burst=2 * 10**6,
                        egress_peakrate=3 * 10**6, egress_minburst=2000),
            id="all of one direction",
        ),
        pytest.param(
            {"ingressPacketRate": "100", "egressMaxConnections": "9"},
            QoSControls(ingress_packet_rate=100, ingress_packet_burst=5, egress_max_connections=9),
            id="packets and connections",
        ),
        pytest.param({"dscp": "46"}, QoSControls(dscp=46), id="DSCP by number"),
        pytest.param({"dscp": "af21"}, QoSControls(dscp="AF21"), id="DSCP by name"),
    ],
)  # fmt: skip
def test_annotations(notes: dict[str, str], expected: QoSControls | None) -> None:
    """Annotations become the endpoint's limits, with Calico's defaults."""
    assert controls(notes, None) == expected


@pytest.mark.parametrize(
    ("notes", "text"),
    [
        ({"ingressBurst": "1M"}, "needs ingressBandwidth"),
        ({"egressMinburst": "2k", "egressBandwidth": "1M"}, "needs egressPeakrate"),
        ({"ingressPacketBurst": "3"}, "needs ingressPacketRate"),
        ({"ingressBandwidth": "1M", "ingressPeakrate": "1M"}, "higher than ingressBandwidth"),
        ({"ingressPeakrate": "1M"}, "higher than ingressBandwidth"),
        ({"dscp": "64"}, "DiffServ"),
        ({"dscp": "AF44"}, "DiffServ"),
        *(
            ({f"egress{name}": str(number)}, "is not between")
            for name, (least, most) in BOUNDS.items()
            for number in (least - 1, most + 1)
        ),
    ],
)  # fmt: skip
def test_refused(notes: dict[str, str], text: str) -> None:
    """What is out of bounds, or lacks the limit that it refines, is refused by name."""
    with pytest.raises(CniError, match=text) as caught:
        controls(notes, None)
    assert caught.value.code == 7


def test_annotations_win_in_their_direction() -> None:
    """The capability counts where no annotation says otherwise."""
    capability = Bandwidth(ingress_rate=5000, ingress_burst=6000, egress_rate=7000)
    assert controls({"ingressBandwidth": "9k"}, capability) == QoSControls(
        ingress_bandwidth=9000,
        ingress_burst=1 << 32,
        egress_bandwidth=7000,
        egress_burst=1 << 32,
    )


def test_buckets() -> None:
    """Bits become bytes, and a bucket always holds a whole packet: else none would pass."""
    limits = QoSControls(
        ingress_bandwidth=8000,
        ingress_burst=1000,
        egress_bandwidth=80_000,
        egress_burst=800_000,
        egress_peakrate=160_000,
    )
    assert buckets(limits, 1500) == (
        Bucket(rate=1000, burst=1514),
        Bucket(rate=10_000, burst=100_000, peak=20_000, peak_burst=1514),
    )
    assert buckets(QoSControls(ingress_packet_rate=5), 1500) == (None, None)


@given(
    rate=st.integers(*BOUNDS["Bandwidth"]),
    burst=st.integers(*BOUNDS["Burst"]),
    higher=st.integers(8, 10**13),
    minburst=st.integers(*BOUNDS["Minburst"]),
)
def test_every_allowed_limit_fits_the_message(
    rate: int, burst: int, higher: int, minburst: int
) -> None:
    """Whatever is within the bounds can be told to the kernel."""
    limits = QoSControls(
        ingress_bandwidth=rate,
        ingress_burst=burst,
        ingress_peakrate=rate + higher,
        ingress_minburst=minburst,
    )
    bucket, nothing = buckets(limits, 1500)
    assert bucket is not None
    assert nothing is None
    message = request(7, bucket)
    assert len(message) % 4 == 0
    assert int.from_bytes(message[:4], "little") == len(message)
