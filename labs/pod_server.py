"""What runs in a pod: answers every HTTP request with the address of the client it sees.

Only the standard library, started with -I -S like anything foreign to the project would be.
"""

import asyncio
import sys


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One request, one line back: the client's address as it arrived."""
    try:
        await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout=5)
        body = f"{writer.get_extra_info('peername')[0]}\n".encode()
        writer.write(
            b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        await writer.drain()
    except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return  # the client went away, or never was one; the next may be better
    finally:
        writer.close()


async def serve(port: int) -> None:
    """Serve until killed."""
    server = await asyncio.start_server(answer, "0.0.0.0", port, backlog=256)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
