"""A streaming client of the OpenAI completions API: open loop along a trace, or closed loop at a set concurrency.

Prompts are token ids drawn from a seed, unlike each other, so that a prefix cache does not help; times are
CLOCK_MONOTONIC seconds, the journal's.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pals.core.errors import ConfigError
from pals.core.quantities import Checked

LOWEST_ID, HIGHEST_ID = 10, 15000  # below every shipped tokenizer's size


def _aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError as e:
        raise ConfigError("aiohttp is not installed; install it with `pip install 'pals-llm[client]'`") from e
    return aiohttp


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSpec(Checked):
    """One request of a load: when, how long a prompt, how many tokens to ask for."""

    at_s: float  # from the start of the load
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult(Checked):
    """What came of a request; `error` says why where nothing did."""

    spec: RequestSpec
    sent_s: float
    first_token_s: float | None = None
    last_token_s: float | None = None
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for fewer than two tokens."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)


async def replay(specs: Sequence[RequestSpec], *, base_url: str, model: str, seed: int) -> list[RequestResult]:
    """Send each request at its time, whether or not earlier ones are answered; return results in the load's order."""
    aiohttp = _aiohttp()
    rng = np.random.default_rng(seed)
    prompts = [prompt(spec, rng) for spec in specs]
    start_s = time.monotonic() + 0.5
    async with aiohttp.ClientSession(
        connector=connector(aiohttp), timeout=aiohttp.ClientTimeout(total=None)
    ) as session:

        async def one(spec: RequestSpec, ids: list[int]) -> RequestResult:
            await asyncio.sleep(max(0.0, start_s + spec.at_s - time.monotonic()))
            return await complete(session, base_url, model, spec, ids)

        return list(await asyncio.gather(*(one(s, p) for s, p in zip(specs, prompts, strict=True))))


def connector(aiohttp: Any) -> Any:
    """A new connection for each request: re-used ones race with the server's keep-alive timer."""
    return aiohttp.TCPConnector(limit=0, force_close=True)


def prompt(spec: RequestSpec, rng: np.random.Generator) -> list[int]:
    """Random token ids of the asked length."""
    return [int(i) for i in rng.integers(LOWEST_ID, HIGHEST_ID, spec.prompt_tokens)]


async def complete(session: Any, base_url: str, model: str, spec: RequestSpec, ids: list[int]) -> RequestResult:
    """Stream one completion of exactly the asked length; failures are recorded, never retried."""
    body = {
        "model": model,
        "prompt": ids,
        "max_tokens": spec.output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    aiohttp = _aiohttp()
    sent_s = time.monotonic()
    first_s = last_s = None
    tokens = 0
    try:
        async with session.post(f"{base_url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                return RequestResult(
                    spec=spec, sent_s=sent_s, error=f"HTTP {answer.status}: {(await answer.text())[:200]}"
                )
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                if b'"choices":[]' in line:
                    tokens = int(json.loads(line[6:])["usage"]["completion_tokens"])
                    continue
                last_s = time.monotonic()
                first_s = first_s or last_s
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as e:
        return RequestResult(spec=spec, sent_s=sent_s, error=f"{type(e).__name__}: {e}")
    if first_s is None or tokens == 0:
        return RequestResult(spec=spec, sent_s=sent_s, error="the stream ended without a token")
    return RequestResult(spec=spec, sent_s=sent_s, first_token_s=first_s, last_token_s=last_s, output_tokens=tokens)


class ClosedLoop:
    """Keeps a settable number of requests in flight from a thread of its own; for profiling."""

    def __init__(self, specs: Sequence[RequestSpec], *, base_url: str, model: str, seed: int) -> None:
        self._specs, self._base_url, self._model = list(specs), base_url, model
        self._rng = np.random.default_rng(seed)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._wanted = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._next = 0
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load", daemon=True)

    def start_in_thread(self) -> None:
        """Start with nothing in flight."""
        _aiohttp()
        self._thread.start()
        self._started.wait()

    def set_concurrency(self, n: int) -> None:
        """Keep `n` requests in flight from now on; those above it end by themselves."""
        self._wanted = n
        self._wake()

    def stop(self) -> None:
        """Cancel what is in flight and end the thread."""
        self._stopping = True
        self._wake()
        self._thread.join(timeout=10)

    def _wake(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)

    async def _run(self) -> None:
        aiohttp = _aiohttp()
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        async with aiohttp.ClientSession(
            connector=connector(aiohttp), timeout=aiohttp.ClientTimeout(total=None)
        ) as session:
            while not self._stopping:
                while len(self._tasks) < self._wanted:
                    task = asyncio.create_task(self._one(session))
                    self._tasks.add(task)
                    task.add_done_callback(self._ended)
                await self._changed.wait()
                self._changed.clear()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()

    async def _one(self, session: Any) -> None:
        spec = self._specs[self._next % len(self._specs)]
        self._next += 1
        result = await complete(session, self._base_url, self._model, spec, prompt(spec, self._rng))
        if result.error is not None:
            await asyncio.sleep(0.2)  # a refused request must not turn into a busy loop
