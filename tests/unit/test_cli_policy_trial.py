"""Changes on trial by the command line: put on, confirmed, rolled back."""

from __future__ import annotations

import json

import pytest

from cymric.cli import policy_trial
from cymric.cli.session import Session
from cymric.datastore.memory import MemoryDatastore
from cymric.model import trial
from tests.support.cymric_cli import RESOURCES, Cymric, InMemory

PLACE = f"{RESOURCES}/globalnetworkpolicies/host"
HOSTS = f"{RESOURCES}/hostendpoints/node1-up0"
NOW = 1_800_000_000.0


class Clock:
    """Seconds since 1970, turned by hand."""

    now = NOW

    def time(self) -> float:
        """As the module does."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The time that the command line sees."""
    made = Clock()
    monkeypatch.setattr(policy_trial, "time", made)
    return made


@pytest.fixture
def cymric() -> Cymric:
    """The command line on a datastore in memory, with the default tier."""
    store = MemoryDatastore()
    made = Cymric(InMemory(store), Session(store=store, environ={}))
    made.ok("apply", "-f", "-", stdin=tree("Tier", "default", order=1000000))
    return made


def tree(kind: str, name: str, **spec: object) -> dict[str, object]:
    """An object as a user writes it."""
    api_version = "projectcalico.org/v3"
    return {"kind": kind, "apiVersion": api_version, "metadata": {"name": name}, "spec": spec}


def host(order: int) -> dict[str, object]:
    """A policy, told from others by its order."""
    return tree("GlobalNetworkPolicy", "host", order=order, selector="role == 'node'")


def test_confirmed_in_time(cymric: Cymric, clock: Clock) -> None:
    """The annotations go, all else stays."""
    cymric.ok("apply", "-f", "-", stdin=host(1))
    before = cymric.stored(PLACE)
    said = cymric.ok("policy", "apply", "-f", "-", "--confirm", "60s", stdin=host(2))
    assert "on trial until" in said
    stored = cymric.stored(PLACE)
    assert stored["spec"]["order"] == 2
    assert json.loads(stored["metadata"]["annotations"][trial.CONFIRM_ELSE]) == before
    clock.now += 59
    assert "undone in 1s" in cymric.ok("policy", "trials")
    assert cymric.ok("policy", "confirm") == "GlobalNetworkPolicy host stays\n"
    after = cymric.stored(PLACE)
    assert after == {**before, "spec": {**before["spec"], "order": 2}}
    assert "nothing is on trial" in cymric.refused("policy", "confirm")


def test_too_late(cymric: Cymric, clock: Clock) -> None:
    """What the nodes have undone cannot be confirmed; rolling back writes what they have."""
    objects = [host(2), tree("HostEndpoint", "node1-up0", node="node1", interfaceName="up0")]
    cymric.ok("policy", "apply", "-f", "-", "--confirm", "1m", stdin=objects)
    clock.now += 60
    assert "too late for GlobalNetworkPolicy host, HostEndpoint node1-up0" in cymric.refused(
        "policy", "confirm"
    )
    assert "undone 0s ago" in cymric.ok("policy", "trials")
    assert cymric.ok("policy", "rollback").count("is gone") == 2
    assert cymric.raw.get(PLACE) is None
    assert cymric.raw.get(HOSTS) is None


def test_rollback_writes_what_was_before(cymric: Cymric, clock: Clock) -> None:
    """To the byte, also while there is time; only of the objects of a file, if one is given."""
    cymric.ok("apply", "-f", "-", stdin=host(1))
    before = cymric.raw.get(PLACE)
    for _ in range(2):
        cymric.ok("policy", "apply", "-f", "-", "--confirm", "60s", stdin=host(2))
        clock.now += 100
    other = tree("HostEndpoint", "node1-up0", node="node1", interfaceName="up0")
    cymric.ok("policy", "apply", "-f", "-", "--confirm", "60s", stdin=other)
    assert "is as it was before" in cymric.ok("policy", "rollback", "-f", "-", stdin=host(9))
    assert cymric.raw.get(PLACE) == before
    assert cymric.raw.get(HOSTS) is not None


def test_an_ordinary_apply_ends_a_trial(cymric: Cymric, clock: Clock) -> None:
    """Whoever writes the object without a trial means it."""
    cymric.ok("policy", "apply", "-f", "-", "--confirm", "60s", stdin=host(2))
    cymric.ok("apply", "-f", "-", stdin=host(3))
    assert set(cymric.stored(PLACE)["metadata"]["annotations"]) == {"projectcalico.org/metadata"}


def test_what_cannot_be_on_trial(cymric: Cymric) -> None:
    """Only what nodes know to undo, and only for a time that makes sense."""
    pool = tree("IPPool", "one", cidr="198.19.16.0/21")
    said = cymric.refused("policy", "apply", "-f", "-", "--confirm", "60s", stdin=pool)
    assert "IPPool cannot be on trial" in said
    for span in ("1s", "2h", "soon"):
        result = cymric("policy", "apply", "-f", "-", "--confirm", span, stdin=host(1))
        assert result.exit_code == 2
    assert cymric("policy", "apply", "-f", "-", stdin=host(1)).exit_code == 2
    assert cymric.raw.get(PLACE) is None
