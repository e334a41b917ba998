"""`cymric bgp` and `cymric node status`, against a bgpd that gives prepared answers."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cymric.cli.durations import ago, span
from cymric.cli.main import cli
from cymric.cli.session import Session
from cymric.datastore.memory import MemoryDatastore
from tests.support.routing import node, peer, store

THEIRS, ROUTER = "198.19.0.3", "198.19.0.254"


def told(address: str, **fields: Any) -> dict[str, Any]:
    """A peer as bgpd tells it."""
    return {
        "address": address,
        "name": f"Mesh_{address.replace('.', '_')}",
        "type": "node-to-node mesh",
        "asn": 64512,
        "node": "",
        "state": "up",
        "since": time.time() - 200,
        "changed": time.time() - 200,
        "uptime_s": 200,
        "info": "Established",
        "received": 3,
        "accepted": 3,
        "limit": 100_000,
        "over_limit": 0,
        "advertised": {"wanted": 1, "confirmed": 1},
        "families": ["ipv4 unicast"],
        "flaps": 0,
        "updates": 7,
        "last_error": "",
        "last_error_at": 0.0,
        "hint": "",
        "bfd": "",
        **fields,
    }


STATUS: dict[str, Any] = {
    "node": "us",
    "in_sync": True,
    "speaker": {"connected": True},
    "unsupported_peers": {},
    "outgoing": {"wish": "", "phase": "", "complaint": "", "waits_for": ""},
    "peers": [
        told(THEIRS, node="other", received=5, accepted=3, bfd="up", flaps=2,
             last_error="hold timer expired", last_error_at=time.time() - 90),
        told(ROUTER, state="start", uptime_s=0, info="Connect", hint="does the password differ?",
             last_error="connection refused", over_limit=4,
             advertised={"wanted": 2, "confirmed": 0}),
    ],
}  # fmt: skip


def route(prefix: str, **fields: Any) -> dict[str, Any]:
    return {
        "prefix": prefix,
        "next_hop": THEIRS,
        "as_path": [64900, 65001],
        "local_pref": 100,
        "med": None,
        "communities": ["65535:0"],
        "rejected": "",
        "stale": False,
        "why": "block of this node",
        **fields,
    }


Cymric = Callable[..., Result]


@contextmanager
def bgpd(directory: Path, answers: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """A bgpd that answers these questions, any number of times."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "bgpd.sock"))
        listener.listen()
        is_over = threading.Event()

        def serve() -> None:
            while True:
                with listener.accept()[0] as asked:
                    if is_over.is_set():
                        return
                    question = asked.makefile().readline().strip()
                    answer = answers.get(question, {"error": f"no such question: {question!r}"})
                    asked.sendall(json.dumps(answer).encode())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            with socket.socket(socket.AF_UNIX) as last:
                last.connect(str(directory / "bgpd.sock"))
            thread.join(timeout=10)


@pytest.fixture
def datastore() -> MemoryDatastore:
    return MemoryDatastore()


@pytest.fixture
def cymric(tmp_path: Path, datastore: MemoryDatastore) -> Cymric:
    def run(*arguments: str) -> Result:
        session = Session(
            environ={"CYMRIC_RUN_DIR": str(tmp_path), "CYMRIC_NODE_NAME": "us"},
            calicoctl_file=Path("/nonexistent"),
            store=datastore,
        )
        return CliRunner().invoke(cli, arguments, obj=session)

    return run


def table(result: Result) -> list[list[str]]:
    """The cells of a table whose cells hold no wide gaps."""
    import re

    assert result.exit_code == 0, result.output
    return [re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()]


def test_peers(tmp_path: Path, cymric: Cymric) -> None:
    """Each peer in a line: state, for how long, prefixes in, allowed and out, BFD, last error."""
    with bgpd(tmp_path, {"status": STATUS}):
        result = cymric("bgp", "peers")
        wide = cymric("bgp", "peers", "-o", "wide")
    heading, theirs, router = table(result)
    assert heading == [*("PEER", "ASN", "STATE", "FOR", "IN", "LIMIT", "OUT", "BFD", "LAST ERROR")]
    assert theirs[:8] == [THEIRS, "64512", "up", "3m20s", "3 of 5", "100000", "1", "up"]
    assert theirs[8].endswith("ago: hold timer expired")
    assert router[2] == "start"
    assert re.fullmatch(r"\d+m\d+s ago", router[3])
    assert router[6:] == ["0 of 2", "-", "connection refused"]
    assert f"{ROUTER}: does the password differ?" in result.stderr
    assert f"{ROUTER}: 4 prefixes above its limit not kept" in result.stderr
    assert "ipv4 unicast" in wide.stdout
    assert "Mesh_198_19_0_3" in wide.stdout


@pytest.mark.parametrize("name", [THEIRS, "other", "Mesh_198_19_0_3"])
def test_received(tmp_path: Path, cymric: Cymric, name: str) -> None:
    """What a peer sent, in order of prefix, with the reason for what is not used; the peer is
    named by address, node or session.
    """
    answer = {
        "peer": THEIRS,
        "is_up": True,
        "routes": [
            route("198.19.16.64/26"),
            route("0.0.0.0/0", rejected="default route"),
            route("9.0.0.0/8", stale=True),
        ],
    }
    with bgpd(tmp_path, {"status": STATUS, f"received {THEIRS}": answer}):
        result = cymric("bgp", "received", name)
        rejected = cymric("bgp", "received", name, "--rejected")
        as_json = cymric("bgp", "received", name, "-o", "json")
    assert table(result) == [
        ["PREFIX", "NEXT HOP", "AS PATH", "POLICY"],
        ["0.0.0.0/0", THEIRS, "64900 65001", "default route"],
        ["9.0.0.0/8", THEIRS, "64900 65001", "stale; accepted"],
        ["198.19.16.64/26", THEIRS, "64900 65001", "accepted"],
    ]
    assert [row[0] for row in table(rejected)[1:]] == ["0.0.0.0/0"]
    assert [one["prefix"] for one in json.loads(as_json.stdout)["routes"]] == [
        *("0.0.0.0/0", "9.0.0.0/8", "198.19.16.64/26")
    ]


def test_advertised(tmp_path: Path, cymric: Cymric) -> None:
    """What a peer is told, and why; that nothing goes out yet is told as well."""
    answer = {
        "peer": ROUTER,
        "is_up": False,
        "waits_for": "felix",
        "drain": "marking",
        "routes": [route("198.19.16.0/26", as_path=[])],
    }
    with bgpd(tmp_path, {"status": STATUS, f"advertised {ROUTER}": answer}):
        result = cymric("bgp", "advertised", ROUTER, "-o", "wide")
    assert table(result)[1] == [
        *("198.19.16.0/26", THEIRS, "-", "100", "-", "65535:0", "block of this node")
    ]
    assert "is down" in result.stderr
    assert "waiting for felix" in result.stderr
    assert "drained: marking" in result.stderr


def test_a_peer_that_is_none(tmp_path: Path, cymric: Cymric) -> None:
    """The peers there are are named."""
    with bgpd(tmp_path, {"status": STATUS}):
        result = cymric("bgp", "received", "nobody")
    assert result.exit_code == 1
    assert f"no peer nobody; there are: {THEIRS} (other), {ROUTER}" in result.stderr


@pytest.mark.parametrize(
    ("is_up", "missing", "exit_code"), [(True, 0, 0), (True, 2, 1), (False, 2, 0)]
)
def test_diff(tmp_path: Path, cymric: Cymric, is_up: bool, missing: int, exit_code: int) -> None:
    """The sets are counted per peer; what is missing at a connected peer is an error."""
    numbers = {"wanted": 9, "configured": 8, "confirmed": 7, "pending": 1, "repaired": 3}
    answer = {
        "waits_for": "",
        "configuration": "in use",
        "peers": [{"peer": THEIRS, "is_up": is_up, "missing": missing, **numbers}],
    }
    with bgpd(tmp_path, {"diff": answer}):
        result = cymric("bgp", "diff")
    assert result.exit_code == exit_code
    cells = result.stdout.splitlines()[1].split()
    state = "up" if is_up else "down"
    assert cells == [THEIRS, state, "9", "8", "7", "1", str(missing), "3"]


def test_routes_and_why(tmp_path: Path, cymric: Cymric) -> None:
    """Routes in order of prefix; a prefix that nobody sent is told."""
    rows = [
        {"prefix": p, "next_hop": THEIRS, "peer": THEIRS, "settled_by": "only path"}
        for p in ("198.19.16.0/26", "9.0.0.0/8")
    ]
    none = {"prefix": "1.0.0.0/8", "settled_by": "", "paths": []}
    with bgpd(tmp_path, {"routes": {"routes": rows}, "why 1.0.0.0/8": none}):
        routes = cymric("bgp", "routes")
        why = cymric("bgp", "why", "1.0.0.0/8")
    assert [row[0] for row in table(routes)[1:]] == ["9.0.0.0/8", "198.19.16.0/26"]
    assert "no peer sent 1.0.0.0/8" in why.stderr


def test_why_names_the_way(tmp_path: Path, cymric: Cymric) -> None:
    """A next hop that is not on-link is shown with its gateway, or with what stands in the way."""
    path = {"peer": ROUTER, "next_hop": THEIRS, "lost_at": "", "unreachable": ""}
    used = {**path, "used": True, "rejected": "", "reached_through": [ROUTER]}
    reason = f"there is no route to {THEIRS}"
    lost = {**path, "used": False, "rejected": "next hop cannot be reached", "reached_through": []}
    paths = [used, {**lost, "unreachable": reason}]
    answer = {"prefix": "1.0.0.0/8", "settled_by": "only path", "paths": paths}
    with bgpd(tmp_path, {"why 1.0.0.0/8": answer}):
        shown = cymric("bgp", "why", "1.0.0.0/8").stdout
    assert f"{THEIRS} via {ROUTER}" in shown
    assert reason in shown


def test_what_confd_refused(tmp_path: Path, cymric: Cymric) -> None:
    """Status shows why the newest configuration is not in use, and a BGPPeer that is left out; a
    file that is no JSON shows nothing.
    """
    (tmp_path / "confd-status.json").write_text(
        json.dumps(
            {
                "state": "refused",
                "reason": "line 12: no such family",
                "at": time.time() - 65,
                "unsupported": {"rack": "no password file"},
            }
        )
    )
    with bgpd(tmp_path, {"status": STATUS}):
        result = cymric("node", "status")
        (tmp_path / "confd-status.json").write_text("{")
        broken = cymric("node", "status")
    assert "confd refused the newest configuration 1m" in result.stderr
    assert "line 12: no such family" in result.stderr
    assert "BGPPeer rack is not configured: no password file" in result.stderr
    assert broken.exit_code == 0
    assert "refused" not in broken.stderr


def test_ipv6_sessions_have_a_table_of_their_own(tmp_path: Path, cymric: Cymric) -> None:
    """As calicoctl shows them."""
    answer = {**STATUS, "peers": [told("fd00::3")]}
    with bgpd(tmp_path, {"status": answer}):
        result = cymric("node", "status")
    assert "No IPv4 peers found." in result.stdout
    assert result.stdout.index("IPv6 BGP status") < result.stdout.index("fd00::3")


def test_all_nodes(tmp_path: Path, cymric: Cymric, datastore: MemoryDatastore) -> None:
    """From the datastore: address, sessions that each node should have, and how far a drain is;
    from the local bgpd: how the session with it looks. Without bgpd the rest is still there.
    """
    draining = node("other", f"{THEIRS}/20")
    annotations = {"cymric.io/drain": "reboot", "cymric.io/drain-status": "reboot leaving"}
    draining = _with_annotations(draining, annotations)
    objects = (node("us", "198.19.0.2/20"), draining, peer(ROUTER, 65000))
    asyncio.run(store(datastore, *objects))
    with bgpd(tmp_path, {"status": STATUS}):
        result = cymric("node", "status", "--all")
        one = cymric("node", "status", "other")
    assert table(result) == [
        ["NODE", "ADDRESS", "ASN", "REFLECTOR", "SESSIONS", "FROM HERE", "DRAIN"],
        ["other", THEIRS, "64512", "-", "2", "up", "reboot leaving"],
        ["us", "198.19.0.2", "64512", "-", "2", "here", "-"],
    ]
    assert ["198.19.0.2", "node-to-node mesh", "64512", "us"] in table(one)
    assert "drain: reboot leaving" in one.stderr
    (tmp_path / "bgpd.sock").unlink()
    assert table(cymric("node", "status", "-a"))[1][5] == "-"
    assert cymric("node", "status", "nobody").exit_code == 1


def _with_annotations(value: Any, annotations: dict[str, str]) -> Any:
    from msgspec.structs import replace

    return replace(value, metadata=replace(value.metadata, annotations=annotations))


def test_a_drain_that_nobody_answers(cymric: Cymric, datastore: MemoryDatastore) -> None:
    """Without the node's bgpd the command ends after its time and says what to look at; the wish
    stays, and is taken back by undrain, over other annotations.
    """
    start = _with_annotations(node("n1", "198.19.0.9/20"), {"rack": "7"})
    asyncio.run(store(datastore, start))
    result = cymric("node", "drain", "n1", "--timeout", "0.1")
    assert result.exit_code == 1
    assert "its bgpd does not answer" in result.stderr
    assert _annotations(datastore) == {"rack": "7", "cymric.io/drain": "services"}
    assert cymric("node", "drain", "n1", "--for-reboot", "--timeout", "0").exit_code == 0
    assert _annotations(datastore)["cymric.io/drain"] == "reboot"
    assert cymric("node", "undrain", "n1").exit_code == 0
    assert _annotations(datastore) == {"rack": "7"}
    missing = cymric("node", "drain", "n2")
    assert missing.exit_code == 1
    assert "does not exist" in missing.stderr


def _annotations(datastore: MemoryDatastore) -> dict[str, str]:
    key = "/calico/resources/v3/projectcalico.org/nodes/n1"
    read = asyncio.run(datastore.get(key))
    assert read is not None
    annotations: dict[str, str] = json.loads(read.value)["metadata"].get("annotations", {})
    return annotations


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0s"),
        (0, "0s"),
        (59.9, "59s"),
        (60, "1m"),
        (3_605, "1h"),
        (3_725, "1h2m"),
        (90_000, "1d1h"),
        (400 * 86_400, "400d"),
    ],
)
def test_spans(seconds: float, text: str) -> None:
    """The two largest units, as far as they count."""
    assert span(seconds) == text


def test_never() -> None:
    """A moment that never was has no age."""
    assert ago(0) == ""
