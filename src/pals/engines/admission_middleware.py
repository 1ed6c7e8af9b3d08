"""ASGI middleware in vLLM's API server: answers 503 with Retry-After where the agent's bound on the queue is reached.

`vllm serve --middleware pals.engines.admission_middleware.AdmissionMiddleware`; `pals serve` adds it by itself. A request that
is let in is not touched, nor is its answer. It never raises: if its own part fails, it logs once and lets everybody in.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from pals.engines.admission import LET_IN, Admission, Verdict, admission_of, own_engine

log = logging.getLogger("vllm.pals")
LOOK_EVERY_S = 1.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

#: Paths that make the engine generate; all others (health, metrics, models, tokenizing, pooling) are never refused.
GENERATING = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/responses",
        "/v1/messages",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/cohere/v2/chat",
        "/inference/v1/generate",
        "/generative_scoring",
        "/invocations",
    }
)


def find_admission() -> Admission | None:
    """That of this process's engine; None while it has no channel."""
    engine = own_engine(os.environ)
    return None if engine is None else admission_of(engine, time.monotonic)


class AdmissionMiddleware:
    """See the module."""

    def __init__(
        self,
        app: App,
        *,
        find: Callable[[], Admission | None] = find_admission,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app, self._find, self._now_s = app, find, now_s
        self._admission: Admission | None = None
        self._look_again_s = float("-inf")
        self._look()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http" or scope["method"] != "POST" or _path(scope) not in GENERATING:
            return await self._app(scope, receive, send)
        verdict, admission = self._judge(), self._admission
        if verdict.retry_after_s is not None:
            return await _refuse(send, verdict.retry_after_s)
        if verdict.ticket is None or admission is None:
            return await self._app(scope, receive, send)
        answer = _Answer(send)
        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            answer.turned_down |= not answer.started
            raise
        finally:
            if answer.turned_down:
                admission.failed(verdict.ticket)

    def _judge(self) -> Verdict:
        if self._admission is None:
            self._look()
            if self._admission is None:
                return LET_IN
        try:
            return self._admission.ask()
        except Exception as e:  # noqa: BLE001 - whatever it is, a request must not suffer from it
            self._failed(e)
            return LET_IN

    def _look(self) -> None:
        """Look for the engine's channel, now and then."""
        now_s = self._now_s()
        if now_s < self._look_again_s:
            return
        self._look_again_s = now_s + LOOK_EVERY_S
        try:
            self._admission = self._find()
        except Exception as e:  # noqa: BLE001 - as above
            self._failed(e)

    def _failed(self, error: Exception) -> None:
        """Say it once, and let everybody in from now on."""
        self._admission, self._look_again_s = None, float("inf")
        log.error("PALS admission control failed (%s: %s); requests are let in without it", type(error).__name__, error)


class _Answer:
    """Passes an answer on, and notes whether it turns the request down, which vLLM does before its engine sees it.

    A client that is gone turns nothing down: its request may reach the engine all the same.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.turned_down = False

    async def send(self, message: Message) -> None:
        """As ASGI wants it."""
        if message["type"] == "http.response.start":
            self.started, self.turned_down = True, 400 <= message["status"] < 500
        await self._send(message)


def _path(scope: Message) -> str:
    """The path below a `--root-path`."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


async def _refuse(send: Send, retry_after_s: int) -> None:
    """503, in the words of the OpenAI API."""
    error = {
        "message": "The server keeps a power budget and cannot take more requests now: as many wait as may. "
        f"Try again in {retry_after_s} s, or another server.",
        "type": "Service Unavailable",
        "param": None,
        "code": 503,
    }
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(retry_after_s).encode()),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
