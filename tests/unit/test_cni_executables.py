"""The CNI executables, the compiled one and the one in Python: how they ask and what they say."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cni import plugin
from cymric.runtime.cni_executables import (
    DEFAULT_SOCKET,
    NAMES,
    compile_client,
    executables,
    find_compiler,
    is_ours,
    write_whole,
)


def test_default_socket_is_one() -> None:
    """The Python executable, the compiled one and the installer agree where cnid listens."""
    assert plugin.DEFAULT_SOCKET == DEFAULT_SOCKET
    compiler = find_compiler()
    assert compiler is not None
    client = compile_client(compiler)
    assert executables(client)["cymric-cni"] == client
    assert is_ours(client)


def test_executable_imports_next_to_nothing(tmp_path: Path) -> None:
    """The executable loads no module beyond what Python starts with, until it asks cnid."""
    script = executables(None, python=Path(sys.executable))["cymric-cni"].decode()
    bare = _modules("pass", tmp_path)
    body = script.partition("\n")[2].replace('__name__ == "__main__"', "False")
    assert _modules(body, tmp_path) == bare


def _modules(body: str, directory: Path) -> set[str]:
    script = directory / "script.py"
    script.write_text(f"{body}\nimport sys\nprint(' '.join(sys.modules))\n")
    done = subprocess.run(
        [sys.executable, "-IS", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.fixture(params=["compiled", "python"])
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Both kinds of executables, installed for a socket where nobody listens."""
    compiler = find_compiler()
    assert compiler is not None
    client = compile_client(compiler) if request.param == "compiled" else None
    files = executables(client, python=Path(sys.executable), socket=tmp_path / "no-such.sock")
    assert len(files) == (4 if client else 2)
    for name, content in files.items():
        write_whole(tmp_path / name, content, mode=0o755)
    return tmp_path


def ask(path: Path, config: bytes, **env: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run([path], env=env, input=config, capture_output=True, check=False)
    assert done.stderr == b""
    return done.returncode, json.loads(done.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_executable_without_cnid(installed: Path, name: str) -> None:
    """Where nobody listens the runtime is told to try again, and where was asked."""
    code, error = ask(installed / name, b'{"cniVersion": "0.4.0"}', CNI_COMMAND="ADD")
    assert (code, error["code"], error["cniVersion"]) == (1, 11, "0.4.0")
    assert str(installed / "no-such.sock") in error["msg"]


@pytest.mark.parametrize(
    ("config", "env", "code"),
    [
        pytest.param(b"{}", {}, 4, id="no command"),
        pytest.param(b"{}", {"CNI_COMMAND": "MOVE"}, 4, id="unknown command"),
        pytest.param(b'{"socket": 7}', {"CNI_COMMAND": "ADD"}, 6, id="socket is no text"),
        pytest.param(b'{"socket": "/a"', {"CNI_COMMAND": "ADD"}, 11, id="half a configuration"),
        pytest.param(b'"socket"', {"CNI_COMMAND": "ADD"}, 6, id="only the word"),
        pytest.param(b'{"socket": "/a\\u0062"}', {"CNI_COMMAND": "ADD"}, 11, id="escaped"),
        pytest.param(b'{"socket": "/' + b"a" * 200 + b'"}', {"CNI_COMMAND": "ADD"}, 11, id="long"),
        pytest.param(b" " * ((1 << 20) + 1), {"CNI_COMMAND": "ADD"}, 6, id="too large"),
        pytest.param(b"", {"CNI_COMMAND": "STATUS"}, 50, id="status without cnid"),
    ],
)
def test_executable_on_bad_input(
    installed: Path, config: bytes, env: dict[str, str], code: int
) -> None:
    """What cannot be passed on is an error as the specification wants it, in both kinds alike."""
    found, error = ask(installed / "cymric-cni", config, **env)
    assert (found, error["code"]) == (1, code)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        pytest.param(b"", "", id="nothing"),
        pytest.param(b"cymric-cni 1 0\n{}", "protocol", id="another version"),
        pytest.param(b"cymric-cni 2 x\n{}", "protocol", id="no code"),
        pytest.param(b"cymric-cni 2", "", id="half a line"),
    ],
)
def test_executable_on_a_bad_answer(installed: Path, answer: bytes, said: str) -> None:
    """An answer that is none is told as one; nothing of it is printed."""
    with _answering(installed / "no-such.sock", answer):
        code, error = ask(installed / "cymric-cni", b"{}", CNI_COMMAND="ADD")
    assert (code, error["code"]) == (1, 11)
    assert said in error["details"]


@pytest.mark.parametrize("name", NAMES)
def test_executable_passes_on(installed: Path, name: str) -> None:
    """Variables and configuration arrive as they are, and the answer is printed as it is."""
    config = b'{"x": "\xc3\xa4", "y": "' + b"z" * 300_000 + b'"}'
    answer = b'{"a": 1}\n' + b" " * 300_000
    with _answering(installed / "no-such.sock", b"cymric-cni 2 7\n" + answer) as asked:
        done = subprocess.run(
            [installed / name],
            env={"CNI_COMMAND": "DEL", "CNI_ARGS": "a=b\tc", "OTHER": "x"},
            input=config,
            capture_output=True,
            check=False,
        )
    assert (done.returncode, done.stdout, done.stderr) == (7, answer, b"")
    head, _, rest = asked[0].partition(b"\n")
    kind = b"ipam" if name.endswith("ipam") else b"main"
    variables = sorted([b"CNI_COMMAND=DEL", b"CNI_ARGS=a=b\tc"])
    size = sum(len(variable) + 1 for variable in variables)
    assert head == b"cymric-cni 2 %s %d %d" % (kind, size, len(config))
    assert sorted(rest[: size - 1].split(b"\0")) == variables
    assert rest[size:] == config


@contextmanager
def _answering(path: Path, answer: bytes) -> Iterator[list[bytes]]:
    """A cnid that reads one request whole, says `answer` and hangs up; what it was asked."""
    asked: list[bytes] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                request = b""
                while not _is_whole(request):
                    request += connection.recv(65536)
                asked.append(request)
                connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield asked
        thread.join(30)
        assert not thread.is_alive()


def _is_whole(request: bytes) -> bool:
    head, end, rest = request.partition(b"\n")
    return bool(end) and len(rest) == sum(map(int, head.split()[3:]))


@pytest.mark.parametrize(
    ("config", "path"),
    [
        pytest.param({"socket": "/a"}, "/a", id="at the top"),
        pytest.param({"ipam": {"socket": "/b"}}, "/b", id="in ipam"),
        pytest.param({"ipam": []}, plugin.DEFAULT_SOCKET, id="nowhere"),
    ],
)
def test_socket_named_by_the_configuration(config: dict[str, Any], path: str) -> None:
    """The network configuration may say where cnid listens."""
    assert plugin.socket_path(json.dumps(config).encode()) == path
