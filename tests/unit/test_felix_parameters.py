"""Which parameters count, what they do to rules, and what is known to do nothing here."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest
import structlog

from cymric.cli.fields import FELIX_CONFIGURATION
from cymric.model.keys import ResourceKey
from cymric.runtime import logs
from cymric.runtime.settings import Settings
from felix.calc.config import FelixConfig
from felix.calc.parameters import IGNORED, PARAMETERS
from felix.calc.state import Calculation
from felix.calc.values import (
    Desired,
    Endpoint,
    EndpointId,
    HostEndpoint,
    Policy,
    PolicyId,
    PolicyRule,
    Problem,
    ProfileRules,
    Verdict,
)
from felix.daemon import Reporter
from felix.dataplane import pools
from felix.iptables import render
from felix.iptables.plan import render_table
from felix.rules import nat
from felix.rules.marks import allocate
from felix.rules.names import DSCP_SOURCES
from felix.rules.policy import RuleChains
from felix.rules.rule import Masquerade, TableContent
from felix.rules.tables import contents
from tests.support.felix_policy import NODE, Stored, calculate, update, wep

MARKS = allocate(0xFFFF0000)


def test_objects_with_a_selector_are_for_nodes_with_such_labels() -> None:
    """Between the node's own object and the cluster's; the first by name wins; labels change."""
    calculation = Calculation(NODE, {})
    stored: Stored = {
        "FelixConfiguration default": {"vxlanPort": 1, "maxIpsetSize": 1, "logPrefix": "one"},
        "FelixConfiguration rack-b": {"nodeSelector": "rack == 'b'", "vxlanPort": 4},
        "FelixConfiguration y": {"nodeSelector": "has(rack)", "vxlanPort": 2, "logPrefix": "two"},
        "FelixConfiguration z": {"nodeSelector": "rack == 'a'", "vxlanPort": 3, "logPrefix": "no"},
        "FelixConfiguration node.node1": {"logPrefix": "mine"},
    }
    for name, spec in stored.items():
        calculation.on_update(*update(name, spec))
    plain = calculation.desired().config
    assert (plain.vxlan_port, plain.log_prefix) == (1, "mine")
    calculation.on_update(*update(f"Node {NODE}", {"labels": {"rack": "a"}}))
    scoped = calculation.desired().config
    assert (scoped.vxlan_port, scoped.max_ipset_size, scoped.log_prefix) == (2, 1, "mine")
    calculation.on_update(ResourceKey("Node", NODE), None)
    assert calculation.desired().config == plain
    assert not calculation.desired().problems


def test_parameters_without_effect_are_named() -> None:
    """Whoever sets what does nothing here is told why; what selects the node is no parameter."""
    desired = calculate(
        {"FelixConfiguration default": {"wireguardEnabled": True, "bpfEnabled": False}},
        FELIX_FELIXHOSTNAME="node1",
        FELIX_XDPENABLED="true",
    )
    assert [note.subject for note in desired.notes] == [
        "environment XDPENABLED",
        "FelixConfiguration default wireguardEnabled",
        "FelixConfiguration default bpfEnabled",
    ]
    assert desired.notes[1].reason == "there is no WireGuard"
    assert not desired.problems


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FELIX_IPINIPMTU", "there are no tunnels: pods are routed"),
        ("FELIX_USAGEREPORTINGINTERVALSECS", "usage is never reported to anybody"),
        ("FELIX_TYPHAADDR", "there is no Typha"),
        ("FELIX_DATASTORETYPE", "a setting (docs/etcd.md)"),
    ],
)
def test_names_that_only_the_environment_has(name: str, reason: str) -> None:
    """What a Calico node's manifest sets is known by those names as well."""
    (note,) = calculate({}, **{name: "1"}).notes
    assert note.reason == reason


def test_every_parameter_of_calico_is_known() -> None:
    """Each field is either in use or ignored for a reason, and the operator's page tells which."""
    known = set(FELIX_CONFIGURATION) - {"nodeSelector"}
    ours = {"logAction"}
    assert set(PARAMETERS) | set(IGNORED) == known | ours
    assert not set(PARAMETERS) & set(IGNORED)
    page = (Path(__file__).parents[2] / "docs" / "felix-configuration.md").read_text()
    rows = {
        name: line
        for line in page.splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert set(rows) == known
    for name, reason in IGNORED.items():
        assert reason in rows[name]


@pytest.fixture
def log_as_a_daemon() -> Iterator[Callable[[str], None]]:
    """Logging set up as in a process of its own, at that level, and back again.

    No logger may keep the stream of this test, which is closed when other tests run.
    """
    handlers = logging.getLogger().handlers[:]

    def configure(level: str) -> None:
        logs.configure(Settings(log_level=level, log_format="json"), "test")
        structlog.configure(cache_logger_on_first_use=False)

    yield configure
    logging.getLogger().handlers[:] = handlers
    logs.set_level("info")
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def test_the_level_of_logs_follows_the_datastore(
    capsys: pytest.CaptureFixture[str], log_as_a_daemon: Callable[[str], None]
) -> None:
    """Without a restart; when nobody sets it any more, the settings count again."""
    log_as_a_daemon("warning")
    reporter = Reporter("warning")
    log = structlog.get_logger()
    said = []
    for severity in ("", "debug", "error", ""):
        reporter.report(Desired(config=FelixConfig(log_severity=severity)))
        for level in ("debug", "warning", "error"):
            getattr(log, level)(f"{severity or 'unset'} {level}")
        said.append([json.loads(one)["event"] for one in capsys.readouterr().err.splitlines()])
    assert said == [
        ["unset warning", "unset error"],
        ["debug debug", "debug warning", "debug error"],
        ["error error"],
        ["unset warning", "unset error"],
    ]


def test_what_is_without_effect_is_said_once(
    capsys: pytest.CaptureFixture[str], log_as_a_daemon: Callable[[str], None]
) -> None:
    """However often the picture changes."""
    log_as_a_daemon("info")
    reporter = Reporter("info")
    note = Problem("FelixConfiguration default xdpEnabled", "there is no eBPF data plane")
    for size in (1, 2, 3):
        reporter.report(Desired(config=FelixConfig(max_ipset_size=size), notes=(note,)))
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["subject"] == note.subject


@pytest.mark.parametrize(
    "place", ["Drop if no profiles matched", "Unknown interface", "--ctstate INVALID"]
)
def test_denied_packets_may_be_rejected(place: str) -> None:
    """Wherever the filter table denies; the others cannot."""
    found = [line for line in rendered("filter", filter_deny_action="reject") if place in line]
    assert found
    assert all(line.endswith("--jump REJECT") for line in found)
    for table in ("raw", "mangle"):
        assert not [one for one in rendered(table, filter_deny_action="reject") if "REJECT" in one]


def test_accepted_packets_may_go_on_to_the_rules_of_others() -> None:
    """Return instead of accept, but for failsafe ports; what is established is marked first."""
    found = [
        one for one in rendered("filter", filter_allow_action="return") if "failsafe" not in one
    ]
    assert not [line for line in found if line.endswith("--jump ACCEPT")]
    chain = [line for line in found if line.startswith("-A cali-tw-")]
    assert chain[0].endswith("--ctstate RELATED,ESTABLISHED --jump MARK --set-mark 0x10000/0x10000")
    assert chain[1].endswith("--ctstate RELATED,ESTABLISHED --jump RETURN")
    mangle = [
        one for one in rendered("mangle", mangle_allow_action="return") if "cali-f" not in one
    ]
    assert not [line for line in mangle if line.endswith("--jump ACCEPT")]


LOGGING = Policy(
    PolicyId("gnp", "", "deny-all"), "default", inbound=(PolicyRule(Verdict.LOG, protocol="tcp"),)
)


@pytest.mark.parametrize(
    ("config", "target"),
    [
        ({}, '-p tcp --jump LOG --log-prefix "calico-packet: " --log-level 5'),
        (
            {"log_rate_limit": "10/minute"},
            "-p tcp -m limit --limit 10/minute --limit-burst 5"
            ' --jump LOG --log-prefix "calico-packet: " --log-level 5',
        ),
        (
            {"log_action": "nflog:7"},
            '-p tcp --jump NFLOG --nflog-group 7 --nflog-prefix "GlobalNetworkPolicy deny-all: "',
        ),
        (
            {"log_action": "nflog:7", "log_prefix": "%t/%n"},
            '-p tcp --jump NFLOG --nflog-group 7 --nflog-prefix "default/deny-all: "',
        ),
    ],
)
def test_log_rules(config: dict[str, str], target: str) -> None:
    """To the kernel's log, or to a group with the policy's name; limited where asked."""
    made = RuleChains(FelixConfig(**config), MARKS, 4)  # type: ignore[arg-type]
    made.update({LOGGING.id: LOGGING}, {})
    (chain,) = made.needed(["cali-pi-gnp/deny-all"])
    assert render.body(chain.rules[0]).endswith(target)


def test_nat_exclusions() -> None:
    """What a pool's annotation names is returned before anything is translated; by family."""
    stored: Stored = {
        "IPPool one": {
            "cidr": "198.19.16.0/21",
            "natOutgoing": True,
            "annotations": {"cymric.io/nat-exclude": "10.0.0.0/8, 192.0.2.1,fd00::/8,what"},
        }
    }
    desired = calculate(stored)
    assert [problem.reason for problem in desired.problems] == [
        "cymric.io/nat-exclude: 'what' does not appear to be an IPv4 or IPv6 interface",
        "cymric.io/nat-exclude: fd00::/8 is of the other family",
    ]
    found = [
        line.partition(" --source ")[2]
        for line in lines(contents(desired)["nat"])
        if line.startswith("-A cali-nat-outgoing") and "RETURN" in line
    ]
    assert found == [
        "198.19.16.0/21 --destination 10.0.0.0/8 --jump RETURN",
        "198.19.16.0/21 --destination 192.0.2.1/32 --jump RETURN",
    ]
    assert "MASQUERADE" in lines(contents(desired)["nat"])[-1]


def test_features_that_the_kernel_lacks() -> None:
    """Whoever overrides the detection gets plain translation."""
    config = FelixConfig(feature_overrides=(("MASQFullyRandom", False),))
    (rule,) = nat.outgoing_chain(config, is_wanted=True).rules
    assert rule.action == Masquerade(random_fully=False)


def rendered(table: str, **config: str) -> list[str]:
    """Every rule of a table with one pod."""
    pod = Endpoint(
        EndpointId("k8s", "default/a", "eth0"), "calia", "", (IPv4Address("198.19.16.2"),), ("p",)
    )
    desired = Desired(
        config=FelixConfig(**config),  # type: ignore[arg-type]
        endpoints=(pod,),
        host_endpoints=(HostEndpoint("up", "up0", ("p",)),),
        profiles={"p": ProfileRules("p", (PolicyRule(Verdict.ALLOW),), None)},
    )
    return lines(contents(desired)[table])


def lines(content: TableContent) -> list[str]:
    """A table as restore input, without the rules in kernel chains."""
    chains = render_table(content).chains.values()
    return [f"-A {chain.name} {text}" for chain in chains for text in chain.rules]


@pytest.mark.parametrize(
    ("wish", "number"), [(10, 10), ("EF", 46), ("cs6", 48), ("AF41", 34), ("DF", 0), (64, None)]
)
def test_dscp_of_an_endpoint(wish: object, number: int | None) -> None:
    """By number or name; what is neither leaves packets as they are, and is told."""
    stored: Stored = {
        "WorkloadEndpoint default/node1-k8s-a-eth0": wep("a", qosControls={"dscp": wish})
    }
    desired = calculate(stored)
    assert desired.endpoints[0].dscp == number
    assert bool(desired.problems) is (number is None)
    mangle = lines(contents(desired)["mangle"])
    sets = {one.id for one in pools.sets(desired, {})}
    marks = [line for line in mangle if line.startswith("-A cali-egress-dscp")]
    if number is None:
        assert not marks
        assert DSCP_SOURCES not in sets
        return
    (mark,) = marks
    assert mark.endswith(f"--source 198.19.16.2 --jump DSCP --set-dscp {number:#04x}")
    (first, *_) = [line for line in mangle if line.startswith("-A cali-POSTROUTING")]
    assert first.endswith(
        "-m set --match-set cali40dscp-src-net src"
        " -m set ! --match-set cali40network-ip-pools dst"
        " -m set ! --match-set cali40this-host dst --jump cali-egress-dscp"
    )
    assert DSCP_SOURCES in sets
