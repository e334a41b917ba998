"""What this kernel shows of connections whose TCP MD5 passwords do not agree."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.fv.speaker_lab import run

pytestmark = [pytest.mark.root]

CONNECT = """
import socket, struct, sys
from bgpd.tcp_view import drops, look

TCP_MD5SIG = 14

def expect(sock, address, password):
    if password:
        peer = struct.pack("=HH4s120x", socket.AF_INET, 0, socket.inet_aton(address))
        key = struct.pack("=BBHI80s", 0, 0, len(password), 0, password.encode())
        sock.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, peer + key)

before = drops()
listener, caller = socket.socket(), socket.socket()
listener.bind(("127.0.0.1", 0))
expect(listener, "127.0.0.2", sys.argv[1])
listener.listen()
caller.bind(("127.0.0.2", 0))
caller.settimeout(1.5)
expect(caller, "127.0.0.1", sys.argv[2])
try:
    caller.connect(listener.getsockname())
except TimeoutError:
    pass
seen = look()
address, port = listener.getsockname()
states = {(str(host), at): state for (host, at), state in seen.states.items()}
new = drops().since(before)
print(states.get((address, port)), new.missing > 0, new.unexpected > 0, new.wrong > 0)
"""


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace of our own: the counters are the namespace's."""
    name = f"cybo-{secrets.token_hex(3)}"
    run("ip", "netns", "add", name)
    run("ip", "-n", name, "link", "set", "lo", "up")
    yield name
    run("ip", "netns", "delete", name)


@pytest.mark.parametrize(
    ("ours", "theirs", "seen"),
    [
        ("secret", "secret", "ESTABLISHED False False False"),
        ("secret", "other", "SYN_SENT False False True"),
        ("secret", "", "SYN_SENT True False False"),
        ("", "other", "SYN_SENT False True False"),
    ],
)
def test_passwords_that_differ(namespace: str, ours: str, theirs: str, seen: str) -> None:
    """Each disagreement leaves the caller unanswered and raises its own counter here."""
    told = subprocess.run(
        ["nsenter", f"--net=/run/netns/{namespace}", sys.executable, "-c", CONNECT, ours, theirs],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert told.stdout.strip() == seen
