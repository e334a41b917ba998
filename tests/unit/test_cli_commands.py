"""Commands that need no datastore, and how answers look."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cymric.cli import output, utilization
from cymric.cli.main import cli
from cymric.cli.session import Session
from cymric.model.ipam import AllocationAttribute, AllocationBlock
from cymric.model.net import parse_network


def run(*arguments: str, **environ: str) -> Result:
    """Run a command with this environment alone."""
    session = Session(environ=environ, calicoctl_file=Path("/nonexistent"))
    return CliRunner().invoke(cli, arguments, obj=session)


def test_help_is_quick_because_it_imports_little() -> None:
    """Nothing heavy is imported before a command needs it."""
    heavy = ("grpc", "rich", "pyroute2", "structlog", "exabgp")
    program = (
        f"import sys, cymric.cli.main; print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["get", "pods"], "unknown kind 'pods'; known are: node, ippool"),
        (["get"], "give a KIND, or a file with -f"),
        (["get", "node", "n", "-a"], "--all-namespaces goes with neither"),
        (["delete", "node"], "name the objects to delete"),
        (["apply"], "give the file with -f"),
        (["delete", "node", "n", "-f", "-"], "not both"),
        (["ipam", "show", "--ip", "x"], "'x' does not appear to be"),
        (["node", "init", "--as-number", "x"], "--as-number"),
    ],
)
def test_misuse(arguments: list[str], said: str) -> None:
    """A wrong command line is exit code 2 and says what is wrong."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_a_missing_file() -> None:
    """A file that is not there is refused by its name."""
    result = run("apply", "-f", "/nonexistent.yaml")
    assert result.exit_code == 1
    assert "/nonexistent.yaml" in result.stderr


def test_config_show() -> None:
    """The settings are shown as the daemons would have them, without secrets."""
    result = run("config", "show", "-o", "json", CYMRIC_NODE_NAME="n1", ETCD_PASSWORD="geheim")
    shown = json.loads(result.stdout)
    assert shown["node_name"] == "n1"
    assert shown["run_dir"] == "/run/cymric"
    assert shown["etcd_password"] == "(set)"
    assert "geheim" not in run("config", "show", ETCD_PASSWORD="geheim").stdout


def test_bad_settings_are_misuse() -> None:
    """A setting that cannot be used is named; the exit code is 2."""
    result = run("config", "show", CYMRIC_LOG_LEVEL="loud")
    assert result.exit_code == 2
    assert "log_level 'loud'" in result.stderr


def test_version() -> None:
    """The version says which data model it speaks."""
    assert "data model: Calico v3.32" in run("version").stdout


# --- node status ----------------------------------------------------------------------------------


@contextmanager
def bgpd_answering(path: Path, answer: Mapping[str, Any]) -> Iterator[list[str]]:
    """A bgpd that gives one answer; the questions it was asked."""
    questions: list[str] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(10)

        def serve() -> None:
            with listener.accept()[0] as asked:
                questions.append(asked.makefile().readline())
                asked.sendall(json.dumps(answer).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        yield questions
        thread.join(timeout=10)


def peer(address: str, **fields: Any) -> dict[str, Any]:
    started = time.mktime((2020, 1, 2, 3, 4, 5, 0, 0, -1))
    return {"address": address, "type": "node-to-node mesh", "state": "up", "since": started,
            "info": "Established", **fields}  # fmt: skip


def test_node_status(tmp_path: Path) -> None:
    """Sessions are shown with calicoctl's columns, as bgpd tells them."""
    answer = {
        "in_sync": True,
        "speaker": {"connected": True},
        "peers": [
            peer("10.0.0.2"),
            peer("10.0.0.9", type="global", state="start", since=0.0, info="Connect"),
        ],
        "unsupported_peers": {"rr": "peerSelector"},
    }
    with bgpd_answering(tmp_path / "bgpd.sock", answer) as questions:
        result = run("node", "status", CYMRIC_RUN_DIR=str(tmp_path))
    assert result.exit_code == 0, result.output
    assert questions == ["status\n"]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in result.stdout.splitlines()
        if line.startswith("|")
    ]
    assert rows == [
        ["PEER ADDRESS", "PEER TYPE", "STATE", "SINCE", "INFO"],
        ["10.0.0.2", "node-to-node mesh", "up", "2020-01-02", "Established"],
        ["10.0.0.9", "global", "start", "", "Connect"],
    ]
    assert "BGPPeer rr is not served: peerSelector" in result.stderr


def test_node_status_as_json(tmp_path: Path) -> None:
    """As JSON the answer is bgpd's own, whole."""
    answer = {"in_sync": True, "speaker": {"connected": True}, "peers": [], "more": 1}
    with bgpd_answering(tmp_path / "bgpd.sock", answer):
        result = run("node", "status", "-o", "json", CYMRIC_RUN_DIR=str(tmp_path))
    assert json.loads(result.stdout) == answer


def test_why(tmp_path: Path) -> None:
    """`why` shows every path to a prefix and the step that settled it."""
    path = {"peer": "10.0.0.2", "next_hop": "10.0.0.2", "rejected": "", "lost_at": ""}
    answer = {
        "prefix": "10.1.0.0/26",
        "settled_by": "only path",
        "paths": [{**path, "used": True}, {**path, "used": False, "rejected": "outside pools"}],
    }
    with bgpd_answering(tmp_path / "bgpd.sock", answer) as questions:
        result = run("node", "why", "10.1.0.0/26", CYMRIC_RUN_DIR=str(tmp_path))
    assert questions == ["why 10.1.0.0/26\n"]
    lines = [line.split(maxsplit=3) for line in result.stdout.splitlines()[1:]]
    assert lines[0] == ["*", "10.0.0.2", "10.0.0.2", "only path"]
    assert "outside pools" in result.stdout


def test_bgpd_that_is_away(tmp_path: Path) -> None:
    """Without bgpd the socket that was tried is named."""
    result = run("node", "status", CYMRIC_RUN_DIR=str(tmp_path))
    assert result.exit_code == 1
    assert f"bgpd does not answer at {tmp_path}/bgpd.sock" in result.stderr


# --- tables and numbers ---------------------------------------------------------------------------


def test_plain_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Outside a terminal columns are three blanks apart and lines have no blanks at the end."""
    output.table(("A", "LONGER"), [("value", ""), ("v", "w")])
    assert capsys.readouterr().out == "A       LONGER\nvalue\nv       w\n"


def test_boxed_tables(capsys: pytest.CaptureFixture[str]) -> None:
    """Reports have lines around them, numbers to the right, headings in the middle."""
    output.boxed(("A", "TOTAL"), [("x", "7")])
    assert capsys.readouterr().out.splitlines() == [
        "+---+-------+",
        "| A | TOTAL |",
        "+---+-------+",
        "| x |     7 |",
        "+---+-------+",
    ]


def test_tables_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the same cells are drawn, text with brackets as it stands."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.table(("A", "B"), [("[x]", "y")])
    assert "[x]" in capsys.readouterr().out


def block(cidr: str, owner: str, *holders: Mapping[str, str]) -> AllocationBlock:
    size = parse_network(cidr).num_addresses
    held = len(holders)
    return AllocationBlock(
        cidr=cidr,
        affinity=f"host:{owner}" if owner else None,
        allocations=(*range(held), *[None] * (size - held)),
        unallocated=tuple(range(held, size)),
        attributes=tuple(AllocationAttribute(secondary=dict(h)) for h in holders),
    )


def test_utilization_counts_as_calico() -> None:
    """Given addresses are counted by pool and block; percentages are rounded; orphans are shown."""
    pools = {"b": parse_network("10.0.0.0/29"), "a": parse_network("10.1.0.0/16")}
    blocks = [block("10.0.0.0/30", "n", {}, {}, {}), block("10.9.0.0/30", "n")]
    usages = utilization.utilization(pools, blocks)
    assert utilization.rows(usages, with_blocks=False) == [
        ("IP Pool", "10.1.0.0/16", "65536", "0 (0%)", "65536 (100%)"),
        ("IP Pool", "10.0.0.0/29", "8", "3 (38%)", "5 (62%)"),
        ("Block", "10.9.0.0/30", "4", "0 (0%)", "4 (100%)"),
    ]
    assert ("Block", "10.0.0.0/30", "4", "3 (75%)", "1 (25%)") in utilization.rows(
        usages, with_blocks=True
    )


def test_borrowed_addresses() -> None:
    """An address whose holder lives on another node than the block's owner is borrowed."""
    pod = {"node": "other", "namespace": "ns", "pod": "p"}
    tunnel = {"node": "other", "type": "ipipTunnelAddress"}
    rows = utilization.borrowed_rows([block("10.0.0.0/30", "n", {"node": "n"}, pod, tunnel)])
    assert rows == [
        ("10.0.0.1", "other", "10.0.0.0/30", "n", "pod", "ns/p"),
        ("10.0.0.2", "other", "10.0.0.0/30", "n", "ipipTunnelAddress", "ipipTunnelAddress"),
    ]
