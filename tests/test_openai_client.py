"""The streaming client against a small server of its own: order, counts, times and honest failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pals.engines.openai_client import RequestSpec, replay
from tests.loopback import http_server

pytest.importorskip("aiohttp")


@asynccontextmanager
async def completions_server(fail_at: int | None = None) -> AsyncIterator[tuple[str, list[dict[str, object]]]]:
    """Streams as many chunks as asked for; the request with `fail_at` output tokens gets a 503."""
    seen: list[dict[str, object]] = []

    async def answer(raw: bytes) -> bytes:
        body = json.loads(raw)
        seen.append(body)
        if body["max_tokens"] == fail_at:
            return b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\nConnection: close\r\n\r\nbusy"
        usage = json.dumps({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}, separators=(",", ":"))
        tokens = 'data: {"choices":[{"text":"x"}]}\n\n' * body["max_tokens"]
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        return f"{head}{tokens}data: {usage}\n\ndata: [DONE]\n\n".encode()

    async with http_server(answer) as url:
        yield url, seen


def spec(at_s: float, prompt: int, output: int) -> RequestSpec:
    return RequestSpec(at_s=at_s, prompt_tokens=prompt, output_tokens=output)


def test_results_come_in_the_loads_order_with_counts_and_times() -> None:
    async def go() -> None:
        async with completions_server() as (url, seen):
            specs = [spec(0.05, 4, 3), spec(0.0, 5, 2), spec(0.02, 6, 1)]
            results = await replay(specs, base_url=url, model="m", seed=1)
        assert [r.output_tokens for r in results] == [3, 2, 1]
        assert [r.error for r in results] == [None] * 3
        assert results[1].sent_s < results[2].sent_s < results[0].sent_s
        assert all(r.ttft_s is not None and r.ttft_s > 0 for r in results)
        assert results[2].tpot_s is None  # one token has no time per further token
        assert sorted(len(b["prompt"]) for b in seen) == [4, 5, 6]  # type: ignore[arg-type]
        assert all(b["ignore_eos"] and b["stream"] for b in seen)

    asyncio.run(go())


def test_a_refusal_is_recorded_and_the_others_are_answered() -> None:
    async def go() -> None:
        async with completions_server(fail_at=9) as (url, _):
            results = await replay([spec(0, 4, 9), spec(0, 4, 2)], base_url=url, model="m", seed=1)
        assert results[0].error is not None
        assert "503" in results[0].error
        assert results[1].error is None

    asyncio.run(go())


def test_nobody_listening_is_an_error_of_each_request() -> None:
    results = asyncio.run(replay([spec(0, 4, 2)], base_url="http://127.0.0.1:9", model="m", seed=1))

    assert results[0].error is not None
    assert results[0].ttft_s is None


def test_prompts_differ_and_follow_the_seed() -> None:
    async def prompts(seed: int) -> list[object]:
        async with completions_server() as (url, seen):
            await replay([spec(0, 8, 1), spec(0.01, 8, 1)], base_url=url, model="m", seed=seed)
            return [b["prompt"] for b in seen]

    first, again, other = (asyncio.run(prompts(s)) for s in (1, 1, 2))

    assert first == again != other
    assert first[0] != first[1]
