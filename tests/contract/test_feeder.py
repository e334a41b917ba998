"""A program that is fed piece by piece: done means worked on, and nothing is ever left behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cymric.kernel import feeder
from cymric.kernel.command import CommandFailed, HostCommands
from tests.support.eventually import eventually

EATER = (
    "while read -r word rest; do case $word in"
    " write) echo $rest >> {0};;"
    " slow) sleep 0.3; echo slow >> {0};;"
    " bad) echo that is bad >&2; exit 3;;"
    " hang) exec sleep 60;;"
    " esac; done; echo end >> {0}"
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the program writes."""
    return tmp_path / "out"


@pytest.fixture
def eater(out: Path) -> tuple[str, ...]:
    """A program that works on its lines and says which process it is."""
    return ("bash", "-c", f"echo $$ >> {out}.pids; " + EATER.format(out))


@pytest.fixture
def commands() -> Iterator[HostCommands]:
    """Real programs, ended after the test."""
    made = HostCommands()
    yield made
    made.close()


def pids(out: Path) -> list[int]:
    """The programs that were started."""
    return list(map(int, Path(f"{out}.pids").read_text().split()))


async def test_one_program_works_on_piece_after_piece(
    commands: HostCommands, eater: tuple[str, ...], out: Path
) -> None:
    """Each piece is worked on when `feed` returns; the program is started once."""
    for number in range(5):
        await commands.feed(eater, f"slow\nwrite {number}\n")
        assert out.read_text().splitlines()[-1] == str(number)
    assert len(pids(out)) == 1


async def test_a_piece_larger_than_the_pipe(
    commands: HostCommands, eater: tuple[str, ...], out: Path
) -> None:
    """Pages go in one after the other."""
    lines = [f"write {number:060}" for number in range(300)]
    await commands.feed(eater, "\n".join((*lines, "")))
    assert len(out.read_text().splitlines()) == 300


async def test_refusal_is_told_and_the_next_piece_meets_a_new_program(
    commands: HostCommands, eater: tuple[str, ...], out: Path
) -> None:
    """The error names the program, its exit code and what it said."""
    await commands.feed(eater, "write 1\n")
    with pytest.raises(CommandFailed, match="exit code 3: that is bad"):
        await commands.feed(eater, "bad\nwrite 2\n")
    await commands.feed(eater, "write 3\n")
    assert out.read_text().split() == ["1", "3"]
    assert len(pids(out)) == 2


async def test_time_limit_and_cancellation_end_the_program(
    commands: HostCommands, eater: tuple[str, ...], out: Path
) -> None:
    """What it had in hand is unknown, so it is not asked again."""
    with pytest.raises(CommandFailed, match=r"did not end within 0\.2 s"):
        await commands.feed(eater, "hang\nwrite 1\n", timeout_s=0.2)
    task = asyncio.ensure_future(commands.feed(eater, "hang\nwrite 1\n"))
    await eventually(lambda: len(pids(out)) == 2)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    for pid in pids(out):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_program_that_was_killed_is_replaced(
    commands: HostCommands, eater: tuple[str, ...], out: Path
) -> None:
    """An idle program may be killed by anybody."""
    await commands.feed(eater, "write 1\n")
    os.kill(pids(out)[0], 9)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with suppress(CommandFailed):
            await commands.feed(eater, "write 2\n")
            break
    assert out.read_text().split() == ["1", "2"]


async def test_pieces_of_many_callers_are_worked_on_one_by_one(
    commands: HostCommands, eater: tuple[str, ...], out: Path
) -> None:
    """No piece is mixed with another."""
    await asyncio.gather(
        *(commands.feed(eater, f"write {n}a\nslow\nwrite {n}b\n") for n in range(3))
    )
    words = [word for word in out.read_text().split() if word != "slow"]
    assert words == ["0a", "0b", "1a", "1b", "2a", "2b"]


async def test_program_is_replaced_after_many_pieces(
    commands: HostCommands, eater: tuple[str, ...], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends by itself, having done all."""
    monkeypatch.setattr(feeder, "MOST_PIECES", 2)
    for number in range(3):
        await commands.feed(eater, f"write {number}\n")
    commands.close()
    assert len(pids(out)) == 2
    assert sorted(out.read_text().split()) == ["0", "1", "2", "end", "end"]


async def test_missing_program_is_named(commands: HostCommands) -> None:
    """As with `run`."""
    with pytest.raises(CommandFailed, match="no-such-program: cannot be started"):
        await commands.feed(("no-such-program",), "x\n")
