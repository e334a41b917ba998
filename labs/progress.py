"""What a person sees while the lab works: one line a step, with a spinner on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from labs.checks import wait_settled
from labs.lab import Lab, Step


def steps_on(console: Console) -> Step:
    """A Step that shows a spinner while it works and leaves one line, with its time if long."""

    @contextmanager
    def step(text: str) -> Iterator[object]:
        begun = time.monotonic()
        try:
            with console.status(text):
                yield text
        except BaseException:
            console.print(f"[red]failed[/red]  {text}", highlight=False)
            raise
        took_s = time.monotonic() - begun
        tail = f" [dim]({took_s:.1f} s)[/dim]" if took_s > 1 else ""
        console.print(f"[green]ok[/green]      {text}{tail}", highlight=False)

    return step


def settle(lab: Lab, console: Console, *, patience_s: float = 60) -> None:
    """Wait until every promise holds, and say meanwhile how many do not."""
    begun = time.monotonic()
    text = "Wait for sessions and routes"
    with console.status(text) as status:
        wait_settled(
            lab,
            patience_s=patience_s,
            on_wrong=lambda left: status.update(f"{text} ({left} to come)"),
        )
    took_s = time.monotonic() - begun
    console.print(
        f"[green]ok[/green]      Every session is up, every route is there, every pod answers"
        f" [dim]({took_s:.1f} s)[/dim]",
        highlight=False,
    )
