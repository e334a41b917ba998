"""`cymric node`: how nodes are, and taking one out of service; each command has a file.

`routes` and `why` stand under `bgp` as well, where everything else about routes is.
"""

from __future__ import annotations

import click

from cymric.cli import bgp
from cymric.cli.node_drain import drain, undrain
from cymric.cli.node_init import init
from cymric.cli.node_status import status


@click.group("node")
def group() -> None:
    """The node that runs on this machine, and the others."""


for _command in (init, status, drain, undrain, bgp.routes, bgp.why):
    group.add_command(_command)
