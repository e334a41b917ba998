"""Prefixes around addresses, and their two text forms."""

from __future__ import annotations

import pytest

from cymric.model.net import (
    contains,
    from_dashed,
    host_network,
    network_of,
    parse_address,
    parse_network,
    to_dashed,
)


@pytest.mark.parametrize(
    ("address", "length", "network"),
    [
        ("10.0.0.77", 26, "10.0.0.64/26"),
        ("10.0.0.64", 26, "10.0.0.64/26"),
        ("fd00::77", 122, "fd00::40/122"),
        ("::1", 122, "::/122"),
    ],
)
def test_the_prefix_around_an_address(address: str, length: int, network: str) -> None:
    """Host bits are cut off, and the family is the address's even where the number is small."""
    assert network_of(parse_address(address), length) == parse_network(network)


def test_single_addresses() -> None:
    """A host prefix is as long as its family's addresses."""
    assert str(host_network(parse_address("10.0.0.7"))) == "10.0.0.7/32"
    assert str(host_network(parse_address("fd00::7"))) == "fd00::7/128"


def test_containment_never_crosses_families() -> None:
    """A prefix of one family contains none of the other."""
    assert contains(parse_network("10.0.0.0/8"), parse_network("10.1.0.0/16"))
    assert contains(parse_network("10.0.0.0/8"), parse_network("10.0.0.0/8"))
    assert not contains(parse_network("10.1.0.0/16"), parse_network("10.0.0.0/8"))
    assert not contains(parse_network("::/0"), parse_network("10.0.0.0/8"))
    assert not contains(parse_network("0.0.0.0/0"), parse_network("fd00::/8"))


def test_dashed_form() -> None:
    """In keys the slash is a dash; what is not masked is refused."""
    assert to_dashed(parse_network("fd00:10:244::40/122")) == "fd00:10:244::40-122"
    assert from_dashed("192.168.10.0-26") == parse_network("192.168.10.0/26")
    with pytest.raises(ValueError, match="host bits"):
        from_dashed("192.168.10.1-26")
