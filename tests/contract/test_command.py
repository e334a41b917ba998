"""Commands of the host: bounded, and never left behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from cymric.kernel.command import Call, CommandFailed, FakeCommands, Finished, HostCommands
from tests.support.eventually import eventually


async def test_program_gets_stdin_and_its_end_is_told() -> None:
    """Output, messages and exit code; a failure is an answer until it is checked."""
    done = await HostCommands().run(["sh", "-c", "cat; echo oh >&2; exit 3"], stdin="hello")
    assert (done.stdout, done.stderr, done.code, done.ok) == ("hello", "oh\n", 3, False)
    with pytest.raises(CommandFailed, match=r"sh .*exit code 3: oh"):
        done.checked()


async def test_large_input_and_output_do_not_block() -> None:
    """Both pipes are served at once."""
    text = "x" * 1_000_000
    assert (await HostCommands().run(["cat"], stdin=text)).stdout == text


async def test_program_that_does_not_read_its_input() -> None:
    """A closed pipe is no error of ours."""
    assert (await HostCommands().run(["true"], stdin="x" * 1_000_000)).ok


async def test_missing_program() -> None:
    """It is named."""
    with pytest.raises(CommandFailed, match=r"no-such-program: cannot be started"):
        await HostCommands().run(["no-such-program"])


async def test_messages_are_in_english_and_environment_can_be_replaced() -> None:
    """Messages are matched by their text."""
    done = await HostCommands().run(["sh", "-c", "echo $LC_ALL $A $HOME"], env={"A": "1"})
    assert done.stdout.split() == ["C", "1"]


async def test_slow_program_is_killed(tmp_path: Path) -> None:
    """After its time the program is gone, and that is the error."""
    pid_file = tmp_path / "pid"
    with pytest.raises(CommandFailed, match=r"did not end within 0.2 s"):
        await HostCommands().run(
            ["sh", "-c", f"echo $$ > {pid_file}; exec sleep 60"], timeout_s=0.2
        )
    assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()


async def test_cancelled_run_leaves_no_child(tmp_path: Path) -> None:
    """Whoever waits may give up at any moment."""
    pid_file = tmp_path / "pid"
    command = ["sh", "-c", f"echo $$ > {pid_file}; exec sleep 60"]
    task = asyncio.ensure_future(HostCommands().run(command))
    pid = await eventually(lambda: pid_file.exists() and pid_file.read_text().strip())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not Path(f"/proc/{pid}").exists()


async def test_fake_runs_programs_in_memory() -> None:
    """By name, with what was asked kept; an unknown one cannot be started."""
    fake = FakeCommands({"cat": lambda argv, stdin: Finished(tuple(argv), 0, stdin, "")})
    assert (await fake.run(["/bin/cat"], stdin="hi")).stdout == "hi"
    assert fake.calls == [Call(("/bin/cat",), "hi")]
    with pytest.raises(CommandFailed, match="no such program"):
        await fake.run(["dog"])
