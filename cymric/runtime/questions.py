"""Answers for people, on a unix socket: one question line in, one JSON document out, then the end.

The socket is for its owner only, as is everything in the run directory. Who says nothing within a
moment asks the empty question. A `ValueError` of the one who answers is told to who asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

QUESTION_WITHIN_S = 0.5
LISTEN_WITHIN_S = 10.0
MOST_BYTES = 65_536

Answer = Callable[[str], Awaitable[Mapping[str, Any]]]

log = structlog.get_logger()


async def serve_questions(path: Path, answer: Answer) -> None:
    """Answer at `path` until cancelled; replaces what an earlier process left there."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            said = await _said(reader, answer)
            writer.write(msgspec.json.encode(said) + b"\n")
            async with asyncio.timeout(LISTEN_WITHIN_S):
                await writer.drain()
        except (OSError, TimeoutError) as error:
            log.debug("who asked went away", error=str(error))
        finally:
            writer.close()

    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(converse, path, limit=MOST_BYTES)
    path.chmod(0o600)
    async with server:
        await server.serve_forever()


async def _said(reader: asyncio.StreamReader, answer: Answer) -> Mapping[str, Any]:
    try:
        async with asyncio.timeout(QUESTION_WITHIN_S):
            question = (await reader.readline()).decode(errors="replace").strip()
    except TimeoutError:
        question = ""
    except ValueError:
        return {"error": f"a question is longer than {MOST_BYTES} bytes"}
    try:
        return await answer(question)
    except ValueError as error:
        return {"error": str(error)}
