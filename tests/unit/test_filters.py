"""BGPFilter rules, as truth tables."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import msgspec
import pytest

from bgpd.announcement import AsPathSegment, PathAttributes, SegmentKind, as_sequence
from bgpd.filters import NO_CHANGES, Candidate, Changes, Rules, compile_rules, prepended
from cymric.model.bgp_filter import BGPFilter, BGPFilterSpec
from cymric.model.resources import ObjectMeta

ACCEPTED, REJECTED, UNNAMED = NO_CHANGES, "reject", None
WHOLE = "10.0.0.0/8"


def rules(*given: dict[str, Any], version: int = 4, is_ibgp: bool = False) -> Rules:
    """Compiled export rules."""
    spec = msgspec.convert({f"exportV{version}": given}, BGPFilterSpec)
    found = {"f": BGPFilter(metadata=ObjectMeta(name="f"), spec=spec)}
    return compile_rules(["f"], found, direction="export", version=version, is_ibgp=is_ibgp)


def route(
    prefix: str = "10.1.0.0/16",
    *,
    local_pref: int = 100,
    is_learned: bool = True,
    interface: str = "",
    **attributes: Any,
) -> Candidate:
    """A route."""
    return Candidate(
        prefix=ip_network(prefix),
        attributes=PathAttributes(**attributes),
        local_pref=local_pref,
        is_learned=is_learned,
        interface=interface,
    )


def on(prefix: str, operator: str, **more: Any) -> dict[str, Any]:
    """An accepting rule on a prefix."""
    return {"cidr": prefix, "matchOperator": operator, "action": "Accept", **more}


@pytest.mark.parametrize(
    ("rule", "candidate", "matches"),
    [
        pytest.param({"action": "Accept"}, route(), True, id="no condition"),
        pytest.param(on(WHOLE, "Equal"), route(WHOLE), True, id="equal"),
        pytest.param(on(WHOLE, "Equal"), route(), False, id="inside is not equal"),
        pytest.param(on(WHOLE, "NotEqual"), route(WHOLE), False, id="equal is not unequal"),
        pytest.param(on(WHOLE, "NotEqual"), route(), True, id="unequal"),
        pytest.param(on(WHOLE, "In"), route(WHOLE), True, id="a prefix is in itself"),
        pytest.param(on(WHOLE, "In"), route(), True, id="in"),
        pytest.param(on(WHOLE, "In"), route("11.0.0.0/8"), False, id="beside"),
        pytest.param(on(WHOLE, "In"), route("0.0.0.0/0"), False, id="around"),
        pytest.param(on(WHOLE, "NotIn"), route(), False, id="in is not not in"),
        pytest.param(on(WHOLE, "NotIn"), route("0.0.0.0/0"), True, id="around is not in"),
        pytest.param(
            on(WHOLE, "In", prefixLength={"min": 24}), route(), False, id="shorter than the least"
        ),
        pytest.param(
            on(WHOLE, "In", prefixLength={"min": 16, "max": 16}), route(), True, id="in bounds"
        ),
        pytest.param(
            on(WHOLE, "In", prefixLength={"max": 12}), route(), False, id="longer than the most"
        ),
        pytest.param(
            on(WHOLE, "NotIn", prefixLength={"min": 24}), route(), True, id="not among the bounds"
        ),
        pytest.param(
            on(WHOLE, "Equal", prefixLength={"min": 16, "max": 24}),
            route(),
            True,
            id="a length makes equal a set",
        ),
        pytest.param(
            {"source": "RemotePeers", "action": "Accept"}, route(), True, id="from a peer"
        ),
        pytest.param(
            {"source": "RemotePeers", "action": "Accept"},
            route(is_learned=False),
            False,
            id="our own",
        ),
        pytest.param(
            {"interface": "cali*", "action": "Accept"},
            route(interface="calif00"),
            True,
            id="interface",
        ),
        pytest.param(
            {"interface": "*", "action": "Accept"}, route(), False, id="without an interface"
        ),
        pytest.param(
            {"interface": "eth[0]", "action": "Accept"},
            route(interface="eth0"),
            False,
            id="only the star is special",
        ),
        pytest.param(
            {"communities": {"values": ["64512:7"]}, "action": "Accept"},
            route(communities=((64512, 7), (1, 1))),
            True,
            id="community",
        ),
        pytest.param(
            {"communities": {"values": ["64512:7:8"]}, "action": "Accept"},
            route(large_communities=((64512, 7, 8),)),
            True,
            id="large community",
        ),
        pytest.param(
            {"communities": {"values": ["64512:7"]}, "action": "Accept"},
            route(large_communities=((64512, 7, 8),)),
            False,
            id="another community",
        ),
        pytest.param(
            {"asPathPrefix": [1, 2], "action": "Accept"},
            route(as_path=as_sequence(1, 2, 3)),
            True,
            id="path begins so",
        ),
        pytest.param(
            {"asPathPrefix": [1, 2], "action": "Accept"},
            route(as_path=as_sequence(1)),
            False,
            id="path too short",
        ),
        pytest.param(
            {"asPathPrefix": [1], "action": "Accept"},
            route(as_path=(AsPathSegment(SegmentKind.SET, (1, 2)),)),
            False,
            id="a set has no first",
        ),
        pytest.param(
            {"priority": 1024, "action": "Accept"},
            route(local_pref=2147482623),
            True,
            id="priority",
        ),
        pytest.param({"priority": 1024, "action": "Accept"}, route(), False, id="other priority"),
        pytest.param(
            on(WHOLE, "In", source="RemotePeers", asPathPrefix=[1]),
            route(as_path=as_sequence(2)),
            False,
            id="all conditions must hold",
        ),
    ],
)
def test_conditions(rule: dict[str, Any], candidate: Candidate, matches: bool) -> None:
    """A rule that matches speaks, in either word; one that does not leaves it to the default."""
    assert rules(rule).judge(candidate) == (ACCEPTED if matches else UNNAMED)
    assert rules(rule | {"action": "Reject"}).judge(candidate) == (REJECTED if matches else UNNAMED)


@pytest.mark.parametrize(
    ("kind", "is_ibgp", "verdict"),
    [("eBGP", False, ACCEPTED), ("eBGP", True, UNNAMED), ("iBGP", True, ACCEPTED)],
)
def test_peer_type(kind: str, is_ibgp: bool, verdict: object) -> None:
    """A rule for one kind of session is none for the other."""
    asked = rules({"peerType": kind, "action": "Accept"}, is_ibgp=is_ibgp)
    assert asked.judge(route()) == verdict


def test_the_first_match_of_all_filters_decides() -> None:
    """Filters are asked in the order of the session; what one leaves open the next may close."""

    def one(name: str, *given: dict[str, Any]) -> BGPFilter:
        spec = msgspec.convert({"importV4": given}, BGPFilterSpec)
        return BGPFilter(metadata=ObjectMeta(name=name), spec=spec)

    found = {
        "a": one("a", on("10.1.0.0/16", "In")),
        "b": one("b", {"cidr": WHOLE, "matchOperator": "In", "action": "Reject"}),
    }

    def asked(*names: str) -> Rules:
        return compile_rules(names, found, direction="import", version=4, is_ibgp=True)

    assert asked("a", "b").judge(route()) == ACCEPTED
    assert asked("a", "b").judge(route("10.2.0.0/16")) == REJECTED
    assert asked("b", "a").judge(route()) == REJECTED
    assert asked("a", "b").judge(route("192.0.2.0/24")) == UNNAMED
    assert asked("a", "gone").judge(route()) == REJECTED
    assert not asked()


def test_the_families_have_rules_of_their_own() -> None:
    """IPv6 rules say nothing about IPv4 routes."""
    spec = msgspec.convert({"exportV6": [{"action": "Reject"}]}, BGPFilterSpec)
    found = {"f": BGPFilter(metadata=ObjectMeta(name="f"), spec=spec)}
    for version, verdict in ((4, UNNAMED), (6, REJECTED)):
        asked = compile_rules(["f"], found, direction="export", version=version, is_ibgp=False)
        assert asked.judge(route()) == verdict
    asked = rules({"cidr": "fd00::/8", "matchOperator": "In", "action": "Accept"}, version=6)
    assert asked.judge(route("fd00:16::/122")) == ACCEPTED


def test_operations_apply_in_order() -> None:
    """Communities are added, AS sequences end up in front, the last priority counts."""
    operations = [
        {"addCommunity": {"value": "1:2"}},
        {"addCommunity": {"value": "1:2:3"}},
        {"prependASPath": {"prefix": [7, "1.0"]}},
        {"prependASPath": {"prefix": [6]}},
        {"setPriority": {"value": 5}},
        {"setPriority": {"value": 512}},
    ]
    changes = rules({"action": "Accept", "operations": operations}).judge(route())
    assert isinstance(changes, Changes)
    assert changes.local_pref == 2**31 - 1 - 512
    applied = changes.apply(PathAttributes(as_path=as_sequence(9), communities=((1, 2), (3, 4))))
    assert applied.communities == ((1, 2), (3, 4))
    assert applied.large_communities == ((1, 2, 3),)
    assert applied.as_path == as_sequence(6, 7, 65536, 9)


def test_prepending() -> None:
    """ASes join a sequence and stand before a set; a full sequence gets another one before it."""
    as_set = AsPathSegment(SegmentKind.SET, (1, 2))
    assert prepended((), (7,)) == as_sequence(7)
    assert prepended((as_set,), (7,)) == (*as_sequence(7), as_set)
    full = as_sequence(*range(1, 256))
    assert prepended(full, (7,)) == (*as_sequence(7), *full)
    assert prepended(full, ()) is full


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"importV4": [{"cidr": WHOLE, "action": "Accept"}]}, "belong together"),
        ({"importV4": [{"matchOperator": "In", "action": "Accept"}]}, "belong together"),
        ({"importV6": [on(WHOLE, "In")]}, "is not IPv6"),
        ({"importV4": [{"prefixLength": {"min": 1}, "action": "Accept"}]}, "needs a cidr"),
        ({"importV4": [on(WHOLE, "In", prefixLength={"max": 33})]}, "between 0 and 32"),
        ({"importV4": [{"source": "Mars", "action": "Accept"}]}, "not RemotePeers"),
        ({"importV4": [{"peerType": "both", "action": "Accept"}]}, "neither eBGP nor iBGP"),
        ({"importV4": [{"priority": 0, "action": "Accept"}]}, "not between"),
        ({"importV4": [{"action": "Perhaps"}]}, "Invalid enum value"),
        ({"importV4": [{}]}, "action"),
        ({"importV4": [{"communities": {"values": []}, "action": "Accept"}]}, "exactly one"),
        ({"importV4": [{"communities": {"values": ["7"]}, "action": "Accept"}]}, "aa:nn"),
        (
            {"importV4": [{"action": "Reject", "operations": [{"setPriority": {"value": 1}}]}]},
            "rules that accept",
        ),
        ({"importV4": [{"action": "Accept", "operations": [{}]}]}, "exactly one thing"),
        (
            {
                "importV4": [
                    {"action": "Accept", "operations": [{"setPriority": {"value": 1}}] * 11}
                ]
            },
            "at most 10",
        ),
    ],
)
def test_what_is_no_filter(spec: dict[str, Any], reason: str) -> None:
    """A rule that cannot be meant does not become an object."""
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(spec, BGPFilterSpec)
