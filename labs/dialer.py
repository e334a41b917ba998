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
ANSWER_TIMEOUT_S = 10.0
"""How long the server, a program that must get its turn on a busy machine, may take."""


def dial(address: str, port: int) -> str:
    """One request. Returns what went wrong, empty if nothing did."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S) as connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return "" if connection.recv(65536) else "closed without an answer"
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
