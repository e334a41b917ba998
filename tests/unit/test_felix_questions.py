"""What felix tells people: counts by rule, the picture, and why a connection passes or not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cymric.cli.session import Session
from cymric.datastore import api
from cymric.datastore.memory import MemoryDatastore
from cymric.kernel.command import FakeCommands, Finished
from cymric.model import codec
from cymric.runtime.questions import serve_questions
from felix.iptables.backend import Backend
from felix.iptables.counters import Count, Place, of_policies, parse_counted
from felix.iptables.plan import render_table
from felix.questions import Questions, dump
from felix.rules.marks import allocate
from felix.rules.policy import RuleChains
from felix.rules.tables import contents
from tests.support.cymric_cli import Cymric, InMemory
from tests.support.eventually import eventually
from tests.support.felix_policy import Stored, calculate, update, wep

CLIENT, WEB = "198.19.16.3", "198.19.16.2"
STORED: Stored = {
    "Tier default": {"order": 1000000},
    "FelixConfiguration default": {"ipv6Support": False},
    "WorkloadEndpoint default/node1-k8s-web-eth0": wep("web", labels={"app": "web"}),
    "WorkloadEndpoint default/node2-k8s-cl-eth0": wep(
        "cl", node="node2", ipNetworks=[f"{CLIENT}/32"], labels={"app": "client"}
    ),
    "NetworkPolicy default/web": {
        "selector": "app == 'web'",
        "types": ["Ingress"],
        "ingress": [
            {"action": "Log", "protocol": "TCP"},
            {
                "action": "Deny",
                "protocol": "TCP",
                "source": {"nets": ["10.0.0.0/8", "192.0.2.0/24"]},
                "destination": {"ports": list(range(1, 40, 2))},
            },
            {"action": "Allow", "ipVersion": 6},
            {
                "action": "Allow",
                "protocol": "TCP",
                "source": {"selector": "app == 'client'"},
                "destination": {"ports": [80]},
            },
        ],
    },
}


def saved(counts: Mapping[str, Sequence[int]]) -> str:
    """What iptables-save -c prints of a filter table as wanted, with packets by chain and index."""
    lines = ["*filter"]
    for chain in render_table(contents(calculate(STORED))["filter"]).chains.values():
        lines.append(f":{chain.name} - [0:0]")
        for index, text in enumerate(chain.rules):
            packets = counts.get(chain.name, ())
            count = packets[index] if index < len(packets) else 0
            lines.append(f"[{count}:{count * 60}] -A {chain.name} {text}")
    return "\n".join([*lines, "COMMIT", ""])


def questions(text: str = "", store: MemoryDatastore | None = None) -> Questions:
    """Felix with this in the kernel."""

    def save(argv: Sequence[str], _: str) -> Finished:
        assert argv[-1] == "-c"
        return Finished(tuple(argv), 0, text if "filter" in argv else "", "")

    made = Questions(
        lambda: calculate(STORED),
        store or MemoryDatastore(),
        FakeCommands({"iptables-nft-save": save}),
        lambda: 0.0,
    )
    made.backend = Backend("nft")
    return made


POLICY_CHAIN = "cali-pi-np/default/web"


def test_the_acting_rule_of_each_rule_is_counted() -> None:
    """Whatever blocks a rule needs before it; a rule of the other family has none."""
    chains = RuleChains(calculate(STORED).config, allocate(0xFFFF0000), 4)
    desired = calculate(STORED)
    chains.update(desired.policies, desired.profiles)
    (one,) = [one for one in chains.counted() if one.chain.name == POLICY_CHAIN]
    bodies = [str(one.chain.rules[at].action) for at, _ in one.rules if at is not None]
    assert [action for _, action in one.rules] == ["log", "deny", "allow", "allow"]
    assert one.rules[2][0] is None
    assert [text.partition("(")[0] for text in bodies] == ["Log", "SetMark", "SetMark"]


async def test_counters_by_rule() -> None:
    """Numbers are those of the rules as written; ends of tiers have a line of their own."""
    size = len(saved({}).split(f"-A {POLICY_CHAIN} ")) - 1
    counts = list(range(100, 100 + size))
    text = saved({POLICY_CHAIN: counts, "cali-tw-caliweb": [0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0]})
    answer = (await questions(text).answer("counters"))["counters"]
    of_policy = {row["rule"]: row for row in answer if row["policy"] == "NetworkPolicy default/web"}
    assert [of_policy[number]["action"] for number in (1, 2, 3, 4)] == [
        "log",
        "deny",
        "allow",
        "allow",
    ]
    assert of_policy[1]["packets"] == 100
    assert of_policy[2]["packets"] > 105, "after the blocks that it needs"
    assert of_policy[3]["packets"] == 0
    assert of_policy[4]["packets"] == counts[-1]
    assert of_policy[4]["bytes"] == counts[-1] * 60
    assert of_policy[4]["direction"] == "ingress"
    ends = [row for row in answer if row["policy"] == "End of tier default"]
    assert [(row["tier"], row["direction"]) for row in ends] == [("default", "ingress")]


def test_a_chain_that_is_not_as_rendered_is_not_counted() -> None:
    """It is of another version of the policy, or somebody changed it."""
    desired = calculate(STORED)
    chains = RuleChains(desired.config, allocate(0xFFFF0000), 4)
    chains.update(desired.policies, desired.profiles)
    lines = saved({POLICY_CHAIN: [7] * 99}).splitlines()
    place = Place("default", "NetworkPolicy default/web", "ingress", 1, "log")
    assert of_policies(chains.counted(), parse_counted("\n".join(lines)))[place] == Count(7, 420)
    other = [line for line in lines if f"-A {POLICY_CHAIN}" not in line or "LOG" not in line]
    assert place not in of_policies(chains.counted(), parse_counted("\n".join(other)))


def test_a_dump_is_json_and_tells_all() -> None:
    """Policies in their order, sets with sizes, problems."""
    found = json.loads(json.dumps(dump(calculate(STORED))))
    (endpoint,) = found["endpoints"]
    assert endpoint["endpoint"] == "k8s/default/web/eth0"
    assert endpoint["tiers"] == [
        {"tier": "default", "end": "deny", "ingress": ["np/default/web"], "egress": []}
    ]
    (members,) = found["sets"].values()
    assert members == {"type": "hash:net", "ipv4": 1, "ipv6": 0}
    assert len(found["policies"]["np/default/web"]["ingress"]) == 4
    assert found["config"]["ipv6_support"] is False
    with_members = dump(calculate(STORED), with_members=True)["sets"]
    assert [one["ipv4"] for one in with_members.values()] == [[CLIENT]]


async def filled() -> MemoryDatastore:
    """A datastore with these objects."""
    store = MemoryDatastore()
    for name, spec in STORED.items():
        key, value = update(name, spec)
        await api.put(store, str(key), codec.encode(value))
    return store


@pytest.mark.parametrize(
    ("asked", "verdict", "decisions"),
    [
        (
            {"from": "default/cl", "to": "default/web", "port": 80},
            "allowed",
            [("egress", "allow", 1), ("ingress", "allow", 4)],
        ),
        (
            {"from": "default/cl", "to": "default/web", "port": 81},
            "denied",
            [("egress", "allow", 1), ("ingress", "deny", 0)],
        ),
        ({"from": "10.0.0.1", "to": WEB, "port": 3}, "denied", [("ingress", "deny", 2)]),
        ({"from": "default/web", "to": "8.8.8.8"}, "allowed", [("egress", "allow", 1)]),
    ],
)
async def test_explanations(
    asked: dict[str, object], verdict: str, decisions: list[tuple[str, str, int]]
) -> None:
    """Both ends have a say, by policy and number of the rule; also for pods of other nodes."""
    answer = await questions(store=await filled()).answer(f"explain {json.dumps(asked)}")
    assert answer["verdict"] == verdict
    found = [(one["direction"], one["action"], one["rule"]) for one in answer["decisions"]]
    assert found == decisions


@pytest.mark.parametrize(
    "question",
    [
        "what",
        "explain",
        "explain {}",
        'explain {"from": "default/none", "to": "8.8.8.8"}',
        'explain {"from": "8.8.8.8", "to": "9.9.9.9"}',
        'explain {"from": "a", "to": "b", "protocol": "carrier pigeon"}',
    ],
)
async def test_questions_that_have_no_answer(question: str) -> None:
    """They are refused with a reason."""
    with pytest.raises(ValueError, match=r"."):
        await questions(store=await filled()).answer(question)


def test_the_command_line_asks_felix(tmp_path: Path) -> None:
    """Over its socket; what felix cannot answer is told, as is that it does not run."""
    cymric = Cymric(
        InMemory(MemoryDatastore()),
        Session(store=MemoryDatastore(), environ={"CYMRIC_RUN_DIR": str(tmp_path)}),
    )
    assert "felix does not answer" in cymric.refused("felix", "dump")

    async def asking(*words: str) -> Any:
        answer = questions(saved({POLICY_CHAIN: [5] * 99}), await filled()).answer
        async with asyncio.TaskGroup() as tasks:
            path = tmp_path / "felix-status.sock"
            serving = tasks.create_task(serve_questions(path, answer))
            await eventually(path.is_socket)
            done = await asyncio.to_thread(cymric, *words)
            serving.cancel()
            path.unlink()
        return done

    counters = asyncio.run(asking("policy", "counters", "default/web"))
    rows = [line.split() for line in counters.stdout.splitlines()]
    assert " ".join(rows[1]) == "NetworkPolicy default/web default ingress 1 log 5 300"
    assert len(rows) == 5
    dumped = json.loads(asyncio.run(asking("felix", "dump")).stdout)
    assert dumped["ready"] is True
    assert dumped["inSync"] is True
    words = ("policy", "explain", "--from", "default/cl", "--to", "default/web", "--port", "80")
    explained = asyncio.run(asking(*words))
    assert "NetworkPolicy default/web" in explained.stdout
    assert "the connection is allowed" in explained.stderr
    refused = asyncio.run(asking(*words[:3], "default/none", *words[4:]))
    assert refused.exit_code == 1
    assert "there is no workload default/none" in refused.stderr
