"""How answers look: tables, YAML, JSON.

On a terminal tables are drawn with rich; anywhere else (a pipe, a file, a test) they are plain
text, aligned as calicoctl aligns, so that scripts written for it keep working. Nothing else of the
command line writes to standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
import msgspec
import yaml

from cymric.cli.schema import Tree
from cymric.model.resources import API_VERSION

_GAP = 3
_MIN_WIDTH = 5

Rows = Sequence[Sequence[str]]


def table(headings: Sequence[str], rows: Rows) -> None:
    """A list of objects: aligned columns without lines."""
    if sys.stdout.isatty():
        _rich(headings, rows)
        return
    widths = [max(map(len, cells), default=0) for cells in zip(headings, *rows, strict=True)]
    for cells in (headings, *rows):
        padded = (
            cell.ljust(max(width + _GAP, _MIN_WIDTH))
            for cell, width in zip(cells, widths, strict=True)
        )
        click.echo("".join(padded).rstrip())


def boxed(headings: Sequence[str], rows: Rows) -> None:
    """A report: columns with lines around them, numbers to the right."""
    if sys.stdout.isatty():
        _rich(headings, rows)
        return
    widths = [max(map(len, cells)) for cells in zip(headings, *rows, strict=True)]
    line = "+" + "+".join("-" * (width + 2) for width in widths) + "+"
    click.echo(line)
    centred = (cell.center(width) for cell, width in zip(headings, widths, strict=True))
    click.echo("|" + "|".join(f" {cell} " for cell in centred) + "|")
    click.echo(line)
    for cells in rows:
        placed = (
            cell.rjust(width) if cell.isdigit() else cell.ljust(width)
            for cell, width in zip(cells, widths, strict=True)
        )
        click.echo("|" + "|".join(f" {cell} " for cell in placed) + "|")
    click.echo(line)


def document(value: object, form: str) -> None:
    """A whole value: `yaml` with keys sorted, as calicoctl prints; `json` in stored order."""
    if form == "yaml":
        click.echo(yaml.safe_dump(value, sort_keys=True, allow_unicode=True, width=1000), nl=False)
    else:
        click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def listed(kind: str, trees: Sequence[Tree], revision: int) -> Tree:
    """Many objects as the one `…List` object that files may hold as well."""
    return {
        "kind": f"{kind}List",
        "apiVersion": API_VERSION,
        "metadata": {"resourceVersion": str(revision)},
        "items": list(trees),
    }


def note(text: str) -> None:
    """A remark for the person, on standard error."""
    click.echo(text, err=True)


def _rich(headings: Sequence[str], rows: Rows) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))
    for heading in headings:
        drawn.add_column(heading, overflow="fold")
    for cells in rows:
        drawn.add_row(*map(Text, cells))  # as text: brackets in a cell are no markup
    Console().print(drawn)
