"""A small HTTP server on loopback that says exactly what a test wants said, and leaves no connection behind."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Connections:
    """What a server of a test is asked, each connection in a task of its own; `end` waits for all of them."""

    def __init__(
        self, handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]
    ) -> None:
        self._handle = handle
        self._tasks: set[asyncio.Task[None]] = set()
        self._last = asyncio.Event()
        self._last_port: int | None = None

    def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A client came."""
        if writer.get_extra_info("peername")[1] == self._last_port:
            self._last.set()
        self._tasks.add(asyncio.ensure_future(self._served(reader, writer)))

    async def _served(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._handle(reader, writer)
        except (asyncio.IncompleteReadError, IndexError, ConnectionError):
            return  # the client left early, or is somebody else who came to this port
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def end(self, port: int) -> None:
        """Wait until every connection is closed: one that outlived its event loop would warn in some later test.

        Connections are accepted in the order they came, so one more tells when those of clients that have left are in.
        """
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self._last_port = s.getsockname()[1]
            s.setblocking(False)
            await asyncio.get_running_loop().sock_connect(s, ("127.0.0.1", port))
            await self._last.wait()
        await asyncio.gather(*self._tasks)


@asynccontextmanager
async def http_server(answer: Callable[[bytes], Awaitable[bytes]]) -> AsyncIterator[str]:
    """Answers each request's body with the raw bytes that `answer(body)` gives, then closes; yields its address."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        body = await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        writer.write(await answer(body))
        await writer.drain()

    async with serving(handle) as url:
        yield url


@asynccontextmanager
async def serving(
    handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]],
) -> AsyncIterator[str]:
    """A server whose connections are served by `handle`, and closed; yields its address."""
    connections = Connections(handle)
    async with await asyncio.start_server(connections.connected, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        await connections.end(port)
