"""Telling changes ends as telling whole sets, in memory and in the adapter of ExaBGP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bgpd.announcement import Announcement, PathAttributes
from bgpd.exabgp import ExaBGPSpeaker
from bgpd.fake_speaker import FakeSpeaker

PEER = "198.19.0.3"
PREFIXES = [f"10.0.0.{n * 64}/26" for n in range(4)]
NOWHERE = Path("/nonexistent")

Wanted = Callable[[], Mapping[str, Announcement] | None]


def route(prefix: str, med: int) -> Announcement:
    """A route whose MED tells its versions apart."""
    return Announcement(prefix, "192.0.2.1", PathAttributes(med=med))


def in_memory() -> tuple[FakeSpeaker, Wanted]:
    """The fake, and what it was asked for."""
    speaker = FakeSpeaker()
    return speaker, lambda: speaker.advertised.get(PEER)


def of_exabgp() -> tuple[ExaBGPSpeaker, Wanted]:
    """The adapter without an ExaBGP, and what it would command."""
    speaker = ExaBGPSpeaker(NOWHERE, NOWHERE)
    return speaker, lambda: speaker._peer(PEER).rib.wanted


MEDS = st.dictionaries(st.sampled_from(PREFIXES), st.none() | st.integers(0, 2))


@pytest.mark.parametrize("make", [in_memory, of_exabgp])
@given(steps=st.lists(st.tuples(st.booleans(), MEDS), max_size=8))
def test_changes_end_as_whole_sets(
    make: Callable[[], tuple[FakeSpeaker | ExaBGPSpeaker, Wanted]],
    steps: list[tuple[bool, dict[str, int | None]]],
) -> None:
    """Whatever mixture of both, in whatever order; what the caller keeps is not touched."""
    speaker, wanted = make()
    whole: dict[str, Announcement] = {}
    speaker.advertise(PEER, whole)
    for is_whole, meds in steps:
        changes = {p: None if med is None else route(p, med) for p, med in meds.items()}
        after = {} if is_whole else dict(whole)
        for prefix, one in changes.items():
            if one is None:
                after.pop(prefix, None)
            else:
                after[prefix] = one
        given_before = dict(whole)
        if is_whole:
            speaker.advertise(PEER, after)
        else:
            speaker.advertise_changes(PEER, changes)
        assert whole == given_before
        whole = after
        assert wanted() == whole


@pytest.mark.parametrize("make", [in_memory, of_exabgp])
def test_changes_need_a_whole_set(
    make: Callable[[], tuple[FakeSpeaker | ExaBGPSpeaker, Wanted]],
) -> None:
    """Before the first whole set there is nothing to change; a key must be its route's."""
    speaker, wanted = make()
    with pytest.raises(ValueError, match="nothing was ever advertised"):
        speaker.advertise_changes(PEER, {PREFIXES[0]: None})
    speaker.advertise(PEER, {})
    with pytest.raises(ValueError, match="names a route for"):
        speaker.advertise_changes(PEER, {PREFIXES[0]: route(PREFIXES[1], 1)})
    assert wanted() == {}
