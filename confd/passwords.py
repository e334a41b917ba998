"""Where the passwords of sessions come from: files of this node, else a key in the datastore.

    <bgp_password_dir>/<secret name>/<key>      a file that its owner alone may read
    /cymric/bgp-passwords/<secret name>/<key>   in etcd, for which nodes have a role of their own

A BGPPeer names a secret and a key in it (`password.secretKeyRef`), the cluster's BGPConfiguration
those of the mesh. The file wins: it is what somebody put on this very machine. One newline at the
end does not count.

Invariants: a session whose password is missing, empty, too long or kept where others can read it is
not configured at all (Calico runs it without password); no password is ever logged or in an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from cymric.datastore.syncer import Update
from cymric.model.keys import PasswordKey
from cymric.model.peering import PasswordRef

LONGEST_BYTES = 80
"""What a Linux kernel takes as key of RFC 2385 signatures."""
_ANYONE_ELSE = 0o077

Signature = tuple[tuple[int, ...], ...]


class Missing(Exception):
    """A password that cannot be used; the message says why, without any part of it."""


class Passwords:
    """The passwords known now. Files are read when asked for, keys when they change."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stored: dict[PasswordRef, bytes] = {}

    def update(self, updates: Sequence[Update]) -> bool:
        """Take in what changed in the datastore; whether anything did."""
        before = dict(self._stored)
        for update in updates:
            if not isinstance(update.key, PasswordKey):
                continue
            ref = PasswordRef(update.key.name, update.key.key)
            if isinstance(update.value, bytes):
                self._stored[ref] = update.value
            else:
                self._stored.pop(ref, None)
        return before != self._stored

    def read(self, ref: PasswordRef) -> bytes:
        """The password behind `ref`. Raises Missing."""
        path = self._path(ref)
        try:
            if path.stat().st_mode & _ANYONE_ELSE:
                raise Missing(f"{path} can be read by others than its owner")
            password = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            if ref not in self._stored:
                key = PasswordKey(ref.name, ref.key)
                raise Missing(f"no password: neither {path} nor {key} exists") from None
            password = self._stored[ref]
        except OSError as error:
            raise Missing(f"{path}: {error.strerror}") from None
        password = password.removesuffix(b"\n").removesuffix(b"\r")
        if not 0 < len(password) <= LONGEST_BYTES:
            raise Missing(f"password {ref} has {len(password)} bytes, not 1 to {LONGEST_BYTES}")
        return password

    def signature(self, refs: Iterable[PasswordRef]) -> Signature:
        """Differs when one of the files does; cheap."""
        return tuple(_stat(self._path(ref)) for ref in sorted(refs, key=str))

    def _path(self, ref: PasswordRef) -> Path:
        return self._directory / ref.name / ref.key


def _stat(path: Path) -> tuple[int, ...]:
    try:
        stat = path.stat()
    except OSError:
        return ()
    return (stat.st_ino, stat.st_mtime_ns, stat.st_size, stat.st_mode)
