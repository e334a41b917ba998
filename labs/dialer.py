"""Opens a new TCP connection every few milliseconds until SIGINT, then prints what failed.

An established flow survives much that a new one does not (conntrack remembers it), so both are
measured. Standard library only; arguments: address, port, seconds between connections.
"""

import json
import signal
import socket
import sys
import time

CONNECT_TIMEOUT_S = 0.9
"""Below the kernel's first retransmission of a SYN: a single lost packet counts."""


def dial(address: str, port: int) -> str:
    """One handshake, which two kernels do between them: no server has to get its turn.

    Returns what went wrong, empty if nothing did.
    """
    try:
        with socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S):
            return ""
    except OSError as failure:
        return str(failure)


def main(address: str, port: int, interval_s: float) -> None:
    """Dial on the beat until interrupted."""
    stopping = []
    signal.signal(signal.SIGINT, lambda *_: stopping.append(True))
    failed, sent, begun = [], 0, time.monotonic()
    while not stopping:
        trouble = dial(address, port)
        sent += 1
        if trouble:
            failed.append(f"{sent}@{time.monotonic() - begun:.2f}s:{trouble}")
        if sent == 1:
            print("started", flush=True)
        time.sleep(max(0.0, begun + sent * interval_s - time.monotonic()))
    print(json.dumps({"sent": sent, "failed": failed}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
