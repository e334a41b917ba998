"""Lines recorded from ExaBGP 5.0.15 talking to BIRD, through the relay, and their values."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgpd.announcement import Announcement, Origin, PathAttributes, as_sequence
from bgpd.exabgp_events import (
    Answer,
    EndOfRIBLine,
    Greeting,
    Ignored,
    Line,
    Malformed,
    NotificationLine,
    Open,
    Refresh,
    Shutdown,
    State,
    Text,
    Update,
    parse,
)

PEER = "198.19.8.2"
FAMILY = "ipv4 unicast"
RECORDING = Path(__file__).with_name("exabgp-5.0.15.lines").read_bytes().splitlines()
GREETING, UPDATE = RECORDING[0], RECORDING[1]


def recorded(kind: type[Line]) -> list[Line]:
    """All lines of that kind in the recording."""
    return [value for value in map(parse, RECORDING) if isinstance(value, kind)]


def test_nothing_recorded_is_malformed() -> None:
    """Every line of the recording is understood."""
    assert recorded(Malformed) == []
    assert recorded(Ignored) == []


def test_greeting_carries_live_sessions() -> None:
    """The relay's greeting names ExaBGP, tells loss, and brings OPEN and `up` of each session."""
    (greeting,) = recorded(Greeting)
    assert greeting == Greeting(
        generation="10152-263006",
        lost=True,
        sessions=(
            (
                State(PEER, 64999, "up", ""),
                Open(
                    peer=PEER,
                    router_id=PEER,
                    families=frozenset({FAMILY}),
                    restart_time_s=120,
                    forwarding_families=frozenset(),
                    restarting=False,
                    route_refresh=True,
                    enhanced_refresh=True,
                ),
            ),
        ),
    )


def test_received_update() -> None:
    """All attributes arrive, and both prefixes."""
    attributes = PathAttributes(
        origin=Origin.EGP,
        as_path=as_sequence(64999, 65010),
        med=5,
        communities=((64999, 1), (65001, 7)),
        large_communities=((1, 2, 3),),
        extended_communities=(0x0002FDE900000005,),
    )
    assert parse(UPDATE) == Update(
        peer=PEER,
        sent=False,
        announced=(
            Announcement("198.19.20.64/26", PEER, attributes),
            Announcement("198.19.20.0/26", PEER, attributes),
        ),
        withdrawn=(),
    )


def test_order_of_a_session() -> None:
    """What was sent and received stays apart, in the order in which it happened."""
    told = [
        (type(value).__name__, getattr(value, "sent", None))
        for value in map(parse, RECORDING)
        if isinstance(value, Update | EndOfRIBLine)
    ]
    assert told[:5] == [
        ("Update", False),
        ("EndOfRIBLine", False),
        ("Update", True),
        ("Update", True),
        ("EndOfRIBLine", True),
    ]
    assert recorded(Refresh) == [Refresh(PEER, FAMILY, s) for s in ("begin", "end", "query")]
    assert recorded(NotificationLine) == [NotificationLine(PEER, 6, 2, "0x", sent=False)]
    assert [(s.state, s.reason) for s in recorded(State) if isinstance(s, State)] == [
        ("down", "notification received (6,2)"),
        ("connected", ""),
        ("down", "closing connection"),
    ]
    assert recorded(Shutdown) == [Shutdown()]
    assert [a.ok for a in recorded(Answer) if isinstance(a, Answer)].count(False) == 1
    assert Text("198.19.8.2 ipv4 unicast 198.19.16.0/26 next-hop 198.19.8.1") in recorded(Text)


def test_withdrawal() -> None:
    """A withdrawal needs no attributes."""
    gone = [u for u in recorded(Update) if isinstance(u, Update) and u.withdrawn]
    assert [(u.sent, u.withdrawn) for u in gone] == [
        (True, ("198.19.16.64/26",)),
        (False, ("198.19.20.64/26",)),
    ]


def edited(old: bytes, new: bytes) -> Line:
    """The recorded update with something else in it."""
    assert old in UPDATE
    return parse(UPDATE.replace(old, new))


def test_global_and_link_local_next_hop_are_one_path() -> None:
    """An IPv6 prefix listed under both next hops is one announcement, by the global one."""
    hops = b'"fe80::1": [ { "nlri": "2001:db8::/64" } ], "2001:DB8::1": [ "2001:db8::/64" ]'
    line = edited(
        b'"ipv4 unicast": { "198.19.8.2": [ { "nlri": "198.19.20.64/26" }, '
        b'{ "nlri": "198.19.20.0/26" } ] }',
        b'"ipv6 unicast": { ' + hops + b" }",
    )
    assert isinstance(line, Update)
    assert [(a.prefix, a.next_hop) for a in line.announced] == [("2001:db8::/64", "2001:db8::1")]


def test_restart_flags() -> None:
    """ExaBGP's "restart" is the F bit of a family, its "forwarding" the R bit of the peer."""
    flags = GREETING.replace(b'{"ipv4/unicast": []}', b'{"ipv4/unicast": ["restart"]}').replace(
        b'"restart-flags": []', b'"restart-flags": ["forwarding"]'
    )
    greeting = parse(flags)
    assert isinstance(greeting, Greeting)
    opened = greeting.sessions[0][1]
    assert opened is not None
    assert opened.forwarding_families == {FAMILY}
    assert opened.restarting


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"{", id="cut off"),
        pytest.param(b"{}", id="empty object"),
        pytest.param(UPDATE[:-40], id="half an update"),
        pytest.param(b'{"type": "update", "neighbor": 7}', id="wrong types"),
        pytest.param(UPDATE.replace(b"198.19.20.0/26", b"nonsense"), id="no prefix"),
        pytest.param(UPDATE.replace(b"64999", b"None"), id="no JSON"),
        pytest.param(b'{"relay": 1, "generation": 1, "lost": 0, "sessions": [[1]]}', id="hello"),
        pytest.param(b"{\xff\xfe}", id="no text"),
    ],
)  # fmt: skip
def test_garbage_is_reported_not_raised(line: bytes) -> None:
    """A line that makes no sense is a value that says so."""
    value = parse(line)
    assert isinstance(value, Malformed)
    assert value.reason


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(UPDATE.replace(b"egp", b"invalid"), id="an origin that does not exist"),
        pytest.param(UPDATE.replace(b'"origin"', b'"attribute-0x01"'), id="no origin"),
    ],
)
def test_broken_attributes_withdraw(line: bytes) -> None:
    """Routes without a usable mandatory attribute are withdrawn (RFC 7606)."""
    whole, value = parse(UPDATE), parse(line)
    assert isinstance(whole, Update)
    assert isinstance(value, Update)
    assert value.announced == ()
    assert {*value.withdrawn} == {*whole.withdrawn, *(one.prefix for one in whole.announced)}
    assert whole.announced


@given(st.binary(max_size=300))
def test_no_line_raises(noise: bytes) -> None:
    """Whatever comes, parsing ends with a value."""
    parse(b"{" + noise)
    parse(noise)
