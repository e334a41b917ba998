"""How every daemon lives: settings, logs, signals, health, one asyncio loop, a clean end.

`run_daemon("felix", serve)` runs `serve(settings, health)` until SIGTERM or SIGINT cancels it
(exit code 0) or it fails (exit code 1, for the supervisor to start it again). The data plane is
left as it is in every case. A service manager is told READY and STOPPING over NOTIFY_SOCKET.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

from cymric.runtime import logs, settings
from cymric.runtime.health import PULSE_S, Health, serve_http
from cymric.runtime.settings import BadSettings, Settings

Serve = Callable[[Settings, Health], Awaitable[None]]

log = structlog.get_logger()


def run_daemon(name: str, serve: Serve) -> NoReturn:
    """Run the daemon `name` to its end and leave the process."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        loaded = settings.load()
    except BadSettings as error:
        sys.exit(f"{name}: {error}")
    logs.configure(loaded, name)
    sys.exit(asyncio.run(_live(name, serve, loaded)))


async def _live(name: str, serve: Serve, loaded: Settings) -> int:
    health = Health()
    try:
        servers = serve_http(health, loaded.http_host, loaded.http_ports(name))
    except OSError as error:
        log.error("cannot serve health and metrics", error=str(error))
        return 1
    for server in servers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    main = asyncio.ensure_future(serve(loaded, health))
    beat = asyncio.create_task(_beat(health), name="pulse")
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _stop, name, main)
    log.info("started", pid=os.getpid())
    try:
        await main
    except asyncio.CancelledError:
        log.info("stopped; the data plane stays as it is")
        return 0
    except Exception:
        # The last line of defence: say why, and let the supervisor start a fresh process.
        log.exception("failed")
        return 1
    finally:
        beat.cancel()
        for server in servers:
            server.server_close()
    return 0


def _stop(name: str, main: asyncio.Future[None]) -> None:
    log.info("stopping", program=name)
    notify("STOPPING=1")
    main.cancel()


async def _beat(health: Health) -> None:
    was_ready = False
    while True:
        health.pulse()
        if not health.missing and not was_ready:
            was_ready = True
            notify("READY=1")
        await asyncio.sleep(PULSE_S if was_ready else 0.05)


def notify(state: str) -> None:
    """Tell the service manager (sd_notify(3)); nothing happens outside one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(state.encode())
        except OSError as error:
            log.warning("service manager cannot be told", error=str(error))
