"""The socket between the CNI executables and cnid: one request, one answer, then closed.

Only root may ask (the socket's mode, and the peer's credentials once more). What arrives is read
within limits of size and time, and garbage gets an error as any other call does. The path always
names a socket that somebody listens on or nobody: it is put in place by rename.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import structlog

from cni.errors import CniError, Code, try_again
from cni.request import Request, version_of
from cni.result import of_error

PROTOCOL = 2
MAX_HEADER_BYTES = 128
MAX_ENVIRONMENT_BYTES = 1 << 16
MAX_CONFIG_BYTES = 1 << 20
READ_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 5.0
BACKLOG = 1024
MAX_CONNECTIONS = 2048
"""More are told to try again later: each costs a descriptor and memory for its request."""

Answer = tuple[int, bytes]
"""The executable's exit code and standard output."""

log = structlog.get_logger()


async def serve(path: Path, answer: Callable[[Request], Awaitable[Answer]]) -> None:
    """Answer requests at `path` until cancelled."""
    _allow_descriptors(2 * MAX_CONNECTIONS)
    count = 0

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        # The executable may be gone by now: its runtime gave up. What was done is found by DEL.
        with suppress(ConnectionError, TimeoutError):
            try:
                code, output = await _answer_one(reader, writer, answer, count)
                writer.write(b"cymric-cni %d %d\n" % (PROTOCOL, code) + output)
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await writer.drain()
            finally:
                count -= 1
                writer.close()

    server = await asyncio.start_unix_server(
        converse, sock=_listening(path), limit=MAX_CONFIG_BYTES, backlog=BACKLOG
    )
    async with server:
        await server.serve_forever()


async def _answer_one(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    answer: Callable[[Request], Awaitable[Answer]],
    count: int,
) -> Answer:
    raw_config = b""
    try:
        _refuse_strangers(writer.get_extra_info("socket"))
        if count > MAX_CONNECTIONS:
            raise try_again("cnid has too many calls to answer", f"{count} at once")
        async with asyncio.timeout(READ_TIMEOUT_S):
            kind, lengths = _header(await reader.readuntil(b"\n"))
            env = await reader.readexactly(lengths[0])
            raw_config = await reader.readexactly(lengths[1])
        request = Request.of(kind, env, raw_config)
    except (asyncio.LimitOverrunError, asyncio.IncompleteReadError):
        error = CniError(Code.DECODING_FAILURE, "the request ends before it is complete")
    except TimeoutError:
        error = CniError(Code.DECODING_FAILURE, f"no request within {READ_TIMEOUT_S} s")
    except CniError as refused:
        error = refused
    else:
        return await answer(request)
    log.warning("request refused", why=str(error))
    return 1, of_error(version_of(raw_config), error)


def _header(line: bytes) -> tuple[bytes, tuple[int, int]]:
    """Which executable asks, and the lengths of what follows. Raises CniError."""
    words = line.split()
    if len(line) > MAX_HEADER_BYTES or len(words) != 5 or words[0] != b"cymric-cni":
        raise CniError(Code.DECODING_FAILURE, "this is no request of our executables")
    if words[1] != b"%d" % PROTOCOL:
        raise CniError(
            Code.DECODING_FAILURE,
            f"the executable speaks protocol {words[1].decode(errors='replace')}, "
            f"cnid speaks {PROTOCOL}",
            "install the executables of this version",
        )
    if not (words[3].isdigit() and words[4].isdigit()):
        raise CniError(Code.DECODING_FAILURE, "the request's lengths are no numbers")
    lengths = int(words[3]), int(words[4])
    for length, limit in zip(lengths, (MAX_ENVIRONMENT_BYTES, MAX_CONFIG_BYTES), strict=True):
        if length > limit:
            raise CniError(
                Code.DECODING_FAILURE, f"the request is too long: {length} bytes of {limit}"
            )
    return words[2], lengths


def _allow_descriptors(count: int) -> None:
    """Every call takes a few descriptors; the usual soft limit of 1,024 is soon reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max(soft, min(count, hard) if hard != resource.RLIM_INFINITY else count)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _refuse_strangers(connection: socket.socket) -> None:
    size = struct.calcsize("3i")
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, uid, _ = struct.unpack("3i", raw)
    if uid not in (0, os.geteuid()):
        raise CniError(Code.INVALID_ENVIRONMENT, f"user {uid} may not use this socket")


def _listening(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    former = os.umask(0o177)  # never, not even for a moment, open to others
    try:
        listener.bind(str(half))
    finally:
        os.umask(former)
    listener.listen(BACKLOG)
    listener.setblocking(False)
    half.rename(path)
    return listener
