"""A file that says "done since this boot", for another program of the same node.

    felix ─ data plane applied ─▶ run_dir/felix.ready ─▶ bgpd may announce

A mark holds for one boot and one network namespace, and says which. A run directory that outlives
them (a lab node that is destroyed and made again, a run directory on disk) does not deceive. The
mark stays when its writer stops: what it marks stays as well.
"""

from __future__ import annotations

import os
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
NAMESPACE = Path("/proc/self/ns/net")


def write_mark(path: Path) -> None:
    """Mark; whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(this_boot())
    fresh.rename(path)


def is_marked(path: Path) -> bool:
    """Whether somebody marked since this boot, in this network namespace."""
    try:
        return path.read_text() == this_boot()
    except (OSError, UnicodeDecodeError):
        return False


def this_boot() -> str:
    """Names this boot and network namespace. Raises OSError."""
    return f"{BOOT_ID.read_text().strip()} {os.stat(NAMESPACE).st_ino}\n"  # noqa: PTH116
