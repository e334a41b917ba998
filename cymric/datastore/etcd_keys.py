"""Keys as etcd has them: bytes, and a prefix as a range.

Our keys are text. A foreign key need not be; it survives the way to text and back unharmed.
"""

from __future__ import annotations


def to_bytes(key: str) -> bytes:
    """The key on the wire."""
    return key.encode("utf-8", "surrogateescape")


def to_text(key: bytes) -> str:
    """The key as we speak of it."""
    return key.decode("utf-8", "surrogateescape")


def range_of(prefix: str) -> tuple[bytes, bytes]:
    """First key and end of the range that holds all keys starting with `prefix`."""
    first = to_bytes(prefix)
    for last in range(len(first) - 1, -1, -1):
        if first[last] < 0xFF:
            return first, first[:last] + bytes([first[last] + 1])
    return first or b"\0", b"\0"  # etcd's way to say: to the end
