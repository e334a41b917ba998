"""`cymric node`."""

from __future__ import annotations

import click


@click.group("node")
def group() -> None:
    """The node that runs on this machine."""
