"""What is remembered of each session, and the words for why it ended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgpd.announcement import IPV4_UNICAST, Announcement
from bgpd.causes import of_notification, of_reason
from bgpd.session_log import MOST_STRANGERS, SessionLog
from bgpd.speaker import (
    NotificationReceived,
    RoutesReceived,
    SessionDown,
    SessionRejected,
    SessionUp,
    SpeakerLost,
)

PEER = "198.19.0.3"
UP = SessionUp(PEER, 64512, frozenset({IPV4_UNICAST}))


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(clock: Clock) -> SessionLog:
    return SessionLog(clock)


def test_a_session_comes_and_goes(log: SessionLog, clock: Clock) -> None:
    """Since when, how many flaps and how many updates; a restart of ours is no flap."""
    log.note(UP)
    log.note(RoutesReceived(PEER, (Announcement("192.0.2.0/24", PEER),), ("10.0.0.0/8",)))
    clock.now_s += 60
    log.note(SessionUp(PEER, 64512, frozenset({IPV4_UNICAST}), resumed=True))
    record = log.of(PEER)
    assert (record.is_up, record.since_s, record.flaps) == (True, 1000.0, 0)
    assert (record.updates, record.announced, record.withdrawn) == (1, 1, 1)
    log.note(SessionDown(PEER, "closing connection"))
    assert (log.of(PEER).is_up, log.of(PEER).since_s, log.of(PEER).flaps) == (False, 1060.0, 1)


def test_the_notification_tells_why(log: SessionLog, clock: Clock) -> None:
    """What a NOTIFICATION said counts for the end right after it, not for one much later."""
    log.note(UP)
    log.note(NotificationReceived(PEER, 4, 0, "", sent=True))
    log.note(SessionDown(PEER, "closing connection"))
    error = log.of(PEER).last_error
    assert error is not None
    assert "hold timer expired" in error.text
    log.note(UP)
    log.note(NotificationReceived(PEER, 6, 2, ""))
    clock.now_s += 100
    log.note(SessionDown(PEER, "closing connection"))
    error = log.of(PEER).last_error
    assert error is not None
    assert error.bird.startswith("Socket: ")


def test_failed_attempts(log: SessionLog) -> None:
    """Attempts are counted until one succeeds; what went wrong stays to be read afterwards."""
    for _ in range(3):
        log.note(SessionRejected(PEER, "connection refused"))
    assert (log.of(PEER).attempts, log.of(PEER).flaps) == (3, 0)
    log.note(UP)
    assert log.of(PEER).attempts == 0
    assert log.of(PEER).last_error is not None


def test_the_speaker_is_lost(log: SessionLog) -> None:
    """Every session that was up is down with it, once."""
    log.note(UP)
    log.note(SpeakerLost("exabgp is a new process"))
    log.note(SpeakerLost("exabgp is a new process"))
    assert log.of(PEER).flaps == 1


def test_memory_is_bounded(log: SessionLog) -> None:
    """Peers that are not configured are forgotten, in any number; those that are up are kept."""
    log.note(UP)
    for number in range(3 * MOST_STRANGERS):
        log.note(SessionRejected(f"stranger {number}", ""))
    assert len(log._records) <= MOST_STRANGERS
    log.keep(())
    assert list(log._records) == [PEER]


@pytest.mark.parametrize(
    ("code", "subcode", "sent", "words"),
    [
        (4, 0, True, "hold timer expired, we ended it: nothing was heard from it"),
        (4, 0, False, "hold timer expired, the peer ended it: it heard nothing from us"),
        (2, 2, False, "OPEN message error: bad peer AS, the peer ended it: the AS number it has"),
        (6, 1, True, "maximum number of prefixes reached, we ended it: it sent more prefixes"),
        (6, 10, True, "BFD down, we ended it"),
        (3, 99, True, "UPDATE message error, subcode 99, we ended it"),
        (77, 3, False, "error 77, subcode 3, the peer ended it"),
    ],
)
def test_words_for_notifications(code: int, subcode: int, sent: bool, words: str) -> None:
    """Each says what it is, who ended the session, what to look at, and the numbers."""
    text = of_notification(code, subcode, sent=sent).text
    assert text.startswith(words)
    assert text.endswith(f"[{code}/{subcode}]")


def test_what_the_other_operator_wrote() -> None:
    """A shutdown communication is shown, and cannot do anything to a terminal."""
    said = b"maintenance \x1b[2J until 5"
    text = of_notification(6, 2, "0x" + bytes([len(said), *said]).hex(), sent=False).text
    assert "(it said: maintenance  [2J until 5)" in text


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("notification received (6,3)", "peer de-configured, the peer ended it"),
        ("Could not connect to peer 10.0.0.1:179 ([Errno 111] Connection refused)", "nothing lis"),
        ("[Errno 113] No route to host", "does not answer on the link"),
        ("[Errno 110] Connection timed out", "its password differs"),
        ("closing connection", "without a NOTIFICATION"),
        ("something new", "something new"),
        ("", "no reason given"),
    ],
)
def test_words_for_reasons(reason: str, words: str) -> None:
    """What ExaBGP and the system say becomes what it means; the unknown is told as it is."""
    assert words in of_reason(reason).text


@given(st.integers(0, 255), st.integers(0, 255), st.text(), st.booleans(), st.text())
def test_every_end_has_words(code: int, subcode: int, data: str, sent: bool, reason: str) -> None:
    """Whatever a peer sends, there is one printable line for it."""
    for cause in (of_notification(code, subcode, data, sent=sent), of_reason(reason)):
        assert cause.text
        assert "\n" not in cause.text + cause.bird
