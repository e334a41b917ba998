"""The socket between the CNI executables and cnid: one line in, one answer out, then closed.

Only root may ask (the socket's mode, and the peer's credentials once more). What arrives is read
within limits of size and time, and garbage gets an error as any other call does. The path always
names a socket that somebody listens on or nobody: it is put in place by rename.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import structlog

from cni.errors import CniError, Code
from cni.request import CNI_VERSIONS
from cni.result import of_error

PROTOCOL = 1
MAX_BYTES = 1 << 20
READ_TIMEOUT_S = 5.0
WRITE_TIMEOUT_S = 5.0
BACKLOG = 512

Answer = tuple[int, bytes]
"""The executable's exit code and standard output."""

log = structlog.get_logger()


async def serve(path: Path, answer: Callable[[bytes], Awaitable[Answer]]) -> None:
    """Answer requests at `path` until cancelled."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The executable may be gone by now: its runtime gave up. What was done is found by DEL.
        with suppress(ConnectionError, TimeoutError):
            try:
                code, output = await _answer_one(reader, writer, answer)
                writer.write(b"cymric-cni %d %d\n" % (PROTOCOL, code) + output)
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await writer.drain()
            finally:
                writer.close()

    server = await asyncio.start_unix_server(converse, sock=_listening(path), limit=MAX_BYTES)
    async with server:
        await server.serve_forever()


async def _answer_one(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    answer: Callable[[bytes], Awaitable[Answer]],
) -> Answer:
    try:
        _refuse_strangers(writer.get_extra_info("socket"))
        async with asyncio.timeout(READ_TIMEOUT_S):
            line = await reader.readuntil(b"\n")
    except asyncio.LimitOverrunError:
        error = CniError(Code.DECODING_FAILURE, f"the request is longer than {MAX_BYTES} bytes")
    except asyncio.IncompleteReadError:
        error = CniError(Code.DECODING_FAILURE, "the request ends before its line does")
    except TimeoutError:
        error = CniError(Code.DECODING_FAILURE, f"no request within {READ_TIMEOUT_S} s")
    except CniError as refused:
        error = refused
    else:
        return await answer(line)
    log.warning("request refused", why=str(error))
    return 1, of_error(CNI_VERSIONS[-1], error)


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
