"""Whether ExaBGP accepts a file, asked of ExaBGP's own parser in a process of its own.

`python -m confd.check <file>` prints, as JSON, the label of each peer that ExaBGP found in the
file; a file that it refuses ends with exit code 1 and the reason on stderr. ExaBGP's parser stops
in silence at a stray brace, so whoever asks compares the peers with those that were written.

The parser keeps global state and a failed parse spoils it, hence the process; it costs a quarter of
a second, only when the text has changed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from cymric.kernel.command import CommandFailed, Commands

TIMEOUT_S = 30.0


async def refusal(commands: Commands, path: Path, label_by_peer: Mapping[str, str]) -> str:
    """Why ExaBGP would not run exactly these peers from the file; empty if it would."""
    try:
        ended = await commands.run(
            [sys.executable, "-m", "confd.check", str(path)], timeout_s=TIMEOUT_S
        )
    except CommandFailed as error:
        return str(error)
    if not ended.ok:
        return ended.stderr.strip()[-1000:] or f"exit code {ended.code}"
    found = json.loads(ended.stdout)
    if found != dict(label_by_peer):
        return f"ExaBGP reads the peers {sorted(found)}, not {sorted(label_by_peer)}"
    return ""


def main(path: str) -> int:
    """Parse the file and print what is in it; the exit code."""
    os.environ["exabgp_log_enable"] = "false"  # noqa: SIM112 - ExaBGP's own name
    from exabgp.configuration.configuration import Configuration
    from exabgp.environment import getenv
    from exabgp.logger import log

    log.init(getenv())
    configuration = Configuration([path])
    if not configuration.reload():
        sys.stderr.write(str(configuration.error).strip() + "\n")
        return 1
    neighbors = configuration.neighbors.values()
    found = {str(each["peer-address"]): str(each["description"]) for each in neighbors}
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
