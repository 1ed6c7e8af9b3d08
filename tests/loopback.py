"""A small HTTP server on loopback that says exactly what a test wants said, and leaves no connection behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@asynccontextmanager
async def http_server(answer: Callable[[bytes], Awaitable[bytes]]) -> AsyncIterator[str]:
    """Answers each request's body with the raw bytes that `answer(body)` gives, then closes; yields its address.

    It ends only when every connection is closed: one that outlived its event loop would warn in some later test.
    """
    connections: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            body = await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
            writer.write(await answer(body))
            await writer.drain()
        except (asyncio.IncompleteReadError, IndexError, ConnectionError):
            return  # the client left early, or is somebody else who came to this port
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.ensure_future(handle(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    await all_ended(connections)


async def all_ended(connections: set[asyncio.Task[None]]) -> None:
    """Wait for every connection's task, also of those that were accepted just before the server closed."""
    await asyncio.sleep(0.05)  # an accepted connection reaches its callback some turns of the loop later
    while waiting := {task for task in connections if not task.done()}:
        await asyncio.gather(*waiting)
