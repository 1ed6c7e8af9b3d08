"""Keeps requests of one mix in flight at a running server, from a thread of its own; the load of a live sweep."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from pals.core.errors import EngineGoneError
from pals.core.load import Latencies, Mix
from pals.engines.load_book import LoadBook, Order
from pals.engines.openai_client import aiohttp_package, complete, open_session

ANSWER_S = 30.0  # the thread does small things only; one that does not answer by then has ended
T = TypeVar("T")


class ClosedLoop:
    """A `LoadDriver` on the OpenAI completions API; a context manager, which sends nothing before its first load.

    Lengths follow `seed`, prompts are new ones each time.
    """

    def __init__(self, *, base_url: str, model: str, seed: int) -> None:
        self._base_url, self._model = base_url.rstrip("/"), model
        prompts = np.random.default_rng()  # never those of an earlier run, which the server's prefix cache may hold
        self._book = LoadBook(seed=seed, prompts=prompts)  # only the thread touches it
        self._tasks: dict[int, asyncio.Task[None]] = {}  # by the order's number
        self._stopping = False
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load", daemon=True)

    def __enter__(self) -> ClosedLoop:
        aiohttp_package()  # missing: said here, not in the thread
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        """Cancel what is in flight and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop)
            self._thread.join(timeout=ANSWER_S)

    def set_load(self, mix: Mix, in_flight: int) -> None:
        """From now on send requests of `mix`, `in_flight` at a time; another mix's are cancelled."""

        def change() -> None:
            for number in self._book.set_load(mix, in_flight):
                if (task := self._tasks.get(number)) is not None:
                    task.cancel()
            self._changed.set()

        self._ask(change)

    def latencies(self, since_s: float) -> Latencies:
        """Of requests sent under the present mix, since this time of CLOCK_MONOTONIC."""
        return self._ask(lambda: self._book.latencies(since_s))

    @property
    def last_error(self) -> str | None:
        """What the newest request that failed got; None: none did."""
        return self._ask(lambda: self._book.last_error)

    def _ask(self, question: Callable[[], T]) -> T:
        """Have the thread do something, and wait for it."""

        async def answer() -> T:
            return question()

        if not self._thread.is_alive():
            raise EngineGoneError("the client that loads the engine has ended; nothing is sent any more")
        return asyncio.run_coroutine_threadsafe(answer(), self._loop).result(timeout=ANSWER_S)

    def _stop(self) -> None:
        self._stopping = True
        self._changed.set()

    async def _run(self) -> None:
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        async with open_session(aiohttp_package()) as session:
            while not self._stopping:
                for _ in range(self._book.lacking(time.monotonic())):
                    order = self._book.order()
                    task = self._tasks[order.number] = asyncio.create_task(self._one(session, order))
                    task.add_done_callback(partial(self._ended, order.number))
                await self._wait()
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _wait(self) -> None:
        """Until a request ends or another load is asked for, or a pause is over."""
        pause_s = self._book.resume_s - time.monotonic()
        try:
            async with asyncio.timeout(pause_s if pause_s > 0 else None):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()

    def _ended(self, number: int, task: asyncio.Task[None]) -> None:
        del self._tasks[number]
        self._changed.set()

    async def _one(self, session: Any, order: Order) -> None:
        sent_s = time.monotonic()

        def first(at_s: float) -> None:
            self._book.first_token(order, at_s=at_s, ttft_s=at_s - sent_s)

        result = await complete(session, self._base_url, self._model, order.spec, order.ids, on_first=first)
        self._book.ended(order, result, at_s=time.monotonic())
