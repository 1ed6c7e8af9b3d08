"""The streaming client where the answer is not the expected one: it keeps what it saw and says what went wrong."""

from __future__ import annotations

import asyncio
import time
from contextlib import AbstractAsyncContextManager

import pytest

from pals.engines.openai_client import RequestResult, RequestSpec, replay
from tests.loopback import http_server

pytest.importorskip("aiohttp")

TOKEN = b'data: {"choices":[{"text":"x"}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\ndata: [DONE]\n\n'
SPEC = RequestSpec(at_s=0.0, prompt_tokens=4, output_tokens=2)


def server_saying(stream: bytes, promised: int | None = None) -> AbstractAsyncContextManager[str]:
    """Answers every request with `stream`, having promised `promised` bytes; yields its address."""
    length = len(stream) if promised is None else promised

    async def answer(body: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (length, stream)

    return http_server(answer)


def answer_to(stream: bytes, promised: int | None = None) -> RequestResult:
    """The client's record of one request answered with `stream`."""

    async def go() -> RequestResult:
        async with server_saying(stream, promised) as url:
            return (await replay([SPEC], base_url=url, model="m", seed=1))[0]

    return asyncio.run(go())


def test_tokens_are_counted_from_the_usage_not_from_chunks() -> None:
    result = answer_to(TOKEN + USAGE % 7)

    assert (result.output_tokens, result.error) == (7, None)
    assert result.first_token_s == result.last_token_s


def test_text_that_looks_like_a_usage_is_a_token() -> None:
    text = rb'data: {"choices":[{"text":"\"usage\":{\"completion_tokens\":99}"}]}' + b"\n\n"

    assert answer_to(TOKEN + text + USAGE % 2).output_tokens == 2


def test_a_usage_beside_the_last_token_counts_as_both() -> None:
    both = b'data: {"choices":[{"text":"x"}],"usage":{"completion_tokens":2}}\n\n'
    result = answer_to(TOKEN + both)

    assert (result.output_tokens, result.error) == (2, None)
    assert result.tpot_s is not None


@pytest.mark.parametrize(
    ("stream", "promised", "error"),
    [
        (b"data: [DONE]\n\n", None, "without a token"),
        (TOKEN, None, "before its token count"),
        (TOKEN, 500, "ClientPayloadError"),
        (TOKEN + b'data: {"error":{"message":"engine died"}}\n\ndata: [DONE]\n\n', None, "engine died"),
        (TOKEN + b'data: {"usage":{broken\n\n', None, "JSONDecodeError"),
    ],
)
def test_what_went_wrong_is_recorded(stream: bytes, promised: int | None, error: str) -> None:
    result = answer_to(stream, promised)

    assert result.error is not None
    assert error in result.error
    assert (result.first_token_s is not None) == stream.startswith(TOKEN)
    assert result.output_tokens == 0


def test_the_time_scale_stretches_arrivals() -> None:
    specs = [RequestSpec(at_s=at_s, prompt_tokens=4, output_tokens=2) for at_s in (0.0, 100.0)]

    async def go() -> list[RequestResult]:
        async with server_saying(TOKEN + USAGE % 2) as url:
            return await replay(specs, base_url=url, model="m", seed=1, time_scale=0.001)

    first, second = asyncio.run(go())
    assert 0.09 < second.sent_s - first.sent_s < 50.0  # 100 s of load in 0.1 s, and room for a busy machine
    assert first.sent_s < second.sent_s < time.monotonic()


def test_a_time_scale_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="time_scale"):
        asyncio.run(replay([SPEC], base_url="http://127.0.0.1:9", model="m", seed=1, time_scale=0.0))
