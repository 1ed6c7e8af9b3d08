"""What admission control costs a request in the API server: nothing in its way, no bound in force, a bound, and a refusal.

Command: `python -m benchmarks.admission`. No vLLM: the middleware stands before an ASGI app that does nothing, its channel is a real
one. Processor time of one core. Pass: less than 20 µs without a bound, 500 µs with one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pals.core.quantities import EngineInfo
from pals.engines.admission import Admission, admission_of
from pals.engines.admission_middleware import AdmissionMiddleware
from pals.runtime.channel import GAUGES, AgentChannel, EngineChannel
from pals.runtime.group import EngineGroup

REQUESTS = 5000
UNBOUND_PASS_S, BOUND_PASS_S = 20e-6, 500e-6
SCOPE = {"type": "http", "method": "POST", "path": "/v1/chat/completions"}


async def app(*_: Any) -> None:
    """Answers nothing."""


async def send(_: Any) -> None:
    """Takes an answer."""


def per_request_s(served: Any) -> float:
    """Processor seconds of one request, the least of five rounds."""

    async def load() -> float:
        began_s = time.process_time()
        for _ in range(REQUESTS):
            await served(SCOPE, send, send)
        return (time.process_time() - began_s) / REQUESTS

    return min(asyncio.run(load()) for _ in range(5))


def channel_in(folder: Path) -> tuple[EngineChannel, AgentChannel]:
    """Both ends of an engine whose 64 places are taken."""
    info = EngineInfo(
        pid=os.getpid(), engine="vllm", version="", model="m", parallelism="tp1 pp1 dp1 ep0", boards=(0,), launch_sequences=64
    )  # fmt: skip
    engine = EngineChannel(folder, info, name="benchmark")
    told = {"running": 64.0, "active_limit": 64.0, "launch_limit": 64.0, "time_s": time.monotonic() + 3600}
    engine.publish([told.get(name, 0.0) for name in GAUGES])
    return engine, AgentChannel(engine.path)


def main() -> int:
    """Measure and print; 1 where it is too slow."""
    with tempfile.TemporaryDirectory() as folder:
        _, agent = channel_in(Path(folder))

        def find() -> Admission:
            return admission_of(EngineGroup([agent]), time.monotonic)

        agent.apply(64, lease_s=3600.0)
        served, bare_s = AdmissionMiddleware(app, find=find), per_request_s(app)
        unbound_s = per_request_s(served) - bare_s
        agent.apply(64, lease_s=3600.0, most_waiting=1)
        bound_s = per_request_s(served) - bare_s
        agent.apply(64, lease_s=3600.0, most_waiting=0)
        refused_s = per_request_s(served) - bare_s
    print(f"no bound in force  {1e6 * unbound_s:6.1f} µs a request")
    print(f"let in under one   {1e6 * bound_s:6.1f} µs")
    print(f"refused            {1e6 * refused_s:6.1f} µs")
    return int(unbound_s > UNBOUND_PASS_S or max(bound_s, refused_s) > BOUND_PASS_S)


if __name__ == "__main__":
    sys.exit(main())
