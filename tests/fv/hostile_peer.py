"""A BGP speaker that says what no good one would: run in a namespace, told by lines on stdin.

Listens on port 179, opens one IPv4 session after another with whoever connects, sends a KEEPALIVE
each second, and writes each hexadecimal line of its input as an UPDATE's body to the peer.
`python hostile_peer.py ADDRESS ASN`. Standard library only.
"""

from __future__ import annotations

import select
import socket
import struct
import sys

MARKER = b"\xff" * 16


def message(kind: int, body: bytes = b"") -> bytes:
    """One BGP message (RFC 4271 §4.1)."""
    return MARKER + struct.pack("!HB", 19 + len(body), kind) + body


def main() -> None:
    """Serve until killed."""
    address, asn = sys.argv[1], int(sys.argv[2])
    capability = b"\x02\x06\x01\x04\x00\x01\x00\x01" + b"\x02\x06\x41\x04" + struct.pack("!I", asn)
    opening = struct.pack("!BHH4sB", 4, asn, 240, socket.inet_aton(address), len(capability))
    with socket.create_server((address, 179)) as server:
        peer: socket.socket | None = None
        while True:
            waited = [server, sys.stdin, *([peer] if peer else [])]
            ready, _, _ = select.select(waited, [], [], 1.0)
            try:
                if server in ready:
                    peer, _ = server.accept()
                    peer.sendall(message(1, opening + capability) + message(4))
                elif peer is not None and peer in ready and not peer.recv(65536):
                    peer = None
                elif sys.stdin in ready and peer is not None:
                    peer.sendall(message(2, bytes.fromhex(sys.stdin.readline())))
                elif peer is not None:
                    peer.sendall(message(4))
            except OSError:
                peer = None


if __name__ == "__main__":
    main()
