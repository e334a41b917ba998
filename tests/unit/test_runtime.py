"""Settings, health and pacing: what every daemon stands on."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from cymric.runtime.health import STALE_AFTER_S, Health
from cymric.runtime.pacing import Backoff, Kick
from cymric.runtime.settings import BadSettings, Settings, load
from tests.support.etcd import free_port


def test_environment_wins_over_file_and_default(tmp_path: Path) -> None:
    """Defaults give way to the file, the file to the environment, calicoctl's names to ours."""
    file = tmp_path / "cymric.toml"
    file.write_text('run_dir = "/from/file"\nlog_level = "debug"\nhttp_host = "::1"\n')
    settings = load(
        {
            "CYMRIC_RUN_DIR": "/from/env",
            "ETCD_ENDPOINTS": "http://a:1, http://b:2",
            "ETCD_USERNAME": "calicoctl",
            "CYMRIC_ETCD_USERNAME": "ours",
            "CYMRIC_POLICY_SETUP_TIMEOUT_S": "2.5",
            "CYMRIC_FELIX_HEALTH_PORT": "0",
        },
        path=file,
    )
    assert settings.run_dir == Path("/from/env")
    assert settings.cni_socket == Path("/from/env/cni.sock")
    assert settings.log_level == "debug"
    assert settings.etcd_endpoints == ("http://a:1", "http://b:2")
    assert settings.etcd_username == "ours"
    assert settings.policy_setup_timeout_s == 2.5
    assert settings.http_ports("felix") == (9091,)
    assert settings.node_name == socket.gethostname().lower()


@pytest.mark.parametrize(
    ("values", "directory", "bears_names"),
    [
        ({}, "/var/run/calico", True),
        ({"run_dir": Path("/run/lab/node1")}, "/run/lab/node1", False),
        ({"bird_socket_dir": "none"}, None, False),
        ({"bird_socket_dir": "/run/bird"}, "/run/bird", False),
        (
            {"run_dir": Path("/run/lab"), "bird_socket_dir": "/var/run/calico"},
            "/var/run/calico",
            True,
        ),
    ],
)
def test_where_birds_sockets_are(
    values: dict[str, Any], directory: str | None, bears_names: bool
) -> None:
    """Where calicoctl looks, unless this is one node of several on a machine; or as set."""
    settings = Settings(node_name="us", **values)
    assert settings.bird_directory == (None if directory is None else Path(directory))
    assert settings.bears_calico_names is bears_names


@pytest.mark.parametrize(
    ("environ", "text", "named"),
    [
        ({"CYMRIC_FELIX_HEALTH_PORT": "x"}, "", "CYMRIC_FELIX_HEALTH_PORT"),
        ({"CYMRIC_LOG_FORMAT": "xml"}, "", "log_format"),
        ({}, 'colour = "red"', "colour"),
        ({}, "= 1", "cymric.toml"),
        ({"CYMRIC_ETCD_ENDPOINTS": ","}, "", "etcd_endpoints"),
        ({"CYMRIC_IPAM_AHEAD_PART": "1.5"}, "", "ipam_ahead_part"),
        ({}, "ipam_idle_s = 0.0", "ipam_idle_s"),
    ],
)
def test_bad_settings_are_named(
    tmp_path: Path, environ: dict[str, str], text: str, named: str
) -> None:
    """A setting that cannot be used is named with its origin."""
    file = tmp_path / "cymric.toml"
    file.write_text(text)
    with pytest.raises(BadSettings, match=named):
        load(environ, path=file)


def test_health() -> None:
    """Ready when all that was expected is true; alive while the loop runs."""
    now = 0.0
    health = Health(clock=lambda: now)
    assert health.respond("/readiness") == (503, "not ready: start\n")
    health.expect("in sync", "first apply")
    health.set_ready("in sync")
    assert health.respond("/readiness") == (503, "not ready: first apply\n")
    health.set_ready("first apply")
    assert health.respond("/readiness") == (200, "ready: in sync\nready: first apply\n")
    assert health.respond("/liveness") == (200, "alive\n")
    now = STALE_AFTER_S + 1
    assert health.respond("/liveness") == (503, "event loop is stuck\n")
    assert health.respond("/other") is None


async def test_kicks_while_nobody_looks_are_one() -> None:
    """A kick is a level: many of them wake once, none of them is lost."""
    kick = Kick()
    kick()
    kick()
    assert await kick.wait(1)
    assert not await kick.wait(0.01)
    waiting = asyncio.create_task(kick.wait(5))
    await asyncio.sleep(0)
    kick()
    assert await waiting


def test_backoff_grows_to_its_limit_and_starts_anew() -> None:
    """Pauses double with up to half taken off by chance, and a success resets them."""
    backoff = Backoff(first_s=1, most_s=4)
    assert 0.5 <= backoff.next_s() <= 1
    assert 1 <= backoff.next_s() <= 2
    for _ in range(100):
        assert backoff.next_s() <= 4
    backoff.succeeded()
    assert backoff.next_s() <= 1


DAEMON = """
import asyncio
from cymric.runtime.daemon import run_daemon

async def serve(settings, health):
    health.expect("one thing")
    health.set_ready("one thing")
    if settings.node_name == "broken":
        raise RuntimeError("no good")
    await asyncio.sleep(60)

run_daemon("bgpd", serve)
"""


def test_a_daemon_tells_its_manager_answers_http_and_ends_cleanly(tmp_path: Path) -> None:
    """READY is notified, health and metrics are served, SIGTERM ends with code 0."""
    port = free_port()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        process = subprocess.Popen(
            [sys.executable, "-c", DAEMON],
            env={
                **os.environ,
                "NOTIFY_SOCKET": str(tmp_path / "notify"),
                "CYMRIC_BGPD_HTTP_PORT": str(port),
                "CYMRIC_NODE_NAME": "n",
            },
            stderr=subprocess.PIPE,
        )
        try:
            assert manager.recv(64) == b"READY=1"
            for path, expected in (("readiness", "one thing"), ("metrics", "process_resident")):
                url = f"http://127.0.0.1:{port}/{path}"
                with urllib.request.urlopen(url, timeout=5) as answer:
                    assert expected in answer.read().decode()
            process.send_signal(signal.SIGTERM)
            assert manager.recv(64) == b"STOPPING=1"
            _, errors = process.communicate(timeout=10)
            assert process.returncode == 0
            assert b"stopped; the data plane stays as it is" in errors
        finally:
            process.kill()


def test_a_daemon_that_fails_says_why_and_exits_for_its_supervisor() -> None:
    """An error ends the process with code 1 and its cause in the log."""
    result = subprocess.run(
        [sys.executable, "-c", DAEMON],
        env={**os.environ, "CYMRIC_NODE_NAME": "broken", "CYMRIC_BGPD_HTTP_PORT": "0"},
        capture_output=True,
        timeout=30,
    )
    assert result.returncode == 1
    assert b"no good" in result.stderr
