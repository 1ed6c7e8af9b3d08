"""The live closed loop against a small server: as many in flight as asked for, honest times, and no storm of refused requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable

import pytest

from pals.core.errors import EngineGoneError
from pals.core.load import Latencies, Mix
from pals.engines.closed_loop import ClosedLoop
from tests.loopback import http_server, serving

pytest.importorskip("aiohttp")

MIX = Mix(name="test", prompt_tokens=40, output_tokens=10)
TOKEN = b'data: {"choices":[{"text":"x"}]}\n\n'
Answer = Callable[[bytes], Awaitable[bytes]]


def stream_of(body: bytes, tokens: int | None = None) -> bytes:
    """As many tokens as asked for."""
    count = tokens or int(json.loads(body)["max_tokens"])
    usage = b'data: {"choices":[],"usage":{"completion_tokens":%d}}\n\n' % count
    return b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + TOKEN * count + usage


async def until(reached: Callable[[], bool], *, within_s: float = 20.0) -> None:
    """Return when it holds; a test that waits in vain fails."""
    async with asyncio.timeout(within_s):
        while not reached():
            await asyncio.sleep(0.002)


def run(answer: Answer, scene: Callable[[ClosedLoop], Awaitable[None]]) -> None:
    """Play a scene with a loop on a server that answers so."""

    async def go() -> None:
        async with http_server(answer) as url:
            loop = ClosedLoop(base_url=f"{url}/", model="m", seed=1)
            await asyncio.to_thread(loop.__enter__)
            try:
                await scene(loop)
            finally:
                await asyncio.to_thread(loop.__exit__)

    asyncio.run(go())


def test_it_keeps_as_many_in_flight_as_asked_for() -> None:
    in_flight = most = 0
    release = asyncio.Event()

    async def answer(body: bytes) -> bytes:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await release.wait()
        in_flight -= 1
        return stream_of(body)

    async def scene(loop: ClosedLoop) -> None:
        await asyncio.to_thread(loop.set_load, MIX, 5)
        await until(lambda: in_flight == 5)
        await asyncio.to_thread(loop.set_load, MIX, 7)
        await until(lambda: in_flight == 7)
        release.set()  # each that ends is followed by another
        await until_many(loop, 30)
        assert most == 7

    run(answer, scene)


async def until_many(loop: ClosedLoop, count: int) -> Latencies:
    """Return when so many requests have ended."""
    async with asyncio.timeout(20.0):
        while len((seen := await asyncio.to_thread(loop.latencies, 0.0)).tpot_s) < count:
            await asyncio.sleep(0.002)
    return seen


def test_lengths_are_the_mixs_and_latencies_belong_to_the_span_and_the_mix() -> None:
    bodies: list[dict[str, object]] = []

    async def answer(body: bytes) -> bytes:
        bodies.append(json.loads(body))
        return stream_of(body)

    async def scene(loop: ClosedLoop) -> None:
        await asyncio.to_thread(loop.set_load, MIX, 3)
        seen = await until_many(loop, 20)
        assert len(seen.ttft_s) >= len(seen.tpot_s)
        assert min(seen.ttft_s) > 0.0
        assert seen.failed == 0
        assert len((await asyncio.to_thread(loop.latencies, time.monotonic() + 60.0)).ttft_s) == 0
        await asyncio.to_thread(loop.set_load, Mix(name="other", prompt_tokens=400, output_tokens=10), 0)
        assert await asyncio.to_thread(loop.latencies, 0.0) == Latencies()

    run(answer, scene)
    assert all(20 <= len(b["prompt"]) <= 60 for b in bodies)  # type: ignore[arg-type]
    assert all(5 <= int(str(b["max_tokens"])) <= 15 for b in bodies)


def test_a_first_token_counts_before_the_answer_is_complete() -> None:
    hold = asyncio.Event()

    async def scene_on(url: str) -> None:
        loop = ClosedLoop(base_url=url, model="m", seed=1)
        await asyncio.to_thread(loop.__enter__)
        try:
            await asyncio.to_thread(loop.set_load, MIX, 1)
            async with asyncio.timeout(20.0):
                while not (seen := await asyncio.to_thread(loop.latencies, 0.0)).ttft_s:
                    await asyncio.sleep(0.002)
            assert seen.tpot_s == ()
        finally:
            hold.set()
            await asyncio.to_thread(loop.__exit__)

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + TOKEN)
        await writer.drain()
        await hold.wait()

    async def go() -> None:
        async with serving(slow) as url:
            await scene_on(url)

    asyncio.run(go())


def test_refused_requests_are_counted_and_do_not_become_a_storm() -> None:
    asked = 0

    async def answer(body: bytes) -> bytes:
        nonlocal asked
        asked += 1
        return b"HTTP/1.1 400 Bad Request\r\nContent-Length: 8\r\nConnection: close\r\n\r\ntoo long"

    async def scene(loop: ClosedLoop) -> None:
        start_s = time.monotonic()
        await asyncio.to_thread(loop.set_load, MIX, 4)
        async with asyncio.timeout(20.0):
            while (await asyncio.to_thread(loop.latencies, 0.0)).failed < 8:
                await asyncio.sleep(0.002)
        assert time.monotonic() - start_s > 0.1  # between the first four and the next
        assert "too long" in (await asyncio.to_thread(lambda: loop.last_error) or "")

    run(answer, scene)
    assert asked <= 12


def test_what_waits_under_an_old_mix_is_cancelled_and_the_new_one_sent() -> None:
    waiting, seen = set[int](), list[int]()

    async def answer(body: bytes) -> bytes:
        asked = json.loads(body)
        seen.append(len(asked["prompt"]))
        if seen[-1] >= 20:  # of the old mix: never answered
            waiting.add(len(seen))
            await asyncio.sleep(0.5)
        return stream_of(body)

    async def scene(loop: ClosedLoop) -> None:
        await asyncio.to_thread(loop.set_load, MIX, 4)
        await until(lambda: len(waiting) == 4)
        await asyncio.to_thread(loop.set_load, Mix(name="other", prompt_tokens=4, output_tokens=4), 2)
        await until_many(loop, 10)
        assert all(n < 20 for n in seen[4:])

    run(answer, scene)


def test_after_its_end_it_says_that_nothing_is_sent() -> None:
    loop = ClosedLoop(base_url="http://127.0.0.1:9", model="m", seed=1)
    with loop:
        loop.set_load(MIX, 0)

    with pytest.raises(EngineGoneError, match="nothing is sent any more"):
        loop.latencies(0.0)


def test_another_run_has_the_same_lengths_and_other_prompts_for_the_server_may_remember() -> None:
    def sent() -> list[list[int]]:
        prompts: list[list[int]] = []

        async def answer(body: bytes) -> bytes:
            prompts.append(json.loads(body)["prompt"])
            return stream_of(body)

        async def scene(loop: ClosedLoop) -> None:
            await asyncio.to_thread(loop.set_load, MIX, 1)
            await until_many(loop, 5)

        run(answer, scene)
        return prompts[:5]

    one, two = sent(), sent()
    assert [len(p) for p in one] == [len(p) for p in two]
    assert all(a[:8] != b[:8] for a, b in zip(one, two, strict=True))
