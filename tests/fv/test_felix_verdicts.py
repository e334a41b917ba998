"""The verdict on every real packet is what the stored objects say; also while they change.

Clusters by chance are given to felix' real drivers in a node's namespace; packets of every kind are
sent in namespaces around it, and whoever gets one tells. What should happen is worked out from the
stored objects alone. `make soak` asks for many more, from a seed that it prints.
"""

from __future__ import annotations

import os
import random
import select
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from felix.calc.journey import judge
from tests.support.felix_generate import OTHER, SCTP, Question, cluster, packets, selective_cluster
from tests.support.felix_policy import Spec, Stored
from tests.support.felix_walk import node_of
from tests.support.verdict_lab import VerdictLab

pytestmark = [pytest.mark.root, pytest.mark.slow]

IS_SOAK = bool(os.environ.get("CYMRIC_SOAK"))
SEED = random.SystemRandom().randrange(10**9) if IS_SOAK else 0
VERDICTS = 25_000 if IS_SOAK else 1_500
"""On each backend."""
PACKETS = 60
"""To each cluster."""
CHANGES = {"nft": 1_000, "legacy": 1_000} if IS_SOAK else {"nft": 200, "legacy": 50}
FLOWS = 16
FIRST_PORT, PORTS = 20_000, 40_000
"""Source ports that all rules treat alike, so that each packet may begin a connection."""
PATIENCE_S = 30.0
PAUSE_S = 0.0002


@pytest.fixture(scope="module", params=["nft", "legacy"])
def lab(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VerdictLab]:
    """A node with felix' drivers, and everybody around it."""
    made = VerdictLab(tmp_path_factory.mktemp("verdicts"), request.param)
    try:
        yield made.open()
    finally:
        made.close()


@dataclass
class Ledger:
    """What was sent, what may become of it, and what did."""

    lab: VerdictLab
    sent: int = 0
    wanted: dict[int, tuple[str, frozenset[str]]] = field(default_factory=dict)
    """The namespace that may get it, and the verdicts that are right, by number."""
    arrived: set[int] = field(default_factory=set)
    wrong: list[tuple[int, str]] = field(default_factory=list)
    """Packets that came where or when they should not."""
    verdicts: Counter[str] = field(default_factory=Counter)

    def send(self, question: Question, right: frozenset[str]) -> int:
        """Send a packet for which these verdicts are right; its number."""
        self.sent += 1
        self.wanted[self.sent] = (self.lab.namespace(question.destination.name), right)
        namespace = self.lab.namespace(question.source.name)
        self.lab.wire.send(namespace, question.packet, self.sent)
        return self.sent

    def collect(self, wait_s: float = 0.0) -> None:
        """Note what arrived."""
        for number, namespace in self.lab.wire.received(wait_s):
            expected, right = self.wanted[number]
            if namespace == expected and "allow" in right:
                self.arrived.add(number)
            else:
                self.wrong.append((number, namespace))

    def wait_for(self, numbers: Sequence[int]) -> list[int]:
        """Wait for those that must arrive; those that did not."""
        must = {number for number in numbers if self.wanted[number][1] == {"allow"}}
        deadline_s = time.monotonic() + PATIENCE_S
        self.collect()
        while (missing := must - self.arrived) and time.monotonic() < deadline_s:
            self.collect(0.1)
        for number in numbers:
            self.verdicts["/".join(sorted(self.wanted[number][1]))] += 1
        return sorted(missing)


@pytest.mark.timeout(7200)
def test_every_packet_meets_its_verdict(lab: VerdictLab) -> None:
    """Any packet, from anywhere to anywhere, under any policy, in both families."""
    ledger, ways = Ledger(lab), Counter[tuple[str, str]]()
    about: dict[int, str] = {}
    wrong: list[str] = []
    seed = SEED
    while ledger.sent < VERDICTS:
        seed += 1
        stored = cluster(seed)
        lab.store(stored)
        lab.forget_connections()
        numbers = []
        for question, verdict, why in judged(stored, packets(seed, PACKETS)):
            numbers.append(ledger.send(question, frozenset([verdict])))
            about[ledger.sent] = f"seed {seed}: {question}: {verdict} by {why}"
            ways[question.direction, verdict] += 1
        wrong += [f"lost: {about[number]}" for number in ledger.wait_for(numbers)]
    ledger.collect(1.0)  # what is late is found by its number
    wrong += [f"got through to {where}: {about[number]}" for number, where in ledger.wrong]
    print(f"\n{lab.backend}: {ledger.sent} verdicts, seeds from {SEED + 1}: {ledger.verdicts}")
    print(f"{ways}")
    assert not wrong, f"{len(wrong)} of {ledger.sent}: {wrong[:5]}"
    assert min(ledger.verdicts.values()) >= 0.2 * ledger.sent


@pytest.mark.timeout(7200)
def test_every_packet_meets_the_verdict_before_or_after_a_change(lab: VerdictLab) -> None:
    """While policies, tiers, sets, labels and host endpoints change at random, a packet meets what
    is stored before or after the change that it falls into, and never anything else.
    """
    chance, ledger = random.Random(f"changes {SEED}"), Ledger(lab)
    flows = [
        with_new_port(question, 0)
        for question in packets(f"flows {SEED}", 4 * FLOWS)
        if question.packet.protocol not in (SCTP, OTHER)
    ][:FLOWS]
    stored = whole_pods(selective_cluster(SEED))
    lab.store(stored)
    staged = lab.staged
    before = verdicts_of(stored, flows)
    wrong: list[str] = []
    about: dict[int, str] = {}
    sent_by_flow = Counter[int]()

    def send_all(right: Mapping[int, frozenset[str]]) -> list[int]:
        numbers = []
        for at, flow in enumerate(flows):
            number = ledger.send(with_new_port(flow, sent_by_flow[at]), right[at])
            sent_by_flow[at] += 1
            about[number] = f"change {change} of seed {SEED}: {flow}: {set(right[at])}"
            numbers.append(number)
        return numbers

    with on_one_processor():
        for change in range(CHANGES[lab.backend]):
            if change % 10 == 0:
                lab.forget_connections()
            stored = changed(stored, chance)
            after = verdicts_of(stored, flows)
            right = {at: before[at] | after[at] for at in before}
            lab.begin(stored)
            numbers = send_all(right)
            while not select.select([lab.answers], [], [], PAUSE_S)[0]:
                numbers += send_all(right)
                ledger.collect()
            lab.finish()
            numbers += send_all(after)
            wrong += [f"lost: {about[number]}" for number in ledger.wait_for(numbers)]
            if wrong or ledger.wrong:
                break  # each loss is waited for
            before = after
    ledger.collect(1.0)
    wrong += [f"got through to {where}: {about[number]}" for number, where in ledger.wrong]
    print(f"\n{lab.backend}: {CHANGES[lab.backend]} changes, {lab.staged - staged} of them staged")
    print(f"{ledger.sent} packets, by the verdicts that are right: {ledger.verdicts}")
    assert not wrong, f"{len(wrong)} of {ledger.sent}: {wrong[:5]}"
    assert lab.staged > staged
    assert min(ledger.verdicts["allow"], ledger.verdicts["deny"]) >= 0.1 * ledger.sent


def judged(stored: Stored, asked: Sequence[Question]) -> Iterator[tuple[Question, str, object]]:
    """Packets, what must become of them, and why; without those that have no route."""
    node = node_of(stored)
    homes = {one["interfaceName"]: one for one in stored.values() if "interfaceName" in one}
    for question in asked:
        to = question.destination
        if to.kind == "pod" and to.interface not in homes and question.source.kind == "host":
            continue  # the host itself may send there, but does not know where it is
        found = judge(node, question.way, question.packet)
        yield question, found[-1].action, found


def verdicts_of(stored: Stored, flows: Sequence[Question]) -> dict[int, frozenset[str]]:
    """What must become of each flow."""
    found = judged(stored, flows)
    return {at: frozenset([verdict]) for at, (_, verdict, _) in enumerate(found)}


def whole_pods(stored: Stored) -> Stored:
    """With an endpoint for every pod: routes come and go beside rules, and are no policy."""
    seeds = iter(range(10**6))
    while len(pods := {name: one for name, one in stored.items() if is_local_pod(name)}) < 4:
        more = selective_cluster(f"pods {next(seeds)}")
        stored = {**{name: one for name, one in more.items() if is_local_pod(name)}, **stored}
    assert len(pods) == 4
    return stored


def is_local_pod(name: str) -> bool:
    """Whether it is an endpoint of this node."""
    return name.startswith("WorkloadEndpoint") and "node1-" in name


def changed(stored: Stored, chance: random.Random) -> Stored:
    """The next cluster: up to three objects come, go, or are as in another cluster.

    Every other time it means the same in other words: values of labels, or names of ports, change
    places wherever they are written. No verdict changes, but any mixture of old and new is wrong.
    """
    if chance.random() < 0.5:
        words = chance.choice([{"a": "b", "b": "a"}, {"http": "dns", "dns": "http"}])
        return {name: in_other_words(one, words) for name, one in stored.items()}
    other = selective_cluster(f"other {chance.random()}")
    names = sorted({*stored, *other})
    found = dict(stored)
    for name in chance.sample(names, chance.randint(1, 3)):
        if name in other and (name not in found or chance.random() < 0.7):
            found[name] = other[name]
        elif not is_local_pod(name):
            found.pop(name, None)
    return found


def in_other_words(spec: Spec, words: Mapping[str, str]) -> Spec:
    """With other values of labels and names of ports, in labels, ports and selectors."""

    def label(value: str) -> str:
        return words.get(value, value)

    def quoted(text: str) -> str:
        parts = text.split("'")
        return "'".join([label(part) if at % 2 else part for at, part in enumerate(parts)])

    def walk(name: str, value: object) -> object:
        if isinstance(value, dict):
            if name in ("labels", "labelsToApply"):
                return {key: label(one) for key, one in value.items()}
            return {key: walk(key, one) for key, one in value.items()}
        if isinstance(value, list):
            return [walk(name, one) for one in value]
        if isinstance(value, str) and name.lower().endswith("selector"):
            return quoted(value)
        is_port = name in ("ports", "notPorts", "name")
        return label(value) if is_port and isinstance(value, str) else value

    return {key: walk(key, value) for key, value in spec.items()}


def with_new_port(flow: Question, number: int) -> Question:
    """The same, as a connection of its own."""
    if not flow.packet.source_port:
        return flow
    packet = replace(flow.packet, source_port=FIRST_PORT + number % PORTS)
    return replace(flow, packet=packet)


@contextmanager
def on_one_processor() -> Iterator[None]:
    """What one processor sends is handled in the order in which it was sent."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
