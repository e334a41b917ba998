"""Changes on trial: in force, confirmed, or undone by the node itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cymric.kernel.command import FakeCommands, Finished
from cymric.model import codec, trial
from cymric.model.keys import Key, ResourceKey
from cymric.model.net import parse_address
from felix import rescue
from felix.trials import Trials
from tests.support.eventually import eventually

KEY = ResourceKey("GlobalNetworkPolicy", "host")
NOW = 1_800_000_000.0


def tree(order: int, **annotations: str) -> trial.Tree:
    """A policy that is told from others by its order."""
    metadata = {"name": "host", "annotations": annotations} if annotations else {"name": "host"}
    return {
        "kind": "GlobalNetworkPolicy",
        "apiVersion": "projectcalico.org/v3",
        "metadata": metadata,
        "spec": {"order": order},
    }


def stored(of: trial.Tree) -> object:
    """As the syncer delivers it."""
    decoded = codec.decode(str(KEY), json.dumps(of).encode())
    assert decoded is not None
    return decoded[1]


def order_of(value: object | None) -> object:
    """What tells one policy from another."""
    return value if value is None else value.spec.order  # type: ignore[attr-defined]


@dataclass
class World:
    """A clock turned by hand, and what the calculation was told."""

    directory: Path
    now: float = NOW
    told: list[object] = field(default_factory=list)

    def fresh(self) -> Trials:
        """As a process has it that just started."""
        return Trials(self._update, self.mark, lambda: self.now)

    @property
    def mark(self) -> Path:
        """Where a later process finds out."""
        return self.directory / "policy-trial"

    def _update(self, key: Key, value: object | None) -> None:
        assert key == KEY
        self.told.append(order_of(value))


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Nothing has happened yet."""
    return World(tmp_path / "state")


async def test_a_trial_that_nobody_confirms_is_undone(world: World) -> None:
    """It is in force until its time is up; then what was there before is, and no file is left."""
    trials = world.fresh()
    on_trial = trial.put_on(tree(2), tree(1), now=world.now, within_s=0.05)
    assert order_of(trials.read(KEY, stored(tree(1)))) == 1
    on_trial["metadata"]["annotations"][trial.CONFIRM_BY] = trial.time_text(world.now + 60)
    assert order_of(trials.read(KEY, stored(on_trial))) == 2
    assert world.mark.exists()
    assert trials.keys == {KEY}
    await eventually(lambda: world.told == [1])
    assert not world.mark.exists()
    assert not trials.keys


async def test_a_trial_of_something_new_ends_in_nothing(world: World) -> None:
    """What was not there before is gone again."""
    trials = world.fresh()
    on_trial = trial.put_on(tree(2), None, now=world.now, within_s=60)
    on_trial["metadata"]["annotations"][trial.CONFIRM_WITHIN] = "0.01"
    trials.read(KEY, stored(on_trial))
    await eventually(lambda: world.told == [None])


async def test_a_confirmed_trial_stays(world: World) -> None:
    """An object without the annotations is an ordinary one, and the timer is gone."""
    trials = world.fresh()
    on_trial = trial.put_on(tree(2), tree(1), now=world.now, within_s=60)
    trials.read(KEY, stored(on_trial))
    assert order_of(trials.read(KEY, stored(trial.ended(on_trial)))) == 2
    assert not trials.keys
    assert not world.mark.exists()


async def test_a_fresh_process_decides_the_same(world: World) -> None:
    """By what is stored and the clock alone; the file of the one before is removed when in sync."""
    on_trial = stored(trial.put_on(tree(2), tree(1), now=world.now, within_s=60))
    world.fresh().read(KEY, on_trial)
    world.now += 59
    again = world.fresh()
    assert order_of(again.read(KEY, on_trial)) == 2
    world.now += 1
    last = world.fresh()
    assert order_of(last.read(KEY, on_trial)) == 1
    assert world.mark.exists()
    last.in_sync()
    assert not world.mark.exists()


async def test_a_clock_that_is_behind_prolongs_nothing(world: World) -> None:
    """A node an hour behind counts the seconds from when it saw the object."""
    on_trial = trial.put_on(tree(2), tree(1), now=world.now + 3600, within_s=60)
    on_trial["metadata"]["annotations"][trial.CONFIRM_WITHIN] = "0.01"
    world.fresh().read(KEY, stored(on_trial))
    await eventually(lambda: world.told == [1])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        pytest.param(trial.CONFIRM_BY, "tomorrow", 1, id="time"),
        pytest.param(trial.CONFIRM_BY, "2030-01-01T00:00:00", 1, id="no zone"),
        pytest.param(trial.CONFIRM_WITHIN, "long", 1, id="seconds"),
        pytest.param(trial.CONFIRM_WITHIN, "nan", 1, id="no number"),
        pytest.param(trial.CONFIRM_ELSE, "{", 2, id="object before"),
        pytest.param(trial.CONFIRM_ELSE, "7", 2, id="no object before"),
    ],
)
async def test_damaged_trials(world: World, name: str, text: str, expected: int) -> None:
    """Without a time the trial is over; without what was before, what is stored counts."""
    on_trial = trial.put_on(tree(2), tree(1), now=world.now, within_s=60)
    on_trial["metadata"]["annotations"][name] = text
    trials = world.fresh()
    value = trials.read(KEY, stored(on_trial))
    if name == trial.CONFIRM_ELSE:
        world.now += 61
        value = world.fresh().read(KEY, stored(on_trial))
    assert order_of(value) == expected


async def test_a_policy_that_cannot_be_read_is_undone_too(world: World) -> None:
    """It denies everything meanwhile, so it is the one that matters most."""
    on_trial = trial.put_on(tree(2), tree(1), now=world.now, within_s=60)
    on_trial["spec"]["selector"] = "role =="
    on_trial["metadata"]["annotations"][trial.CONFIRM_WITHIN] = "0.01"
    with pytest.raises(codec.Malformed) as caught:
        stored(on_trial)
    damaged = caught.value.damaged
    assert damaged is not None
    assert world.fresh().read(KEY, damaged) is damaged
    await eventually(lambda: world.told == [1])


def test_a_trial_of_a_trial_falls_back_to_what_is_in_force() -> None:
    """While the first runs, that is the first; when it is over, what was before that."""
    first = trial.put_on(tree(2), tree(1), now=NOW, within_s=60)
    assert trial.in_force(first, now=NOW + 59) == tree(2)
    assert trial.in_force(first, now=NOW + 60) == tree(1)
    second = trial.put_on(tree(3), trial.in_force(first, now=NOW + 61), now=NOW + 61, within_s=60)
    assert trial.in_force(second, now=NOW + 200) == tree(1)


def test_annotations_of_others_stay() -> None:
    """Only our three come and go."""
    on_trial = trial.put_on(tree(2, kept="yes"), None, now=NOW, within_s=60)
    assert set(on_trial["metadata"]["annotations"]) == {"kept", *trial.ANNOTATIONS}
    assert trial.ended(on_trial) == tree(2, kept="yes")


# --- a felix that starts behind a wall ------------------------------------------------------------

SAVED = """*filter
:INPUT ACCEPT [0:0]
:cali-INPUT - [0:0]
:cali-OUTPUT - [0:0]
COMMIT
"""


def test_the_way_is_opened_only_to_etcd_and_only_where_our_chains_are() -> None:
    """Both directions, by address and port, ahead of every rule of ours."""
    endpoints = [(parse_address("198.19.0.9"), 2379)]
    text = rescue.transaction("filter", endpoints, ["INPUT", "cali-INPUT", "cali-OUTPUT"])
    assert text.splitlines() == [
        "*filter",
        "-I cali-INPUT 1 -p tcp --source 198.19.0.9 -m tcp --sport 2379 -j ACCEPT",
        "-I cali-INPUT 1 -p tcp --destination 198.19.0.9 -m tcp --dport 2379 -j ACCEPT",
        "-I cali-OUTPUT 1 -p tcp --source 198.19.0.9 -m tcp --sport 2379 -j ACCEPT",
        "-I cali-OUTPUT 1 -p tcp --destination 198.19.0.9 -m tcp --dport 2379 -j ACCEPT",
        "COMMIT",
    ]
    assert rescue.transaction("raw", endpoints, ["PREROUTING"]) == ""


async def test_rescue_waits_for_the_time_in_the_file(world: World) -> None:
    """Without a file, or before its time, nothing is touched."""
    fed: list[str] = []

    def restore(argv: Sequence[str], text: str) -> Finished:
        fed.append(text)
        return Finished(tuple(argv), 0, "", "")

    def save(argv: Sequence[str], _: str) -> Finished:
        is_filter = "filter" in argv or len(argv) == 1
        return Finished(tuple(argv), 0, SAVED if is_filter else "", "")

    def plain(argv: Sequence[str], _: str) -> Finished:
        return Finished(tuple(argv), 0, "iptables v1.8.9 (nf_tables)", "")

    commands = FakeCommands(
        {
            "iptables-nft-save": save,
            "iptables-legacy-save": lambda argv, _: Finished(tuple(argv), 0, "", ""),
            "iptables-nft-restore": restore,
            "iptables": plain,
        }
    )
    assert not rescue.is_over(world.mark, world.now)
    world.mark.parent.mkdir()
    world.mark.write_text(trial.time_text(world.now + 60))
    assert not rescue.is_over(world.mark, world.now)
    world.now += 60
    async with asyncio.timeout(30):
        await rescue.rescue(
            commands, world.mark, ["http://198.19.0.9:2379"], lambda: world.now, patience_s=0
        )
    (text,) = fed
    assert text.startswith("*filter\n-I cali-INPUT 1 -p tcp --source 198.19.0.9")
