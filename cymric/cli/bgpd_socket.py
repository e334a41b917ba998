"""Asking this node's daemons: one question line in, one JSON document out, over a unix socket."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import msgspec

from cymric.cli.objects import ObjectError
from cymric.cli.session import Session

ANSWER_WITHIN_S = 5.0


class NotRunning(ObjectError):
    """The daemon that would know does not answer."""


def ask(session: Session, question: str) -> dict[str, Any]:
    """Bgpd's answer. Raises NotRunning, ObjectError."""
    return ask_at(session.settings().bgpd_socket, "bgpd", question)


def ask_felix(session: Session, question: str) -> dict[str, Any]:
    """Felix' answer. Raises NotRunning, ObjectError."""
    return ask_at(session.settings().felix_status_socket, "felix", question)


def ask_at(path: Path, daemon: str, question: str) -> dict[str, Any]:
    """What `daemon` answers at its socket. Raises NotRunning, ObjectError."""
    try:
        with socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(ANSWER_WITHIN_S)
            asked.connect(str(path))
            asked.sendall(question.encode() + b"\n")
            received = b"".join(iter(lambda: asked.recv(65536), b""))
    except OSError as error:
        hint = "; is CYMRIC_RUN_DIR right?" if not path.exists() else ""
        raise NotRunning(f"{daemon} does not answer at {path}: {error}{hint}") from None
    answer: dict[str, Any] = msgspec.json.decode(received)
    if "error" in answer:
        raise ObjectError(f"{daemon}: {answer['error']}")
    return answer
