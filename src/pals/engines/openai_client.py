"""A streaming client of the OpenAI completions API, and an open-loop load along a trace; `closed_loop` is the other kind.

Prompts are token ids drawn from a seed, unlike each other, so that a prefix cache does not help; times are
CLOCK_MONOTONIC seconds, the journal's.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pals.core.errors import INSTALL, ConfigError
from pals.core.quantities import Checked

LOWEST_ID, HIGHEST_ID = 10, 15000  # below every shipped tokenizer's size
SILENCE_S = 300.0  # a stream silent for longer is recorded as an error, so that a hung server cannot hang a run


def aiohttp_package() -> Any:
    """The package, imported when first needed.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import aiohttp
    except ImportError as e:
        raise ConfigError(f"aiohttp is not installed; {INSTALL}") from e
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
    def refused(self) -> bool:
        """Whether the server answered 503: it takes no more now."""
        return self.error is not None and self.error.startswith("HTTP 503")

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


async def replay(
    specs: Sequence[RequestSpec], *, base_url: str, model: str, seed: int, time_scale: float = 1.0
) -> list[RequestResult]:
    """Send each request at its time, whether or not earlier ones are answered.

    Args:
        specs: the load, in any order.
        base_url: the server's address, without `/v1`.
        model: its served model name.
        seed: draws the prompts.
        time_scale: stretches the arrival times: 2.0 halves the request rate.

    Returns:
        One result for each request, in the load's order; failures are results too.

    Raises:
        ConfigError: aiohttp is not installed.
        ValueError: `time_scale` is not above 0.
    """
    if not time_scale > 0:
        raise ValueError(f"time_scale is {time_scale}; it must be above 0")
    aiohttp = aiohttp_package()
    rng = np.random.default_rng(seed)
    prompts = [prompt(spec, rng) for spec in specs]
    start_s = time.monotonic() + 0.5
    async with open_session(aiohttp) as session:

        async def one(spec: RequestSpec, ids: list[int]) -> RequestResult:
            await asyncio.sleep(max(0.0, start_s + time_scale * spec.at_s - time.monotonic()))
            return await complete(session, base_url, model, spec, ids)

        return list(await asyncio.gather(*(one(s, p) for s, p in zip(specs, prompts, strict=True))))


def open_session(aiohttp: Any) -> Any:
    """Any number of connections, a new one for each request: re-used ones race with the server's keep-alive timer."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=SILENCE_S),
    )


def prompt(spec: RequestSpec, rng: np.random.Generator) -> list[int]:
    """Random token ids of the asked length."""
    return token_ids(spec.prompt_tokens, rng)


def token_ids(count: int, rng: np.random.Generator) -> list[int]:
    """So many random token ids."""
    ids: list[int] = rng.integers(LOWEST_ID, HIGHEST_ID, count).tolist()
    return ids


async def complete(
    session: Any,
    base_url: str,
    model: str,
    spec: RequestSpec,
    ids: list[int],
    *,
    on_first: Callable[[float], None] = lambda at_s: None,
) -> RequestResult:
    """Stream one completion of exactly the asked length; failures are recorded, never retried.

    `on_first` is told the time of the first token when it comes.
    """
    body = {
        "model": model,
        "prompt": ids,
        "max_tokens": spec.output_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    aiohttp = aiohttp_package()
    stream = _Stream(on_first)
    sent_s = time.monotonic()
    try:
        async with session.post(f"{base_url}/v1/completions", json=body) as answer:
            if answer.status != 200:
                stream.error = f"HTTP {answer.status}: {(await answer.text())[:200]}"
            else:
                async for line in answer.content:
                    stream.feed(line)
                stream.end()
    except (aiohttp.ClientError, TimeoutError, ConnectionError, ValueError, LookupError, TypeError) as e:
        stream.error = f"{type(e).__name__}: {e}"  # the last three: an answer that is not the API's
    return RequestResult(
        spec=spec,
        sent_s=sent_s,
        first_token_s=stream.first_s,
        last_token_s=stream.last_s,
        output_tokens=stream.tokens,
        error=stream.error,
    )


class _Stream:
    """Reads one stream's lines; only those that carry `usage` or an error are parsed, the rest are times."""

    __slots__ = ("_on_first", "error", "first_s", "last_s", "tokens")

    def __init__(self, on_first: Callable[[float], None]) -> None:
        self._on_first = on_first
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.tokens = 0
        self.error: str | None = None

    def feed(self, line: bytes) -> None:
        if not line.startswith(b"data: {"):
            return
        if line.startswith(b'data: {"error"'):
            self.error = f"in the stream: {line[6:206].decode(errors='replace').strip()}"
            return
        if b'"usage":{' in line or b'"usage": {' in line:  # inside generated text its quotes would be escaped
            event = json.loads(line[6:])
            self.tokens = int(event["usage"]["completion_tokens"])
            if not event["choices"]:
                return
        self.last_s = time.monotonic()
        if self.first_s is None:
            self.first_s = self.last_s
            self._on_first(self.last_s)

    def end(self) -> None:
        if self.error is None and self.first_s is None:
            self.error = "the stream ended without a token"
        elif self.error is None and self.tokens == 0:
            self.error = "the stream ended before its token count"
