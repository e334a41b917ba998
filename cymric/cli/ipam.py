"""`cymric ipam`."""

from __future__ import annotations

import click


@click.group("ipam")
def group() -> None:
    """Addresses: what is given, and to whom."""
