"""What PALS does on the vLLM of this environment, feature by feature, through the real server on emulated boards.

Command: `python -m benchmarks.release_features`; the last line of its output is one JSON object, feature → what was seen.
A feature that does not work says FAILED and why; those after it are still tried as far as the server lives.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata as metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from packaging.requirements import Requirement

from pals.core.errors import PalsError
from pals.core.quantities import LOWERINGS
from pals.engines.openai_client import RequestResult, RequestSpec, replay
from pals.engines.vllm_launcher import tail
from pals.experiments.demo import free_port, healthy
from pals.runtime.channel import AgentChannel, find_engines

MODEL, BOARDS, LAUNCH, LOWERED = "Qwen/Qwen3-30B-A3B", "2xa100-sxm4-80gb", 32, 4
PATIENCE_S = 180.0  # long enough for a busy machine; nothing here is a measurement of speed


class FeatureError(Exception):
    """A feature does not do what it should; the text goes into the row."""


@dataclass
class Server:
    """`pals serve --no-agent` in a run directory of its own."""

    scratch: Path
    port: int
    process: subprocess.Popen[bytes]
    seen: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def engine(self) -> AgentChannel:
        """The engine's channel.

        Raises:
            FeatureError: there is none.
        """
        engines = find_engines(self.scratch / "run")
        if not engines:
            raise FeatureError("no channel: the plugin was not loaded")
        return engines[0]


def start(scratch: Path) -> Server:
    """Start the server; it may not be up yet."""
    port = free_port()
    with (scratch / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pals.cli", "serve", MODEL, "--emulate", BOARDS, "--no-agent", "--port", str(port),
             "--max-num-seqs", str(LAUNCH), "--log", str(scratch / "vllm.log")],
            stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PALS_RUN_DIR": str(scratch / "run")},
        )  # fmt: skip
    return Server(scratch, port, process)


def wait_for(holds: Callable[[], bool], what: str) -> float:
    """Wait until `holds`; return the seconds it took.

    Raises:
        FeatureError: it never did.
    """
    began_s = time.monotonic()
    while not holds():
        if time.monotonic() - began_s > PATIENCE_S:
            raise FeatureError(f"not within {PATIENCE_S:.0f} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - began_s


def starts(server: Server) -> str:
    """The server answers and PALS says that it serves."""

    def up() -> bool:
        if server.process.poll() is not None:
            raise FeatureError(cause(server.scratch))
        return healthy(server.url) and "serving" in (server.scratch / "serve.log").read_text()

    return f"{wait_for(up, 'the server answers'):.0f} s"


def cause(scratch: Path) -> str:
    """Why the server ended: the module it lacked, or its last error."""
    text = (scratch / "vllm.log").read_text(errors="replace") if (scratch / "vllm.log").exists() else ""
    if missing := re.findall(r"No module named '([^']+)'", text):
        return f"missing module {missing[0]}"
    errors = re.findall(r"(?:^|\s)(\w+(?:Error|Exception): .*)", text)
    return errors[0][:200] if errors else tail(scratch / "serve.log", 1).strip()[:200]


def lists_model(server: Server) -> str:
    """`/v1/models` names the model."""
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as answer:
        names = [m["id"] for m in json.load(answer)["data"]]
    if MODEL not in names:
        raise FeatureError(f"lists {names}")
    return "yes"


def streams(server: Server) -> str:
    """Streams carry exactly the tokens asked for."""
    specs = [RequestSpec(at_s=0.01 * i, prompt_tokens=50 + 7 * i, output_tokens=20 + i) for i in range(40)]
    return exact(specs, asyncio.run(replay(specs, base_url=server.url, model=MODEL, seed=1)))


def exact(specs: list[RequestSpec], results: list) -> str:  # type: ignore[type-arg]
    """ "n of n", or the error."""
    errors = sorted({str(r.error) for r in results if r.error is not None})
    right = sum(r.output_tokens == s.output_tokens for r, s in zip(results, specs, strict=True))
    if errors or right != len(specs):
        raise FeatureError(f"{right} of {len(specs)} exact; {'; '.join(errors)[:150]}")
    return f"{right} of {len(specs)} exact"


def plugin(server: Server) -> str:
    """The channel is there and says what the engine is."""
    info = server.engine().info
    if (info.model, info.boards, info.launch_sequences) != (MODEL, (0, 1), LAUNCH):
        raise FeatureError(f"the channel says {info}")
    return "yes"


def capabilities(server: Server) -> str:
    """What the plugin found in this scheduler."""
    return ", ".join(k for k, v in server.engine().info.capabilities.items() if v) or "none"


def moves(lowering: str, server: Server) -> str:
    """The limit goes 32 → 4 → 32 under load as `lowering` says, the batch follows, and every stream is whole."""
    engine = server.engine()
    if lowering != "drain" and not engine.info.capabilities.get(lowering, False):
        raise FeatureError("this scheduler does not offer it: the plugin drains instead")
    specs = [RequestSpec(at_s=0.0, prompt_tokens=40, output_tokens=250 + i % 9) for i in range(160)]
    preempted_before = engine.read().preemptions

    def lowered() -> bool:
        now = engine.read()
        batch = now.scheduled if lowering == "time-slice" else now.running
        return now.lowering == lowering and batch is not None and 0 < batch <= LOWERED

    async def hold(limit: int, until: Callable[[], bool]) -> None:
        end_s = time.monotonic() + PATIENCE_S
        while not until():
            if time.monotonic() > end_s:
                raise FeatureError(
                    f"at a limit of {limit}: {engine.read().running} run, {engine.read().scheduled} in a step"
                )
            engine.apply(limit, lease_s=2.0, lowering=lowering)
            await asyncio.sleep(0.05)

    async def load() -> str:
        task = asyncio.create_task(replay(specs, base_url=server.url, model=MODEL, seed=2))
        await hold(LAUNCH, lambda: engine.read().running == LAUNCH)
        await hold(LOWERED, lowered)
        await hold(LAUNCH, lambda: engine.read().running > LAUNCH // 2)
        return exact(specs, await task)

    told = asyncio.run(load())
    preempted = engine.read().preemptions - preempted_before
    if preempted and lowering != "preempt":
        raise FeatureError(f"{preempted} requests were preempted")
    return f"{told}, {preempted} preempted"


def expires(server: Server) -> str:
    """Without a new setpoint the engine is back at its launch limit."""
    engine = server.engine()
    specs = [RequestSpec(at_s=0.0, prompt_tokens=40, output_tokens=400) for _ in range(60)]

    async def load() -> str:
        task = asyncio.create_task(replay(specs, base_url=server.url, model=MODEL, seed=3))
        end_s = time.monotonic() + PATIENCE_S
        engine.apply(LOWERED, lease_s=2.0)
        lowered = False
        while engine.read().active_limit != LAUNCH or not lowered:
            lowered = lowered or engine.read().active_limit == LOWERED
            if time.monotonic() > end_s or (task.done() and not lowered):
                raise FeatureError(f"limit {engine.read().active_limit} after the lease")
            await asyncio.sleep(0.02)
        return exact(specs, await task)

    asyncio.run(load())
    return f"back at {LAUNCH}"


def refuses(server: Server) -> str:
    """Of a burst those beyond the bound get 503, the others all their tokens, and the engine counts what was refused."""
    engine = server.engine()
    before = engine.read().refused_requests
    specs = [RequestSpec(at_s=0.0, prompt_tokens=40, output_tokens=60) for _ in range(80)]

    async def load() -> list[RequestResult]:
        task = asyncio.create_task(replay(specs, base_url=server.url, model=MODEL, seed=5))
        while not task.done():
            engine.apply(LOWERED, lease_s=2.0, most_waiting=LOWERED)
            await asyncio.sleep(0.05)
        return await task

    engine.apply(LOWERED, lease_s=2.0, most_waiting=LOWERED)
    results = asyncio.run(load())
    engine.release()
    kept = [r for r in results if not r.refused]
    exact([r.spec for r in kept], kept)
    refused = len(results) - len(kept)
    counted = engine.read().refused_requests - before
    if len(kept) < 2 * LOWERED or not refused or counted != refused:
        raise FeatureError(f"{refused} of {len(results)} got 503, {counted} were counted as refused")
    return "yes"


def stops(server: Server) -> str:
    """SIGTERM: exit code 0 and nothing left behind."""
    server.process.send_signal(signal.SIGTERM)
    try:
        code = server.process.wait(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired as e:
        raise FeatureError("did not end") from e
    left = [p.name for p in (server.scratch / "run").iterdir() if p.suffix != ".log"]
    if code != 0 or left:
        raise FeatureError(f"exit code {code}, left behind: {left}")
    return "exit 0, nothing left"


def virtual(server: Server) -> str:
    """A virtual run with a lowered limit and a budget step; the digest of its records, equal where the schedule is."""
    out = server.scratch / "virtual"
    done = subprocess.run(
        [sys.executable, "-m", "pals.cli", "emulate", "run", MODEL, "--boards", BOARDS, "--seconds", "20", "--budget-w",
         "0:800,6:300,14:800", "--active-sequences", str(2 * LOWERED), "--max-num-seqs", str(LAUNCH), "--out", str(out)],
        capture_output=True, text=True, timeout=2 * PATIENCE_S,
    )  # fmt: skip
    if done.returncode != 0:
        raise FeatureError(done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else "no output")
    records = (out / "static.jsonl").read_bytes().split(b"\n", 1)[1]
    return hashlib.sha256(records).hexdigest()[:8]


FEATURES: tuple[tuple[str, Callable[[Server], str]], ...] = (
    ("starts", starts),
    ("/v1/models", lists_model),
    ("streaming", streams),
    ("plugin", plugin),
    ("capabilities", capabilities),
    *((f"{LAUNCH} → {LOWERED} → {LAUNCH} live, {way}", partial(moves, way)) for way in LOWERINGS),
    ("setpoint expiry", expires),
    ("admission control", refuses),
    ("clean stop", stops),
    ("virtual run", virtual),
)


def unmet(requires: Iterable[str]) -> list[tuple[Requirement, str | None]]:
    """Which of these requirements this environment does not meet, each with the version that is here (None: absent)."""
    found: list[tuple[Requirement, str | None]] = []
    for requirement in map(Requirement, requires):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            here = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append((requirement, None))
            continue
        if not requirement.specifier.contains(here, prereleases=True):
            found.append((requirement, here))
    return found


def told(unmet: Iterable[tuple[Requirement, str | None]]) -> str:
    """Unmet requirements for people."""
    return (
        ", ".join(f"{r.name} (absent)" if v is None else f"{r.name}{r.specifier} (here {v})" for r, v in unmet)
        or "none"
    )


def main() -> int:
    """Try every feature; 1 where one failed."""
    row = {"version": metadata.version("vllm"), "unmet dependencies": told(unmet(metadata.requires("vllm") or []))}
    with tempfile.TemporaryDirectory(prefix="pals-matrix-") as name:
        server = start(Path(name))
        try:
            for feature, check in FEATURES:
                if row.get("starts", "").startswith("FAILED") and check is not virtual:
                    continue  # not tried: the page says so
                try:
                    row[feature] = check(server)
                except (FeatureError, PalsError, OSError, ValueError, subprocess.SubprocessError) as e:
                    row[feature] = f"FAILED: {str(e) or type(e).__name__}"
                print(f"{row['version']} {feature}: {row[feature]}", file=sys.stderr, flush=True)
        finally:
            if server.process.poll() is None:
                server.process.kill()
                server.process.wait()
    print(json.dumps(row))
    return int(any(v.startswith("FAILED") for v in row.values()))


if __name__ == "__main__":
    sys.exit(main())
