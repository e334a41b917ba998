"""Liveness, readiness and metrics of a daemon, over HTTP.

A daemon names what it must have done to be ready (`expect`) and says when it has (`set_ready`).
Liveness is the event loop's pulse: a loop that has not run for `STALE_AFTER_S` is not alive. The
server is prometheus_client's own (a thread of that library), so that a stuck loop still answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

STALE_AFTER_S = 30.0
PULSE_S = 1.0


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Requests of a scraper are no news."""


class Health:
    """What this daemon can say of itself. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._is_ready: dict[str, bool] = {}
        self._last_pulse = clock()

    def expect(self, *conditions: str) -> None:
        """Name what must come true before the daemon is ready."""
        for condition in conditions:
            self._is_ready.setdefault(condition, False)

    def set_ready(self, condition: str, *, is_ready: bool = True) -> None:
        """Say that a condition holds now (or no longer)."""
        self._is_ready[condition] = is_ready

    def pulse(self) -> None:
        """Say that the event loop runs."""
        self._last_pulse = self._clock()

    @property
    def is_alive(self) -> bool:
        """Whether the loop ran recently."""
        return self._clock() - self._last_pulse < STALE_AFTER_S

    @property
    def missing(self) -> tuple[str, ...]:
        """What is not ready yet. A daemon that has not said what it must do has not begun."""
        if not self._is_ready:
            return ("start",)
        return tuple(name for name, is_ready in self._is_ready.items() if not is_ready)

    def respond(self, path: str) -> tuple[int, str] | None:
        """HTTP status and text for a health path; None for any other path."""
        if path == "/liveness":
            return (200, "alive\n") if self.is_alive else (503, "event loop is stuck\n")
        if path == "/readiness":
            if self.missing:
                return 503, "".join(f"not ready: {name}\n" for name in self.missing)
            return 200, "".join(f"ready: {name}\n" for name in self._is_ready)
        return None


def serve_http(health: Health, host: str, ports: Iterable[int]) -> list[WSGIServer]:
    """Serve /metrics, /liveness and /readiness on each port. Raises OSError if one is taken."""
    metrics = make_wsgi_app()

    def application(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        answer = health.respond(environ.get("PATH_INFO", ""))
        if answer is None:
            response: Iterable[bytes] = metrics(environ, start)
            return response
        status, text = answer
        start(
            "200 OK" if status == 200 else "503 Service Unavailable",
            [("Content-Type", "text/plain; charset=utf-8")],
        )
        return [text.encode()]

    return [
        make_server(host, port, application, ThreadingWSGIServer, _QuietHandler) for port in ports
    ]
