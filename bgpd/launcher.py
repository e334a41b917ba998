"""`cymric-exabgp`: runs ExaBGP, repaired and configured, in this process.

Place in the flow: confd writes the configuration file, this process waits for it, ExaBGP reads it,
connects to the peers and starts `bgpd/relay.py` as its API process, to which bgpd connects. bgpd,
confd and ExaBGP come and go independently.

Invariants: ExaBGP is never started with a file it refuses or an address it cannot listen on; the
reason is logged once and the wait goes on, because a supervisor that counts restarts would give up.
SIGTERM ends with exit code 0; under graceful restart that closes the sessions without NOTIFICATION,
so the peers keep our routes until we are back.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import structlog

from bgpd import exabgp_orders, exabgp_patches
from bgpd.speaker_file import Listen, read_header
from cymric.runtime import logs, settings

POLL_S = 0.2
DEFAULT_LISTEN = Listen("0.0.0.0", 179)

log = structlog.get_logger()


def environment(listen: Listen, *, reactor_speed: str = "1.0") -> Mapping[str, str]:
    """ExaBGP's settings.

    It stays root, since a reload reads the file and may bind the port anew. A reactor speed of 1.0
    sleeps long when idle (0.1 costs a tenth of a core); `exabgp_speed` does not sleep at work.
    """
    return {
        "exabgp_daemon_user": "root",
        "exabgp_daemon_drop": "false",
        "exabgp_daemon_daemonize": "false",
        "exabgp_api_ack": "true",
        "exabgp_api_chunk": "100",
        "exabgp_api_cli": "false",
        "exabgp_log_level": "WARNING",
        "exabgp_log_destination": "stderr",
        "exabgp_reactor_speed": reactor_speed,
        "exabgp_tcp_bind": " ".join(listen.addresses),
        "exabgp_tcp_port": str(listen.port),
    }


def main() -> None:
    """Wait for a file ExaBGP accepts, then be ExaBGP until told to stop."""
    signal.signal(signal.SIGTERM, _leave)
    loaded = settings.load()
    logs.configure(loaded, "exabgp")
    path = loaded.exabgp_config
    _wait_for_file(path)
    os.environ.update(environment(_wait_to_listen(path)))
    exabgp_patches.apply(_report_refusal, path)
    sys.exit(_run(path))


def _leave(_signal_number: int, _frame: FrameType | None) -> None:
    sys.exit(0)


def _report_refusal(reason: str) -> None:
    log.error("configuration refused, what ran before goes on", reason=reason)


def _wait_for_file(path: Path) -> None:
    if not path.is_file():
        log.info("waiting for the configuration", path=str(path))
    while not path.is_file():
        time.sleep(POLL_S)


def _wait_to_listen(path: Path) -> Listen:
    """Where the file says to listen, once that is possible."""
    reported = ""
    while True:
        listen = read_header(path).listen or DEFAULT_LISTEN
        try:
            for address in listen.addresses:
                _try_to_bind(address, listen.port)
            return listen
        except OSError as error:
            if str(error) != reported:
                reported = str(error)
                log.warning(
                    "cannot listen yet", address=listen.address, port=listen.port, error=reported
                )
            time.sleep(POLL_S)


def _try_to_bind(address: str, port: int) -> None:
    """Raises OSError if ExaBGP could not either."""
    is_ipv6 = ":" in address
    with socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_ipv6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind((address, port))


def _run(path: Path) -> int:
    # ExaBGP reads its environment while it is imported.
    from exabgp.configuration.configuration import Configuration
    from exabgp.environment import getenv
    from exabgp.logger import log as exabgp_log
    from exabgp.reactor.loop import Reactor

    exabgp_log.init(getenv())
    seen = 0
    while not Configuration([str(path)]).reload():  # a refusal is reported by the repaired reload
        seen = _modified(path)
        while _modified(path) == seen:
            time.sleep(POLL_S)
    log.info("starting exabgp", version=exabgp_patches.SUPPORTED_VERSION, path=str(path))
    reactor = Reactor(Configuration([str(path)]))
    return exabgp_orders.exit_code(reactor, int(reactor.run()))


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


if __name__ == "__main__":
    main()
