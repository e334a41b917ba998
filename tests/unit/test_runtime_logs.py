"""What a daemon's log looks like."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import structlog
from cymric.runtime import logs
from cymric.runtime.settings import Settings
logs.configure(Settings(node_name="n1", log_format="{format}"), "felix")
structlog.get_logger().info("session up", peer="192.0.2.1")
"""


def _logged(log_format: str) -> str:
    """What a process whose standard error is no terminal writes there."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(format=log_format)], capture_output=True, text=True
    )
    return done.stderr


def test_console_lines_in_a_file_have_no_colours() -> None:
    """Lines for people are plain text when they go to a file, so that they can be searched."""
    text = _logged("console")
    assert "session up" in text
    assert "peer=192.0.2.1" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("log_format", ["json", "auto"])
def test_json_lines_hold_the_event_and_its_fields(log_format: str) -> None:
    """Without a terminal the format is JSON unless told otherwise: one object a line."""
    line = json.loads(_logged(log_format))
    assert line["event"] == "session up"
    assert (line["peer"], line["daemon"], line["node"]) == ("192.0.2.1", "felix", "n1")
